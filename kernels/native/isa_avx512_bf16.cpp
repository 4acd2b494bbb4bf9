// Compiled with the flags of isa_avx512.cpp and -mavx512bf16; used by it where the processor has that, too.
#include "isa.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

#define QC_USE_AVX512

namespace qc {
namespace avx512_bf16 {
namespace {

#include "simd.h"
#include "simd_avx512_bf16.h"
#include "sizes.h"
#include "linear.h"
#include "pairs.h"
#include "screen.h"

const PairProducts products = {
    [](const float *x, int64_t in, uint32_t *pairs) { round_row(x, in, pairs); },
    [](const qc_linear &linear, int64_t begin, int64_t end, const uint32_t *pairs, int64_t ld, float *y, int64_t ldy,
       int64_t rows, bool accumulate) {
      pair_tiles(linear, {begin, end}, pairs, ld, rows, {y, ldy, linear.bias, linear.out, accumulate});
    },
    [](const qc_linear &head, int64_t rows) { return screen_size(head, rows); },
    [](const qc_linear &head, const qc_screen &screen, const float *x, int64_t ldx, int64_t rows, int64_t *index,
       float *memory, const Crew &crew) { likeliest_rows(head, screen, x, ldx, rows, index, memory, crew); },
};

}  // namespace
}  // namespace avx512_bf16
}  // namespace qc

const qc::PairProducts *const qc::avx512_bf16_products = &qc::avx512_bf16::products;
#else
const qc::PairProducts *const qc::avx512_bf16_products = nullptr;
#endif
