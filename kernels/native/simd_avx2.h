// F16 in two 256-bit registers. Included by simd.h.

struct F16 {
  __m256 a, b;
};
struct Words {
  __m256i a, b;
};
struct Table {
  __m256 low, high;
};
constexpr int kRegisters = 8;

QC_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
QC_INLINE F16 load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
QC_INLINE void store(float *p, F16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
QC_INLINE F16 load_part(const float *p, int n) {
  return {_mm256_maskload_ps(p, first_lanes(n)),
          n > 8 ? _mm256_maskload_ps(p + 8, first_lanes(n - 8)) : _mm256_setzero_ps()};
}
QC_INLINE void store_part(float *p, F16 x, int n) {
  _mm256_maskstore_ps(p, first_lanes(n), x.a);
  if (n > 8) _mm256_maskstore_ps(p + 8, first_lanes(n - 8), x.b);
}
QC_INLINE __m256 widen(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
QC_INLINE F16 load(const uint16_t *p) {
  return {widen(_mm_loadu_si128((const __m128i *)p)), widen(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
QC_INLINE F16 load_part(const uint16_t *p, int n) {
  uint16_t whole[16] = {0};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load(whole);
}
QC_INLINE F16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
QC_INLINE F16 fma(F16 x, F16 y, F16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
QC_INLINE F16 operator+(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
QC_INLINE F16 operator-(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
QC_INLINE F16 operator*(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
QC_INLINE F16 operator/(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
QC_INLINE F16 minimum(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
QC_INLINE F16 maximum(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
QC_INLINE F16 absolute(F16 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
QC_INLINE F16 nearest(F16 x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
QC_INLINE __m256 scale_by_power(__m256 x, __m256 n) {
  __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
}
QC_INLINE F16 scale_by_power(F16 x, F16 n) { return {scale_by_power(x.a, n.a), scale_by_power(x.b, n.b)}; }
QC_INLINE F16 where_less(F16 l, F16 r, F16 x, F16 y) {
  return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(l.a, r.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(l.b, r.b, _CMP_LT_OQ))};
}
QC_INLINE __m256 lanes_or(__m256 x, int from, int to, float other) {
  __m256i inside = _mm256_andnot_si256(first_lanes(from), first_lanes(to));
  return _mm256_blendv_ps(_mm256_set1_ps(other), x, _mm256_castsi256_ps(inside));
}
QC_INLINE F16 lanes_or(F16 x, int from, int to, float other) {
  return {lanes_or(x.a, from, to, other), lanes_or(x.b, from - 8, to - 8, other)};
}
QC_INLINE __m128i narrow(__m256 x) {
  __m256i u = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
  __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
QC_INLINE void store_bf16(uint16_t *p, F16 x, int n) {
  uint16_t whole[16];
  _mm_storeu_si128((__m128i *)whole, narrow(x.a));
  _mm_storeu_si128((__m128i *)(whole + 8), narrow(x.b));
  for (int i = 0; i < n; ++i) p[i] = whole[i];
}
QC_INLINE float sum(F16 x) {
  __m256 b = _mm256_add_ps(x.a, x.b);
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
QC_INLINE F16 sums(const F16 (&v)[16]) {
  float each[16];
  for (int i = 0; i < 16; ++i) each[i] = sum(v[i]);
  return load(each);
}
QC_INLINE float largest(F16 x) {
  __m256 b = _mm256_max_ps(x.a, x.b);
  __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}
QC_INLINE Table make_table(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
QC_INLINE Words load_words(const uint32_t *p) {
  return {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 8))};
}
// Three bits choose within each half of the table, the fourth (moved to the sign) between the halves.
template <int J>
QC_INLINE __m256 look_up(const Table &table, __m256i words) {
  __m256i index = _mm256_srli_epi32(words, 4 * J);
  __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - 4 * J));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index), _mm256_permutevar8x32_ps(table.high, index),
                          fourth);
}
template <int J>
QC_INLINE F16 look_up(const Table &table, Words words) {
  return {look_up<J>(table, words.a), look_up<J>(table, words.b)};
}
