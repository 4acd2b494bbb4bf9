// The threads that share one operation.
//
// One thread runs an operation from beginning to end and opens its phases one after another; a phase is so many
// pieces of work, each done by whoever takes it first. Helpers take pieces where they can; nobody waits for a
// helper that the system has not scheduled, only for pieces that have been taken. Which thread computes a piece
// changes nothing about its numbers.
#pragma once

#include <stdint.h>

namespace qc {

struct Crew {
  void *pool;  // null: one thread
  void (*run)(void *pool, int64_t pieces, void (*piece)(void *work, int64_t index), void *work);
  int threads;

  // work(i) for every i below `pieces`, in any order; returns when all are done.
  template <typename Work>
  inline __attribute__((always_inline)) void each(int64_t pieces, Work &&work) const {
    if (!pool || pieces <= 1) {
      for (int64_t i = 0; i < pieces; ++i) work(i);
      return;
    }
    run(pool, pieces, [](void *data, int64_t index) { (*(__typeof__(&work))data)(index); }, &work);
  }
};

}  // namespace qc
