// The multi-adapter update. Included once per instruction set.
//
// shrink: s[r] = sum over lanes of the 16-wide partial products of x and a[r], in order of D
// expand: y[o] += the products scaling·s[r]·b[r][o], in order of r
// Both per row and adapter alone, at its true rank.

constexpr int kColumns = 64;  // out-features: expand is cut in multiples of these
constexpr int kRanks = 8;     // ranks: shrink is
constexpr int kLoraRows = 4;  // rows of one block

QC_INLINE const qc_factors *factors_of(const qc_linear &linear, int32_t slot) {
  if (slot < 0 || slot >= linear.slot_count) return nullptr;
  const qc_factors *factors = linear.slots + slot;
  return factors->rank > 0 ? factors : nullptr;
}

// Floats that the shrunk rows of a step take.
QC_INLINE int64_t shrunk_size(const qc_linear *const *parts, int part_count, const qc_segment *segments,
                              int64_t segment_count) {
  int64_t size = 0;
  for (int64_t s = 0; s < segment_count; ++s)
    for (int p = 0; p < part_count; ++p)
      if (const qc_factors *factors = factors_of(*parts[p], segments[s].slot))
        size += (int64_t)(segments[s].end - segments[s].start) * factors->rank;
  return size;
}

template <int Rows, int Ranks, typename Weight>
QC_INLINE void shrink_block(const Weight *a, int64_t in, const float *x, int64_t ldx, float scaling, float *shrunk,
                            int64_t ld_shrunk) {
  F16 sums[Rows][Ranks];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Ranks; ++j) sums[i][j] = set1(0.0f);
  int64_t k = 0;
  for (; k + 16 <= in; k += 16) {
    F16 xs[Rows];
    for (int i = 0; i < Rows; ++i) xs[i] = load(x + i * ldx + k);
    for (int j = 0; j < Ranks; ++j) {
      F16 w = load(a + j * in + k);
      for (int i = 0; i < Rows; ++i) accumulate(sums[i][j], xs[i], w);
    }
  }
  if (k < in)
    for (int j = 0; j < Ranks; ++j) {
      F16 w = load_part(a + j * in + k, (int)(in - k));
      for (int i = 0; i < Rows; ++i)
        sums[i][j] = fma(load_part(x + i * ldx + k, (int)(in - k)), w, sums[i][j]);
    }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Ranks; ++j) shrunk[i * ld_shrunk + j] = scaling * sum(sums[i][j]);
}

template <typename Weight>
void shrink(const qc_factors &factors, float scaling, int64_t in, const float *x, int64_t ldx, int rows,
            int rank_from, int ranks, float *shrunk) {
  const int64_t ld = factors.rank;
  for (int j = 0; j < ranks;) {
    const Weight *a = (const Weight *)factors.a + (rank_from + j) * in;
    float *place = shrunk + rank_from + j;
    if (rows == 4 && ranks - j >= 4) {
      shrink_block<4, 4>(a, in, x, ldx, scaling, place, ld);
      j += 4;
    } else if (ranks - j >= 8) {
      for (int i = 0; i < rows; ++i) shrink_block<1, 8>(a, in, x + i * ldx, ldx, scaling, place + i * ld, ld);
      j += 8;
    } else if (ranks - j >= 4) {
      for (int i = 0; i < rows; ++i) shrink_block<1, 4>(a, in, x + i * ldx, ldx, scaling, place + i * ld, ld);
      j += 4;
    } else {
      for (int i = 0; i < rows; ++i) shrink_block<1, 1>(a, in, x + i * ldx, ldx, scaling, place + i * ld, ld);
      j += 1;
    }
  }
}

