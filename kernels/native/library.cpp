// The C interface: chooses the instruction set, owns scratch memory, and hands work to the team of threads.
#include <stdlib.h>

#include "isa.h"
#include "pool.h"

#define QC_API extern "C" __attribute__((visibility("default")))

namespace {

using qc::Crew;
using qc::Kernels;

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

// qc_bf16 of this build on this processor. AMD's vdpbf16ps does twice the multiply-adds of its float32 units;
// Intel's, which is there for programs that do without AMX, half of them.
int32_t bf16_of_processor() {
#if defined(__x86_64__)
  if (kernels_of(QC_AVX512) && qc::avx512_bf16_products && __builtin_cpu_supports("avx512bf16"))
    return __builtin_cpu_is("amd") ? QC_BF16_FAST : QC_BF16_SLOW;
#endif
  return QC_BF16_NONE;
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

  // Null, and nothing kept, if there is no memory for so many.
  float *floats(int64_t count) {
#if defined(__SANITIZE_ADDRESS__)
    const bool fits = memory_ && count == size_;  // exactly what was asked for, so that one float more is found
    const int64_t wanted = count / 16 * 16 + 16;
#else
    const bool fits = memory_ && count <= size_;
    const int64_t wanted = (count + count / 4 + 1024) / 1024 * 1024;
#endif
    if (!fits) {
      free(memory_);
      memory_ = (float *)aligned_alloc(64, (size_t)wanted * sizeof(float));
      size_ = memory_ ? wanted : 0;
    }
    return memory_;
  }

 private:
  float *memory_ = nullptr;
  int64_t size_ = 0;
};

thread_local Scratch scratch;

// Runs work(crew) with so many threads.
template <typename Work>
void with_crew(int32_t threads, const Work &work) {
  const Crew crew = qc::assemble(threads);
  work(crew);
  qc::disband(crew);
}

}  // namespace

const qc::PairProducts *const qc::pair_products =
    bf16_of_processor() == QC_BF16_NONE ? nullptr : qc::avx512_bf16_products;

QC_API int32_t qc_interface(void) { return QC_INTERFACE; }

QC_API int32_t qc_isa_available(int32_t isa) { return kernels_of(isa) != nullptr; }

QC_API int32_t qc_isa_active(void) { return active_isa; }

QC_API int32_t qc_isa_use(int32_t isa) {
  if (!kernels_of(isa)) return -1;
  active_isa = isa;
  kernels = kernels_of(isa);
  return 0;
}

QC_API int32_t qc_isa_bf16(int32_t isa) { return isa == QC_AVX512 ? bf16_of_processor() : QC_BF16_NONE; }

QC_API void qc_spin_for(int64_t microseconds) { qc::spin_for(microseconds); }

QC_API int32_t qc_linear_forward(const qc_linear *const *parts, int32_t part_count, const float *x, int64_t ldx,
                                 float *y, int64_t ldy, int32_t rows, const qc_segment *segments,
                                 int64_t segment_count, int32_t accumulate, int32_t threads) {
  float *memory = scratch.floats(kernels->linear_size(parts, part_count, rows, segments, segment_count));
  if (!memory) return QC_NO_MEMORY;
  with_crew(threads, [=](const Crew &crew) {
    kernels->linear(parts, part_count, x, ldx, y, ldy, rows, segments, segment_count, memory, accumulate != 0, true, crew);
  });
  return QC_DONE;
}

QC_API int32_t qc_lora_delta(const qc_linear *const *parts, int32_t part_count, const float *x, int64_t ldx, float *y,
                             int64_t ldy, const qc_segment *segments, int64_t segment_count, int32_t threads) {
  const int64_t size = kernels->linear_size(parts, part_count, 0, segments, segment_count);
  if (size == 0) return QC_DONE;
  float *memory = scratch.floats(size);
  if (!memory) return QC_NO_MEMORY;
  with_crew(threads, [=](const Crew &crew) {
    kernels->linear(parts, part_count, x, ldx, y, ldy, 0, segments, segment_count, memory, false, false, crew);
  });
  return QC_DONE;
}

QC_API void qc_cache_write(const qc_cache *cache, const qc_paging *paging, const float *keys, int64_t ldk,
                           const float *values, int64_t ldv, int32_t rows, int32_t threads) {
  with_crew(threads, [=](const Crew &crew) {
    kernels->cache_write(*cache, *paging, keys, ldk, values, ldv, rows, crew);
  });
}

QC_API void qc_attention(const qc_cache *cache, const qc_paging *paging, const qc_attention_rule *rule, const float *q,
                         int64_t ldq, float *out, int64_t ldo, int32_t rows, int32_t threads) {
  with_crew(threads, [=](const Crew &crew) {
    kernels->attention(*cache, *paging, *rule, q, ldq, out, ldo, rows, crew);
  });
}

QC_API void qc_rms_norm(const float *x, int64_t ldx, const float *weight, float *y, int64_t ldy, int32_t rows,
                        int32_t width, float epsilon, int32_t threads) {
  with_crew(threads, [=](const Crew &crew) { kernels->norm(x, ldx, weight, y, ldy, rows, width, epsilon, crew); });
}

QC_API void qc_rotary(float *x, int64_t ldx, int32_t heads, int32_t width, const float *cosines, const float *sines,
                      int32_t rotary_width, int32_t rows, int32_t threads) {
  with_crew(threads, [=](const Crew &crew) {
    kernels->rotary(x, ldx, heads, width, cosines, sines, rotary_width, rows, crew);
  });
}

QC_API void qc_gated(const float *x, int64_t ldx, float *y, int64_t ldy, int32_t rows, int32_t width,
                     int32_t activation, int32_t threads) {
  with_crew(threads, [=](const Crew &crew) { kernels->gated(x, ldx, y, ldy, rows, width, activation, crew); });
}

QC_API void qc_argmax(const float *x, int64_t ldx, int64_t *index, int32_t rows, int64_t width, int32_t threads) {
  with_crew(threads, [=](const Crew &crew) { kernels->argmax(x, ldx, index, rows, width, crew); });
}

QC_API int32_t qc_likeliest(const qc_linear *head, const qc_screen *screen, const float *x, int64_t ldx, int32_t rows,
                            int64_t *index, int32_t threads) {
  if (qc_isa_bf16(qc_isa_active()) == QC_BF16_NONE) return QC_NOT_HERE;
  float *memory = scratch.floats(qc::pair_products->likeliest_size(*head, rows));
  if (!memory) return QC_NO_MEMORY;
  with_crew(threads, [=](const Crew &crew) {
    qc::pair_products->likeliest(*head, *screen, x, ldx, rows, index, memory, crew);
  });
  return QC_DONE;
}

QC_API void qc_draw_tokens(const qc_draw *draws, int32_t count, int64_t width, int64_t *tokens, int32_t threads) {
  with_crew(threads, [=](const Crew &crew) { kernels->draw(draws, count, width, tokens, crew); });
}

QC_API int32_t qc_layers_forward(const qc_layer *const *layers, int64_t count, const qc_step *step, float *x) {
  int64_t size = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t needed = kernels->layer_size(*layers[i], *step);
    if (needed > size) size = needed;
  }
  float *memory = scratch.floats(size);
  if (!memory) return QC_NO_MEMORY;
  with_crew(step->threads, [=](const Crew &crew) {
    for (int64_t i = 0; i < count; ++i) kernels->layer(*layers[i], *step, x, memory, crew);
  });
  return QC_DONE;
}
