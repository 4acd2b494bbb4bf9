// A whole decoder layer: against the operations one by one, and against the formula.
#pragma once

#include <algorithm>

#include "attention_cases.h"
#include "linear_cases.h"
#include "row_cases.h"

namespace selftest {

struct LayerCase {
  CacheShape shape;
  qc_layer record{};
  std::vector<Linear> qkv, output, gate_up, down;
  qc_precision precision;
  Buffer<float> input_norm, attention_norm, mlp_norm, after_mlp_norm, query_norm, key_norm;
  std::vector<Place> rows;
  std::vector<int> lengths;  // of what is in the cache already, by sequence
  Buffer<qc_segment> segments;
  int block_tokens;

  int query_width() const { return record.rule.heads * shape.key_width; }
  int kv_key_width() const { return shape.kv_heads * shape.key_width; }
  int kv_value_width() const { return shape.kv_heads * shape.value_width; }
  int attended_width() const { return record.rule.heads * shape.value_width; }
  int qkv_width() const { return query_width() + kv_key_width() + kv_value_width(); }
};

// NF4 with the largest group that fits, or dense.
inline Linear random_linear(Random &random, int in, int out, int slots, qc_precision precision) {
  const int group = in % 64 == 0 ? 64 : in % 32 == 0 ? 32 : in % 16 == 0 ? 16 : 8;
  const qc_form form = random.one_of({QC_NF4, QC_NF4, QC_DENSE_F32, QC_DENSE_BF16});
  const bool with_bias = random.coin();
  const qc_precision own = precision == QC_MEDIUM && random.coin() ? QC_MEDIUM : QC_HIGHEST;
  Linear linear(random, form, group, in, out, with_bias, own);
  std::vector<int> ranks;
  for (int i = random.below(slots + 1); i > 0; --i) ranks.push_back(random.one_of({0, 1, 4, 7, 8, 33}));
  linear.attach(random, ranks);
  return linear;
}

inline Buffer<float> random_norm(Random &random, int width) {
  Buffer<float> weight(width);
  for (float &each : weight) each = 1.0f + random.uniform() * 0.5f;
  return weight;
}

inline void place_rows(LayerCase &test, Random &random, int rows) {
  test.block_tokens = random.one_of({1, 4, 16, 48});
  for (int left = rows; left > 0;) {
    const int length = random.one_of({0, 0, 3, 15, 40, 250}), now = 1 + random.below(left < 12 ? left : 12);
    for (int i = 0; i < now; ++i) test.rows.push_back({(int)test.lengths.size(), length + i});
    test.lengths.push_back(length);
    left -= now;
  }
}

inline void give_norms(LayerCase &test, Random &random) {
  qc_layer &record = test.record;
  const int query_width = record.norm_all_heads ? test.query_width() : test.shape.key_width;
  const int key_width = record.norm_all_heads ? test.kv_key_width() : test.shape.key_width;
  if (random.below(4)) record.input_norm = (test.input_norm = random_norm(random, record.hidden)).data();
  if (random.below(4)) record.mlp_norm = (test.mlp_norm = random_norm(random, record.hidden)).data();
  if (random.coin()) record.attention_norm = (test.attention_norm = random_norm(random, record.hidden)).data();
  if (random.coin()) record.after_mlp_norm = (test.after_mlp_norm = random_norm(random, record.hidden)).data();
  if (random.coin()) record.query_norm = (test.query_norm = random_norm(random, query_width)).data();
  if (random.coin()) record.key_norm = (test.key_norm = random_norm(random, key_width)).data();
}

// In medium precision: half of its products.
inline LayerCase layer_case(Random &random, int rows, qc_precision precision = QC_HIGHEST) {
  LayerCase test;
  test.precision = precision;
  const int key_width = random.one_of({8, 16, 24, 40}), slots = random.below(4);
  test.shape = {random.coin() ? QC_BF16 : QC_F32, 1 + random.below(3), key_width,
                random.coin() ? key_width : random.one_of({8, 24, 32})};
  qc_layer &record = test.record;
  record.hidden = random.one_of({24, 32, 40, 64, 96});
  record.intermediate = random.one_of({8, 24, 40, 72, 128});
  record.rule = {1.0f / sqrtf((float)key_width), random.one_of({0.0f, 0.0f, 20.0f}), random.one_of({0, 0, 4, 17, 255}),
                 test.shape.kv_heads * random.one_of({1, 2, 3, 5})};
  record.norm_epsilon = 1e-5f;
  record.residual_scale = random.one_of({1.0f, 1.0f, 0.3f});
  record.norm_all_heads = random.coin();
  record.rotary_width = random.one_of({0, 8, key_width, key_width});
  record.activation = random.coin() ? QC_SILU : QC_GELU_TANH;
  give_norms(test, random);

  const int hidden = record.hidden, intermediate = record.intermediate;
  const std::vector<int> three = {test.query_width(), test.kv_key_width(), test.kv_value_width()};
  for (int out : random.coin() ? three : std::vector<int>{test.qkv_width()})
    test.qkv.push_back(random_linear(random, hidden, out, slots, precision));
  const std::vector<int> two = {intermediate, intermediate};
  for (int out : random.coin() ? two : std::vector<int>{2 * intermediate})
    test.gate_up.push_back(random_linear(random, hidden, out, slots, precision));
  test.output.push_back(random_linear(random, test.attended_width(), hidden, slots, precision));
  test.down.push_back(random_linear(random, intermediate, hidden, slots, precision));

  place_rows(test, random, rows);
  test.segments = random_segments(random, rows, slots);
  return test;
}

// Where the rows of a step stand, their adapters, their angles.
struct LayerStep {
  Paging paging;
  Buffer<qc_segment> segments;
  Matrix cosines, sines;

