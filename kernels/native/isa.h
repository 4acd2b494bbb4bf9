// What one instruction set offers to library.cpp.
#pragma once

#include "crew.h"
#include "quickchange_kernels.h"

namespace qc {

struct Kernels {
  void (*linear)(const qc_linear *const *parts, int part_count, const float *x, int64_t ldx, float *y, int64_t ldy,
                 int64_t rows, const qc_segment *segments, int64_t segment_count, float *memory, bool accumulate, bool with_product,
                 const Crew &crew);
  int64_t (*linear_size)(const qc_linear *const *parts, int part_count, int64_t rows, const qc_segment *segments,
                         int64_t segment_count);
  void (*cache_write)(const qc_cache &cache, const qc_paging &paging, const float *keys, int64_t ldk,
                      const float *values, int64_t ldv, int64_t rows, const Crew &crew);
  void (*attention)(const qc_cache &cache, const qc_paging &paging, const qc_attention_rule &rule, const float *q,
                    int64_t ldq, float *out, int64_t ldo, int64_t rows, const Crew &crew);
  void (*norm)(const float *x, int64_t ldx, const float *weight, float *y, int64_t ldy, int64_t rows, int width,
               float epsilon, const Crew &crew);
  void (*rotary)(float *x, int64_t ldx, int heads, int width, const float *cosines, const float *sines,
                 int rotary_width, int64_t rows, const Crew &crew);
  void (*gated)(const float *x, int64_t ldx, float *y, int64_t ldy, int64_t rows, int width, int activation,
                const Crew &crew);
  void (*argmax)(const float *x, int64_t ldx, int64_t *index, int64_t rows, int64_t width, const Crew &crew);
  void (*draw)(const qc_draw *draws, int64_t count, int64_t width, int64_t *tokens, const Crew &crew);
  int64_t (*layer_size)(const qc_layer &layer, const qc_step &step);
  void (*layer)(const qc_layer &layer, const qc_step &step, float *x, float *memory, const Crew &crew);
};

// Products in bfloat16, for an instruction set that has them. A pair is two columns of a row, in one word.
struct PairProducts {
  void (*round_row)(const float *x, int64_t in, uint32_t *pairs);  // ⌈in/16⌉·8 pairs
  void (*tiles)(const qc_linear &linear, int64_t begin, int64_t end, const uint32_t *pairs, int64_t ld, float *y,
                int64_t ldy, int64_t rows, bool accumulate);
  int64_t (*likeliest_size)(const qc_linear &head, int64_t rows);
  void (*likeliest)(const qc_linear &head, const qc_screen &screen, const float *x, int64_t ldx, int64_t rows,
                    int64_t *index, float *memory, const Crew &crew);
};

// Null where this build or this processor has none; used by the AVX-512 kernels.
extern const PairProducts *const pair_products;

// Null where this build has none of it.
extern const PairProducts *const avx512_bf16_products;
extern const Kernels *const generic_kernels, *const neon_kernels, *const avx2_kernels, *const avx512_kernels;

}  // namespace qc
