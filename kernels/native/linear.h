// Products with one base weight, in tiles of 16 out-features. Included once per instruction set.
//
// For each row and out-feature, whatever the blocking: columns in order, one fused multiply-add each. NF4 adds
// up the 64 (or fewer) columns of a group unscaled, then total = fma(scale, group sum, total). Blocks of rows
// and tiles only choose what is computed side by side.

constexpr int kTile = 16;
constexpr int kMaxRows = kRegisters >= 32 ? 8 : 6;  // rows side by side
constexpr int kWide = kRegisters >= 32 ? 2 : 1;     // tiles side by side, with up to kMaxRows rows
constexpr int kFewRows = 3;
constexpr int kWidest = kRegisters >= 32 ? 4 : 1;  // tiles side by side, with up to kFewRows rows

template <int N>
struct Number {
  static constexpr int value = N;
};

// work(Number<count>) for a count from 1 to Max that the compiler did not know.
template <int Max, typename Work>
QC_INLINE void with_number(int count, const Work &work) {
  if constexpr (Max > 1)
    if (count < Max) return with_number<Max - 1>(count, work);
  work(Number<Max>());
}

// NF4 of the QLoRA paper (Dettmers et al. 2023, appendix E), as bitsandbytes has it.
alignas(64) constexpr float kNF4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// Where results go: y (+)= total + bias.
struct Target {
  float *y;
  int64_t ldy;
  const float *bias;
  int out;
  bool accumulate;

  QC_INLINE void put(int64_t row, int64_t tile, F16 total) const {
    int n = (int)smaller(kTile, out - tile * kTile);
    float *place = y + row * ldy + tile * kTile;
    if (bias) total = total + load_upto(bias + tile * kTile, n);
    if (accumulate) total = load_upto(place, n) + total;
    store_upto(place, total, n);
  }
};

// The rows of one block of activations, from column `at` on.
template <int R>
struct Rows {
  const float *start[R];

  QC_INLINE Rows(const float *x, int64_t ldx) {
    for (int r = 0; r < R; ++r) start[r] = x + r * ldx;
  }
  QC_INLINE F16 column(int r, int64_t at) const { return set1(start[r][at]); }
};

template <int R, int T>
QC_INLINE void clear(F16 (&sums)[R][T]) {
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) sums[r][t] = set1(0.0f);
}

// sums[r][t] += x[r][at] · w[t].
template <int R, int T>
QC_INLINE void add_column(const Rows<R> &x, int64_t at, const F16 (&w)[T], F16 (&sums)[R][T]) {
  for (int r = 0; r < R; ++r) {
    F16 column = x.column(r, at);
    for (int t = 0; t < T; ++t) accumulate(sums[r][t], column, w[t]);
  }
}

template <int J, int R, int T>
QC_INLINE void nf4_column(const Table &table, const Words (&words)[T], const Rows<R> &x, int64_t at,
                          F16 (&sums)[R][T]) {
  F16 w[T];
  for (int t = 0; t < T; ++t) w[t] = look_up<J>(table, words[t]);
  add_column(x, at + J, w, sums);
}

// Asks for one line of the tiles after these: they come from memory while these are computed.
QC_INLINE void fetch(const void *place) { __builtin_prefetch(place, 0, 2); }

// R rows and T tiles, codes looked up as they are used.
template <int R, int T>
void nf4_block(const qc_linear &linear, int64_t tile, const float *x, int64_t ldx, int64_t row, const Target &target) {
  const Table table = make_table(kNF4);
  const int64_t words_per_tile = linear.in / 8 * kTile, groups = linear.in / linear.group;
  const uint32_t *codes = (const uint32_t *)linear.weights + tile * words_per_tile;
  const float *scales = linear.scales + tile * groups * kTile;
  const Rows<R> rows(x + row * ldx, ldx);
  F16 totals[R][T];
  clear(totals);
  for (int64_t g = 0, at = 0; g < groups; ++g) {
    F16 sums[R][T];
    clear(sums);
    for (const int64_t end = at + linear.group; at < end; at += 8) {
      Words words[T];
      for (int t = 0; t < T; ++t) {
        const uint32_t *place = codes + t * words_per_tile + at * (kTile / 8);
        words[t] = load_words(place);
        fetch(place + T * words_per_tile);
      }
      nf4_column<0>(table, words, rows, at, sums);
      nf4_column<1>(table, words, rows, at, sums);
      nf4_column<2>(table, words, rows, at, sums);
      nf4_column<3>(table, words, rows, at, sums);
      nf4_column<4>(table, words, rows, at, sums);
      nf4_column<5>(table, words, rows, at, sums);
      nf4_column<6>(table, words, rows, at, sums);
      nf4_column<7>(table, words, rows, at, sums);
    }
    for (int t = 0; t < T; ++t) {
      F16 scale = load(scales + (t * groups + g) * kTile);
      for (int r = 0; r < R; ++r) totals[r][t] = fma(scale, sums[r][t], totals[r][t]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) target.put(row + r, tile + t, totals[r][t]);
}

// R rows and T tiles of weights stored as they are used, float or bfloat16.
template <int R, int T, typename Weight>
void dense_block(const qc_linear &linear, int64_t tile, const float *x, int64_t ldx, int64_t row, const Target &target) {
  const int64_t tile_size = (int64_t)linear.in * kTile;
  const Weight *weights = (const Weight *)linear.weights + tile * tile_size;
  const Rows<R> rows(x + row * ldx, ldx);
  F16 totals[R][T];
  clear(totals);
#pragma GCC unroll 4
  for (int64_t k = 0; k < linear.in; ++k) {
    F16 w[T];
    for (int t = 0; t < T; ++t) {
      w[t] = load(weights + t * tile_size + k * kTile);

    }
    add_column(rows, k, w, totals);
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) target.put(row + r, tile + t, totals[r][t]);
}

template <int R, int T>
QC_INLINE void any_block(const qc_linear &linear, int64_t tile, const float *x, int64_t ldx, int64_t row,
                         const Target &target) {
  switch (linear.form) {
    case QC_NF4: nf4_block<R, T>(linear, tile, x, ldx, row, target); break;
    case QC_DENSE_BF16: dense_block<R, T, uint16_t>(linear, tile, x, ldx, row, target); break;
    default: dense_block<R, T, float>(linear, tile, x, ldx, row, target); break;
  }
}
