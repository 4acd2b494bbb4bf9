// Causal attention over paged keys and values, read in place. Included once per instruction set.
//
// A row's numbers depend on its own position, query, and sequence alone. Positions are taken in spans of
// kSpan, by absolute position; a span's scores, largest score, weights and weighted values are computed in order
// of position, and spans are merged in order (online softmax, Milakov & Gimelshein 2018). Neither how a prompt
// was cut into chunks nor where blocks lie changes an operation or its order.

constexpr int kSpan = 256;     // positions of one softmax
constexpr int kMaxWidth = QC_MAX_WIDTH;
constexpr int kHeads = 4;      // query heads that are computed side by side over one key head
constexpr int kParts = 4;      // so many of those at most in one piece of work

// Finds positions of one sequence in the cache.
struct Pages {
  const int32_t *table;
  int block_tokens, last;  // last: the newest position there is

  QC_INLINE int64_t slot(int position) const {
    return (int64_t)table[position / block_tokens] * block_tokens + position % block_tokens;
  }

  // Slots of 16 positions from a multiple of 16 on; those outside of [begin, last] lie in blocks of the sequence.
  QC_INLINE void slots(int from, int begin, int64_t (&found)[16]) const {
    if (block_tokens % 16 == 0) {
      const int64_t first = slot(from);
      for (int j = 0; j < 16; ++j) found[j] = first + j;
      return;
    }
    for (int j = 0; j < 16; ++j) found[j] = slot((int)larger(smaller(from + j, last), begin));
  }
};

// Softmax state of one query head: largest score, sum of weights; its weighted values are kept beside it.
struct Softmax {
  float top, sum;
};

// products[g][i] = q[g] · keys[i], not yet added up over lanes, for P of the positions and G queries side by side.
template <int G, int P, typename Element>
QC_INLINE void multiply(const float *q, int width, const Element *const *keys, F16 (*products)[16]) {
  F16 totals[G][P];
  for (int g = 0; g < G; ++g)
    for (int i = 0; i < P; ++i) totals[g][i] = set1(0.0f);
  for (int e = 0; e < width; e += 16) {
    const int n = width - e;
    F16 queries[G];
    for (int g = 0; g < G; ++g) queries[g] = load_upto(q + g * width + e, n);
    for (int i = 0; i < P; ++i) {
      F16 key = load_upto(keys[i] + e, n);
      for (int g = 0; g < G; ++g) accumulate(totals[g][i], queries[g], key);
    }
  }
  for (int g = 0; g < G; ++g)
    for (int i = 0; i < P; ++i) products[g][i] = totals[g][i];
}

// Scores of 16 positions against G queries.
template <int G, typename Element>
QC_INLINE void score(const float *q, int width, const Element *const (&keys)[16], const qc_attention_rule &rule,
                     F16 (&scores)[G]) {
  constexpr int P = kRegisters >= 32 ? (G == 1 ? 16 : G <= 3 ? 8 : 4) : (G == 1 ? 4 : 2);
  F16 products[G][16];
  for (int i = 0; i < 16; i += P)
    multiply<G, P>(q, width, keys + i, (F16(*)[16])((F16 *)products + i));
  for (int g = 0; g < G; ++g) {
    scores[g] = sums(products[g]) * set1(rule.scale);
    if (rule.softcap != 0.0f)
      scores[g] = set1(rule.softcap) * hyperbolic_tangent(scores[g] / set1(rule.softcap));
  }
}

// totals[g] += Σ weights[g][i] · values[i] over positions [begin, end) in order, for G heads side by side.
template <int G, typename Element>
QC_INLINE void weigh(const float (*weights)[kSpan], const int64_t *slots, int begin, int end, const Element *values,
                     int64_t stride, int width, float (*totals)[kMaxWidth]) {
  for (int e = 0; e < width; e += 64) {
    const int vectors = (int)smaller(4, divide_up(width - e, 16));
    F16 sums[G][4];
    for (int g = 0; g < G; ++g)
      for (int v = 0; v < 4; ++v) sums[g][v] = load(totals[g] + e + 16 * v);
    for (int i = begin; i < end; ++i) {
      const Element *value = values + slots[i] * stride + e;
      F16 parts[4];
      if (e + 64 <= width)
        for (int v = 0; v < 4; ++v) parts[v] = load(value + 16 * v);
      else
        for (int v = 0; v < 4; ++v) parts[v] = v < vectors ? load_upto(value + 16 * v, width - e - 16 * v) : set1(0.0f);
      for (int g = 0; g < G; ++g) {
        F16 weight = set1(weights[g][i]);
        for (int v = 0; v < 4; ++v) accumulate(sums[g][v], weight, parts[v]);
      }
    }
    for (int g = 0; g < G; ++g)
      for (int v = 0; v < 4; ++v) store(totals[g] + e + 16 * v, sums[g][v]);
  }
}

