// A whole decoder layer between two synchronisations with Python. Included once per instruction set.
//
// The same operations as one by one, on the same rows, in the same order: the same bits.

// Scratch of a step, carved out of one piece of memory by every thread alike.
struct Workspace {
  float *normed, *qkv, *attended, *projected, *gate_up, *gated, *shrunk;
};

struct LayerShape {
  int64_t query_width, kv_key_width, kv_value_width;  // of all heads together

  explicit LayerShape(const qc_layer &layer)
      : query_width((int64_t)layer.rule.heads * layer.cache->key_width),
        kv_key_width((int64_t)layer.cache->kv_heads * layer.cache->key_width),
        kv_value_width((int64_t)layer.cache->kv_heads * layer.cache->value_width) {}
  int64_t qkv_width() const { return query_width + kv_key_width + kv_value_width; }
  int64_t attended_width(const qc_layer &layer) const { return (int64_t)layer.rule.heads * layer.cache->value_width; }
};

QC_INLINE int64_t layer_shrunk_size(const qc_layer &layer, const qc_step &step) {
  const qc_linear *const output[] = {layer.output}, *const down[] = {layer.down};
  int64_t size = shrunk_size(layer.qkv, layer.qkv_parts, step.segments, step.segment_count);
  size = larger(size, shrunk_size(output, 1, step.segments, step.segment_count));
  size = larger(size, shrunk_size(layer.gate_up, layer.gate_up_parts, step.segments, step.segment_count));
  return larger(size, shrunk_size(down, 1, step.segments, step.segment_count));
}

int64_t layer_workspace_size(const qc_layer &layer, const qc_step &step) {
  const LayerShape shape(layer);
  const int64_t per_row = 2 * (int64_t)layer.hidden + shape.qkv_width() + shape.attended_width(layer) +
                          3 * (int64_t)layer.intermediate;
  return per_row * step.rows + layer_shrunk_size(layer, step) + 7 * 16;
}

QC_INLINE Workspace carve(const qc_layer &layer, const qc_step &step, float *memory) {
  const LayerShape shape(layer);
  auto take = [&](int64_t width) {
    float *place = memory;
    memory += divide_up(width * step.rows, 16) * 16;
    return place;
  };
  Workspace work;
  work.normed = take(layer.hidden);
  work.qkv = take(shape.qkv_width());
  work.attended = take(shape.attended_width(layer));
  work.projected = take(layer.hidden);
  work.gate_up = take(2 * (int64_t)layer.intermediate);
  work.gated = take(layer.intermediate);
  work.shrunk = memory;
  return work;
}

// One linear operation: base and shrink, then expand; the team waits before results are used.
void linear_with_update(const qc_linear *const *parts, int part_count, const float *x, int64_t ldx, float *y,
                        int64_t ldy, int64_t rows, const qc_segment *segments, int64_t segment_count, float *shrunk,
                        bool accumulate, const Team &team) {
  base_products(parts, part_count, x, ldx, y, ldy, rows, accumulate, team);
  if (shrunk_size(parts, part_count, segments, segment_count) > 0) {
    shrink_all(parts, part_count, x, ldx, segments, segment_count, shrunk, team);
    team.barrier();
    expand_all(parts, part_count, segments, segment_count, shrunk, y, ldy, team);
  }
  team.barrier();
}

