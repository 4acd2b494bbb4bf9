// Row-wise operations: norm, rotary positions, gated activation, argmax. Included once per instruction set.

constexpr int kRowsPerPiece = 8;  // of work that takes a fraction of a microsecond a row

// work(row) for every row, so many rows to a piece.
template <typename Work>
QC_INLINE void each_row(int64_t rows, int64_t per_piece, const Crew &crew, Work work) {
  crew.each(divide_up(rows, per_piece), [&](int64_t piece) {
    const int64_t end = smaller(rows, (piece + 1) * per_piece);
    for (int64_t row = piece * per_piece; row < end; ++row) work(row);
  });
}

// y = weight · (x / sqrt(mean(x²) + epsilon)); the sum over 16 lanes in order, then by halving.
QC_INLINE void norm_row(const float *x, const float *weight, float *y, int width, float epsilon) {
  F16 squares = set1(0.0f);
  for (int i = 0; i < width; i += 16) {
    F16 v = load_upto(x + i, width - i);
    squares = fma(v, v, squares);
  }
  const F16 factor = set1(1.0f / __builtin_sqrtf(sum(squares) / (float)width + epsilon));
  for (int i = 0; i < width; i += 16) {
    const int n = width - i;
    store_upto(y + i, load_upto(weight + i, n) * (load_upto(x + i, n) * factor), n);
  }
}

QC_INLINE void norm_rows(const float *x, int64_t ldx, const float *weight, float *y, int64_t ldy, int64_t rows,
                         int width, float epsilon, const Crew &crew) {
  each_row(rows, kRowsPerPiece, crew,
           [&](int64_t row) { norm_row(x + row * ldx, weight, y + row * ldy, width, epsilon); });
}

// One head in place: (a, b) of the two halves becomes (a·cos - b·sin, b·cos + a·sin), each with its own angle.
QC_INLINE void rotate_head(float *head, const float *cosines, const float *sines, int rotary_width) {
  const int half = rotary_width / 2;
  for (int i = 0; i < half; i += 16) {
    const int n = half - i;
    F16 a = load_upto(head + i, n), b = load_upto(head + half + i, n);
    F16 first = fma(a, load_upto(cosines + i, n), set1(0.0f) - b * load_upto(sines + i, n));
    F16 second = fma(b, load_upto(cosines + half + i, n), a * load_upto(sines + half + i, n));
    store_upto(head + i, first, n);
    store_upto(head + half + i, second, n);
  }
}

QC_INLINE void rotate_rows(float *x, int64_t ldx, int heads, int width, const float *cosines, const float *sines,
                           int rotary_width, int64_t rows, const Crew &crew) {
  each_row(rows, kRowsPerPiece, crew, [&](int64_t row) {
    for (int head = 0; head < heads; ++head)
      rotate_head(x + row * ldx + head * width, cosines + row * rotary_width, sines + row * rotary_width,
                  rotary_width);
  });
}

QC_INLINE F16 activate(F16 x, int activation) { return activation == QC_SILU ? silu(x) : gelu_tanh(x); }

constexpr int kGatedColumns = 2048;  // of one piece

QC_INLINE void gated_rows(const float *x, int64_t ldx, float *y, int64_t ldy, int64_t rows, int width, int activation,
                          const Crew &crew) {
  const int64_t per_row = divide_up(width, kGatedColumns);
  crew.each(rows * per_row, [&](int64_t piece) {
    const int64_t row = piece / per_row, begin = piece % per_row * kGatedColumns;
    const int64_t end = smaller(width, begin + kGatedColumns);
    const float *gate = x + row * ldx, *up = gate + width;
    float *place = y + row * ldy;
    for (int64_t i = begin; i < end; i += 16) {
      const int n = (int)smaller(16, width - i);
      store_upto(place + i, activate(load_upto(gate + i, n), activation) * load_upto(up + i, n), n);
    }
  });
}

// The first index of the largest value; -1 if the row holds a value that is not finite (x - x is then NaN).
QC_INLINE int64_t argmax_row(const float *x, int64_t width) {
  F16 best = set1(-__builtin_inff()), faults = set1(0.0f);
  for (int64_t i = 0; i < width; i += 16) {
    const int n = (int)smaller(16, width - i);
    F16 v = load_upto(x + i, n);
    faults = faults + (v - v);
    best = maximum(best, lanes_or(v, 0, n, -__builtin_inff()));
  }
  if (sum(faults) != 0.0f) return -1;
  const float top = largest(best);
  for (int64_t i = 0; i < width; ++i)
    if (x[i] == top) return i;
  return -1;
}

QC_INLINE void argmax_rows(const float *x, int64_t ldx, int64_t *index, int64_t rows, int64_t width,
                           const Crew &crew) {
  crew.each(rows, [&](int64_t row) { index[row] = argmax_row(x + row * ldx, width); });
}
