// Products with one base weight, in tiles of 16 out-features. Included once per instruction set.
//
// For each row and out-feature, whatever the blocking: columns in order, one fused multiply-add each. NF4 adds
// up the 64 (or fewer) columns of a group unscaled, then total = fma(scale, group sum, total). Blocks of rows
// and tiles only choose what is computed side by side.

constexpr int kTile = 16;
constexpr int kMaxRows = 6;                        // rows side by side
constexpr int kWide = kRegisters >= 32 ? 2 : 1;    // tiles side by side, with up to six rows
constexpr int kWidest = kRegisters >= 32 ? 4 : 1;  // and with up to three
constexpr int kPanelRows = 64;                     // rows for which a group is dequantised once
constexpr int kDirectRows = 18;                    // up to which codes are looked up once per block of rows instead

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
      for (int t = 0; t < T; ++t) words[t] = load_words(codes + t * words_per_tile + at * (kTile / 8));
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

template <int J, int T>
QC_INLINE void dequantise_column(const Table &table, const Words (&words)[T], float *panel) {
  for (int t = 0; t < T; ++t) store(panel + (J * T + t) * kTile, look_up<J>(table, words[t]));
}

template <int T>
QC_INLINE void dequantise_group(const Table &table, const uint32_t *codes, int64_t words_per_tile, int words_count,
                                float *panel) {
  for (int w = 0; w < words_count; ++w) {
    Words words[T];
    for (int t = 0; t < T; ++t) words[t] = load_words(codes + t * words_per_tile + w * kTile);
    float *place = panel + w * 8 * T * kTile;
    dequantise_column<0>(table, words, place);
    dequantise_column<1>(table, words, place);
    dequantise_column<2>(table, words, place);
    dequantise_column<3>(table, words, place);
    dequantise_column<4>(table, words, place);
    dequantise_column<5>(table, words, place);
    dequantise_column<6>(table, words, place);
    dequantise_column<7>(table, words, place);
  }
}

// totals[R][T] += scales · (x over the group's columns · panel).
template <int R, int T>
QC_INLINE void panel_block(const float *panel, int columns, const F16 (&scales)[T], const float *x, int64_t ldx,
                           float *totals) {
  const Rows<R> rows(x, ldx);
  F16 sums[R][T];
  clear(sums);
#pragma GCC unroll 4
  for (int k = 0; k < columns; ++k) {
    F16 w[T];
    for (int t = 0; t < T; ++t) w[t] = load(panel + (k * T + t) * kTile);
    add_column(rows, k, w, sums);
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) {
      float *total = totals + (r * T + t) * kTile;
      store(total, fma(scales[t], sums[r][t], load(total)));
    }
}