  LayerStep only(int row) const {  // by the same tables
    return {paging.only(row), alone(segments, row), Matrix(cosines, row), Matrix(sines, row)};
  }
};

inline qc_layer layer_record(const LayerCase &test, const Cache &cache) {
  qc_layer record = test.record;
  for (size_t i = 0; i < test.qkv.size(); ++i) record.qkv[i] = &test.qkv[i].record;
  for (size_t i = 0; i < test.gate_up.size(); ++i) record.gate_up[i] = &test.gate_up[i].record;
  record.qkv_parts = (int)test.qkv.size();
  record.gate_up_parts = (int)test.gate_up.size();
  record.output = &test.output[0].record;
  record.down = &test.down[0].record;
  record.cache = &cache.record;
  return record;
}

inline Matrix forward(const LayerCase &test, const Cache &cache, const LayerStep &step, const Matrix &x, int threads) {
  const qc_layer record = layer_record(test, cache);
  const qc_step step_record = {step.segments.data(), step.segments.size(), step.cosines.floats.data(),
                               step.sines.floats.data(), step.paging.record, x.rows, threads};
  Matrix out = x;
  const qc_layer *const layers[] = {&record};
  qc_layers_forward(layers, 1, &step_record, out.floats.data());
  return out;
}

// The same layer from the other functions of the C interface: the bits have to be the same.
inline Matrix one_by_one(const LayerCase &test, const Cache &cache, const LayerStep &step, const Matrix &x) {
  const qc_layer &record = test.record;
  const int rows = x.rows, hidden = record.hidden, width = test.shape.key_width, qkv_width = test.qkv_width();
  auto norm = [&](const float *from, const float *weight, float *to, int64_t ld, int width) {
    qc_rms_norm(from, ld, weight, to, ld, rows, width, record.norm_epsilon, 1);
  };
  auto linear = [&](const std::vector<Linear> &parts, const Matrix &from, const Matrix &to, bool accumulate) {
    const Buffer<const qc_linear *> records = records_of(parts);
    qc_linear_forward(records.data(), (int)records.size(), from.floats.data(), from.ld, to.floats.data(), to.ld, rows,
                      step.segments.data(), step.segments.size(), accumulate, 1);
  };
  auto add = [&](const std::vector<Linear> &parts, const Matrix &from, const float *weight, const Matrix &to) {
    if (!weight && record.residual_scale == 1.0f) return linear(parts, from, to, true);
    const Matrix added(rows, hidden, 0, 0.0f);
    linear(parts, from, added, false);
    if (weight) norm(added.floats.data(), weight, added.floats.data(), hidden, hidden);
    for (int64_t i = 0; i < to.floats.size(); ++i) to.floats[i] += added.floats[i] * record.residual_scale;
  };

  auto normed = [&](const Matrix &from, const float *weight) {
    Matrix to = from;
    if (weight) norm(from.floats.data(), weight, to.floats.data(), hidden, hidden);
    return to;
  };
  // One weight over all heads, or the same one for each.
  auto norm_heads = [&](float *first, const float *weight, int heads) {
    if (!weight) return;
    const int times = record.norm_all_heads ? 1 : heads, each = heads * width / times;
    for (int i = 0; i < times; ++i) norm(first + i * each, weight, first + i * each, qkv_width, each);
  };

  Matrix y = x;
  const Matrix qkv(rows, qkv_width, 0, 0.0f);
  linear(test.qkv, normed(y, record.input_norm), qkv, false);
  float *queries = qkv.floats.data(), *keys = queries + test.query_width(), *values = keys + test.kv_key_width();
  norm_heads(queries, record.query_norm, record.rule.heads);
  norm_heads(keys, record.key_norm, test.shape.kv_heads);
  if (record.rotary_width)
    qc_rotary(queries, qkv_width, record.rule.heads + test.shape.kv_heads, width, step.cosines.floats.data(),
              step.sines.floats.data(), record.rotary_width, rows, 1);
  qc_cache_write(&cache.record, &step.paging.record, keys, qkv_width, values, qkv_width, rows, 1);
  const Matrix mixed(rows, test.attended_width(), 0, 0.0f);
  qc_attention(&cache.record, &step.paging.record, &record.rule, queries, qkv_width, mixed.floats.data(), mixed.ld,
               rows, 1);
  add(test.output, mixed, record.attention_norm, y);
  const Matrix gate_up(rows, 2 * record.intermediate, 0, 0.0f), gated(rows, record.intermediate, 0, 0.0f);
  linear(test.gate_up, normed(y, record.mlp_norm), gate_up, false);
  qc_gated(gate_up.floats.data(), gate_up.ld, gated.floats.data(), gated.ld, rows, record.intermediate,
           record.activation, 1);
  add(test.down, gated, record.after_mlp_norm, y);
  return y;
}

// The formula in double, row by row in order; `past` grows by the rows.
inline std::vector<Expected> layer_reference(const LayerCase &test, Past past, const LayerStep &step, const Matrix &x) {
  const qc_layer &record = test.record;
  const int width = test.shape.key_width;
  const qc_cache shape = {nullptr, nullptr, test.shape.type, test.shape.kv_heads, width, test.shape.value_width};
  auto value_of = [](const std::vector<Expected> &list) {
    std::vector<double> values;
    for (const Expected &each : list) values.push_back(each.value);
    return values;
  };
  auto normed = [&](const std::vector<double> &row, const float *weight) {
    return weight ? value_of(norm_of(row, weight, record.norm_epsilon)) : row;
  };
  std::vector<Expected> results;
  for (int r = 0; r < x.rows; ++r) {
    const Place place = test.rows[(size_t)r];
    const Route route = route_of(step.segments, r);
    auto product = [&](const std::vector<Linear> &parts, const std::vector<double> &row) {
      return value_of(products(parts, row.data(), route, true));
    };
    std::vector<double> y(x.row(r), x.row(r) + x.width);
    std::vector<double> qkv = product(test.qkv, normed(y, record.input_norm));
    auto norm_heads = [&](int begin, int end, const float *weight) {
      const int each = record.norm_all_heads ? end - begin : width;
      for (int i = begin; i < end; i += each) {
        const std::vector<double> row = normed({qkv.begin() + i, qkv.begin() + i + each}, weight);
        std::copy(row.begin(), row.end(), qkv.begin() + i);
      }
    };
    norm_heads(0, test.query_width(), record.query_norm);
    norm_heads(test.query_width(), test.query_width() + test.kv_key_width(), record.key_norm);
    auto head = [&](int unit) {
      std::vector<Expected> rotated;
      for (int i = unit * width; i < (unit + 1) * width; ++i) rotated.push_back({qkv[(size_t)i], 0.0});
      if (record.rotary_width)
        rotate(rotated.data(), step.cosines.row(r), step.sines.row(r), record.rotary_width);
      return value_of(rotated);
    };
    std::vector<double> &keys = past.keys[(size_t)place.sequence], &values = past.values[(size_t)place.sequence];
    for (int h = 0; h < test.shape.kv_heads; ++h)
      for (double each : head(record.rule.heads + h)) keys.push_back(each);
    values.insert(values.end(), qkv.end() - test.kv_value_width(), qkv.end());
    std::vector<double> mixed;
    for (int h = 0; h < record.rule.heads; ++h) {
      const std::vector<double> query = head(h);
      const int kv_head = h / (record.rule.heads / test.shape.kv_heads);
      for (const Expected &each : attended(past, place, kv_head, shape, record.rule, query.data()))
        mixed.push_back(each.value);
    }
    const std::vector<double> from_attention = normed(product(test.output, mixed), record.attention_norm);
    for (size_t i = 0; i < y.size(); ++i) y[i] += from_attention[i] * record.residual_scale;
    const std::vector<double> pair = product(test.gate_up, normed(y, record.mlp_norm));
    std::vector<double> activation;
    for (int i = 0; i < record.intermediate; ++i)
      activation.push_back(gated(pair[(size_t)i], pair[(size_t)(record.intermediate + i)], record.activation).value);
    const std::vector<double> from_mlp = normed(product(test.down, activation), record.after_mlp_norm);
    double largest = 0.0;
    for (size_t i = 0; i < y.size(); ++i) largest = fmax(largest, fabs(y[i] += from_mlp[i] * record.residual_scale));
    for (double each : y) results.push_back({each, largest});
  }
  return results;
}

inline void same_cache(const Examination &exam, const char *what, const Cache &got, const Cache &expected) {
  exam.same(what, got.keys.floats, expected.keys.floats);
  exam.same(what, got.keys.halves, expected.keys.halves);
  exam.same(what, got.values.floats, expected.values.floats);
  exam.same(what, got.values.halves, expected.values.halves);
}

inline void examine(Examination &exam, Random &random, const LayerCase &test) {
  const qc_layer &record = test.record;
  const int rows = (int)test.rows.size(), hidden = record.hidden, window = record.rule.window;
  exam.begin("%d rows, hidden %d, %d/%d heads of %d/%d, %d rotated, %zu and %zu parts, norms %d%d%d%d%d%d, "
             "all heads %d, scale %g, window %d, %s",
             rows, hidden, record.rule.heads, test.shape.kv_heads, test.shape.key_width, test.shape.value_width,
             record.rotary_width, test.qkv.size(), test.gate_up.size(), record.input_norm != nullptr,
             record.attention_norm != nullptr, record.mlp_norm != nullptr, record.after_mlp_norm != nullptr,
             record.query_norm != nullptr, record.key_norm != nullptr, record.norm_all_heads,
             (double)record.residual_scale, window, test.shape.type == QC_BF16 ? "bfloat16" : "float32");
  const Past past = random_past(random, test.shape, test.lengths);
  const Matrix x = std::move(Matrix(rows, hidden, 0, 0.0f).random(random, 2.0f));
  Cache before(random, test.shape, test.rows, (int)test.lengths.size(), window, test.block_tokens);
  before.put(past, test.rows, window);
  const LayerStep step = {Paging(test.rows, before.tables, before.table_width, test.block_tokens), test.segments,
                          Matrix(rows, record.rotary_width, 0, 0.0f).random(random, 1.0f),
                          Matrix(rows, record.rotary_width, 0, 0.0f).random(random, 1.0f)};

  Cache cache = before;
  const Matrix together = forward(test, cache, step, x, 1);
  exam.settle(together.floats, [&] {
    if (test.shape.type == QC_F32 && test.precision == QC_HIGHEST) return layer_reference(test, past, step, x);
    std::vector<Expected> itself;  // what is rounded to bfloat16 may fall on either side: bits alone are compared
    for (float each : together.floats) itself.push_back({each, 0.0});
    return itself;
  });
  Cache apart = before;
  exam.same("one by one", one_by_one(test, apart, step, x).floats, together.floats);
  same_cache(exam, "one by one, cache", apart, cache);
  for (int threads : {2, 3}) {
    Cache shared = before;
    exam.same("with several threads", forward(test, shared, step, x, threads).floats, together.floats);
    same_cache(exam, "with several threads, cache", shared, cache);
  }

  Cache grown = before;  // each row in a step of its own
  for (int r = 0; r < rows; ++r)
    exam.same("row alone", forward(test, grown, step.only(r), Matrix(x, r), 1).row(0), together.row(r), hidden);
  same_cache(exam, "row alone, cache", grown, cache);
  if (rows == 0) return;

  const int broken = rows - 1;  // the newest of its sequence: nothing else sees it
  Matrix with_nan = x;
  with_nan.row(broken)[random.below(hidden)] = kNaN;
  Cache spoiled = before;
  const Matrix beside = forward(test, spoiled, step, with_nan, 1);
  exam.all_nan("row with NaN", beside.row(broken), hidden);
  exam.same("beside a row with NaN", beside.floats.data(), together.floats.data(), (int64_t)broken * hidden);
}

inline void layer_cases(Examination &exam, qc_precision precision) {
  Random random(9);
  for (int rows : {0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 12, 18, 19, 33})
    for (int times = 0; times < 5; ++times) examine(exam, random, layer_case(random, rows, precision));
}

inline void highest_layer_cases(Examination &exam) { layer_cases(exam, QC_HIGHEST); }
inline void medium_layer_cases(Examination &exam) { layer_cases(exam, QC_MEDIUM); }

}  // namespace selftest
