// Pairs of bfloat16 in one 512-bit register, and their dot product. Included after simd.h.

struct Pairs {
  __m512i v;  // two columns of each of 16 out-features, the first in the low half of a word
};

// sum += first·first + second·second, lane by lane; in its own register, as in simd_avx512.h.
QC_INLINE void accumulate(F16 &sum, Pairs a, Pairs b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
}
QC_INLINE Pairs set1(uint32_t pair) { return {_mm512_set1_epi32((int)pair)}; }
QC_INLINE __m256i rounded(F16 x) { return (__m256i)_mm512_cvtneps_pbh(x.v); }
// Sixteen values, twice: a look-up reads five bits of which the fifth belongs to the next code.
QC_INLINE Pairs make_pair_table(F16 values) { return {_mm512_broadcast_i64x4(rounded(values))}; }
// Codes J and J + 4 of each word, looked up.
template <int J>
QC_INLINE Pairs look_up_pair(Pairs table, Words words) {
  return {_mm512_permutexvar_epi16(J == 0 ? words : _mm512_srli_epi16(words, 4 * J), table.v)};
}
QC_INLINE Pairs interleave(__m256i first, __m256i second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return {_mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1))};
}
// Two columns of 16 weights each, or zeros for one that is null.
QC_INLINE Pairs load_pair(const uint16_t *first, const uint16_t *second) {
  auto column = [](const uint16_t *p) { return p ? _mm256_loadu_si256((const __m256i *)p) : _mm256_setzero_si256(); };
  return interleave(column(first), column(second));
}
// Two eights of columns as eight pairs: columns i and i + 4 of an eight, as a word has its codes.
QC_INLINE void store_pairs(uint32_t *p, F16 x) {
  const __m256i order = _mm256_setr_epi16(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  _mm256_storeu_si256((__m256i *)p, _mm256_permutexvar_epi16(order, rounded(x)));
}
