// Helper threads: whoever calls, from however many threads at once, gets the bits that one thread gives.
#pragma once

#include <sys/wait.h>

#include <thread>

#include "layer_cases.h"

namespace selftest {

struct ThreadsCase {
  LinearCase linear;
  LayerCase layer;
  Cache cache;
  LayerStep step;
  Matrix x;

  explicit ThreadsCase(Random &random)
      : linear(random_case(random, kForms[2], 20, Operation::kAccumulate)),
        layer(layer_case(random, 19)),
        cache(random, layer.shape, layer.rows, (int)layer.lengths.size(), 0, layer.block_tokens),
        step{Paging(layer.rows, cache.tables, cache.table_width, layer.block_tokens), layer.segments,
             Matrix(19, layer.record.rotary_width, 0, 0.0f).random(random, 1.0f),
             Matrix(19, layer.record.rotary_width, 0, 0.0f).random(random, 1.0f)},
        x(std::move(Matrix(19, layer.record.hidden, 0, 0.0f).random(random, 2.0f))) {
    cache.put(random_past(random, layer.shape, layer.lengths), layer.rows, 0);
  }

  // Products, then a layer, with so many threads.
  std::vector<Matrix> results(int threads) const {
    const Cache own = cache;
    return {linear.result(linear.x, linear.y, linear.segments, threads), forward(layer, own, step, x, threads)};
  }
};

inline void repeat(const Examination &exam, const char *what, const ThreadsCase &test,
                   const std::vector<Matrix> &expected, int threads, int times) {
  for (int i = 0; i < times; ++i) {
    const std::vector<Matrix> got = test.results(threads);
    for (size_t r = 0; r < got.size(); ++r) exam.same(what, got[r].floats, expected[r].floats);
  }
}

inline void thread_cases(Examination &exam) {
  Random random(10);
  const ThreadsCase test(random);
  exam.begin("one thread");
  const std::vector<Matrix> expected = test.results(1);
  for (const Matrix &each : expected) exam.settle_exactly("result", each.floats, each.floats);

  for (int spin_us : {0, 50, 5000}) {  // helpers that always sleep, that often do, that never do
    qc_spin_for(spin_us);
    for (int threads : {2, 3, 8}) {
      exam.begin("%d threads that spin for %d us", threads, spin_us);
      repeat(exam, "result", test, expected, threads, 20);
    }
    exam.begin("three callers, helpers that spin for %d us", spin_us);
    std::vector<std::thread> callers;
    for (int threads : {2, 3, 3})
      callers.emplace_back([&, threads] { repeat(exam, "result", test, expected, threads, 20); });
    for (std::thread &caller : callers) caller.join();
  }
  qc_spin_for(50);
}

// A child process has none of its parent's helpers.
inline void child_cases(Examination &exam) {
  Random random(11);
  const ThreadsCase test(random);
  exam.begin("child process");
  const std::vector<Matrix> expected = test.results(2);
  for (const Matrix &each : expected) exam.settle_exactly("result", each.floats, each.floats);
  fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    repeat(exam, "result", test, expected, 2, 5);
    _exit(0);
  }
  int status = 1;
  if (child < 0 || waitpid(child, &status, 0) != child || status != 0) exam.fail("status %d", status);
}

}  // namespace selftest
