// The table of one instruction set: included by isa_*.cpp after the includes that its intrinsics need, with
// QC_ISA naming the namespace.

namespace qc {
namespace QC_ISA {
namespace {

#include "simd.h"
#include "vecmath.h"
#include "sizes.h"
#include "linear.h"
#include "panel.h"
#include "lora.h"
#include "rows.h"
#include "draw.h"
#include "attention.h"
#include "layer.h"

const Kernels kernels = {
    [](const qc_linear *const *parts, int part_count, const float *x, int64_t ldx, float *y, int64_t ldy, int64_t rows,
       const qc_segment *segments, int64_t segment_count, float *memory, bool accumulate, bool with_product,
       const Crew &crew) {
      linear_with_update(parts, part_count, x, ldx, y, ldy, rows, segments, segment_count, memory, accumulate,
                         with_product, crew);
    },
    [](const qc_linear *const *parts, int part_count, int64_t rows, const qc_segment *segments,
       int64_t segment_count) { return linear_size(parts, part_count, rows, segments, segment_count); },
    [](const qc_cache &cache, const qc_paging &paging, const float *keys, int64_t ldk, const float *values,
       int64_t ldv, int64_t rows, const Crew &crew) {
      write_rows(cache, paging, keys, ldk, values, ldv, rows, crew);
    },
    [](const qc_cache &cache, const qc_paging &paging, const qc_attention_rule &rule, const float *q, int64_t ldq,
       float *out, int64_t ldo, int64_t rows, const Crew &crew) {
      attention_rows(cache, paging, rule, q, ldq, out, ldo, rows, crew);
    },
    [](const float *x, int64_t ldx, const float *weight, float *y, int64_t ldy, int64_t rows, int width, float epsilon,
       const Crew &crew) { norm_rows(x, ldx, weight, y, ldy, rows, width, epsilon, crew); },
    [](float *x, int64_t ldx, int heads, int width, const float *cosines, const float *sines, int rotary_width,
       int64_t rows, const Crew &crew) {
      rotate_rows(x, ldx, heads, width, cosines, sines, rotary_width, rows, crew);
    },
    [](const float *x, int64_t ldx, float *y, int64_t ldy, int64_t rows, int width, int activation, const Crew &crew) {
      gated_rows(x, ldx, y, ldy, rows, width, activation, crew);
    },
    [](const float *x, int64_t ldx, int64_t *index, int64_t rows, int64_t width, const Crew &crew) {
      argmax_rows(x, ldx, index, rows, width, crew);
    },
    [](const qc_draw *draws, int64_t count, int64_t width, int64_t *tokens, const Crew &crew) {
      draw_rows(draws, count, width, tokens, crew);
    },
    [](const qc_layer &layer, const qc_step &step) { return layer_workspace_size(layer, step); },
    [](const qc_layer &layer, const qc_step &step, float *x, float *memory, const Crew &crew) {
      layer_forward(layer, step, x, memory, crew);
    },
};

}  // namespace
}  // namespace QC_ISA
}  // namespace qc
