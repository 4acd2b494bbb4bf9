// The likeliest token of a row without all of its logits. Included after pairs.h.
//
// A copy of the head in seven bits, half of its bytes, gives every logit to within a margin: what rounding the
// weights can have changed is at most |error| · |x| (Cauchy and Schwarz), and errors were measured when the copy was
// made. Logits whose margins reach above the best lower bound are then computed as ever, from the head itself; the
// largest of those is the largest of all, with the same bits.

// A code is 64 more than the weight over its step. 128 + code is exact in bfloat16: its seven last bits are the code.
constexpr float kCodeZero = 192.0f;

QC_INLINE Pairs load_codes(const uint8_t *p) {
  return {_mm512_or_si512(_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p)), _mm512_set1_epi16(0x4300))};
}

// A row as pairs, kCodeZero times its sum, and its length.
struct ScreenRow {
  float shift, length;
};

QC_INLINE ScreenRow screen_row(const uint32_t *pairs, int64_t words) {
  double sum = 0.0, squares = 0.0;
  for (int64_t i = 0; i < 2 * words; ++i) {
    const uint32_t bits = (uint32_t)((const uint16_t *)pairs)[i] << 16;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    sum += x;
    squares += (double)x * x;
  }
  return {(float)(kCodeZero * sum), (float)__builtin_sqrt(squares)};
}

// The least and the greatest that the largest logit of each tile can be.
struct Bounds {
  float lower, upper;
};

template <int R, int T>
void screen_block(const qc_linear &head, const qc_screen &screen, int64_t tile, const uint32_t *pairs, int64_t ld,
                  int64_t row, const ScreenRow *lengths, Bounds *bounds) {
  const int64_t eights = divide_up(head.in, 8), tile_size = eights * 8 * kTile, tiles = divide_up(head.out, kTile);
  const uint8_t *codes = screen.codes + tile * tile_size;
  const PairRows<R> rows(pairs + row * ld, ld);
  F16 sums[R][T];
  clear(sums);
  for (int64_t at = 0; at < eights * 4; ++at, codes += 2 * kTile) {
    Pairs w[T];
    for (int t = 0; t < T; ++t) {
      w[t] = load_codes(codes + t * tile_size);
      fetch(codes + (t + T) * tile_size);
    }
    add_pair(rows, at, w, sums);
  }
  for (int t = 0; t < T; ++t) {
    const int n = (int)smaller(kTile, head.out - (tile + t) * kTile);
    const float none = -__builtin_inff();
    const F16 step = load(screen.steps + (tile + t) * kTile), error = load(screen.errors + (tile + t) * kTile);
    for (int r = 0; r < R; ++r) {
      const F16 logit = step * (sums[r][t] - set1(lengths[row + r].shift));
      const F16 margin = error * set1(lengths[row + r].length);
      bounds[(row + r) * tiles + tile + t] = {largest(lanes_or(logit - margin, 0, n, none)),
                                              largest(lanes_or(logit + margin, 0, n, none))};
    }
  }
}

template <int T>
QC_INLINE void screen_tiles(const qc_linear &head, const qc_screen &screen, int64_t tile, const uint32_t *pairs,
                            int64_t ld, int64_t rows, const ScreenRow *lengths, Bounds *bounds) {
  const int64_t blocks = divide_up(rows, kMaxRows);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t row = rows * b / blocks;
    with_number<kMaxRows>((int)(rows * (b + 1) / blocks - row), [&](auto number) QC_LAMBDA {
      screen_block<decltype(number)::value, T>(head, screen, tile, pairs, ld, row, lengths, bounds);
    });
  }
}

// The first index of the largest logit, from the tiles that can hold it; -1 where the row is not finite.
inline int64_t settle_row(const qc_linear &head, const uint32_t *pairs, int64_t ld, const ScreenRow &length,
                          const Bounds *bounds, int64_t tiles) {
  if (!(length.length < 1e15f)) return -1;
  float least = -__builtin_inff(), best = -__builtin_inff();
  int64_t index = -1;
  for (int64_t tile = 0; tile < tiles; ++tile)
    if (bounds[tile].lower > least) least = bounds[tile].lower;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (!(bounds[tile].upper >= least)) continue;
    float logits[kTile];
    const int64_t count = smaller(kTile, head.out - tile * kTile);
    F16 totals[1][1];
    dense_totals<1, 1>(head, tile, pairs, ld, 0, totals);
    store(logits, totals[0][0]);
    for (int64_t i = 0; i < count; ++i)
      if (logits[i] > best) {
        best = logits[i];
        index = tile * kTile + i;
      }
  }
  return index;
}

// Floats of memory: rows as pairs, their lengths, bounds of every tile.
QC_INLINE int64_t screen_size(const qc_linear &head, int64_t rows) {
  return rows * (divide_up(head.in, 16) * 8 + 2 + 2 * divide_up(head.out, kTile));
}

inline void likeliest_rows(const qc_linear &head, const qc_screen &screen, const float *x, int64_t ldx, int64_t rows,
                           int64_t *index, float *memory, const Crew &crew) {
  const int64_t ld = divide_up(head.in, 16) * 8, tiles = divide_up(head.out, kTile), pieces = divide_up(tiles, 4);
  uint32_t *pairs = (uint32_t *)memory;
  ScreenRow *lengths = (ScreenRow *)(memory + rows * ld);
  Bounds *bounds = (Bounds *)(lengths + rows);
  crew.each(rows, [&](int64_t row) {
    round_row(x + row * ldx, head.in, pairs + row * ld);
    lengths[row] = screen_row(pairs + row * ld, ld);
  });
  crew.each(pieces, [&](int64_t piece) {
    int64_t tile = piece * 4;
    const int64_t end = smaller(tiles, tile + 4);
    for (; tile + 2 <= end; tile += 2) screen_tiles<2>(head, screen, tile, pairs, ld, rows, lengths, bounds);
    for (; tile < end; ++tile) screen_tiles<1>(head, screen, tile, pairs, ld, rows, lengths, bounds);
  });
  crew.each(rows, [&](int64_t row) {
    index[row] = settle_row(head, pairs + row * ld, ld, lengths[row], bounds + row * tiles, tiles);
  });
}
