// A whole decoder layer between two synchronisations with Python. Included once per instruction set.
//
// The same operations as one by one, on the same rows, in the same order: the same bits.

// Scratch of a step, carved out of one piece of memory.
struct Workspace {
  float *normed, *qkv, *attended, *projected, *gate_up, *gated, *lora;
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

QC_INLINE int64_t layer_linear_size(const qc_layer &layer, const qc_step &step) {
  const qc_linear *const output[] = {layer.output}, *const down[] = {layer.down};
  int64_t size = linear_size(layer.qkv, layer.qkv_parts, step.rows, step.segments, step.segment_count);
  size = larger(size, linear_size(output, 1, step.rows, step.segments, step.segment_count));
  size = larger(size, linear_size(layer.gate_up, layer.gate_up_parts, step.rows, step.segments, step.segment_count));
  return larger(size, linear_size(down, 1, step.rows, step.segments, step.segment_count));
}

int64_t layer_workspace_size(const qc_layer &layer, const qc_step &step) {
  const LayerShape shape(layer);
  const int64_t per_row = 2 * (int64_t)layer.hidden + shape.qkv_width() + shape.attended_width(layer) +
                          3 * (int64_t)layer.intermediate;
  return per_row * step.rows + layer_linear_size(layer, step) + 7 * 16;
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
  work.lora = memory;
  return work;
}

// Norms of queries and keys, rotary positions, and keys and values into the cache.
QC_INLINE void place_heads_of_row(const qc_layer &layer, const qc_step &step, float *qkv, int64_t row) {
  const LayerShape shape(layer);
  const qc_cache &cache = *layer.cache;
  const int heads = layer.rule.heads, kv_heads = cache.kv_heads, width = cache.key_width;
  const int64_t slot = slot_of_row(step.paging, row) * kv_heads;
  const float *cosines = step.cosines + row * layer.rotary_width, *sines = step.sines + row * layer.rotary_width;
  if (layer.norm_all_heads) {
    float *keys = qkv + shape.query_width;
    if (layer.query_norm) norm_row(qkv, layer.query_norm, qkv, (int)shape.query_width, layer.norm_epsilon);
    if (layer.key_norm) norm_row(keys, layer.key_norm, keys, (int)shape.kv_key_width, layer.norm_epsilon);
  }
  for (int unit = 0; unit < heads + kv_heads; ++unit) {
    float *head = qkv + (int64_t)unit * width;
    const float *norm = unit < heads ? layer.query_norm : layer.key_norm;
    if (norm && !layer.norm_all_heads) norm_row(head, norm, head, width, layer.norm_epsilon);
    if (layer.rotary_width) rotate_head(head, cosines, sines, layer.rotary_width);
    if (unit >= heads) write_head(head, cache.keys, cache.type, (slot + unit - heads) * width, width);
  }
  const float *values = qkv + shape.query_width + shape.kv_key_width;
  for (int head = 0; head < kv_heads; ++head)
    write_head(values + (int64_t)head * cache.value_width, cache.values, cache.type,
               (slot + head) * cache.value_width, cache.value_width);
}

// Rows of x as the next product takes them: normalised, where there is a norm.
QC_INLINE const float *normalised(const qc_layer &layer, const qc_step &step, const float *norm, const float *x,
                                  const Workspace &work, const Crew &crew) {
  if (!norm) return x;
  norm_rows(x, layer.hidden, norm, work.normed, layer.hidden, step.rows, layer.hidden, layer.norm_epsilon, crew);
  return work.normed;
}

// x += product of `linear` and `input`, normalised and scaled first where the layer does that.
QC_INLINE void add_to_residual(const qc_layer &layer, const qc_step &step, const qc_linear *linear, const float *norm,
                               const float *input, int64_t width, float *x, const Workspace &work, const Crew &crew) {
  const qc_linear *const parts[] = {linear};
  const int64_t hidden = layer.hidden;
  if (!norm && layer.residual_scale == 1.0f) {
    linear_with_update(parts, 1, input, width, x, hidden, step.rows, step.segments, step.segment_count, work.lora,
                       true, true, crew);
    return;
  }
  linear_with_update(parts, 1, input, width, work.projected, hidden, step.rows, step.segments, step.segment_count,
                     work.lora, false, true, crew);
  each_row(step.rows, kRowsPerPiece, crew, [&](int64_t row) {
    float *added = work.projected + row * hidden, *place = x + row * hidden;
    if (norm) norm_row(added, norm, added, layer.hidden, layer.norm_epsilon);
    for (int i = 0; i < layer.hidden; i += 16) {
      const int n = layer.hidden - i;
      store_upto(place + i, load_upto(place + i, n) + load_upto(added + i, n) * set1(layer.residual_scale), n);
    }
  });
}

void layer_forward(const qc_layer &layer, const qc_step &step, float *x, float *memory, const Crew &crew) {
  const LayerShape shape(layer);
  const Workspace work = carve(layer, step, memory);
  const int64_t rows = step.rows, hidden = layer.hidden, qkv_width = shape.qkv_width();
  const int64_t attended_width = shape.attended_width(layer), gate_up_width = 2 * (int64_t)layer.intermediate;
  const float *input = normalised(layer, step, layer.input_norm, x, work, crew);
  linear_with_update(layer.qkv, layer.qkv_parts, input, hidden, work.qkv, qkv_width, rows, step.segments,
                     step.segment_count, work.lora, false, true, crew);
  each_row(rows, kRowsPerPiece, crew,
           [&](int64_t row) { place_heads_of_row(layer, step, work.qkv + row * qkv_width, row); });
  attention_rows(*layer.cache, step.paging, layer.rule, work.qkv, qkv_width, work.attended, attended_width, rows,
                 crew);
  add_to_residual(layer, step, layer.output, layer.attention_norm, work.attended, attended_width, x, work, crew);
  input = normalised(layer, step, layer.mlp_norm, x, work, crew);
  linear_with_update(layer.gate_up, layer.gate_up_parts, input, hidden, work.gate_up, gate_up_width, rows,
                     step.segments, step.segment_count, work.lora, false, true, crew);
  gated_rows(work.gate_up, gate_up_width, work.gated, layer.intermediate, rows, layer.intermediate, layer.activation,
             crew);
  add_to_residual(layer, step, layer.down, layer.after_mlp_norm, work.gated, layer.intermediate, x, work, crew);
}
