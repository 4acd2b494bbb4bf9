// Products for more rows than are computed side by side. Included once per instruction set, after linear.h.
//
// 64 columns of a few tiles are made floats once, in the first-level cache, and then used for every block of rows:
// the same operations in the same order as block by block. Meanwhile the next 64 come from memory.

constexpr int kPanelColumns = 64;
constexpr int kPanelRows = 64;  // for which a panel is made once

template <int J, int T>
QC_INLINE void dequantise_column(const Table &table, const Words (&words)[T], float *panel) {
  for (int t = 0; t < T; ++t) store(panel + (J * T + t) * kTile, look_up<J>(table, words[t]));
}

// A group's values of T tiles, without their scales, column by column.
template <int T>
QC_INLINE void dequantise_group(const qc_linear &linear, int64_t tile, int64_t at, float *panel) {
  const Table table = make_table(kNF4);
  const int64_t words_per_tile = linear.in / 8 * kTile;
  const uint32_t *codes = (const uint32_t *)linear.weights + tile * words_per_tile + at / 8 * kTile;
  const int count = linear.group / 8;
  for (int w = 0; w < count; ++w, codes += kTile, panel += 8 * T * kTile) {
    Words words[T];
    for (int t = 0; t < T; ++t) {
      words[t] = load_words(codes + t * words_per_tile);
      fetch(codes + t * words_per_tile + count * kTile);
    }
    dequantise_column<0>(table, words, panel);
    dequantise_column<1>(table, words, panel);
    dequantise_column<2>(table, words, panel);
    dequantise_column<3>(table, words, panel);
    dequantise_column<4>(table, words, panel);
    dequantise_column<5>(table, words, panel);
    dequantise_column<6>(table, words, panel);
    dequantise_column<7>(table, words, panel);
  }
}

template <int T>
QC_INLINE void widen_columns(const qc_linear &linear, int64_t tile, int64_t at, int columns, float *panel) {
  const int64_t tile_size = (int64_t)linear.in * kTile;
  const uint16_t *weights = (const uint16_t *)linear.weights + tile * tile_size + at * kTile;
  for (int k = 0; k < columns; ++k)
    for (int t = 0; t < T; ++t) {
      const uint16_t *place = weights + t * tile_size + k * kTile;
      store(panel + (k * T + t) * kTile, load(place));
      if (k % 2 == 0) fetch(place + kPanelColumns * kTile);
    }
}

// totals[R][T] go on with x over the panel's columns; with scales, its sum is scaled before it is added.
template <int R, int T, bool Scaled>
QC_INLINE void panel_block(const float *panel, int columns, const F16 (&scales)[T], const float *x, int64_t ldx,
                           float *totals) {
  const Rows<R> rows(x, ldx);
  F16 sums[R][T];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) sums[r][t] = Scaled ? set1(0.0f) : load(totals + (r * T + t) * kTile);
#pragma GCC unroll 4
  for (int k = 0; k < columns; ++k) {
    F16 w[T];
    for (int t = 0; t < T; ++t) w[t] = load(panel + (k * T + t) * kTile);
    add_column(rows, k, w, sums);
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) {
      float *total = totals + (r * T + t) * kTile;
      store(total, Scaled ? fma(scales[t], sums[r][t], load(total)) : sums[r][t]);
    }
}

