// The likeliest token by screening, against all logits of the same head.
#pragma once

#include "examination.h"
#include "support.h"

namespace selftest {

// A bfloat16 head and its copy in seven bits, made as kernels/screen.py makes it.
struct Head {
  int in, out, tiles, eights;
  Buffer<uint16_t> weights;
  Buffer<uint8_t> codes;
  Buffer<float> steps, errors;

  Head(Random &random, int in, int out)
      : in(in), out(out), tiles((out + 15) / 16), eights((in + 7) / 8), weights(tiles * in * 16, 0),
        codes(tiles * eights * 128, 64), steps(tiles * 16, 1.0f), errors(tiles * 16, 0.0f) {
    for (int o = 0; o < out; ++o) {
      double largest = 0.0, squares = 0.0, error = 0.0;
      for (int k = 0; k < in; ++k) {
        const double w = widened(weight(o, k) = narrowed(random.uniform()));
        largest = std::max(largest, fabs(w));
        squares += w * w;
      }
      const float step = steps[o] = largest > 0.0 ? (float)(largest / 63.0) : 1.0f;
      for (int k = 0; k < in; ++k) {
        const double w = widened(weight(o, k)), code = nearbyint(w / step);
        const int at = k % 8;
        codes[((o / 16 * eights + k / 8) * 4 + at % 4) * 32 + o % 16 * 2 + at / 4] = (uint8_t)(code + 64.0);
        error += (code * step - w) * (code * step - w);
      }
      errors[o] = (float)(1.01 * (sqrt(error) + (in + 8) * 0x1p-24 * (384.0 * sqrt(in) * step + sqrt(squares))));
    }
  }

  uint16_t &weight(int o, int k) { return weights[(o / 16 * in + k) * 16 + o % 16]; }
};

inline void screen_case(Examination &exam, Random &random, int in, int out, int rows) {
  exam.begin("%d rows, %d of %d", rows, in, out);
  Head head(random, in, out);
  qc_linear linear = {};
  linear.weights = head.weights.data();
  linear.in = in, linear.out = out, linear.group = 1;
  linear.form = QC_DENSE_BF16, linear.precision = QC_MEDIUM;
  const qc_screen screen = {head.codes.data(), head.steps.data(), head.errors.data()};
  Matrix x = input(random, rows, in, 3.0f);
  for (int r = 0; r < rows && r < 2; ++r)  // beside one feature, so that it wins, or nearly
    for (int k = 0, o = random.below(out); k < in; ++k) x.row(r)[k] += 2.0f * (float)widened(head.weight(o, k));
  if (rows > 2)
    for (int k = 0; k < in; ++k) x.row(2)[k] = 0.0f;  // all alike
  if (rows > 3) x.row(3)[random.below(in)] = kNaN;
  const qc_linear *part = &linear;
  Buffer<float> logits(rows * out, kUntouched);
  qc_linear_forward(&part, 1, x.floats.data(), x.ld, logits.data(), out, rows, nullptr, 0, 0, 1);
  Buffer<int64_t> expected(rows, -7), index(rows, -7), shared(rows, -7);
  qc_argmax(logits.data(), out, expected.data(), rows, out, 1);
  if (qc_likeliest(&linear, &screen, x.floats.data(), x.ld, rows, index.data(), 1)) exam.fail("it was refused");
  exam.settle_exactly("index", index, expected);
  qc_likeliest(&linear, &screen, x.floats.data(), x.ld, rows, shared.data(), 2 + random.below(2));
  exam.same("with several threads", shared, index);
}

inline void screen_cases(Examination &exam) {
  Random random(9);
  for (int in : {1, 7, 8, 9, 16, 40, 63, 128, 200})
    for (int out : {1, 15, 16, 17, 33, 80, 300}) screen_case(exam, random, in, out, 1 + random.below(9));
  screen_case(exam, random, 576, 2000, 4);
  screen_case(exam, random, 64, 48, 20);
}

}  // namespace selftest
