// Row-wise operations: norm, rotary positions, gated activation, argmax.
#pragma once

#include "examination.h"

namespace selftest {

inline std::vector<Expected> untouched(const Matrix &y) {
  std::vector<Expected> results;
  for (float each : y.floats) results.push_back({each, 0.0});
  return results;
}

// ---- RMS norm

inline std::vector<Expected> norm_of(const std::vector<double> &x, const float *weight, double epsilon) {
  double squares = 0.0;
  for (double each : x) squares += each * each;
  const double factor = 1.0 / sqrt(squares / (double)x.size() + epsilon);
  std::vector<Expected> results;
  for (size_t i = 0; i < x.size(); ++i) {
    const double value = weight[i] * x[i] * factor;
    results.push_back({value, fabs(value)});
  }
  return results;
}

inline void norm_case(Examination &exam, Random &random, int rows, int width) {
  exam.begin("%d rows of %d", rows, width);
  const Matrix x = input(random, rows, width, random.one_of({1e-4f, 1.0f, 300.0f})), y = output(random, rows, width);
  const Buffer<float> weight = input(random, 1, width).floats;
  const float epsilon = random.one_of({1e-6f, 1e-5f});
  auto norm = [&](const Matrix &x, const Matrix &y, int threads) {
    Matrix out = y;
    qc_rms_norm(x.floats.data(), x.ld, weight.data(), out.floats.data(), out.ld, x.rows, width, epsilon, threads);
    return out;
  };
  const Matrix together = norm(x, y, 1);
  exam.settle(together.floats, [&] {
    std::vector<Expected> results = untouched(y);
    for (int r = 0; r < rows; ++r) {
      const std::vector<Expected> row = norm_of({x.row(r), x.row(r) + width}, weight.data(), epsilon);
      for (int i = 0; i < width; ++i) results[(size_t)(r * y.ld + i)] = row[(size_t)i];
    }
    return results;
  });
  exam.same("with several threads", norm(x, y, 2 + random.below(2)).floats, together.floats);
  if (rows == 0) return;
  Matrix in_place = x;
  qc_rms_norm(in_place.floats.data(), x.ld, weight.data(), in_place.floats.data(), x.ld, rows, width, epsilon, 1);
  for (int r = 0; r < rows; ++r) exam.same("in place", in_place.row(r), together.row(r), width);
  const int broken = random.below(rows);
  Matrix with_nan = x;
  with_nan.row(broken)[random.below(width)] = kNaN;
  const Matrix beside = norm(with_nan, y, 1);
  for (int r = 0; r < rows; ++r)
    if (r == broken)
      exam.all_nan("row with NaN", beside.row(r), width);
    else
      exam.same("beside a row with NaN", beside.row(r), together.row(r), width);
}

inline void norm_cases(Examination &exam) {
  Random random(3);
  for (int width = 1; width <= 70; ++width) norm_case(exam, random, random.below(6), width);
  for (int rows : {0, 1, 3}) norm_case(exam, random, rows, 576);
  norm_case(exam, random, 2, 2048);
  exam.begin("a row of zeros");
  const Buffer<float> zeros(24), weight(24, 1.0f);
  Buffer<float> y(24, kUntouched);
  qc_rms_norm(zeros.data(), 24, weight.data(), y.data(), 24, 1, 24, 1e-6f, 1);
  exam.settle_exactly("norm", y, zeros);
}

// ---- Rotary positions

// One head in place, as Llama rotates it.
inline void rotate(Expected *head, const float *cosines, const float *sines, int rotary_width) {
  const int half = rotary_width / 2;
  const std::vector<Expected> before(head, head + rotary_width);
  for (int i = 0; i < rotary_width; ++i) {
    const double same = before[(size_t)i].value * cosines[i];
    const double other = before[(size_t)((i + half) % rotary_width)].value * sines[i] * (i < half ? -1.0 : 1.0);
    head[i] = {same + other, fabs(same) + fabs(other)};
  }
}

inline void rotary_case(Examination &exam, Random &random, int rows, int heads, int width, int rotary_width) {
  exam.begin("%d rows, %d heads of %d, %d rotated", rows, heads, width, rotary_width);
  const Matrix x = output(random, rows, heads * width).random(random, 2.0f);
  // Not of unit length and not alike in both halves: every entry has to come from its own place.
  const Buffer<float> cosines = Matrix(rows, rotary_width, 0, 0.0f).random(random, 1.0f).floats;
  const Buffer<float> sines = Matrix(rows, rotary_width, 0, 0.0f).random(random, 1.0f).floats;
  auto rotated = [&](const Matrix &x, int threads) {
    Matrix out = x;
    qc_rotary(out.floats.data(), out.ld, heads, width, cosines.data(), sines.data(), rotary_width, rows, threads);
    return out;
  };
  const Matrix together = rotated(x, 1);
  exam.settle(together.floats, [&] {
    std::vector<Expected> results = untouched(x);
    for (int r = 0; r < rows; ++r)
      for (int h = 0; h < heads; ++h)
        rotate(&results[(size_t)(r * x.ld + h * width)], &cosines[r * rotary_width], &sines[r * rotary_width],
               rotary_width);
    return results;
  });
  exam.same("with several threads", rotated(x, 2 + random.below(2)).floats, together.floats);
}

inline void rotary_cases(Examination &exam) {
  Random random(4);
  for (int width : {2, 8, 20, 24, 64, 66, 80, 128})
    for (int rotary_width : {2, 4, 16, 20, 32, 34, 64, 66, 80, 128})
      if (rotary_width <= width) {
        const int rows = random.below(5), heads = 1 + random.below(4);
        rotary_case(exam, random, rows, heads, width, rotary_width);
      }
}

// ---- Gated activation

inline double activated(double x, int activation) {
  if (activation == QC_SILU) return x / (1.0 + exp(-x));
  return 0.5 * x * (1.0 + tanh(sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
}

// SiLU is exact relative to itself, down to where e^-x overflows; GELU's 1 + tanh loses what is small beside 1.
inline Expected gated(double gate, double up, int activation) {
  const double value = activated(gate, activation) * up;
  const double magnitude = activation == QC_SILU ? fabs(value) + 1e-29 * fabs(gate * up) : fabs(gate * up);
  return {value, magnitude + 1e-38};
}

inline void gated_case(Examination &exam, Random &random, int rows, int width, qc_activation activation, float scale) {
  exam.begin("%d rows of %d, %s, up to %g", rows, width, activation == QC_SILU ? "SiLU" : "GELU", (double)scale);
  const Matrix x = input(random, rows, 2 * width, scale), y = output(random, rows, width);
  auto gate = [&](const Matrix &x, const Matrix &y, int threads) {
    Matrix out = y;
    qc_gated(x.floats.data(), x.ld, out.floats.data(), out.ld, x.rows, width, activation, threads);
    return out;
  };
  const Matrix together = gate(x, y, 1);
  exam.settle(together.floats, [&] {
    std::vector<Expected> results = untouched(y);
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < width; ++i)
        results[(size_t)(r * y.ld + i)] = gated(x.row(r)[i], x.row(r)[width + i], activation);
    return results;
  });
  exam.same("with several threads", gate(x, y, 2 + random.below(2)).floats, together.floats);
  if (rows == 0) return;
  const int row = random.below(rows), column = random.below(width);
  exam.same("row alone", gate(Matrix(x, row), Matrix(y, row), 1).row(0), together.row(row), width);
  Matrix with_nan = x;
  with_nan.row(row)[column + (random.coin() ? width : 0)] = kNaN;
  Matrix beside = gate(with_nan, y, 1);
  exam.all_nan("column with NaN", beside.row(row) + column, 1);
  beside.row(row)[column] = together.row(row)[column];
  exam.same("beside NaN", beside.floats, together.floats);
}

// Values at and beyond every limit inside the functions; the bits have to agree, and finite ones with the reference.
inline void gated_extremes(Examination &exam, qc_activation activation) {
  const float inf = __builtin_inff();
  std::vector<float> values = {0.0f, -0.0f, 1e-45f, -1e-45f, 1e-38f, -1e-38f, 0.6f, 0.7f, -0.6f, -0.7f, 9.0f, -9.0f,
                               87.0f, -87.0f, 88.0f, -88.0f, 88.5f, -88.5f, 89.0f, -89.0f, 104.0f, -104.0f, 1e4f,
                               -1e4f, 1e15f, -1e15f, 1e30f, -1e30f};
  for (const char *name : {"finite", "infinite"}) {
    exam.begin("%s extremes, %s", name, activation == QC_SILU ? "SiLU" : "GELU");
    const int width = (int)values.size();
    Buffer<float> x(2 * width, 1.0f), y(width, kUntouched);
    for (int i = 0; i < width; ++i) x[i] = values[(size_t)i];
    qc_gated(x.data(), 2 * width, y.data(), width, 1, width, activation, 1);
    exam.settle(y, [&] {
      std::vector<Expected> results;
      for (int i = 0; i < width; ++i)
        results.push_back(fabsf(x[i]) < inf ? gated(x[i], 1.0, activation) : Expected{y[i], 0.0});
      return results;
    });
    values.insert(values.end(), {inf, -inf, kNaN});
  }
}

inline void gated_cases(Examination &exam) {
  Random random(5);
  for (qc_activation activation : {QC_SILU, QC_GELU_TANH}) {
    for (int width = 1; width <= 40; ++width) {
      const int rows = random.below(5);
      gated_case(exam, random, rows, width, activation, random.one_of({0.5f, 4.0f, 20.0f, 200.0f}));
    }
    gated_case(exam, random, 7, 192, activation, 8.0f);
    gated_extremes(exam, activation);
  }
}

// ---- Argmax

inline int64_t argmax_of(const float *x, int64_t width) {
  int64_t best = 0;
  for (int64_t i = 0; i < width; ++i) {
    if (!isfinite(x[i])) return -1;
    if (x[i] > x[best]) best = i;
  }
  return best;
}

inline void argmax_case(Examination &exam, Random &random, const Matrix &x) {
  Buffer<int64_t> expected(x.rows), index(x.rows, -7), shared(x.rows, -7);
  for (int r = 0; r < x.rows; ++r) expected[r] = argmax_of(x.row(r), x.width);
  qc_argmax(x.floats.data(), x.ld, index.data(), x.rows, x.width, 1);
  exam.settle_exactly("index", index, expected);
  qc_argmax(x.floats.data(), x.ld, shared.data(), x.rows, x.width, 2 + random.below(2));
  exam.same("with several threads", shared, index);
}

inline void argmax_cases(Examination &exam) {
  Random random(6);
  const float inf = __builtin_inff(), largest = 3.40282347e38f;
  std::vector<int> widths = {576, 1000, 4097};
  for (int width = 1; width <= 70; ++width) widths.push_back(width);
  for (int width : widths) {
    Matrix x = input(random, 12, width, 5.0f);
    auto put = [&](int row, float value) { x.row(row)[random.below(width)] = value; };
    for (int row : {1, 2, 2, 2}) put(row, 7.0f);  // the largest once, and several times
    for (int i = 0; i < width; ++i) {
      x.row(3)[i] = -3.0f;  // all alike
      x.row(4)[i] = random.coin() ? 0.0f : -0.0f;
      x.row(5)[i] = -largest;
      x.row(6)[i] -= 100.0f;
      x.row(7)[i] = (float)random.below(3);
    }
    put(6, -1e-45f);
    put(8, kNaN);
    put(9, inf);
    put(10, -inf);
    put(11, largest);
    exam.begin("12 rows of %d", width);
    argmax_case(exam, random, x);
    x.row(0)[width - 1] = kNaN;
    x.row(1)[width - 1] = 8.0f;
    x.row(2)[0] = inf;
    exam.begin("12 rows of %d, at their ends", width);
    argmax_case(exam, random, x);
  }
  exam.begin("no rows");
  argmax_case(exam, random, Matrix(0, 33, 0, 0.0f));
}

}  // namespace selftest
