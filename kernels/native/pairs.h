// Products of bfloat16 pairs with one base weight, in tiles of 16 out-features. Included after linear.h.
//
// Activations are rounded once to bfloat16; sums are float32. For each row and out-feature, whatever the blocking:
// pairs in order. NF4 looks codes up as bfloat16, adds up a group, then total = fma(scale, group sum, total): the
// scales stay exact. A look-up costs one permutation for 32 weights, so it is done again for every block of rows.

// The values of NF4 lie closer to bfloat16 when they are multiplied by this: 0.06 % (root mean square of the
// errors over that of the values) instead of 0.11 %. The best of 2 000 000 factors in [1, 2).
constexpr float kGain = 1.437006f;

QC_INLINE Pairs nf4_pair_table() { return make_pair_table(load(kNF4) * set1(kGain)); }

// The rows of one block, as pairs.
template <int R>
struct PairRows {
  const uint32_t *start[R];

  QC_INLINE PairRows(const uint32_t *pairs, int64_t ld) {
    for (int r = 0; r < R; ++r) start[r] = pairs + r * ld;
  }
};

// sums[r][t] += both products of x[r][at] and w[t].
template <int R, int T>
QC_INLINE void add_pair(const PairRows<R> &x, int64_t at, const Pairs (&w)[T], F16 (&sums)[R][T]) {
  for (int r = 0; r < R; ++r) {
    Pairs pair = set1(x.start[r][at]);
    for (int t = 0; t < T; ++t) accumulate(sums[r][t], w[t], pair);
  }
}

template <int J, int R, int T>
QC_INLINE void nf4_pair(Pairs table, const Words (&words)[T], const PairRows<R> &x, int64_t at, F16 (&sums)[R][T]) {
  Pairs w[T];
  for (int t = 0; t < T; ++t) w[t] = look_up_pair<J>(table, words[t]);
  add_pair(x, at + J, w, sums);
}

// totals[R][T] += the scaled sums of one group.
template <int R, int T>
QC_INLINE void add_group(const float *scales, int64_t scales_per_tile, const F16 (&sums)[R][T], float *totals) {
  for (int t = 0; t < T; ++t) {
    F16 scale = load(scales + t * scales_per_tile);
    for (int r = 0; r < R; ++r) {
      float *total = totals + (r * T + t) * kTile;
      store(total, fma(scale, sums[r][t], load(total)));
    }
  }
}

template <int R, int T>
void nf4_pairs(const qc_linear &linear, int64_t tile, const uint32_t *pairs, int64_t ld, int64_t row,
               const Target &target) {
  const Pairs table = nf4_pair_table();
  const int64_t words_per_tile = linear.in / 8 * kTile, scales_per_tile = linear.in / linear.group * kTile;
  const uint32_t *codes = (const uint32_t *)linear.weights + tile * words_per_tile;
  const float *scales = linear.scales + tile * scales_per_tile;
  const PairRows<R> rows(pairs + row * ld, ld);
  alignas(64) float totals[R * T * kTile];  // in memory: registers are for the sums
  for (int i = 0; i < R * T; ++i) store(totals + i * kTile, set1(0.0f));
  for (int64_t at = 0; at < linear.in / 2; scales += kTile) {
    F16 sums[R][T];
    clear(sums);
    for (const int64_t end = at + linear.group / 2; at < end; at += 4, codes += kTile) {
      Words words[T];
      for (int t = 0; t < T; ++t) {
        words[t] = load_words(codes + t * words_per_tile);
        fetch(codes + (t + T) * words_per_tile);
      }
      nf4_pair<0>(table, words, rows, at, sums);
      nf4_pair<1>(table, words, rows, at, sums);
      nf4_pair<2>(table, words, rows, at, sums);
      nf4_pair<3>(table, words, rows, at, sums);
    }
    add_group(scales, scales_per_tile, sums, totals);
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) target.put(row + r, tile + t, load(totals + (r * T + t) * kTile) * set1(1.0f / kGain));
}

