// Sixteen floats at a time, whatever the registers: every instruction set computes the same bits.
//
// F16 is a vector of 16 floats; lanes are never reordered. Sums over lanes are taken by halving (lane i + lane
// i + 8, then + 4, + 2, + 1). Everything else is one correctly rounded IEEE operation per lane.
// Included once per instruction set, inside its own namespace (isa_*.cpp).

#define QC_INLINE inline __attribute__((always_inline))
#define QC_LAMBDA __attribute__((always_inline))

#if defined(QC_USE_AVX512)

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

#elif defined(QC_USE_AVX2)

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

#elif defined(QC_USE_NEON)

struct F16 {
  float32x4_t q[4];
};
struct Words {
  uint32x4_t q[4];
};
typedef uint8x16x4_t Table;
constexpr int kRegisters = 8;

#define QC_EACH(expression)                  \
  F16 out;                                   \
  for (int i = 0; i < 4; ++i) out.q[i] = expression; \
  return out

QC_INLINE F16 load(const float *p) { QC_EACH(vld1q_f32(p + 4 * i)); }
QC_INLINE void store(float *p, F16 x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.q[i]);
}
QC_INLINE F16 load_part(const float *p, int n) {
  float whole[16] = {0};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load(whole);
}
QC_INLINE void store_part(float *p, F16 x, int n) {
  float whole[16];
  store(whole, x);
  for (int i = 0; i < n; ++i) p[i] = whole[i];
}
QC_INLINE F16 load(const uint16_t *p) { QC_EACH(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16))); }
QC_INLINE F16 load_part(const uint16_t *p, int n) {
  uint16_t whole[16] = {0};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load(whole);
}
QC_INLINE F16 set1(float x) { QC_EACH(vdupq_n_f32(x)); }
QC_INLINE F16 fma(F16 x, F16 y, F16 z) { QC_EACH(vfmaq_f32(z.q[i], x.q[i], y.q[i])); }
QC_INLINE F16 operator+(F16 x, F16 y) { QC_EACH(vaddq_f32(x.q[i], y.q[i])); }
QC_INLINE F16 operator-(F16 x, F16 y) { QC_EACH(vsubq_f32(x.q[i], y.q[i])); }
QC_INLINE F16 operator*(F16 x, F16 y) { QC_EACH(vmulq_f32(x.q[i], y.q[i])); }
QC_INLINE F16 operator/(F16 x, F16 y) { QC_EACH(vdivq_f32(x.q[i], y.q[i])); }
// x86's rule, so that the same values win everywhere: y unless x compares.
QC_INLINE F16 minimum(F16 x, F16 y) { QC_EACH(vbslq_f32(vcltq_f32(x.q[i], y.q[i]), x.q[i], y.q[i])); }
QC_INLINE F16 maximum(F16 x, F16 y) { QC_EACH(vbslq_f32(vcgtq_f32(x.q[i], y.q[i]), x.q[i], y.q[i])); }
QC_INLINE F16 absolute(F16 x) { QC_EACH(vabsq_f32(x.q[i])); }
QC_INLINE F16 nearest(F16 x) { QC_EACH(vrndnq_f32(x.q[i])); }
QC_INLINE F16 scale_by_power(F16 x, F16 n) {
  QC_EACH(vmulq_f32(x.q[i], vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.q[i]), vdupq_n_s32(127)), 23))));
}
QC_INLINE F16 where_less(F16 l, F16 r, F16 x, F16 y) { QC_EACH(vbslq_f32(vcltq_f32(l.q[i], r.q[i]), x.q[i], y.q[i])); }
QC_INLINE F16 lanes_or(F16 x, int from, int to, float other) {
  float whole[16];
  store(whole, x);
  for (int i = 0; i < 16; ++i)
    if (i < from || i >= to) whole[i] = other;
  return load(whole);
}
QC_INLINE void store_bf16(uint16_t *p, F16 x, int n) {
  uint16_t whole[16];
  for (int i = 0; i < 4; ++i) {
    uint32x4_t u = vreinterpretq_u32_f32(x.q[i]);
    uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    uint32x4_t rounded = vshrq_n_u32(vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7FFF))), 16);
    uint32x4_t quiet = vorrq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(0x40));
    vst1_u16(whole + 4 * i, vmovn_u32(vbslq_u32(vceqq_f32(x.q[i], x.q[i]), rounded, quiet)));
  }
  for (int i = 0; i < n; ++i) p[i] = whole[i];
}
QC_INLINE float sum(F16 x) {
  float32x4_t c = vaddq_f32(vaddq_f32(x.q[0], x.q[2]), vaddq_f32(x.q[1], x.q[3]));
  float32x2_t d = vadd_f32(vget_low_f32(c), vget_high_f32(c));
  return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
}
QC_INLINE F16 sums(const F16 (&v)[16]) {
  float each[16];
  for (int i = 0; i < 16; ++i) each[i] = sum(v[i]);
  return load(each);
}
QC_INLINE float largest(F16 x) {
  float whole[16], best;
  store(whole, x);
  best = whole[0];
  for (int i = 1; i < 16; ++i) best = whole[i] > best ? whole[i] : best;
  return best;
}
QC_INLINE Table make_table(const float *p) {
  Table table;
  for (int i = 0; i < 4; ++i) table.val[i] = vreinterpretq_u8_f32(vld1q_f32(p + 4 * i));
  return table;
}
QC_INLINE Words load_words(const uint32_t *p) {
  Words out;
  for (int i = 0; i < 4; ++i) out.q[i] = vld1q_u32(p + 4 * i);
  return out;
}
// A code's four bytes lie at 4·code … 4·code + 3 of the table.
template <int J>
QC_INLINE F16 look_up(const Table &table, Words words) {
  F16 out;
  for (int i = 0; i < 4; ++i) {
    uint32x4_t code = vandq_u32(J == 0 ? words.q[i] : vshrq_n_u32(words.q[i], J == 0 ? 1 : 4 * J), vdupq_n_u32(15));
    uint32x4_t bytes = vmlaq_u32(vdupq_n_u32(0x03020100u), code, vdupq_n_u32(0x04040404u));
    out.q[i] = vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)));
  }
  return out;
}
#undef QC_EACH

