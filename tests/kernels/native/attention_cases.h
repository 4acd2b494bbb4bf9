// Paged keys and values: what is written, and attention over what is read.
#pragma once

#include "examination.h"

namespace selftest {

struct Place {
  int sequence, position;
};

// Keys and values of every sequence, position by position, all heads of one position together.
struct Past {
  std::vector<std::vector<double>> keys, values;
};

struct CacheShape {
  qc_type type;
  int kv_heads, key_width, value_width;
};

inline Past random_past(Random &random, const CacheShape &shape, const std::vector<int> &lengths) {
  auto some = [&](int64_t count) {
    std::vector<double> list;
    for (int64_t i = 0; i < count; ++i) {
      const float value = random.uniform();
      list.push_back(shape.type == QC_BF16 ? widened(narrowed(value)) : value);
    }
    return list;
  };
  Past past;
  for (int length : lengths) {
    past.keys.push_back(some((int64_t)length * shape.kv_heads * shape.key_width));
    past.values.push_back(some((int64_t)length * shape.kv_heads * shape.value_width));
  }
  return past;
}

inline int first_visible(int position, int window) {
  return window > 0 && position >= window ? position - window + 1 : 0;
}

// Where rows stand, with block tables.
struct Paging {
  Buffer<int32_t> positions, sequences, tables;
  qc_paging record{};

  Paging(const std::vector<Place> &rows, const Buffer<int32_t> &tables, int table_width, int block_tokens)
      : positions((int64_t)rows.size()), sequences((int64_t)rows.size()), tables(tables) {
    for (size_t r = 0; r < rows.size(); ++r) {
      positions[(int64_t)r] = rows[r].position;
      sequences[(int64_t)r] = rows[r].sequence;
    }
    record = {positions.data(), sequences.data(), this->tables.data(), table_width, block_tokens};
  }

  Paging(Paging &&) = default;  // a copy's record would point at the original

  // One row, by the same tables.
  Paging only(int row) const {
    return Paging({{sequences[row], positions[row]}}, tables, record.table_width, record.block_tokens);
  }
  // One row with its own sequence's table alone.
  Paging alone(int row) const {
    Buffer<int32_t> table(record.table_width);
    for (int b = 0; b < record.table_width; ++b) table[b] = tables[sequences[row] * record.table_width + b];
    return Paging({{0, positions[row]}}, table, record.table_width, record.block_tokens);
  }
};

// A cache with just what the rows may see, in blocks anywhere. Every other slot holds NaN, and so does block 0,
// to which tables point where their sequence has no block: before the window and behind the newest position.
struct Cache {
  Typed keys, values;
  qc_cache record{};
  Buffer<int32_t> tables;
  int table_width = 0, block_tokens;

  Cache(Random &random, const CacheShape &shape, const std::vector<Place> &rows, int sequences, int window,
        int block_tokens)
      : block_tokens(block_tokens) {
    for (const Place &row : rows)
      if (row.position / block_tokens >= table_width) table_width = row.position / block_tokens + 1;
    tables = Buffer<int32_t>((int64_t)sequences * table_width, 0);
    std::vector<int32_t *> used;
    for (const Place &row : rows)
      for (int p = first_visible(row.position, window); p <= row.position; ++p) {
        int32_t *entry = &tables[row.sequence * table_width + p / block_tokens];
        if (*entry == 0) used.push_back(entry);
        *entry = 1;
      }
    for (size_t i = used.size(); i > 1; --i) std::swap(used[i - 1], used[(size_t)random.below((int)i)]);
    for (size_t i = 0; i < used.size(); ++i) *used[i] = (int32_t)i + 1;
    const int64_t slots = ((int64_t)used.size() + 1) * block_tokens * shape.kv_heads;
    keys = Typed(shape.type, slots * shape.key_width, kNaN);
    values = Typed(shape.type, slots * shape.value_width, kNaN);
    record = {keys.data(), values.data(), shape.type, shape.kv_heads, shape.key_width, shape.value_width};
  }
  Cache(const Cache &other)
      : keys(other.keys), values(other.values), record(other.record), tables(other.tables),
        table_width(other.table_width), block_tokens(other.block_tokens) {
    record.keys = keys.data();
    record.values = values.data();
  }