template <int Rows, int Vectors, typename Weight>
QC_INLINE void expand_block(const Weight *b, int64_t out, int rank, const float *shrunk, int64_t ld_shrunk, float *y,
                            int64_t ldy) {
  F16 sums[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < Vectors; ++v) sums[i][v] = set1(0.0f);
  for (int j = 0; j < rank; ++j) {
    F16 w[Vectors];
    for (int v = 0; v < Vectors; ++v) w[v] = load(b + j * out + v * 16);
    for (int i = 0; i < Rows; ++i) {
      F16 s = set1(shrunk[i * ld_shrunk + j]);
      for (int v = 0; v < Vectors; ++v) accumulate(sums[i][v], s, w[v]);
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < Vectors; ++v) {
      float *place = y + i * ldy + v * 16;
      store(place, load(place) + sums[i][v]);
    }
}

template <typename Weight>
void expand(const qc_factors &factors, int64_t out, const float *shrunk, int rows, int64_t from, int64_t columns,
            float *y, int64_t ldy) {
  const int64_t ld = factors.rank;
  const Weight *b = (const Weight *)factors.b + from;
  y += from;
  int64_t c = 0;
  for (; c + 64 <= columns; c += 64) {
    if (rows == 4)
      expand_block<4, 4>(b + c, out, factors.rank, shrunk, ld, y + c, ldy);
    else
      for (int i = 0; i < rows; ++i)
        expand_block<1, 4>(b + c, out, factors.rank, shrunk + i * ld, ld, y + i * ldy + c, ldy);
  }
  for (; c < columns; c += 16) {
    const int n = (int)smaller(16, columns - c);
    for (int i = 0; i < rows; ++i) {
      F16 total = set1(0.0f);
      for (int j = 0; j < factors.rank; ++j)
        total = fma(set1(shrunk[i * ld + j]), load_upto(b + c + j * out, n), total);
      float *place = y + i * ldy + c;
      store_upto(place, load_upto(place, n) + total, n);
    }
  }
}

// A block of rows of one segment, in one part: what one piece of work is cut from.
struct LoraBlock {
  const qc_factors *factors;
  const qc_linear *linear;
  int64_t row, shrunk, column;  // of x and y; in the shrunk rows; where the part begins in y
  int32_t rows;
  float scaling;  // of the factors, times that of the segment
};

// The blocks of a step, and how finely each is cut.
struct LoraWork {
  const LoraBlock *blocks;
  int64_t count;
  int rank_pieces, column_pieces;  // per block
};

QC_INLINE int64_t block_count(const qc_linear *const *parts, int part_count, const qc_segment *segments,
                              int64_t segment_count) {
  int64_t count = 0;
  for (int64_t s = 0; s < segment_count; ++s)
    for (int p = 0; p < part_count; ++p)
      if (factors_of(*parts[p], segments[s].slot))
        count += divide_up(segments[s].end - segments[s].start, kLoraRows);
  return count;
}

QC_INLINE LoraWork plan_lora(const qc_linear *const *parts, int part_count, const qc_segment *segments,
                             int64_t segment_count, LoraBlock *blocks, int threads) {
  int64_t count = 0, shrunk = 0, most_out = 0, most_rank = 0;
  for (int64_t s = 0; s < segment_count; ++s) {
    int64_t column = 0;
    for (int p = 0; p < part_count; column += parts[p++]->out) {
      const qc_factors *factors = factors_of(*parts[p], segments[s].slot);
      if (!factors) continue;
      most_out = larger(most_out, parts[p]->out);
      most_rank = larger(most_rank, factors->rank);
      for (int64_t row = segments[s].start; row < segments[s].end; row += kLoraRows) {
        const int rows = (int)smaller(kLoraRows, segments[s].end - row);
        blocks[count++] = {factors, parts[p], row, shrunk, column, rows, factors->scaling * segments[s].scale};
        shrunk += (int64_t)rows * factors->rank;
      }
    }
  }
  // A few blocks are cut up so that every thread has something to do.
  const int64_t cuts = count == 0 ? 1 : divide_up(2 * threads, count);
  return {blocks, count, (int)larger(1, smaller(cuts, divide_up(most_rank, kRanks))),
          (int)larger(1, smaller(cuts, divide_up(most_out, kColumns)))};
}

QC_INLINE void shrink_piece(const LoraWork &work, int64_t piece, const float *x, int64_t ldx, float *shrunk) {
  const LoraBlock &block = work.blocks[piece / work.rank_pieces];
  const int part = (int)(piece % work.rank_pieces), eights = (int)divide_up(block.factors->rank, kRanks);
  const int from = eights * part / work.rank_pieces * kRanks;
  const int to = (int)smaller(block.factors->rank, eights * (part + 1) / work.rank_pieces * kRanks);
  if (from >= to) return;
  const float *xs = x + block.row * ldx;
  float *place = shrunk + block.shrunk;
  block.factors->type == QC_BF16
      ? shrink<uint16_t>(*block.factors, block.scaling, block.linear->in, xs, ldx, block.rows, from, to - from, place)
      : shrink<float>(*block.factors, block.scaling, block.linear->in, xs, ldx, block.rows, from, to - from, place);
}

QC_INLINE void expand_piece(const LoraWork &work, int64_t piece, const float *shrunk, float *y, int64_t ldy) {
  const LoraBlock &block = work.blocks[piece / work.column_pieces];
  const int64_t part = piece % work.column_pieces, out = block.linear->out, chunks = divide_up(out, kColumns);
  const int64_t from = chunks * part / work.column_pieces * kColumns;
  const int64_t to = smaller(out, chunks * (part + 1) / work.column_pieces * kColumns);
  if (from >= to) return;
  const float *place = shrunk + block.shrunk;
  float *ys = y + block.row * ldy + block.column;
  block.factors->type == QC_BF16 ? expand<uint16_t>(*block.factors, out, place, block.rows, from, to - from, ys, ldy)
                                 : expand<float>(*block.factors, out, place, block.rows, from, to - from, ys, ldy);
}

// Memory that the update of a step needs, in floats: its blocks, then the shrunk rows.
QC_INLINE int64_t lora_size(const qc_linear *const *parts, int part_count, const qc_segment *segments,
                            int64_t segment_count) {
  return block_count(parts, part_count, segments, segment_count) * (int64_t)(sizeof(LoraBlock) / sizeof(float)) +
         shrunk_size(parts, part_count, segments, segment_count);
}

// Memory of products and update together: rows as pairs first.
QC_INLINE int64_t linear_size(const qc_linear *const *parts, int part_count, int64_t rows, const qc_segment *segments,
                              int64_t segment_count) {
  return rows * pairs_width(parts, part_count) + lora_size(parts, part_count, segments, segment_count);
}

// The products of several layers with one input, side by side, and the update of each row's adapter.
QC_INLINE void linear_with_update(const qc_linear *const *parts, int part_count, const float *x, int64_t ldx,
                                  float *y, int64_t ldy, int64_t rows, const qc_segment *segments,
                                  int64_t segment_count, float *memory, bool accumulate, bool with_product,
                                  const Crew &crew) {
  const Input input = input_of(parts, part_count, x, ldx, with_product ? rows : 0, memory, crew);
  memory += rows * input.ld_pairs;
  const LoraWork work =
      plan_lora(parts, part_count, segments, segment_count, (LoraBlock *)memory, crew.threads);
  float *shrunk = memory + work.count * (int64_t)(sizeof(LoraBlock) / sizeof(float));
  const int64_t products = with_product && rows > 0 ? product_pieces(parts, part_count, rows) : 0;
  // Products compute while shrinking waits for memory: taken in turn, some thread is always at each.
  const int64_t shrinks = work.count * work.rank_pieces, pieces = products + shrinks;
  crew.each(pieces, [&](int64_t piece) {
    const int64_t before = piece * products / pieces;
    if ((piece + 1) * products / pieces > before)
      product_piece(parts, before, input, y, ldy, rows, accumulate);
    else
      shrink_piece(work, piece - before, x, ldx, shrunk);
  });
  if (work.count > 0)
    crew.each(work.count * work.column_pieces, [&](int64_t piece) { expand_piece(work, piece, shrunk, y, ldy); });
}