// Adds a span to what the spans before it gave; before the first the sum is zero.
QC_INLINE void merge(Softmax &state, float *totals, Softmax span, const float *values, int width) {
  if (state.sum == 0.0f) {
    state = span;
    for (int e = 0; e < width; e += 16) store(totals + e, load(values + e));
    return;
  }
  const float top = state.top > span.top ? state.top : span.top;
  float factors[16] = {state.top - top, span.top - top};
  store(factors, exponential(load(factors)));
  const F16 old = set1(factors[0]), now = set1(factors[1]);
  state = {top, state.sum * factors[0] + span.sum * factors[1]};
  for (int e = 0; e < width; e += 16) store(totals + e, fma(load(totals + e), old, load(values + e) * now));
}

// Query heads [head, head + count) of a row, which share a key head.
struct Heads {
  int kv_head, head, count;
};

// Asks for what some neighbouring heads keep of 16 positions, ahead of its use: saves a quarter of attention's time
// where caches come from memory.
template <typename Element>
QC_INLINE void fetch(const Element *first, int64_t stride, const int64_t (&slots)[16], int width) {
  for (int j = 0; j < 16; ++j)
    for (int line = 0; line < width; line += 64 / (int)sizeof(Element))
      __builtin_prefetch(first + slots[j] * stride + line, 0, 2);
}

// Some of a row's query heads, and what is known of them in one span.
struct Attending {
  alignas(64) float weights[kHeads * kParts][kSpan];
  alignas(64) float totals[kHeads * kParts][kMaxWidth];       // of all spans so far
  alignas(64) float span_totals[kHeads * kParts][kMaxWidth];  // of this one
  int64_t slots[kSpan];
  Softmax states[kHeads * kParts];
  Heads parts[kParts];
  int part_count;
};

template <int G, typename Element>
void score_heads(const qc_cache &cache, const qc_attention_rule &rule, const float *q, int kv_head,
                 const int64_t (&slots)[16], int from, int to, float (*weights)[kSpan]) {
  const int64_t stride = (int64_t)cache.kv_heads * cache.key_width;
  const Element *keys = (const Element *)cache.keys + (int64_t)kv_head * cache.key_width;
  const Element *places[16];
  for (int j = 0; j < 16; ++j) places[j] = keys + slots[j] * stride;
  F16 scores[G];
  score<G>(q, cache.key_width, places, rule, scores);
  // What lies there for lanes outside of the window may be anything, NaN included.
  for (int g = 0; g < G; ++g) store(weights[g], lanes_or(scores[g], from, to, -__builtin_inff()));
}

template <int G, typename Element>
void weigh_heads(const qc_cache &cache, int kv_head, const float (*weights)[kSpan], const int64_t *slots, int begin,
                 int end, float (*totals)[kMaxWidth]) {
  const Element *values = (const Element *)cache.values + (int64_t)kv_head * cache.value_width;
  weigh<G>(weights, slots, begin, end, values, (int64_t)cache.kv_heads * cache.value_width, cache.value_width, totals);
}

// Scores to weights exp(score - top) and their sum, over lanes first.
QC_INLINE Softmax soften(float *weights, int begin, int end) {
  F16 tops = set1(-__builtin_inff());
  for (int i = begin / 16 * 16; i < end; i += 16) tops = maximum(tops, load(weights + i));
  const float top = largest(tops);
  F16 total = set1(0.0f);
  for (int i = begin / 16 * 16; i < end; i += 16) {
    F16 weight = exponential(load(weights + i) - set1(top));
    weight = lanes_or(weight, (int)larger(begin - i, 0), (int)smaller(end - i, 16), 0.0f);
    store(weights + i, weight);
    total = total + weight;
  }
  return {top, sum(total)};
}

#define QC_BY_HEADS(count, function, ...)                    \
  switch (count) {                                           \
    case 1: function<1, Element>(__VA_ARGS__); break;        \
    case 2: function<2, Element>(__VA_ARGS__); break;        \
    case 3: function<3, Element>(__VA_ARGS__); break;        \
    default: function<4, Element>(__VA_ARGS__); break;       \
  }