// Up to kPanelRows rows and T tiles: each group is dequantised once, into the first-level cache.
template <int T>
void nf4_panel(const qc_linear &linear, int64_t tile, const float *x, int64_t ldx, int64_t row, int rows,
               const Target &target) {
  alignas(64) float panel[64 * T * kTile];
  alignas(64) float totals[kPanelRows * T * kTile];
  const Table table = make_table(kNF4);
  const int64_t words_per_tile = linear.in / 8 * kTile, groups = linear.in / linear.group;
  const uint32_t *codes = (const uint32_t *)linear.weights + tile * words_per_tile;
  const float *scales = linear.scales + tile * groups * kTile;
  const int blocks = (int)divide_up(rows, kMaxRows);
  x += row * ldx;
  for (int i = 0; i < rows * T; ++i) store(totals + i * kTile, set1(0.0f));
  for (int64_t g = 0; g < groups; ++g) {
    dequantise_group<T>(table, codes + g * linear.group / 8 * kTile, words_per_tile, linear.group / 8, panel);
    F16 scale[T];
    for (int t = 0; t < T; ++t) scale[t] = load(scales + (t * groups + g) * kTile);
    for (int b = 0; b < blocks; ++b) {
      int from = rows * b / blocks, count = rows * (b + 1) / blocks - from;
      const float *xb = x + from * ldx + g * linear.group;
      float *place = totals + from * T * kTile;
      switch (count) {
        case 1: panel_block<1, T>(panel, linear.group, scale, xb, ldx, place); break;
        case 2: panel_block<2, T>(panel, linear.group, scale, xb, ldx, place); break;
        case 3: panel_block<3, T>(panel, linear.group, scale, xb, ldx, place); break;
        case 4: panel_block<4, T>(panel, linear.group, scale, xb, ldx, place); break;
        case 5: panel_block<5, T>(panel, linear.group, scale, xb, ldx, place); break;
        default: panel_block<6, T>(panel, linear.group, scale, xb, ldx, place); break;
      }
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int t = 0; t < T; ++t) target.put(row + r, tile + t, load(totals + (r * T + t) * kTile));
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
    for (int t = 0; t < T; ++t) w[t] = load(weights + t * tile_size + k * kTile);
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

template <int T>
void tiles_of(const qc_linear &linear, int64_t tile, const float *x, int64_t ldx, int64_t row, int rows,
              const Target &target) {
  if constexpr (T > kWide) {
    switch (rows) {
      case 1: any_block<1, T>(linear, tile, x, ldx, row, target); break;
      case 2: any_block<2, T>(linear, tile, x, ldx, row, target); break;
      default: any_block<3, T>(linear, tile, x, ldx, row, target); break;
    }
  } else {
    switch (rows) {
      case 1: any_block<1, T>(linear, tile, x, ldx, row, target); break;
      case 2: any_block<2, T>(linear, tile, x, ldx, row, target); break;
      case 3: any_block<3, T>(linear, tile, x, ldx, row, target); break;
      case 4: any_block<4, T>(linear, tile, x, ldx, row, target); break;
      case 5: any_block<5, T>(linear, tile, x, ldx, row, target); break;
      default: any_block<6, T>(linear, tile, x, ldx, row, target); break;
    }
  }
}

// Tiles [begin, end) of one weight for all rows.
void linear_tiles(const qc_linear &linear, Range tiles, const float *x, int64_t ldx, int64_t rows,
                  const Target &target) {
  int64_t tile = tiles.begin;
  if (rows > 0 && rows <= 3)
    for (; kWidest > kWide && tile + kWidest <= tiles.end; tile += kWidest)
      tiles_of<kWidest>(linear, tile, x, ldx, 0, (int)rows, target);
  while (tile < tiles.end) {
    const bool wide = kWide > 1 && tile + kWide <= tiles.end;
    for (int64_t row = 0; row < rows;) {
      int64_t left = rows - row;
      if (linear.form == QC_NF4 && left > kDirectRows) {
        int count = (int)smaller(left, kPanelRows);
        wide ? nf4_panel<kWide>(linear, tile, x, ldx, row, count, target)
             : nf4_panel<1>(linear, tile, x, ldx, row, count, target);
        row += count;
      } else {
        int count = (int)divide_up(left, divide_up(left, kMaxRows));
        wide ? tiles_of<kWide>(linear, tile, x, ldx, row, count, target)
             : tiles_of<1>(linear, tile, x, ldx, row, count, target);
        row += count;
      }
    }
    tile += wide ? kWide : 1;
  }
}

// Tiles of one piece of work: small pieces balance better, and few rows are done in no time.
QC_INLINE int64_t piece_tiles(int64_t rows) { return rows <= 3 ? 4 : 2; }

QC_INLINE int64_t product_pieces(const qc_linear *const *parts, int part_count, int64_t rows) {
  int64_t pieces = 0;
  for (int p = 0; p < part_count; ++p) pieces += divide_up(parts[p]->out, kTile * piece_tiles(rows));
  return pieces;
}

// One piece of the products of several layers with one input, side by side.
QC_INLINE void product_piece(const qc_linear *const *parts, int64_t piece, const float *x, int64_t ldx, float *y,
                             int64_t ldy, int64_t rows, bool accumulate) {
  const int64_t per_piece = piece_tiles(rows);
  for (;; ++parts) {
    const qc_linear &linear = **parts;
    const int64_t tiles = divide_up(linear.out, kTile), pieces = divide_up(tiles, per_piece);
    if (piece < pieces) {
      const Range range = {piece * per_piece, smaller(tiles, (piece + 1) * per_piece)};
      linear_tiles(linear, range, x, ldx, rows, {y, ldy, linear.bias, linear.out, accumulate});
      return;
    }
    piece -= pieces;
    y += linear.out;
  }
}
