// Drawing tokens: the inverse of a cumulative distribution, likeliest first. Included once per instruction set.
//
// A vocabulary is never put in order. Its likeliest entries are collected in one pass, and the mass of all in the
// same pass; where the likeliest do not settle a draw, the answer says so.

constexpr int kLikeliest = 256;          // entries that are put in order
constexpr int kGathered = 2 * kLikeliest;  // entries that are gathered before the lesser half is dropped
constexpr int kFold = 64;                // vectors whose sum is kept in float

struct Entry {
  float value;
  int32_t index;
};

QC_INLINE bool before(const Entry &a, const Entry &b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// Puts the first `kept` of `count` entries in front, in no order (quickselect; the middle one is the pivot).
inline void select_first(Entry *entries, int count, int kept) {
  if (count <= kept) return;
  for (int low = 0, high = count - 1; low < high;) {
    const Entry pivot = entries[(low + high) / 2];
    int i = low, j = high;
    while (i <= j) {
      while (before(entries[i], pivot)) ++i;
      while (before(pivot, entries[j])) --j;
      if (i <= j) {
        const Entry other = entries[i];
        entries[i++] = entries[j];
        entries[j--] = other;
      }
    }
    if (kept - 1 <= j)
      high = j;
    else if (kept - 1 >= i)
      low = i;
    else
      return;
  }
}

// Insertion is quick enough for a few hundred, most of them in place after halving the gaps.
inline void put_in_order(Entry *entries, int count) {
  for (int gap = count / 2; gap > 0; gap /= 2)
    for (int i = gap; i < count; ++i) {
      const Entry entry = entries[i];
      int j = i;
      for (; j >= gap && before(entry, entries[j - gap]); j -= gap) entries[j] = entries[j - gap];
      entries[j] = entry;
    }
}

// The likeliest `kept` of a row; how many there are.
inline int likeliest_of(const float *x, int64_t width, int kept, Entry *entries) {
  int count = 0;
  float least = -__builtin_inff();  // what does not exceed it is not among them
  for (int64_t i = 0; i < width; i += 16) {
    const int n = (int)smaller(16, width - i);
    if (!(largest(lanes_or(load_upto(x + i, n), 0, n, -__builtin_inff())) > least)) continue;
    for (int64_t k = i; k < i + n; ++k)
      if (x[k] > least) entries[count++] = {x[k], (int32_t)k};
    if (count > kGathered - 16) {
      select_first(entries, count, kept);
      count = kept;
      least = entries[0].value;
      for (int e = 1; e < kept; ++e)
        if (entries[e].value < least) least = entries[e].value;
    }
  }
  select_first(entries, count, kept);
  count = count < kept ? count : kept;
  put_in_order(entries, count);
  return count;
}

// The sum of e^((x - top) / temperature) over a row.
inline double mass_of(const float *x, int64_t width, float top, double temperature) {
  const F16 factor = set1((float)(1.0 / temperature)), highest = set1(top);
  double mass = 0.0;
  for (int64_t i = 0; i < width;) {
    F16 part = set1(0.0f);
    for (int v = 0; v < kFold && i < width; ++v, i += 16) {
      const int n = (int)smaller(16, width - i);
      part = part + lanes_or(exponential((load_upto(x + i, n) - highest) * factor), 0, n, 0.0f);
    }
    mass += (double)sum(part);
  }
  return mass;
}

// The token of one draw; -1 if it is not settled here.
inline int64_t draw_one(const qc_draw &draw, int64_t width) {
  const bool bounded = draw.top_k > 0 && draw.top_k < width;
  if (bounded && draw.top_k > kLikeliest) return -1;
  if (argmax_row(draw.logits, width) < 0) return -1;
  Entry entries[kGathered];
  const int wanted = bounded ? (int)draw.top_k : (int)smaller(kLikeliest, width);
  const int count = likeliest_of(draw.logits, width, wanted, entries);
  const float top = entries[0].value;
  double probabilities[kLikeliest], mass = 0.0;
  for (int e = 0; e < count; ++e) {
    probabilities[e] = __builtin_exp(((double)entries[e].value - (double)top) / draw.temperature);
    mass += probabilities[e];
  }
  const bool complete = bounded || width <= count;
  if (!complete) mass = mass_of(draw.logits, width, top, draw.temperature);
  double before_it = 0.0, kept = 0.0;
  int last = 0;
  for (; last < count; ++last) {
    const double probability = probabilities[last] / mass;
    if (before_it >= draw.top_p || probability < draw.min_p * probabilities[0] / mass) break;
    before_it += probability;
  }
  const bool cut = last < count, cuts = draw.top_p < 1.0 || draw.min_p > 0.0;
  if (!complete && !cut && (cuts || draw.uniform >= before_it - 1e-5)) return -1;
  const double target = draw.uniform * (complete || cut ? before_it : 1.0);
  for (int e = 0; e < last; ++e) {
    kept += probabilities[e] / mass;
    if (kept > target) return entries[e].index;
  }
  return entries[last - 1].index;
}

QC_INLINE void draw_rows(const qc_draw *draws, int64_t count, int64_t width, int64_t *tokens, const Crew &crew) {
  crew.each(count, [&](int64_t row) { tokens[row] = draw_one(draws[row], width); });
}
