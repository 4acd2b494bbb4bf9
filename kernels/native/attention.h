// Causal attention over paged keys and values, read in place. Included once per instruction set.
//
// A row's numbers depend on its own position, query, and sequence alone. Positions are taken in spans of
// kSpan, by absolute position; a span's scores, largest score, weights and weighted values are computed in order
// of position, and spans are merged in order (online softmax, Milakov & Gimelshein 2018). Neither how a prompt
// was cut into chunks nor where blocks lie changes an operation or its order.

constexpr int kSpan = 256;     // positions of one softmax
constexpr int kMaxWidth = 512;  // largest head dimension
constexpr int kHeads = 4;      // query heads that are computed side by side over one key head

// Finds positions of one sequence in the cache.
struct Pages {
  const int32_t *table;
  int block_tokens, last;  // last: the newest position there is

  QC_INLINE int64_t slot(int position) const {
    const int p = position < last ? position : last;
    return (int64_t)table[p / block_tokens] * block_tokens + p % block_tokens;
  }
};

// Softmax state of one query head: largest score, sum of weights; its weighted values are kept beside it.
struct Softmax {
  float top, sum;
};

// Scores of positions [from, from + 16) against one query, lanes outside [begin, end) set to -inf.
template <typename Element>
QC_INLINE F16 scores_of(const float *q, int width, const Element *const (&keys)[16], const qc_attention_rule &rule) {
  F16 products[16];
  for (int i = 0; i < 16; ++i) products[i] = set1(0.0f);
  for (int e = 0; e < width; e += 16) {
    const int n = width - e;
    F16 query = load_upto(q + e, n);
    for (int i = 0; i < 16; ++i) products[i] = fma(query, load_upto(keys[i] + e, n), products[i]);
  }
  F16 scores = sums(products) * set1(rule.scale);
  if (rule.softcap != 0.0f) scores = set1(rule.softcap) * hyperbolic_tangent(scores / set1(rule.softcap));
  return scores;
}

// sums[h] = Σ weights[h][i] · values[i] over the span's positions in order, for G heads side by side.
template <int G, typename Element>
QC_INLINE void weigh(const float (*weights)[kSpan], const int64_t *offsets, int begin, int end, const Element *values,
                     int width, float (*sums)[kMaxWidth]) {
  for (int e = 0; e < width; e += 64) {
    const int vectors = (int)smaller(4, divide_up(width - e, 16));
    F16 totals[G][4];
    for (int g = 0; g < G; ++g)
      for (int v = 0; v < 4; ++v) totals[g][v] = set1(0.0f);
    if (e + 64 <= width) {
      for (int i = begin; i < end; ++i) {
        const Element *value = values + offsets[i] + e;
        F16 parts[4];
        for (int v = 0; v < 4; ++v) parts[v] = load(value + 16 * v);
        for (int g = 0; g < G; ++g) {
          F16 weight = set1(weights[g][i]);
          for (int v = 0; v < 4; ++v) totals[g][v] = fma(weight, parts[v], totals[g][v]);
        }
      }
    } else {
      for (int i = begin; i < end; ++i) {
        const Element *value = values + offsets[i] + e;
        for (int v = 0; v < vectors; ++v) {
          F16 part = load_upto(value + 16 * v, width - e - 16 * v);
          for (int g = 0; g < G; ++g) totals[g][v] = fma(set1(weights[g][i]), part, totals[g][v]);
        }
      }
    }
    for (int g = 0; g < G; ++g)
      for (int v = 0; v < vectors; ++v) store(sums[g] + e + 16 * v, totals[g][v]);
  }
}

// Adds a span to what the spans before it gave.
QC_INLINE void merge(Softmax &state, float *out, Softmax span, const float *values, int width, bool first) {
  if (first) {
    state = span;
    for (int e = 0; e < width; e += 16) store(out + e, load(values + e));
    return;
  }
  const float top = state.top > span.top ? state.top : span.top;
  float factors[16] = {state.top - top, span.top - top};
  store(factors, exponential(load(factors)));
  const F16 old = set1(factors[0]), now = set1(factors[1]);
  state = {top, state.sum * factors[0] + span.sum * factors[1]};
  for (int e = 0; e < width; e += 16) store(out + e, fma(load(out + e), old, load(values + e) * now));
}

