// The multi-adapter update. Included once per instruction set.
//
// shrink: s[r] = sum over lanes of the 16-wide partial products of x and a[r], in order of D
// expand: y[o] += the products scaling·s[r]·b[r][o], in order of r
// Both per row and adapter alone, at its true rank.

constexpr int kColumns = 64;  // out-features of one piece of work in expand
constexpr int kRanks = 8;     // ranks of one piece in shrink
constexpr int kLoraRows = 4;  // rows of one piece

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
      for (int i = 0; i < Rows; ++i) sums[i][j] = fma(xs[i], w, sums[i][j]);
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
void shrink(const qc_factors &factors, int64_t in, const float *x, int64_t ldx, int rows, int rank_from, int ranks,
            float *shrunk) {
  const int64_t ld = factors.rank;
  for (int j = 0; j < ranks;) {
    const Weight *a = (const Weight *)factors.a + (rank_from + j) * in;
    float *place = shrunk + rank_from + j;
    const float scaling = factors.scaling;
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
      for (int v = 0; v < Vectors; ++v) sums[i][v] = fma(s, w[v], sums[i][v]);
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

// Calls work(factors, part, first row, rows, shrunk rows) for every block of rows of every segment and part.
template <typename Work>
QC_INLINE void each_block(const qc_linear *const *parts, int part_count, const qc_segment *segments,
                          int64_t segment_count, float *shrunk, Work work) {
  for (int64_t s = 0; s < segment_count; ++s) {
    const qc_segment &segment = segments[s];
    for (int p = 0; p < part_count; ++p) {
      const qc_factors *factors = factors_of(*parts[p], segment.slot);
      if (!factors) continue;
      for (int64_t row = segment.start; row < segment.end; row += kLoraRows) {
        int rows = (int)smaller(kLoraRows, segment.end - row);
        work(*factors, p, row, rows, shrunk);
        shrunk += (int64_t)rows * factors->rank;
      }
    }
  }
}

void shrink_all(const qc_linear *const *parts, int part_count, const float *x, int64_t ldx,
                const qc_segment *segments, int64_t segment_count, float *shrunk, const Team &team) {
  int64_t piece = 0;
  each_block(parts, part_count, segments, segment_count, shrunk,
             [&](const qc_factors &factors, int p, int64_t row, int rows, float *place) {
               for (int from = 0; from < factors.rank; from += kRanks)
                 if (piece++ % team.count == team.index) {
                   const int ranks = (int)smaller(kRanks, factors.rank - from);
                   const float *xs = x + row * ldx;
                   factors.type == QC_BF16 ? shrink<uint16_t>(factors, parts[p]->in, xs, ldx, rows, from, ranks, place)
                                           : shrink<float>(factors, parts[p]->in, xs, ldx, rows, from, ranks, place);
                 }
             });
}

void expand_all(const qc_linear *const *parts, int part_count, const qc_segment *segments, int64_t segment_count,
                float *shrunk, float *y, int64_t ldy, const Team &team) {
  int64_t offsets[4] = {0, 0, 0, 0};
  for (int p = 1; p < part_count; ++p) offsets[p] = offsets[p - 1] + parts[p - 1]->out;
  int64_t piece = 0;
  each_block(parts, part_count, segments, segment_count, shrunk,
             [&](const qc_factors &factors, int p, int64_t row, int rows, float *place) {
               const int64_t out = parts[p]->out;
               float *ys = y + row * ldy + offsets[p];
               for (int64_t from = 0; from < out; from += kColumns)
                 if (piece++ % team.count == team.index) {
                   const int64_t columns = smaller(kColumns, out - from);
                   factors.type == QC_BF16 ? expand<uint16_t>(factors, out, place, rows, from, columns, ys, ldy)
                                           : expand<float>(factors, out, place, rows, from, columns, ys, ldy);
                 }
             });
}
