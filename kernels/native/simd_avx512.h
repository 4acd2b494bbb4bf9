// F16 in one 512-bit register. Included by simd.h.

struct F16 {
  __m512 v;
};
typedef __m512i Words;  // 16 words of 8 codes
struct Table {
  __m512 v;
};
constexpr int kRegisters = 32;  // vectors of 16 floats that fit in registers

QC_INLINE F16 load(const float *p) { return {_mm512_loadu_ps(p)}; }
QC_INLINE void store(float *p, F16 a) { _mm512_storeu_ps(p, a.v); }
QC_INLINE __mmask16 first_lanes(int n) { return (__mmask16)((1u << n) - 1u); }
QC_INLINE F16 load_part(const float *p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
QC_INLINE void store_part(float *p, F16 a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
QC_INLINE F16 load(const uint16_t *p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16))};
}
QC_INLINE F16 load_part(const uint16_t *p, int n) {
  __m256i half = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
QC_INLINE F16 set1(float x) { return {_mm512_set1_ps(x)}; }
QC_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// sum = fma(a, b, sum), in its own register: compilers move sums about otherwise, at a fifth of the speed.
QC_INLINE void accumulate(F16 &sum, F16 a, F16 b) {
  __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
}
QC_INLINE F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
QC_INLINE F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
QC_INLINE F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
QC_INLINE F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
// The second operand where either is not a number, so that a NaN in `b` survives.
QC_INLINE F16 minimum(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
QC_INLINE F16 maximum(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
QC_INLINE F16 absolute(F16 a) { return {_mm512_abs_ps(a.v)}; }
QC_INLINE F16 nearest(F16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a · 2ⁿ for an integer n in [-126, 127], added to the exponent.
QC_INLINE F16 scale_by_power(F16 a, F16 n) {
  __m512i exponent = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
  return {_mm512_mul_ps(a.v, _mm512_castsi512_ps(exponent))};
}
// Lane-wise: a < b ? x : y; y where either is not a number.
QC_INLINE F16 where_less(F16 a, F16 b, F16 x, F16 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
QC_INLINE F16 lanes_or(F16 a, int from, int to, float other) {  // lanes outside [from, to) become `other`
  return {_mm512_mask_blend_ps((__mmask16)(first_lanes(to) & ~first_lanes(from)), _mm512_set1_ps(other), a.v)};
}
QC_INLINE void store_bf16(uint16_t *p, F16 a, int n) {
  __m512i u = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  rounded = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), rounded, quiet);
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtepi32_epi16(rounded));
}
QC_INLINE float sum(F16 a) {
  __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
// Lane i of the result is the sum of v[i]'s lanes.
QC_INLINE F16 sums(const F16 (&v)[16]) {
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i)  // halves of v[i] and v[i + 8]
    a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i].v, v[i + 8].v, 0x44), _mm512_shuffle_f32x4(v[i].v, v[i + 8].v, 0xEE));
  for (int i = 0; i < 4; ++i)  // quarters: v[i], v[i + 4], v[i + 8], v[i + 12], one to a 128-bit lane
    b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xDD));
  for (int i = 0; i < 2; ++i)
    c[i] = _mm512_add_ps(_mm512_shuffle_ps(b[i], b[i + 2], 0x44), _mm512_shuffle_ps(b[i], b[i + 2], 0xEE));
  __m512 d = _mm512_add_ps(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xDD));
  // In each 128-bit lane now 0, 2, 1, 3 of its four; the lanes hold v[+0], v[+8], v[+4], v[+12].
  const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
  return {_mm512_permutexvar_ps(order, d)};
}
QC_INLINE float largest(F16 a) { return _mm512_reduce_max_ps(a.v); }
QC_INLINE Table make_table(const float *p) { return {_mm512_loadu_ps(p)}; }
QC_INLINE Words load_words(const uint32_t *p) { return _mm512_loadu_si512(p); }
// Code j of each word, looked up; the permutation reads the low four bits alone.
template <int J>
QC_INLINE F16 look_up(const Table &table, Words words) {
  return {_mm512_permutexvar_ps(J == 0 ? words : _mm512_srli_epi32(words, 4 * J), table.v)};
}
