// Sixteen floats at a time, whatever the registers: every instruction set computes the same bits.
//
// F16 is a vector of 16 floats; lanes are never reordered. Sums over lanes are taken by halving (lane i + lane
// i + 8, then + 4, + 2, + 1). Everything else is one correctly rounded IEEE operation per lane.
// Included once per instruction set, inside its own namespace (isa_*.cpp).

#define QC_INLINE inline __attribute__((always_inline))
#define QC_LAMBDA __attribute__((always_inline))

#if defined(QC_USE_AVX512)
#include "simd_avx512.h"
#elif defined(QC_USE_AVX2)
#include "simd_avx2.h"
#elif defined(QC_USE_NEON)
#include "simd_neon.h"
#else
#include "simd_generic.h"
#endif

#if defined(QC_USE_AVX512)
constexpr bool kHasPairs = true;  // see pair_products
#else
constexpr bool kHasPairs = false;
QC_INLINE void accumulate(F16 &sum, F16 a, F16 b) { sum = fma(a, b, sum); }
#endif

QC_INLINE F16 load_upto(const float *p, int n) { return n >= 16 ? load(p) : load_part(p, n); }
QC_INLINE F16 load_upto(const uint16_t *p, int n) { return n >= 16 ? load(p) : load_part(p, n); }
QC_INLINE void store_upto(float *p, F16 a, int n) {
  if (n >= 16)
    store(p, a);
  else
    store_part(p, a, n);
}
QC_INLINE void store_typed(float *p, F16 a, int n) { store_upto(p, a, n); }
QC_INLINE void store_typed(uint16_t *p, F16 a, int n) { store_bf16(p, a, n < 16 ? n : 16); }