// One row and G query heads over one key head.
template <int G, typename Element>
void attend(const qc_cache &cache, const Pages &pages, const qc_attention_rule &rule, const float *q, int kv_head,
            float *out) {
  const int key_width = cache.key_width, value_width = cache.value_width, position = pages.last;
  const int first = rule.window > 0 && position >= rule.window ? position - rule.window + 1 : 0;
  const int64_t key_stride = (int64_t)cache.kv_heads * key_width, value_stride = (int64_t)cache.kv_heads * value_width;
  const Element *keys = (const Element *)cache.keys + (int64_t)kv_head * key_width;
  const Element *values = (const Element *)cache.values + (int64_t)kv_head * value_width;
  alignas(64) float weights[G][kSpan];
  alignas(64) float totals[G][kMaxWidth], span_totals[G][kMaxWidth];
  int64_t offsets[kSpan];
  Softmax states[G];
  bool is_first = true;
  for (int span = first / kSpan * kSpan; span <= position; span += kSpan) {
    const int begin = (int)larger(first - span, 0), end = (int)smaller(position + 1 - span, kSpan);
    F16 tops[G];
    for (int g = 0; g < G; ++g) tops[g] = set1(-__builtin_inff());
    for (int i = begin / 16 * 16; i < end; i += 16) {
      const Element *places[16];
      for (int j = 0; j < 16; ++j) {
        // Lanes before the window look at its first position: what lies before it may be freed.
        const int64_t slot = pages.slot(span + (int)larger(i + j, begin));
        offsets[i + j] = slot * value_stride;
        places[j] = keys + slot * key_stride;
      }
      for (int g = 0; g < G; ++g) {
        F16 scores = scores_of(q + g * key_width, key_width, places, rule);
        scores = lanes_or(scores, (int)larger(begin - i, 0), (int)smaller(end - i, 16), -__builtin_inff());
        tops[g] = maximum(tops[g], scores);
        store(weights[g] + i, scores);
      }
    }
    Softmax spans[G];
    for (int g = 0; g < G; ++g) {
      const float top = largest(tops[g]);
      F16 total = set1(0.0f);
      for (int i = begin / 16 * 16; i < end; i += 16) {
        F16 weight = exponential(load(weights[g] + i) - set1(top));
        weight = lanes_or(weight, (int)larger(begin - i, 0), (int)smaller(end - i, 16), 0.0f);
        store(weights[g] + i, weight);
        total = total + weight;
      }
      spans[g] = {top, sum(total)};
    }
    weigh<G>(weights, offsets, begin, end, values, value_width, span_totals);
    for (int g = 0; g < G; ++g) merge(states[g], totals[g], spans[g], span_totals[g], value_width, is_first);
    is_first = false;
  }
  for (int g = 0; g < G; ++g)
    for (int e = 0; e < value_width; e += 16)
      store_upto(out + g * value_width + e, load(totals[g] + e) / set1(states[g].sum), value_width - e);
}

template <typename Element>
void attend_some(int heads, const qc_cache &cache, const Pages &pages, const qc_attention_rule &rule, const float *q,
                 int kv_head, float *out) {
  switch (heads) {
    case 1: attend<1, Element>(cache, pages, rule, q, kv_head, out); break;
    case 2: attend<2, Element>(cache, pages, rule, q, kv_head, out); break;
    case 3: attend<3, Element>(cache, pages, rule, q, kv_head, out); break;
    default: attend<4, Element>(cache, pages, rule, q, kv_head, out); break;
  }
}

void attention_rows(const qc_cache &cache, const qc_paging &paging, const qc_attention_rule &rule, const float *q,
                    int64_t ldq, float *out, int64_t ldo, int64_t rows, const Team &team) {
  const int group = rule.heads / cache.kv_heads, parts = (int)divide_up(group, kHeads);
  const int64_t units = rows * cache.kv_heads * parts;
  for (int64_t unit = team.index; unit < units; unit += team.count) {
    const int64_t row = unit / parts / cache.kv_heads;
    const int kv_head = (int)(unit / parts % cache.kv_heads), part = (int)(unit % parts);
    const int from = group * part / parts, heads = group * (part + 1) / parts - from;
    const int head = kv_head * group + from;
    const Pages pages = {paging.tables + (int64_t)paging.sequences[row] * paging.table_width, paging.block_tokens,
                         paging.positions[row]};
    const float *queries = q + row * ldq + (int64_t)head * cache.key_width;
    float *place = out + row * ldo + (int64_t)head * cache.value_width;
    cache.type == QC_BF16 ? attend_some<uint16_t>(heads, cache, pages, rule, queries, kv_head, place)
                          : attend_some<float>(heads, cache, pages, rule, queries, kv_head, place);
  }
}

QC_INLINE void write_head(const float *x, void *cache, int type, int64_t offset, int width) {
  for (int e = 0; e < width; e += 16) {
    F16 v = load_upto(x + e, width - e);
    if (type == QC_BF16)
      store_typed((uint16_t *)cache + offset + e, v, width - e);
    else
      store_typed((float *)cache + offset + e, v, width - e);
  }
}

QC_INLINE int64_t slot_of_row(const qc_paging &paging, int64_t row) {
  return Pages{paging.tables + (int64_t)paging.sequences[row] * paging.table_width, paging.block_tokens,
               paging.positions[row]}
      .slot(paging.positions[row]);
}

void write_rows(const qc_cache &cache, const qc_paging &paging, const float *keys, int64_t ldk, const float *values,
                int64_t ldv, int64_t rows, const Team &team) {
  const Range mine = share(rows, team);
  for (int64_t row = mine.begin; row < mine.end; ++row) {
    const int64_t first = slot_of_row(paging, row) * cache.kv_heads;
    for (int head = 0; head < cache.kv_heads; ++head) {
      write_head(keys + row * ldk + head * cache.key_width, cache.keys, cache.type, (first + head) * cache.key_width,
                 cache.key_width);
      write_head(values + row * ldv + head * cache.value_width, cache.values, cache.type,
                 (first + head) * cache.value_width, cache.value_width);
    }
  }
}