// Positions [begin, end) of one span, from `span` on: 16 at a time for all heads, so that memory is read in order.
template <typename Element>
void attend_span(const qc_cache &cache, const Pages &pages, const qc_attention_rule &rule, const float *q, int span,
                 int begin, int end, Attending &work) {
  const int aligned = begin / 16 * 16, heads = work.parts[work.part_count - 1].head +
                                               work.parts[work.part_count - 1].count - work.parts[0].head;
  const int first_kv = work.parts[0].kv_head, kv_heads = work.parts[work.part_count - 1].kv_head + 1 - first_kv;
  const int64_t key_stride = (int64_t)cache.kv_heads * cache.key_width;
  const int64_t value_stride = (int64_t)cache.kv_heads * cache.value_width;
  auto slots_at = [&](int i) -> int64_t(&)[16] { return (int64_t(&)[16])work.slots[i]; };
  pages.slots(span + aligned, span + begin, slots_at(aligned));
  for (int i = aligned; i < end; i += 16) {
    const int64_t(&slots)[16] = slots_at(i);
    if (i + 16 < end) {
      pages.slots(span + i + 16, span + begin, slots_at(i + 16));
      fetch((const Element *)cache.keys + first_kv * cache.key_width, key_stride, slots_at(i + 16),
            kv_heads * cache.key_width);
    }
    fetch((const Element *)cache.values + first_kv * cache.value_width, value_stride, slots, kv_heads * cache.value_width);
    for (int p = 0; p < work.part_count; ++p) {
      const Heads &part = work.parts[p];
      const int local = part.head - work.parts[0].head;
      QC_BY_HEADS(part.count, score_heads, cache, rule, q + (int64_t)part.head * cache.key_width, part.kv_head, slots,
                  (int)larger(begin - i, 0), (int)smaller(end - i, 16), (float(*)[kSpan])(work.weights[local] + i));
    }
  }
  Softmax spans[kHeads * kParts];
  for (int h = 0; h < heads; ++h) {
    spans[h] = soften(work.weights[h], begin, end);
    for (int e = 0; e < cache.value_width; e += 64)
      for (int v = 0; v < 64; v += 16) store(work.span_totals[h] + e + v, set1(0.0f));
  }
  for (int i = aligned; i < end; i += 16)
    for (int p = 0; p < work.part_count; ++p) {
      const Heads &part = work.parts[p];
      const int local = part.head - work.parts[0].head;
      QC_BY_HEADS(part.count, weigh_heads, cache, part.kv_head, work.weights + local, work.slots,
                  (int)larger(begin, i), (int)smaller(end, i + 16), work.span_totals + local);
    }
  for (int h = 0; h < heads; ++h)
    merge(work.states[h], work.totals[h], spans[h], work.span_totals[h], cache.value_width);
}

#undef QC_BY_HEADS

// One row and some of its heads.
template <typename Element>
void attend(const qc_cache &cache, const Pages &pages, const qc_attention_rule &rule, const float *q, float *out,
            Attending &work) {
  const int position = pages.last, width = cache.value_width;
  const int first = rule.window > 0 && position >= rule.window ? position - rule.window + 1 : 0;
  const Heads &last = work.parts[work.part_count - 1];
  const int from = work.parts[0].head, heads = last.head + last.count - from;
  for (int h = 0; h < heads; ++h) work.states[h] = {-__builtin_inff(), 0.0f};
  for (int span = first / kSpan * kSpan; span <= position; span += kSpan)
    attend_span<Element>(cache, pages, rule, q, span, (int)larger(first - span, 0),
                         (int)smaller(position + 1 - span, kSpan), work);
  for (int h = 0; h < heads; ++h)
    for (int e = 0; e < width; e += 16)
      store_upto(out + (int64_t)(from + h) * width + e, load(work.totals[h] + e) / set1(work.states[h].sum), width - e);
}

void attention_rows(const qc_cache &cache, const qc_paging &paging, const qc_attention_rule &rule, const float *q,
                    int64_t ldq, float *out, int64_t ldo, int64_t rows, const Crew &crew) {
  // A key head's queries in parts of kHeads at most; neighbouring parts together where rows alone are enough work.
  const int group = rule.heads / cache.kv_heads, cuts = (int)divide_up(group, kHeads), parts = cache.kv_heads * cuts;
  const int together = (int)larger(1, smaller(smaller(parts, kParts), rows * parts / (4 * crew.threads)));
  const int64_t pieces = divide_up(parts, together);
  crew.each(rows * pieces, [&](int64_t unit) {
    const int64_t row = unit / pieces;
    const int begin = (int)(unit % pieces) * together, end = (int)smaller(parts, begin + together);
    Attending work;
    work.part_count = end - begin;
    for (int p = begin; p < end; ++p) {
      const int kv_head = p / cuts, cut = p % cuts, from = group * cut / cuts;
      work.parts[p - begin] = {kv_head, kv_head * group + from, group * (cut + 1) / cuts - from};
    }
    const Pages pages = {paging.tables + (int64_t)paging.sequences[row] * paging.table_width, paging.block_tokens,
                         paging.positions[row]};
    cache.type == QC_BF16 ? attend<uint16_t>(cache, pages, rule, q + row * ldq, out + row * ldo, work)
                          : attend<float>(cache, pages, rule, q + row * ldq, out + row * ldo, work);
  });
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
                int64_t ldv, int64_t rows, const Crew &crew) {
  each_row(rows, kRowsPerPiece, crew, [&](int64_t row) {
    const int64_t first = slot_of_row(paging, row) * cache.kv_heads;
    for (int head = 0; head < cache.kv_heads; ++head) {
      write_head(keys + row * ldk + head * cache.key_width, cache.keys, cache.type, (first + head) * cache.key_width,
                 cache.key_width);
      write_head(values + row * ldv + head * cache.value_width, cache.values, cache.type,
                 (first + head) * cache.value_width, cache.value_width);
    }
  });
}