  int64_t slot(int sequence, int position) const {
    return (int64_t)tables[sequence * table_width + position / block_tokens] * block_tokens + position % block_tokens;
  }

  // What those rows see of the past.
  void put(const Past &past, const std::vector<Place> &rows, int window) const {
    const int key_floats = record.kv_heads * record.key_width, value_floats = record.kv_heads * record.value_width;
    for (const Place &row : rows) {
      const std::vector<double> &k = past.keys[(size_t)row.sequence], &v = past.values[(size_t)row.sequence];
      const int length = (int)(k.size() / (size_t)key_floats);
      for (int p = first_visible(row.position, window); p <= row.position && p < length; ++p) {
        const int64_t place = slot(row.sequence, p);
        for (int e = 0; e < key_floats; ++e) keys.put(place * key_floats + e, (float)k[(size_t)(p * key_floats + e)]);
        for (int e = 0; e < value_floats; ++e)
          values.put(place * value_floats + e, (float)v[(size_t)(p * value_floats + e)]);
      }
    }
  }
};

// One query head of one row, [E'].
inline std::vector<Expected> attended(const Past &past, Place place, int kv_head, const qc_cache &shape,
                                      const qc_attention_rule &rule, const double *q) {
  const std::vector<double> &keys = past.keys[(size_t)place.sequence], &values = past.values[(size_t)place.sequence];
  const int first = first_visible(place.position, rule.window);
  std::vector<double> scores;
  double top = -INFINITY, largest = 0.0, total = 0.0;
  for (int p = first; p <= place.position; ++p) {
    double score = 0.0, magnitude = 0.0;
    for (int e = 0; e < shape.key_width; ++e) {
      const double term = q[e] * keys[(size_t)((p * shape.kv_heads + kv_head) * shape.key_width + e)] * rule.scale;
      score += term;
      magnitude += fabs(term);
    }
    if (rule.softcap != 0.0f) score = rule.softcap * tanh(score / rule.softcap);
    scores.push_back(score);
    top = fmax(top, score);
    largest = fmax(largest, magnitude);
  }
  for (double &score : scores) total += score = exp(score - top);
  std::vector<Expected> results;
  for (int e = 0; e < shape.value_width; ++e) {
    double sum = 0.0;
    for (int p = first; p <= place.position; ++p)
      sum += scores[(size_t)(p - first)] * values[(size_t)((p * shape.kv_heads + kv_head) * shape.value_width + e)];
    // Values are below 1; an error of a score is one of its weight.
    results.push_back({sum / total, 1.0 + largest});
  }
  return results;
}

inline Matrix attend(const Cache &cache, const Paging &paging, const qc_attention_rule &rule, const Matrix &q,
                     const Matrix &out, int threads) {
  Matrix result = out;
  qc_attention(&cache.record, &paging.record, &rule, q.floats.data(), q.ld, result.floats.data(), result.ld, q.rows,
               threads);
  return result;
}

// A few rows of each sequence, most of them short.
inline std::vector<Place> random_places(Random &random, int sequences) {
  std::vector<Place> rows;
  for (int s = 0; s < sequences; ++s) {
    int position = s == 0 ? random.one_of({255, 256, 257, 300, 511, 512, 600})
                          : random.one_of({0, 1, 14, 15, 16, 17, 31, 32, 47, 48, 49, 63, 100});
    for (int more = random.below(3); more >= 0 && position >= 0; --more) {
      rows.push_back({s, position});
      position -= random.one_of({1, 1, 2, 16, 255});
    }
  }
  for (size_t i = rows.size(); i > 1; --i) std::swap(rows[i - 1], rows[(size_t)random.below((int)i)]);
  return rows;
}

struct AttentionCase {
  CacheShape shape;
  qc_attention_rule rule;
  int block_tokens, sequences;
  std::vector<Place> rows;
};

inline AttentionCase attention_case(Random &random, int i) {
  constexpr int widths[] = {8, 24, 64, 80, 128}, blocks[] = {1, 4, 16, 48};
  AttentionCase test;
  const int group = 1 + i % 9, kv_heads = 1 + random.below(group > 4 ? 2 : 3), key_width = widths[i % 5];
  test.shape = {random.coin() ? QC_BF16 : QC_F32, kv_heads, key_width,
                random.below(3) ? key_width : random.one_of({8, 24, 40, 64, 80})};
  test.rule.scale = 1.0f / sqrtf((float)key_width);
  test.rule.softcap = random.one_of({0.0f, 0.0f, 2.0f, 30.0f});
  test.rule.window = random.one_of({0, 0, 0, 1, 5, 15, 16, 17, 100, 255, 256, 257, 300, 10000});
  test.rule.heads = group * kv_heads;
  test.block_tokens = blocks[i % 4];
  test.sequences = i % 20 == 19 ? 0 : 1 + random.below(4);
  test.rows = random_places(random, test.sequences);
  return test;
}

inline void examine(Examination &exam, Random &random, const AttentionCase &test) {
  const auto &[shape, rule, block_tokens, sequences, rows] = test;
  const int count = (int)rows.size(), group = rule.heads / shape.kv_heads;
  exam.begin("%d rows, %d/%d heads of %d/%d, blocks of %d, window %d, softcap %g, %s", count, rule.heads,
             shape.kv_heads, shape.key_width, shape.value_width, block_tokens, rule.window, (double)rule.softcap,
             shape.type == QC_BF16 ? "bfloat16" : "float32");
  const Past past = random_past(random, shape, std::vector<int>((size_t)sequences, 601));
  const Matrix q = input(random, count, rule.heads * shape.key_width, random.one_of({1.0f, 8.0f, 100.0f}));
  const Matrix out = output(random, count, rule.heads * shape.value_width);

  const Cache cache(random, shape, rows, sequences, rule.window, block_tokens);
  cache.put(past, rows, rule.window);
  const Paging paging(rows, cache.tables, cache.table_width, block_tokens);
  const Matrix together = attend(cache, paging, rule, q, out, 1);
  exam.settle(together.floats, [&] {
    std::vector<Expected> results;
    for (float each : out.floats) results.push_back({each, 0.0});
    for (int r = 0; r < count; ++r)
      for (int h = 0; h < rule.heads; ++h) {
        const std::vector<double> query(q.row(r) + h * shape.key_width, q.row(r) + (h + 1) * shape.key_width);
        const std::vector<Expected> head =
            attended(past, rows[(size_t)r], h / group, cache.record, rule, query.data());
        for (int e = 0; e < shape.value_width; ++e)
          results[(size_t)(r * out.ld + h * shape.value_width + e)] = head[(size_t)e];
      }
    return results;
  });
  const Matrix shared = attend(cache, paging, rule, q, out, 2 + random.below(2));
  exam.same("with several threads", shared.floats, together.floats);
  if (count == 0) return;

  const int other_blocks = block_tokens == 16 ? 5 : 16;
  const Cache moved(random, shape, rows, sequences, rule.window, other_blocks);
  moved.put(past, rows, rule.window);
  const Paging elsewhere(rows, moved.tables, moved.table_width, other_blocks);
  exam.same("in other blocks", attend(moved, elsewhere, rule, q, out, 1).floats, together.floats);

  const int row = random.below(count), head = random.below(rule.heads);
  const Matrix single = attend(cache, paging.alone(row), rule, Matrix(q, row), Matrix(out, row), 1);
  exam.same("row alone", single.row(0), together.row(row), together.width);

  Matrix with_nan = q;
  with_nan.row(row)[head * shape.key_width + random.below(shape.key_width)] = kNaN;
  Matrix beside = attend(cache, paging, rule, with_nan, out, 1);
  float *broken = beside.row(row) + head * shape.value_width;
  exam.all_nan("head with NaN", broken, shape.value_width);
  for (int e = 0; e < shape.value_width; ++e) broken[e] = together.row(row)[head * shape.value_width + e];
  exam.same("beside a head with NaN", beside.floats, together.floats);
}

inline void attention_cases(Examination &exam) {
  Random random(7);
  for (int i = 0; i < 180; ++i) examine(exam, random, attention_case(random, i));
  for (const auto &[key_width, value_width] : {std::pair(192, 128), std::pair(256, 256), std::pair(512, 512)}) {
    AttentionCase test = attention_case(random, key_width);
    test.shape.key_width = key_width;
    test.shape.value_width = value_width;
    examine(exam, random, test);
  }
}

// ---- Writing

// As bfloat16 they are ties, carries, overflows, subnormals, and what is not finite.
inline float special(Random &random) {
  return float_of(random.one_of<uint32_t>({0x3F808000u, 0x3F818000u, 0x3F808001u, 0x3F807FFFu, 0xBFFF8000u, 0x7F7F8000u,
                                           0x7F7FFFFFu, 0x00008000u, 0x00018000u, 0x80000001u, 0x7F800000u, 0xFF800000u,
                                           0x7FC00000u, 0x7F800001u, 0xFFFFFFFFu, 0x80000000u}));
}

inline void write_case(Examination &exam, Random &random, const CacheShape &shape, int rows, int block_tokens) {
  exam.begin("%d rows, %d heads of %d/%d, blocks of %d, %s", rows, shape.kv_heads, shape.key_width,
             shape.value_width, block_tokens, shape.type == QC_BF16 ? "bfloat16" : "float32");
  std::vector<Place> places;
  for (int r = 0; r < rows; ++r) places.push_back({r % 3, random.below(5) + 5 * (r / 3)});
  Cache cache(random, shape, places, 3, 1, block_tokens);
  const Paging paging(places, cache.tables, cache.table_width, block_tokens);
  Matrix keys = input(random, rows, shape.kv_heads * shape.key_width, 3.0f);
  Matrix values = input(random, rows, shape.kv_heads * shape.value_width, 3.0f);
  for (int r = 0; r < rows; ++r)
    for (int times = 0; times < 8; ++times) {
      keys.row(r)[random.below(keys.width)] = special(random);
      values.row(r)[random.below(values.width)] = special(random);
    }
  Cache expected = cache, shared = cache;
  for (int r = 0; r < rows; ++r) {
    const int64_t slot = cache.slot(places[(size_t)r].sequence, places[(size_t)r].position);
    for (int e = 0; e < keys.width; ++e) expected.keys.put(slot * keys.width + e, keys.row(r)[e]);
    for (int e = 0; e < values.width; ++e) expected.values.put(slot * values.width + e, values.row(r)[e]);
  }
  auto write = [&](const Cache &into, int threads) {
    qc_cache_write(&into.record, &paging.record, keys.floats.data(), keys.ld, values.floats.data(), values.ld, rows,
                   threads);
  };
  write(cache, 1);
  exam.settle_exactly("keys", cache.keys.floats, expected.keys.floats);
  exam.settle_exactly("keys", cache.keys.halves, expected.keys.halves);
  exam.settle_exactly("values", cache.values.floats, expected.values.floats);
  exam.settle_exactly("values", cache.values.halves, expected.values.halves);
  write(shared, 2 + random.below(2));
  exam.same("keys with several threads", shared.keys.floats, cache.keys.floats);
  exam.same("keys with several threads", shared.keys.halves, cache.keys.halves);
  exam.same("values with several threads", shared.values.floats, cache.values.floats);
  exam.same("values with several threads", shared.values.halves, cache.values.halves);
}

inline void write_cases(Examination &exam) {
  Random random(8);
  for (qc_type type : {QC_F32, QC_BF16})
    for (int width : {8, 16, 24, 64, 80, 128})
      for (int block_tokens : {1, 4, 16, 48}) {
        const CacheShape shape = {type, 1 + random.below(3), width, random.coin() ? width : random.one_of({8, 24, 40})};
        write_case(exam, random, shape, random.below(20), block_tokens);
      }
}

}  // namespace selftest
