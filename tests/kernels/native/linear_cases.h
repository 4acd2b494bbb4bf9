// Products with base weights and the update of each row's adapter.
#pragma once

#include "examination.h"

namespace selftest {

// NF4 of the QLoRA paper (Dettmers et al. 2023, appendix E).
constexpr float kCodeValues[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

constexpr float kGain = 1.437006f;  // with which products of medium precision round them

struct Adapter {
  Typed a, b;  // [R, D], [R, O]
  int rank;
  float scaling;
};

// One layer with its weights, its bias, and its adapters by slot.
struct Linear {
  qc_linear record{};
  Buffer<uint32_t> codes;
  Typed dense;
  Buffer<float> scales, bias;
  std::vector<double> matrix;  // [O, D], for the reference
  std::vector<Adapter> adapters;
  Buffer<qc_factors> slots;

  // `form` as the library knows it; `group` is for NF4 alone.
  Linear(Random &random, qc_form form, int group, int in, int out, bool with_bias, qc_precision precision) {
    record.in = in;
    record.out = out;
    record.form = form;
    record.group = group;
    record.precision = precision;
    const int64_t tiles = (out + 15) / 16;
    if (form == QC_NF4) {
      codes = Buffer<uint32_t>(tiles * (in / 8) * 16);
      scales = Buffer<float>(tiles * (in / group) * 16);
      for (int64_t i = 0; i < codes.size(); ++i)
        if (is_feature(i, in / 8)) codes[i] = (uint32_t)random.bits();
      for (int64_t i = 0; i < scales.size(); ++i)
        if (is_feature(i, in / group)) scales[i] = (random.uniform() + 1.5f) * 0.125f;
      record.weights = codes.data();
      record.scales = scales.data();
    } else {
      dense = Typed(form == QC_DENSE_BF16 ? QC_BF16 : QC_F32, tiles * in * 16);
      for (int64_t i = 0; i < tiles * in * 16; ++i)
        if (is_feature(i, in)) dense.put(i, random.uniform() * 0.25f);
      record.weights = dense.data();
    }
    if (with_bias) {
      bias = Buffer<float>(out);
      for (float &each : bias) each = random.uniform();
      record.bias = bias.data();
    }
    for (int o = 0; o < out; ++o)
      for (int k = 0; k < in; ++k) matrix.push_back(weight(o, k));
  }

  Linear(Linear &&) = default;  // a copy's record would point at the original

  // As many adapters as there are ranks; rank 0: an empty slot.
  void attach(Random &random, const std::vector<int> &ranks) {
    slots = Buffer<qc_factors>((int64_t)ranks.size());
    for (int rank : ranks) {
      const qc_type type = random.coin() ? QC_BF16 : QC_F32;
      Adapter adapter{Typed(type, (int64_t)rank * record.in), Typed(type, (int64_t)rank * record.out), rank,
                      1.0f + random.uniform() * 0.5f};
      adapter.a.random(random, 0.25f);
      adapter.b.random(random, 0.25f);
      slots[(int64_t)adapters.size()] = {rank ? adapter.a.data() : nullptr, rank ? adapter.b.data() : nullptr, rank,
                                         type, adapter.scaling, 0};
      adapters.push_back(std::move(adapter));
    }
    record.slots = slots.data();
    record.slot_count = slots.size();
  }

  // What the product takes for one activation.
  double rounded(double x) const { return is_medium() ? widened(narrowed((float)x)) : x; }

  const Adapter *adapter(int slot) const {
    if (slot < 0 || slot >= (int)adapters.size() || adapters[(size_t)slot].rank == 0) return nullptr;
    return &adapters[(size_t)slot];
  }

 private:
  double weight(int feature, int column) const {
    const int64_t tile = feature / 16, lane = feature % 16, in = record.in;
    if (record.form != QC_NF4) return dense.at((tile * in + column) * 16 + lane);
    const uint32_t word = codes[(tile * (in / 8) + column / 8) * 16 + lane];
    const double scale = scales[(tile * (in / record.group) + column / record.group) * 16 + lane];
    const float value = kCodeValues[word >> 4 * (column % 8) & 15u];
    return scale * (is_medium() ? widened(narrowed(value * kGain)) / (double)kGain : value);
  }
  bool is_medium() const { return record.precision == QC_MEDIUM && record.form != QC_DENSE_F32; }
  // Whether entry i of a [tiles, columns, 16] array belongs to an out-feature; the others are zero.
  bool is_feature(int64_t i, int64_t columns) const { return i / (columns * 16) * 16 + i % 16 < record.out; }
};

inline int outs_of(const std::vector<Linear> &parts) {
  int outs = 0;
  for (const Linear &part : parts) outs += part.record.out;
  return outs;
}

inline Buffer<const qc_linear *> records_of(const std::vector<Linear> &parts) {
  Buffer<const qc_linear *> records((int64_t)parts.size());
  for (size_t p = 0; p < parts.size(); ++p) records[(int64_t)p] = &parts[p].record;
  return records;
}

constexpr int kNoSlot = -100;

// Which adapter a row uses, and how much of it.
struct Route {
  int slot;
  float scale;
};

inline Route route_of(const Buffer<qc_segment> &segments, int row) {
  for (const qc_segment &segment : segments)
    if (row >= segment.start && row < segment.end) return {segment.slot, segment.scale};
  return {kNoSlot, 1.0f};
}

// Segments over some of the rows, in any order, empty ones and slots outside the table among them.
inline Buffer<qc_segment> random_segments(Random &random, int rows, int slots) {
  std::vector<qc_segment> list;
  for (int at = random.below(3); at <= rows; at += random.below(3)) {
    const int end = at + random.one_of({0, 1, 1, 2, 3, 4, 5, 8, 13, 30});
    list.push_back({at, end < rows ? end : rows, random.below(slots + 2) - 1,
                    random.coin() ? 1.0f : random.uniform() * 2.0f});
    at = end + (end == at);
  }
  for (size_t i = list.size(); i > 1; --i) std::swap(list[i - 1], list[(size_t)random.below((int)i)]);
  return Buffer<qc_segment>(list);
}

// The one segment that a row needs when it is alone.
inline Buffer<qc_segment> alone(const Buffer<qc_segment> &segments, int row) {
  const Route route = route_of(segments, row);
  if (route.slot == kNoSlot) return Buffer<qc_segment>();
  return Buffer<qc_segment>(1, qc_segment{0, 1, route.slot, route.scale});
}

// What the parts add to a row of results, [outs]: the product with bias if `base`, and the adapter's update.
inline std::vector<Expected> products(const std::vector<Linear> &parts, const double *x, Route route, bool base) {
  std::vector<Expected> results;
  for (const Linear &part : parts) {
    const int in = part.record.in;
    const Adapter *adapter = part.adapter(route.slot);
    const double scaling = adapter ? (double)adapter->scaling * route.scale : 0.0;
    std::vector<double> shrunk, shrunk_magnitude;
    for (int r = 0; adapter && r < adapter->rank; ++r) {
      double sum = 0.0, magnitude = 0.0;
      for (int k = 0; k < in; ++k) {
        const double term = x[k] * adapter->a.at((int64_t)r * in + k);
        sum += term;
        magnitude += fabs(term);
      }
      shrunk.push_back(sum * scaling);
      shrunk_magnitude.push_back(magnitude * fabs(scaling));
    }
    for (int o = 0; o < part.record.out; ++o) {
      Expected total{0.0, 0.0};
      for (int k = 0; base && k < in; ++k) {
        const double term = part.rounded(x[k]) * part.matrix[(size_t)o * (size_t)in + (size_t)k];
        total.value += term;
        total.magnitude += fabs(term);
      }
      if (base && part.record.bias) {
        total.value += part.bias[o];
        total.magnitude += fabs(part.bias[o]);
      }
      for (int r = 0; r < (int)shrunk.size(); ++r) {
        const double b = adapter->b.at((int64_t)r * part.record.out + o);
        total.value += shrunk[(size_t)r] * b;
        total.magnitude += shrunk_magnitude[(size_t)r] * fabs(b);
      }
      results.push_back(total);
    }
  }
  return results;
}

enum class Operation { kWrite, kAccumulate, kDelta };

struct LinearCase {
  std::vector<Linear> parts;
  Operation operation;
  Matrix x, y;
  Buffer<qc_segment> segments;

  Matrix result(const Matrix &x, const Matrix &y, const Buffer<qc_segment> &segments, int threads) const {
    const Buffer<const qc_linear *> records = records_of(parts);
    Matrix out = y;
    if (operation == Operation::kDelta)
      qc_lora_delta(records.data(), (int)records.size(), x.floats.data(), x.ld, out.floats.data(), out.ld,
                    segments.data(), segments.size(), threads);
    else
      qc_linear_forward(records.data(), (int)records.size(), x.floats.data(), x.ld, out.floats.data(), out.ld, x.rows,
                        segments.data(), segments.size(), operation == Operation::kAccumulate, threads);
    return out;
  }

  std::vector<Expected> reference() const {
    std::vector<Expected> results;
    for (float each : y.floats) results.push_back({each, 0.0});
    for (int r = 0; r < y.rows; ++r) {
      const std::vector<double> row(x.row(r), x.row(r) + x.width);
      const std::vector<Expected> sums =
          products(parts, row.data(), route_of(segments, r), operation != Operation::kDelta);
      for (int o = 0; o < y.width; ++o) {
        Expected &place = results[(size_t)(r * y.ld + o)];
        const double before = operation == Operation::kWrite ? 0.0 : place.value;
        const Expected sum = sums[(size_t)o];
        place = {before + sum.value, sum.magnitude > 0.0 ? fabs(before) + sum.magnitude : 0.0};
      }
    }
    return results;
  }

  // Whether the operation writes this out-feature of this row at all.
  bool writes(int row, int feature) const {
    if (operation != Operation::kDelta) return true;
    for (const Linear &part : parts) {
      if (feature < part.record.out) return part.adapter(route_of(segments, row).slot) != nullptr;
      feature -= part.record.out;
    }
    return false;
  }
};

// Together, on several threads, alone, and beside a row of NaN: a row's numbers are its own.
inline void examine(Examination &exam, Random &random, const LinearCase &test) {
  const Matrix together = test.result(test.x, test.y, test.segments, 1);
  exam.settle(together.floats, [&] { return test.reference(); });
  const Matrix shared = test.result(test.x, test.y, test.segments, 2 + random.below(2));
  exam.same("with several threads", shared.floats, together.floats);
  if (test.x.rows == 0) return;
  for (int row : {0, random.below(test.x.rows), test.x.rows - 1}) {
    const Matrix single = test.result(Matrix(test.x, row), Matrix(test.y, row), alone(test.segments, row), 1);
    exam.same("row alone", single.row(0), together.row(row), together.width);
  }
  const int broken = random.below(test.x.rows);
  Matrix with_nan = test.x;
  with_nan.row(broken)[random.below(with_nan.width)] = kNaN;
  Matrix beside = test.result(with_nan, test.y, test.segments, 1);
  for (int o = 0; o < beside.width; ++o)
    if (test.writes(broken, o)) {
      exam.all_nan("row with NaN", beside.row(broken) + o, 1);
      beside.row(broken)[o] = together.row(broken)[o];
    }
  exam.same("beside a row with NaN", beside.floats, together.floats);
}

struct Form {
  qc_form form;
  int group;
  const char *name;
};
constexpr Form kForms[] = {{QC_NF4, 8, "nf4/8"},   {QC_NF4, 16, "nf4/16"},        {QC_NF4, 32, "nf4/32"},
                           {QC_NF4, 64, "nf4/64"}, {QC_DENSE_F32, 1, "float32"}, {QC_DENSE_BF16, 1, "bfloat16"}};

inline std::vector<int> random_ranks(Random &random, int count) {
  std::vector<int> ranks;
  for (int i = 0; i < count; ++i) ranks.push_back(random.one_of({0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 33, 64, 256}));
  return ranks;
}

inline LinearCase random_case(Random &random, Form form, int rows, Operation operation,
                              qc_precision precision = QC_HIGHEST) {
  int in = random.one_of({8, 24, 40, 64, 96});
  if (random.below(8) == 0) in = 576;
  if (in % form.group) in = form.group * random.one_of({1, 2, 3});
  if (form.form != QC_NF4 && random.below(3) == 0) in = random.one_of({1, 7, 15, 17, 33});
  std::vector<Linear> parts;
  const int count = 1 + random.below(4), slots = random.below(5);
  for (int p = 0; p < count; ++p) {
    const int out = random.below(p + 2) == 0 ? 192 : random.one_of({1, 7, 16, 17, 33});
    parts.emplace_back(random, form.form, form.group, in, out, random.coin(), precision);
    parts.back().attach(random, random_ranks(random, random.below(slots + 1)));
  }
  LinearCase test{std::move(parts), operation, input(random, rows, in), Matrix(0, 0, 0, 0.0f),
                  random_segments(random, rows, slots)};
  test.y = output(random, rows, outs_of(test.parts));
  if (operation != Operation::kWrite) test.y.random(random, 1.0f);
  return test;
}

inline void describe(Examination &exam, const LinearCase &test, Form form) {
  exam.begin("%d rows, %d in, %zu parts with %d out, %s, %lld segments%s", test.x.rows, test.x.width,
             test.parts.size(), test.y.width, form.name, (long long)test.segments.size(),
             test.operation == Operation::kAccumulate ? ", accumulated" : "");
}

// Where blocks of rows may end: every form there, elsewhere one of each family.
inline bool is_edge(int rows) {
  for (int block : {4, 6, 12, 18, 24, 32, 64})
    if (rows >= block - 1 && rows <= block + 1) return true;
  return rows <= 8 || rows >= 70;
}

inline void linear_cases(Examination &exam, qc_precision precision) {
  Random random(1);
  for (int i = 0; i <= 72; ++i) {
    const int rows = i <= 70 ? i : i == 71 ? 129 : 150;
    for (int f = 0; f < 6; ++f) {
      if (!is_edge(rows) && f != rows % 4 && f != 4 + rows % 2) continue;
      const Operation operation = random.coin() ? Operation::kAccumulate : Operation::kWrite;
      const LinearCase test = random_case(random, kForms[f], rows, operation, precision);
      describe(exam, test, kForms[f]);
      examine(exam, random, test);
    }
  }
}

inline void highest_linear_cases(Examination &exam) { linear_cases(exam, QC_HIGHEST); }
inline void medium_linear_cases(Examination &exam) { linear_cases(exam, QC_MEDIUM); }

inline void delta_cases(Examination &exam) {
  Random random(2);
  for (int rows = 0; rows <= 70; ++rows) {
    const Form form = kForms[rows % 6];
    const LinearCase test = random_case(random, form, rows, Operation::kDelta);
    describe(exam, test, form);
    examine(exam, random, test);
  }
}

}  // namespace selftest
