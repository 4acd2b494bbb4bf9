// Drawing tokens.
#pragma once

#include <algorithm>
#include <numeric>

#include "examination.h"
#include "support.h"

namespace selftest {

constexpr int kSettled = 256;  // of the likeliest tokens one is drawn at once, or none

// A row's tokens, likeliest first, and the probabilities of those that top_k, top_p and min_p leave.
struct Left {
  std::vector<int64_t> order;
  std::vector<double> probabilities;
  bool whole;  // nothing was left out

  Left(const float *x, int width, const qc_draw &draw) : order((size_t)width) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x[a] > x[b]; });
    if (draw.top_k > 0 && draw.top_k < width) order.resize((size_t)draw.top_k);
    std::vector<double> all;
    for (int64_t index : order) all.push_back(exp(((double)x[index] - (double)x[order[0]]) / draw.temperature));
    const double mass = std::accumulate(all.begin(), all.end(), 0.0);
    double before = 0.0;
    for (double each : all) {
      if (before >= draw.top_p || each < draw.min_p * all[0]) break;
      probabilities.push_back(each / mass);
      before += each / mass;
    }
    whole = (int)probabilities.size() == width;
  }
};

// Draws the token of a rank, at the middle of its share, so that no rounding decides.
inline void draw_case(Examination &exam, Random &random, const Matrix &x, qc_draw draw) {
  Buffer<qc_draw> draws(x.rows, draw);
  Buffer<int64_t> expected(x.rows, -7), tokens(x.rows, -7), shared(x.rows, -7);
  for (int r = 0; r < x.rows; ++r) {
    const Left left(x.row(r), x.width, draw);
    const auto begin = left.probabilities.begin();
    const auto count = (int)left.probabilities.size();
    int likely = 0;  // ranks with a share that rounding cannot hide
    while (likely < count && left.probabilities[(size_t)likely] > 1e-4) ++likely;
    const int rank = likely == 0 ? 0 : random.below(random.coin() ? std::min(likely, 4) : likely);
    const double total = std::accumulate(begin, left.probabilities.end(), 0.0);
    const double before = std::accumulate(begin, begin + rank, 0.0);
    draws[r].logits = x.row(r);
    draws[r].uniform = (before + left.probabilities[(size_t)rank] / 2) / total;
    const bool cut_within = count < kSettled, all_ordered = x.width <= kSettled;
    const bool bounded = draw.top_k > 0 && draw.top_k < x.width;
    const double ordered = std::accumulate(begin, begin + std::min(count, kSettled), 0.0);
    const bool settled = bounded ? draw.top_k <= kSettled
                                 : all_ordered || cut_within ||
                                       (draw.top_p == 1.0 && draw.min_p == 0.0 && draws[r].uniform < ordered - 1e-3);
    const bool close = !bounded && left.whole && !all_ordered && draws[r].uniform >= ordered - 1e-3 && rank < kSettled;
    expected[r] = settled ? left.order[(size_t)rank] : -1;
    if (close) draws[r].uniform = 0.0, expected[r] = left.order[0];
  }
  qc_draw_tokens(draws.data(), x.rows, x.width, tokens.data(), 1);
  exam.settle_exactly("tokens", tokens, expected);
  qc_draw_tokens(draws.data(), x.rows, x.width, shared.data(), 2 + random.below(2));
  exam.same("with several threads", shared, tokens);
}

inline void draw_cases(Examination &exam) {
  Random random(8);
  std::vector<int> widths = {255, 256, 257, 511, 1000, 4097};
  for (int width = 1; width <= 40; ++width) widths.push_back(width);
  for (int width : widths)
    for (double temperature : {0.3, 1.0, 2.5})
      for (int kind = 0; kind < 6; ++kind) {
        const qc_draw draw = {nullptr, temperature, kind == 1 || kind == 4 ? 0.7 : 1.0, kind == 2 ? 0.05 : 0.0, 0.0,
                              kind == 3 || kind == 4 ? 1 + random.below(20) : kind == 5 ? 300 : 0};
        exam.begin("%d wide, temperature %g, top_p %g, min_p %g, top_k %d", width, temperature, draw.top_p, draw.min_p,
                   (int)draw.top_k);
        draw_case(exam, random, input(random, 4, width, 8.0f), draw);
      }
  exam.begin("all alike");
  draw_case(exam, random, Matrix(2, 700, 0, 1.5f), {nullptr, 1.0, 1.0, 0.0, 0.0, 5});
  exam.begin("ascending");
  Matrix ascending(1, 3000, 0, 0.0f);
  for (int i = 0; i < 3000; ++i) ascending.row(0)[i] = (float)i * 0.1f;
  draw_case(exam, random, ascending, {nullptr, 1.0, 1.0, 0.0, 0.0, 0});
  for (float bad : {kNaN, __builtin_inff(), -__builtin_inff()}) {
    exam.begin("not finite");
    Matrix x = input(random, 1, 500, 5.0f);
    x.row(0)[random.below(500)] = bad;
    const qc_draw draw = {x.row(0), 1.0, 1.0, 0.0, 0.5, 10};
    Buffer<int64_t> token(1, -7);
    qc_draw_tokens(&draw, 1, 500, token.data(), 1);
    exam.settle_exactly("token", token, Buffer<int64_t>(1, -1));
  }
}

}  // namespace selftest
