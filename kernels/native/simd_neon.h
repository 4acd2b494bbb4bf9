// F16 in four 128-bit registers. Included by simd.h.

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
