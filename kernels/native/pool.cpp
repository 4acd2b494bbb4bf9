// Helper threads: created when first asked for, asleep when there is nothing to do. Knows no operation.
#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <time.h>

#include <atomic>
#include <new>

namespace qc {
namespace {

constexpr int kMaxHelpers = 255;
constexpr int64_t kOwnedSpinUs = 300;    // a helper looks so much longer while an operation is under way
constexpr int64_t kWorthWakingUs = 20;  // a phase that takes longer calls helpers that fell asleep during the one before

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

int64_t now_us() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

// A phase and a count below it in one word, so that both are read and changed at once.
constexpr uint64_t word_of(uint32_t phase, uint32_t count) { return (uint64_t)phase << 32 | count; }
constexpr uint32_t phase_of(uint64_t word) { return (uint32_t)(word >> 32); }
constexpr uint32_t count_of(uint64_t word) { return (uint32_t)word; }

class Pool {
 public:
  bool try_own() { return !owned_.exchange(true, std::memory_order_acquire); }
  void release() { owned_.store(false, std::memory_order_release); }
  void spin_for(int64_t microseconds) { spin_us_.store(microseconds, std::memory_order_relaxed); }

  // Sees to it that so many helpers exist and are awake.
  void call(int helpers) {
    if (helpers > kMaxHelpers) helpers = kMaxHelpers;
    while (created_ < helpers && create()) ++created_;
    wanted_.store(helpers, std::memory_order_relaxed);
    if (asleep_.load() > 0) wake();
  }

  void run(uint32_t pieces, void (*piece)(void *, int64_t), void *work) {
    const uint32_t phase = phase_of(next_.load(std::memory_order_relaxed)) + 1;
    piece_ = piece;
    work_ = work;
    done_.store(0, std::memory_order_relaxed);
    total_.store(word_of(phase, pieces), std::memory_order_release);
    next_.store(word_of(phase, 0), std::memory_order_seq_cst);
    const bool alone = asleep_.load(std::memory_order_relaxed) > 0;
    const int64_t long_us = alone ? now_us() + kWorthWakingUs : 0;
    for (bool woken = !alone; take_piece();)
      if (!woken && now_us() >= long_us) {
        wake();
        woken = true;
      }
    while (done_.load(std::memory_order_acquire) != pieces) relax();
  }

 private:
  // Takes a piece of the current phase and does it; false if none is left.
  //
  // Where a piece was taken, the phase cannot end before it is done, so what belongs to the phase stays as it
  // is. Where none was, nothing of the phase is touched: its owner may have gone on, or returned.
  bool take_piece() {
    uint64_t seen = next_.load(std::memory_order_acquire), total = total_.load(std::memory_order_acquire);
    if (phase_of(seen) != phase_of(total) || count_of(seen) >= count_of(total)) return false;
    seen = next_.fetch_add(1, std::memory_order_acq_rel);
    total = total_.load(std::memory_order_acquire);
    if (phase_of(seen) != phase_of(total) || count_of(seen) >= count_of(total)) return false;
    piece_(work_, count_of(seen));
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  void wake() {
    pthread_mutex_lock(&mutex_);
    ++calls_;
    pthread_cond_broadcast(&condition_);
    pthread_mutex_unlock(&mutex_);
  }

  bool create() {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes)) return false;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_t thread;
    auto *argument = new Argument{this, created_};
    sigset_t all, before;  // signals are the program's; helpers take none
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const bool made = pthread_create(&thread, &attributes, start, argument) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (!made) delete argument;
    pthread_attr_destroy(&attributes);
    return made;
  }

  struct Argument {
    Pool *pool;
    int number;
  };

  static void *start(void *data) {
    const Argument argument = *(Argument *)data;
    delete (Argument *)data;
    argument.pool->help(argument.number);
    return nullptr;
  }

  void help(int number) {
    for (;;) {
      const int64_t spin_us = spin_us_.load(std::memory_order_relaxed);
      int64_t until_us = now_us() + spin_us;
      do {
        for (int i = 0; i < 32; ++i) {
          if (number < wanted_.load(std::memory_order_relaxed) && take_piece()) {
            while (take_piece()) {
            }
            until_us = 0;
          }
          relax();
        }
        if (until_us == 0) until_us = now_us() + spin_us;
      } while (now_us() < until_us + (owned_.load(std::memory_order_relaxed) ? kOwnedSpinUs : 0));
      sleep();
    }
  }

  void sleep() {
    pthread_mutex_lock(&mutex_);
    const uint64_t before = calls_;
    asleep_.fetch_add(1);
    while (calls_ == before) pthread_cond_wait(&condition_, &mutex_);
    asleep_.fetch_sub(1);
    pthread_mutex_unlock(&mutex_);
  }

  alignas(64) std::atomic<uint64_t> next_{0};   // phase and the next piece that nobody has taken
  alignas(64) std::atomic<uint64_t> total_{0};  // phase and how many pieces it has
  void (*piece_)(void *, int64_t) = nullptr;
  void *work_ = nullptr;
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<int> wanted_{0}, asleep_{0};
  std::atomic<int64_t> spin_us_{50};
  std::atomic<bool> owned_{false};
  int created_ = 0;
  uint64_t calls_ = 0;
  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t condition_ = PTHREAD_COND_INITIALIZER;
};

Pool *const pool = new Pool;  // never destroyed: helpers outlive every static object

// A child of fork() has no helpers; nothing waits for them, but they must be created anew.
void forget_helpers();
const int registered = pthread_atfork(nullptr, nullptr, forget_helpers);
void forget_helpers() { new (pool) Pool; }

}  // namespace

Crew assemble(int threads) {
  if (threads <= 1 || !pool->try_own()) return {nullptr, nullptr, 1};
  pool->call(threads - 1);
  return {pool,
          [](void *data, int64_t pieces, void (*piece)(void *, int64_t), void *work) {
            ((Pool *)data)->run((uint32_t)pieces, piece, work);
          },
          threads};
}

void disband(const Crew &crew) {
  if (crew.pool) pool->release();
}

void spin_for(int64_t microseconds) { pool->spin_for(microseconds); }

}  // namespace qc
