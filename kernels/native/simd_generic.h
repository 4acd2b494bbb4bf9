// F16 in plain C++: what the others are compared with. Included by simd.h.

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