// Norms per head, rotary positions, and keys and values into the cache.
QC_INLINE void place_heads(const qc_layer &layer, const qc_step &step, float *qkv, const Team &team) {
  const LayerShape shape(layer);
  const qc_cache &cache = *layer.cache;
  const int heads = layer.rule.heads, kv_heads = cache.kv_heads, width = cache.key_width;
  const int units = heads + 2 * kv_heads;
  const Range mine = share((int64_t)step.rows * units, team);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int64_t row = i / units;
    const int unit = (int)(i % units);
    float *start = qkv + row * shape.qkv_width();
    if (unit >= heads + kv_heads) {
      const int head = unit - heads - kv_heads;
      const int64_t slot = slot_of_row(step.paging, row) * kv_heads + head;
      write_head(start + shape.query_width + shape.kv_key_width + (int64_t)head * cache.value_width, cache.values,
                 cache.type, slot * cache.value_width, cache.value_width);
      continue;
    }
    float *head = start + (int64_t)unit * width;
    const float *norm = unit < heads ? layer.query_norm : layer.key_norm;
    if (norm) norm_row(head, norm, head, width, layer.norm_epsilon);
    if (layer.rotary_width)
      rotate_head(head, step.cosines + row * layer.rotary_width, step.sines + row * layer.rotary_width,
                  layer.rotary_width);
    if (unit >= heads) {
      const int64_t slot = slot_of_row(step.paging, row) * kv_heads + (unit - heads);
      write_head(head, cache.keys, cache.type, slot * width, width);
    }
  }
  team.barrier();
}

// x += product of `linear` and `input`, normalised first where the layer does that.
QC_INLINE void add_to_residual(const qc_layer &layer, const qc_step &step, const qc_linear *linear, const float *norm,
                               const float *input, int64_t width, float *x, const Workspace &work, const Team &team) {
  const qc_linear *const parts[] = {linear};
  if (!norm) {
    linear_with_update(parts, 1, input, width, x, layer.hidden, step.rows, step.segments, step.segment_count,
                       work.shrunk, true, team);
    return;
  }
  linear_with_update(parts, 1, input, width, work.projected, layer.hidden, step.rows, step.segments,
                     step.segment_count, work.shrunk, false, team);
  const Range mine = share(step.rows, team);
  for (int64_t row = mine.begin; row < mine.end; ++row) {
    float *added = work.projected + row * layer.hidden, *place = x + row * layer.hidden;
    norm_row(added, norm, added, layer.hidden, layer.norm_epsilon);
    for (int i = 0; i < layer.hidden; i += 16)
      store_upto(place + i, load_upto(place + i, layer.hidden - i) + load_upto(added + i, layer.hidden - i),
                 layer.hidden - i);
  }
  team.barrier();
}

void layer_forward(const qc_layer &layer, const qc_step &step, float *x, float *memory, const Team &team) {
  const LayerShape shape(layer);
  const Workspace work = carve(layer, step, memory);
  const int64_t rows = step.rows, hidden = layer.hidden;
  norm_rows(x, hidden, layer.input_norm, work.normed, hidden, rows, layer.hidden, layer.norm_epsilon, team);
  team.barrier();
  linear_with_update(layer.qkv, layer.qkv_parts, work.normed, hidden, work.qkv, shape.qkv_width(), rows,
                     step.segments, step.segment_count, work.shrunk, false, team);
  place_heads(layer, step, work.qkv, team);
  attention_rows(*layer.cache, step.paging, layer.rule, work.qkv, shape.qkv_width(), work.attended,
                 shape.attended_width(layer), rows, team);
  team.barrier();
  add_to_residual(layer, step, layer.output, layer.attention_norm, work.attended, shape.attended_width(layer), x, work,
                  team);
  norm_rows(x, hidden, layer.mlp_norm, work.normed, hidden, rows, layer.hidden, layer.norm_epsilon, team);
  team.barrier();
  linear_with_update(layer.gate_up, layer.gate_up_parts, work.normed, hidden, work.gate_up,
                     2 * (int64_t)layer.intermediate, rows, step.segments, step.segment_count, work.shrunk, false,
                     team);
  gated_rows(work.gate_up, 2 * (int64_t)layer.intermediate, work.gated, layer.intermediate, rows, layer.intermediate,
             layer.activation, team);
  team.barrier();
  add_to_residual(layer, step, layer.down, layer.after_mlp_norm, work.gated, layer.intermediate, x, work, team);
}