// Pair J of the eight columns from `at` on, of bfloat16 weights; columns past the last are zeros.
template <int J, int R, int T>
QC_INLINE void dense_pair(const uint16_t *weights, int64_t tile_size, const PairRows<R> &x, int64_t at, int columns,
                          F16 (&sums)[R][T]) {
  Pairs w[T];
  for (int t = 0; t < T; ++t) {
    const uint16_t *first = weights + t * tile_size + (at + J) * kTile, *second = first + 4 * kTile;
    if constexpr (J % 2 == 0) {  // two columns to a line
      fetch(first + T * tile_size);
      fetch(second + T * tile_size);
    }
    w[t] = load_pair(J < columns ? first : nullptr, J + 4 < columns ? second : nullptr);
  }
  add_pair(x, at / 2 + J, w, sums);
}

template <int R, int T>
QC_INLINE void dense_eight(const uint16_t *weights, int64_t tile_size, const PairRows<R> &x, int64_t at, int columns,
                           F16 (&sums)[R][T]) {
  dense_pair<0>(weights, tile_size, x, at, columns, sums);
  dense_pair<1>(weights, tile_size, x, at, columns, sums);
  dense_pair<2>(weights, tile_size, x, at, columns, sums);
  dense_pair<3>(weights, tile_size, x, at, columns, sums);
}

template <int R, int T>
QC_INLINE void dense_totals(const qc_linear &linear, int64_t tile, const uint32_t *pairs, int64_t ld, int64_t row,
                            F16 (&totals)[R][T]) {
  const int64_t tile_size = (int64_t)linear.in * kTile;
  const uint16_t *weights = (const uint16_t *)linear.weights + tile * tile_size;
  const PairRows<R> rows(pairs + row * ld, ld);
  clear(totals);
  int64_t at = 0;
  for (; at + 8 <= linear.in; at += 8) dense_eight(weights, tile_size, rows, at, 8, totals);
  if (at < linear.in) dense_eight(weights, tile_size, rows, at, (int)(linear.in - at), totals);
}

template <int R, int T>
void dense_pairs(const qc_linear &linear, int64_t tile, const uint32_t *pairs, int64_t ld, int64_t row,
                 const Target &target) {
  F16 totals[R][T];
  dense_totals(linear, tile, pairs, ld, row, totals);
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) target.put(row + r, tile + t, totals[r][t]);
}

// T tiles for all rows, in blocks of nearly equal size.
template <int MaxRows, int T>
QC_INLINE void pair_blocks(const qc_linear &linear, int64_t tile, const uint32_t *pairs, int64_t ld, int64_t rows,
                           const Target &target) {
  const int64_t blocks = divide_up(rows, MaxRows);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t row = rows * b / blocks;
    with_number<MaxRows>((int)(rows * (b + 1) / blocks - row), [&](auto number) QC_LAMBDA {
      constexpr int R = decltype(number)::value;
      linear.form == QC_NF4 ? nf4_pairs<R, T>(linear, tile, pairs, ld, row, target)
                            : dense_pairs<R, T>(linear, tile, pairs, ld, row, target);
    });
  }
}

void pair_tiles(const qc_linear &linear, Range tiles, const uint32_t *pairs, int64_t ld, int64_t rows,
                const Target &target) {
  int64_t tile = tiles.begin;
  if (rows <= kFewRows)
    for (; tile + kWidest <= tiles.end; tile += kWidest)
      pair_blocks<kFewRows, kWidest>(linear, tile, pairs, ld, rows, target);
  for (; tile + kWide <= tiles.end; tile += kWide)
    pair_blocks<kMaxRows, kWide>(linear, tile, pairs, ld, rows, target);
  for (; tile < tiles.end; ++tile) pair_blocks<kMaxRows, 1>(linear, tile, pairs, ld, rows, target);
}

// One row of activations as pairs, rounded to nearest; columns past the last are zeros.
QC_INLINE void round_row(const float *x, int64_t in, uint32_t *pairs) {
  for (int64_t k = 0; k < in; k += 16, pairs += 8) store_pairs(pairs, load_upto(x + k, (int)smaller(16, in - k)));
}
