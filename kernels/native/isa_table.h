// The table of one instruction set: included by isa_*.cpp after the includes that its intrinsics need, with
// QC_ISA naming the namespace.

namespace qc {
namespace QC_ISA {
namespace {

#include "simd.h"
#include "vecmath.h"
#include "team.h"
#include "linear.h"
#include "lora.h"
#include "rows.h"
#include "attention.h"
#include "layer.h"

QC_INLINE Team team_of(Member member) { return {member.index, member.count, member.wait}; }

const Kernels kernels = {
    [](const qc_linear *const *parts, int part_count, const float *x, int64_t ldx, float *y, int64_t ldy, int64_t rows,
       const qc_segment *segments, int64_t segment_count, float *shrunk, bool accumulate, Member member) {
      linear_with_update(parts, part_count, x, ldx, y, ldy, rows, segments, segment_count, shrunk, accumulate,
                         team_of(member));
    },
    [](const qc_linear *const *parts, int part_count, const float *x, int64_t ldx, float *y, int64_t ldy,
       const qc_segment *segments, int64_t segment_count, float *shrunk, Member member) {
      shrink_all(parts, part_count, x, ldx, segments, segment_count, shrunk, team_of(member));
      team_of(member).barrier();
      expand_all(parts, part_count, segments, segment_count, shrunk, y, ldy, team_of(member));
    },
    [](const qc_linear *const *parts, int part_count, const qc_segment *segments, int64_t segment_count) {
      return shrunk_size(parts, part_count, segments, segment_count);
    },
    [](const qc_cache &cache, const qc_paging &paging, const float *keys, int64_t ldk, const float *values,
       int64_t ldv, int64_t rows, Member member) {
      write_rows(cache, paging, keys, ldk, values, ldv, rows, team_of(member));
    },
    [](const qc_cache &cache, const qc_paging &paging, const qc_attention_rule &rule, const float *q, int64_t ldq,
       float *out, int64_t ldo, int64_t rows, Member member) {
      attention_rows(cache, paging, rule, q, ldq, out, ldo, rows, team_of(member));
    },
    [](const float *x, int64_t ldx, const float *weight, float *y, int64_t ldy, int64_t rows, int width, float epsilon,
       Member member) { norm_rows(x, ldx, weight, y, ldy, rows, width, epsilon, team_of(member)); },
    [](float *x, int64_t ldx, int heads, int width, const float *cosines, const float *sines, int rotary_width,
       int64_t rows, Member member) {
      rotate_rows(x, ldx, heads, width, cosines, sines, rotary_width, rows, team_of(member));
    },
    [](const float *x, int64_t ldx, float *y, int64_t ldy, int64_t rows, int width, int activation, Member member) {
      gated_rows(x, ldx, y, ldy, rows, width, activation, team_of(member));
    },
    [](const float *x, int64_t ldx, int64_t *index, int64_t rows, int64_t width, Member member) {
      argmax_rows(x, ldx, index, rows, width, team_of(member));
    },
    [](const qc_layer &layer, const qc_step &step) { return layer_workspace_size(layer, step); },
    [](const qc_layer &layer, const qc_step &step, float *x, float *memory, Member member) {
      layer_forward(layer, step, x, memory, team_of(member));
    },
};

}  // namespace
}  // namespace QC_ISA
}  // namespace qc
