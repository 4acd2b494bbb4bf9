// The C interface: chooses the instruction set, owns scratch memory, and hands work to the team of threads.
#include <stdlib.h>

#include "isa.h"

#define QC_API extern "C" __attribute__((visibility("default")))

namespace {

using qc::Kernels;
using qc::Member;

// OpenMP, as torch has loaded it. The signatures are those of GCC's runtime, which LLVM's offers as well.
void (*omp_parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
void (*omp_barrier)() = nullptr;
int (*omp_thread_num)() = nullptr;
int (*omp_num_threads)() = nullptr;

const Kernels *kernels_of(int32_t isa) {
  switch (isa) {
    case QC_GENERIC: return qc::generic_kernels;
    case QC_NEON: return qc::neon_kernels;
#if defined(__x86_64__)
    case QC_AVX2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? qc::avx2_kernels : nullptr;
    case QC_AVX512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
                 ? qc::avx512_kernels
                 : nullptr;
#endif
    default: return nullptr;
  }
}

int32_t best_isa() {
  for (int32_t isa = QC_AVX512; isa > QC_GENERIC; --isa)
    if (kernels_of(isa)) return isa;
  return QC_GENERIC;
}

int32_t active_isa = best_isa();
const Kernels *kernels = kernels_of(active_isa);

// Memory that an operation needs besides its arguments; one per calling thread, grown and then kept.
class Scratch {
 public:
  ~Scratch() { free(memory_); }

  float *floats(int64_t count) {
    if (count > size_) {
      free(memory_);
      size_ = (count + count / 4 + 1023) / 1024 * 1024;
      memory_ = (float *)aligned_alloc(64, (size_t)size_ * sizeof(float));
      if (!memory_) abort();  // a few megabytes were not to be had: nothing could go on
    }
    return memory_;
  }

 private:
  float *memory_ = nullptr;
  int64_t size_ = 0;
};

thread_local Scratch scratch;

void no_wait() {}

// Runs work(member) once per thread of the team.
template <typename Work>
void in_parallel(int32_t threads, const Work &work) {
  if (threads <= 1 || !omp_parallel) {
    work(Member{0, 1, no_wait});
    return;
  }
  omp_parallel([](void *data) { (*(const Work *)data)(Member{omp_thread_num(), omp_num_threads(), omp_barrier}); },
               (void *)&work, (unsigned)threads, 0);
}

}  // namespace

QC_API int32_t qc_isa_available(int32_t isa) { return kernels_of(isa) != nullptr; }

QC_API int32_t qc_isa_active(void) { return active_isa; }

QC_API int32_t qc_isa_use(int32_t isa) {
  if (!kernels_of(isa)) return -1;
  active_isa = isa;
  kernels = kernels_of(isa);
  return 0;
}

QC_API void qc_use_openmp(void *parallel, void *barrier, void *thread_num, void *num_threads) {
  omp_barrier = (void (*)())barrier;
  omp_thread_num = (int (*)())thread_num;
  omp_num_threads = (int (*)())num_threads;
  omp_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
}

QC_API void qc_linear_forward(const qc_linear *const *parts, int32_t part_count, const float *x, int64_t ldx, float *y,
                              int64_t ldy, int32_t rows, const qc_segment *segments, int64_t segment_count,
                              int32_t accumulate, int32_t threads) {
  float *shrunk = scratch.floats(kernels->shrunk_size(parts, part_count, segments, segment_count));
  in_parallel(threads, [=](Member member) {
    kernels->linear(parts, part_count, x, ldx, y, ldy, rows, segments, segment_count, shrunk, accumulate != 0, member);
  });
}

QC_API void qc_lora_delta(const qc_linear *const *parts, int32_t part_count, const float *x, int64_t ldx, float *y,
                          int64_t ldy, const qc_segment *segments, int64_t segment_count, int32_t threads) {
  const int64_t size = kernels->shrunk_size(parts, part_count, segments, segment_count);
  if (size == 0) return;
  float *shrunk = scratch.floats(size);
  in_parallel(threads, [=](Member member) {
    kernels->delta(parts, part_count, x, ldx, y, ldy, segments, segment_count, shrunk, member);
  });
}

QC_API void qc_cache_write(const qc_cache *cache, const qc_paging *paging, const float *keys, int64_t ldk,
                           const float *values, int64_t ldv, int32_t rows, int32_t threads) {
  in_parallel(threads, [=](Member member) {
    kernels->cache_write(*cache, *paging, keys, ldk, values, ldv, rows, member);
  });
}

QC_API void qc_attention(const qc_cache *cache, const qc_paging *paging, const qc_attention_rule *rule, const float *q,
                         int64_t ldq, float *out, int64_t ldo, int32_t rows, int32_t threads) {
  in_parallel(threads, [=](Member member) {
    kernels->attention(*cache, *paging, *rule, q, ldq, out, ldo, rows, member);
  });
}

QC_API void qc_rms_norm(const float *x, int64_t ldx, const float *weight, float *y, int64_t ldy, int32_t rows,
                        int32_t width, float epsilon, int32_t threads) {
  in_parallel(threads, [=](Member member) { kernels->norm(x, ldx, weight, y, ldy, rows, width, epsilon, member); });
}

QC_API void qc_rotary(float *x, int64_t ldx, int32_t heads, int32_t width, const float *cosines, const float *sines,
                      int32_t rotary_width, int32_t rows, int32_t threads) {
  in_parallel(threads, [=](Member member) {
    kernels->rotary(x, ldx, heads, width, cosines, sines, rotary_width, rows, member);
  });
}

QC_API void qc_gated(const float *x, int64_t ldx, float *y, int64_t ldy, int32_t rows, int32_t width,
                     int32_t activation, int32_t threads) {
  in_parallel(threads, [=](Member member) { kernels->gated(x, ldx, y, ldy, rows, width, activation, member); });
}

QC_API void qc_argmax(const float *x, int64_t ldx, int64_t *index, int32_t rows, int64_t width, int32_t threads) {
  in_parallel(threads, [=](Member member) { kernels->argmax(x, ldx, index, rows, width, member); });
}

QC_API void qc_layer_forward(const qc_layer *layer, const qc_step *step, float *x) {
  float *memory = scratch.floats(kernels->layer_size(*layer, *step));
  in_parallel(step->threads, [=](Member member) { kernels->layer(*layer, *step, x, memory, member); });
}