#else  // plain C++: what the others are compared with

struct F16 {
  float v[16];
};
struct Words {
  uint32_t v[16];
};
struct Table {
  float v[16];
};
constexpr int kRegisters = 8;

#define QC_EACH(expression)                   \
  F16 out;                                    \
  for (int i = 0; i < 16; ++i) out.v[i] = expression; \
  return out

QC_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
QC_INLINE float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}
QC_INLINE F16 load(const float *p) { QC_EACH(p[i]); }
QC_INLINE void store(float *p, F16 x) {
  for (int i = 0; i < 16; ++i) p[i] = x.v[i];
}
QC_INLINE F16 load_part(const float *p, int n) { QC_EACH(i < n ? p[i] : 0.0f); }
QC_INLINE void store_part(float *p, F16 x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x.v[i];
}
QC_INLINE F16 load(const uint16_t *p) { QC_EACH(float_of((uint32_t)p[i] << 16)); }
QC_INLINE F16 load_part(const uint16_t *p, int n) { QC_EACH(i < n ? float_of((uint32_t)p[i] << 16) : 0.0f); }
QC_INLINE F16 set1(float x) { QC_EACH(x); }
QC_INLINE F16 fma(F16 x, F16 y, F16 z) { QC_EACH(__builtin_fmaf(x.v[i], y.v[i], z.v[i])); }
QC_INLINE F16 operator+(F16 x, F16 y) { QC_EACH(x.v[i] + y.v[i]); }
QC_INLINE F16 operator-(F16 x, F16 y) { QC_EACH(x.v[i] - y.v[i]); }
QC_INLINE F16 operator*(F16 x, F16 y) { QC_EACH(x.v[i] * y.v[i]); }
QC_INLINE F16 operator/(F16 x, F16 y) { QC_EACH(x.v[i] / y.v[i]); }
QC_INLINE F16 minimum(F16 x, F16 y) { QC_EACH(x.v[i] < y.v[i] ? x.v[i] : y.v[i]); }
QC_INLINE F16 maximum(F16 x, F16 y) { QC_EACH(x.v[i] > y.v[i] ? x.v[i] : y.v[i]); }
QC_INLINE F16 absolute(F16 x) { QC_EACH(float_of(bits_of(x.v[i]) & 0x7FFFFFFFu)); }
QC_INLINE F16 nearest(F16 x) { QC_EACH(__builtin_nearbyintf(x.v[i])); }
QC_INLINE F16 scale_by_power(F16 x, F16 n) {
  QC_EACH(x.v[i] * float_of((uint32_t)((n.v[i] == n.v[i] ? (int32_t)n.v[i] : 0) + 127) << 23));
}
QC_INLINE F16 where_less(F16 l, F16 r, F16 x, F16 y) { QC_EACH(l.v[i] < r.v[i] ? x.v[i] : y.v[i]); }
QC_INLINE F16 lanes_or(F16 x, int from, int to, float other) { QC_EACH(i >= from && i < to ? x.v[i] : other); }
QC_INLINE void store_bf16(uint16_t *p, F16 x, int n) {
  for (int i = 0; i < n; ++i) {
    uint32_t u = bits_of(x.v[i]);
    p[i] = (uint16_t)(x.v[i] == x.v[i] ? (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16 : (u >> 16) | 0x40u);
  }
}
QC_INLINE float sum(F16 x) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) x.v[i] += x.v[i + half];
  return x.v[0];
}
QC_INLINE F16 sums(const F16 (&v)[16]) { QC_EACH(sum(v[i])); }
QC_INLINE float largest(F16 x) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) x.v[i] = x.v[i] > x.v[i + half] ? x.v[i] : x.v[i + half];
  return x.v[0];
}
QC_INLINE Table make_table(const float *p) {
  Table table;
  for (int i = 0; i < 16; ++i) table.v[i] = p[i];
  return table;
}
QC_INLINE Words load_words(const uint32_t *p) {
  Words out;
  for (int i = 0; i < 16; ++i) out.v[i] = p[i];
  return out;
}
template <int J>
QC_INLINE F16 look_up(const Table &table, Words words) { QC_EACH(table.v[(words.v[i] >> (4 * J)) & 15u]); }
#undef QC_EACH

#endif

#if !defined(QC_USE_AVX512)
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