// Up to kPanelRows rows and T tiles of NF4 or bfloat16 weights.
template <int T, bool Scaled>
void panel_rows(const qc_linear &linear, int64_t tile, const float *x, int64_t ldx, int64_t row, int rows,
                const Target &target) {
  alignas(64) float panel[kPanelColumns * T * kTile];
  alignas(64) float totals[kPanelRows * T * kTile];
  const int width = Scaled ? linear.group : kPanelColumns, blocks = (int)divide_up(rows, kMaxRows);
  const int64_t groups = linear.in / width;
  F16 scales[T];
  x += row * ldx;
  for (int i = 0; i < rows * T; ++i) store(totals + i * kTile, set1(0.0f));
  for (int64_t at = 0; at < linear.in; at += width) {
    const int columns = (int)smaller(width, linear.in - at);
    if constexpr (Scaled)
      dequantise_group<T>(linear, tile, at, panel);
    else
      widen_columns<T>(linear, tile, at, columns, panel);
    for (int t = 0; t < T; ++t)
      scales[t] = Scaled ? load(linear.scales + ((tile + t) * groups + at / width) * kTile) : set1(1.0f);
    for (int b = 0; b < blocks; ++b) {
      const int from = rows * b / blocks, count = rows * (b + 1) / blocks - from;
      with_number<kMaxRows>(count, [&](auto number) QC_LAMBDA {
        panel_block<decltype(number)::value, T, Scaled>(panel, columns, scales, x + from * ldx + at, ldx,
                                                        totals + from * T * kTile);
      });
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int t = 0; t < T; ++t) target.put(row + r, tile + t, load(totals + (r * T + t) * kTile));
}

// T tiles for all rows.
template <int T>
void tiles_for_rows(const qc_linear &linear, int64_t tile, const float *x, int64_t ldx, int64_t rows,
                    const Target &target) {
  const bool with_panel = rows > kMaxRows && linear.form != QC_DENSE_F32;
  for (int64_t row = 0; row < rows;) {
    const int64_t left = rows - row;
    if (with_panel) {
      const int count = (int)smaller(left, kPanelRows);
      linear.form == QC_NF4 ? panel_rows<T, true>(linear, tile, x, ldx, row, count, target)
                            : panel_rows<T, false>(linear, tile, x, ldx, row, count, target);
      row += count;
    } else {
      const int count = (int)divide_up(left, divide_up(left, kMaxRows));
      with_number<kMaxRows>(count, [&](auto number) QC_LAMBDA {
        any_block<decltype(number)::value, T>(linear, tile, x, ldx, row, target);
      });
      row += count;
    }
  }
}

// Tiles [begin, end) of one weight for all rows.
void linear_tiles(const qc_linear &linear, Range tiles, const float *x, int64_t ldx, int64_t rows,
                  const Target &target) {
  int64_t tile = tiles.begin;
  if (rows > 0 && rows <= kFewRows)
    for (; kWidest > kWide && tile + kWidest <= tiles.end; tile += kWidest)
      with_number<kFewRows>((int)rows, [&](auto number) QC_LAMBDA {
        any_block<decltype(number)::value, kWidest>(linear, tile, x, ldx, 0, target);
      });
  for (; kWide > 1 && tile + kWide <= tiles.end; tile += kWide)
    tiles_for_rows<kWide>(linear, tile, x, ldx, rows, target);
  for (; tile < tiles.end; ++tile) tiles_for_rows<1>(linear, tile, x, ldx, rows, target);
}

// Tiles of one piece of work: small pieces balance better, large ones follow their own stream of weights.
QC_INLINE int64_t piece_tiles(const qc_linear &linear, int64_t rows) {
  const int64_t tiles = divide_up(linear.out, kTile);
  return tiles >= 512 ? 4 : rows <= 3 ? 4 : 2;
}

QC_INLINE int64_t product_pieces(const qc_linear *const *parts, int part_count, int64_t rows) {
  int64_t pieces = 0;
  for (int p = 0; p < part_count; ++p) pieces += divide_up(parts[p]->out, kTile * piece_tiles(*parts[p], rows));
  return pieces;
}

// The products in bfloat16 that a layer asks for; null: it asks for none, or there are none here.
QC_INLINE const PairProducts *pairs_for(const qc_linear &linear) {
  return kHasPairs && linear.precision == QC_MEDIUM && linear.form != QC_DENSE_F32 ? pair_products : nullptr;
}

// Words that one row of pairs takes, if one of the parts asks for them; else 0.
QC_INLINE int64_t pairs_width(const qc_linear *const *parts, int part_count) {
  for (int p = 0; p < part_count; ++p)
    if (pairs_for(*parts[p])) return divide_up(parts[p]->in, 16) * 8;
  return 0;
}

// Rows of activations, and the same as pairs where a part asks for them.
struct Input {
  const float *x;
  int64_t ldx;
  const uint32_t *pairs;
  int64_t ld_pairs;
};

// Rounds rows once for all parts; `memory` has room for rows · pairs_width words.
QC_INLINE Input input_of(const qc_linear *const *parts, int part_count, const float *x, int64_t ldx, int64_t rows,
                         float *memory, const Crew &crew) {
  const int64_t width = pairs_width(parts, part_count), in = parts[0]->in;
  uint32_t *pairs = (uint32_t *)memory;
  if (width > 0)
    crew.each(divide_up(rows, kMaxRows), [&](int64_t piece) {
      const int64_t end = smaller(rows, (piece + 1) * kMaxRows);
      for (int64_t row = piece * kMaxRows; row < end; ++row)
        pair_products->round_row(x + row * ldx, in, pairs + row * width);
    });
  return {x, ldx, pairs, width};
}

// One piece of the products of several layers with one input, side by side.
QC_INLINE void product_piece(const qc_linear *const *parts, int64_t piece, const Input &input, float *y, int64_t ldy,
                             int64_t rows, bool accumulate) {
  for (;; ++parts) {
    const qc_linear &linear = **parts;
    const int64_t per_piece = piece_tiles(linear, rows), tiles = divide_up(linear.out, kTile);
    const int64_t pieces = divide_up(tiles, per_piece);
    if (piece < pieces) {
      const Range range = {piece * per_piece, smaller(tiles, (piece + 1) * per_piece)};
      if (const PairProducts *products = pairs_for(linear))
        products->tiles(linear, range.begin, range.end, input.pairs, input.ld_pairs, y, ldy, rows, accumulate);
      else
        linear_tiles(linear, range, input.x, input.ldx, rows, {y, ldy, linear.bias, linear.out, accumulate});
      return;
    }
    piece -= pieces;
    y += linear.out;
  }
}
