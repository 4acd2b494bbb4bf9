// The C interface of the native CPU operations. Knows tensors as pointers and shapes; no Python, no torch.
//
// Every operation computes each row in an order that depends on nothing but that row's own sequence: results
// are the same bits for any batch, chunking, block placement, number of threads, and instruction set (products
// of medium precision: of the one that has them).
//
// T tokens (rows), D in-features, O out-features, R rank, K key/value heads, H query heads, E head dimension.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QC_MAX_WIDTH 512

enum qc_type { QC_F32 = 0, QC_BF16 = 1 };
enum qc_form { QC_NF4 = 0, QC_DENSE_F32 = 1, QC_DENSE_BF16 = 2 };
enum qc_precision { QC_HIGHEST = 0, QC_MEDIUM = 1 };
enum qc_bf16 { QC_BF16_NONE = 0, QC_BF16_SLOW = 1, QC_BF16_FAST = 2 };  // slower, faster than float32
enum qc_activation { QC_SILU = 0, QC_GELU_TANH = 1 };
enum qc_isa { QC_GENERIC = 0, QC_NEON = 1, QC_AVX2 = 2, QC_AVX512 = 3 };

// One adapter's factors for one linear layer: update = scaling · (x · aᵀ) · b. Rank 0: no update.
typedef struct {
  const void *a;  // [R, D]
  const void *b;  // [R, O]
  int32_t rank;
  int32_t type;  // qc_type of a and b
  float scaling;
  int32_t unused;
} qc_factors;

// One linear layer, weights in tiles of 16 out-features, the last one padded with zeros.
typedef struct {
  const void *weights;      // NF4: uint32 [tiles][D/8][16], column 8w+j in bits 4j…4j+3 of word w
                            // dense: float or bfloat16 [tiles][D][16]
  const float *scales;      // NF4: [tiles][D/group][16]
  const float *bias;        // [O] or null
  const qc_factors *slots;  // by adapter slot
  int64_t slot_count;
  int32_t in;     // D; NF4: a multiple of 8
  int32_t out;    // O
  int32_t form;   // qc_form
  int32_t group;  // NF4: columns per scale, 8, 16, 32 or 64, a divisor of D
  int32_t precision;  // qc_precision; medium: of NF4 and bfloat16 weights, activations are rounded to bfloat16 if the
                      // instruction set has such products; sums are float32
  int32_t unused;
} qc_linear;

// Rows [start, end) use the adapter in `slot`, its update times `scale`. Disjoint; rows outside have none.
typedef struct {
  int32_t start, end, slot;
  float scale;
} qc_segment;

// Where each row of a step stands in its own sequence, and where that sequence's keys and values lie.
typedef struct {
  const int32_t *positions;  // [T] the row's own position
  const int32_t *sequences;  // [T] row of `tables`
  const int32_t *tables;     // [sequences, table_width] cache blocks by position / block_tokens
  int32_t table_width;
  int32_t block_tokens;
} qc_paging;

// Keys and values of one layer: [blocks, block_tokens, K, E], both of one type.
typedef struct {
  void *keys, *values;
  int32_t type;  // qc_type
  int32_t kv_heads;
  int32_t key_width, value_width;  // values: at most QC_MAX_WIDTH
} qc_cache;

typedef struct {
  float scale;
  float softcap;   // scores become softcap·tanh(score/softcap); 0: they do not
  int32_t window;  // a row at position p sees p-window+1 … p; 0: all
  int32_t heads;   // H, a multiple of kv_heads
} qc_attention_rule;

// One decoder layer, each norm only where there is one:
// x += s·norm(o(attention(rotary(norm(qkv(norm(x))))))), x += s·norm(down(act(gate(norm(x)))·up(norm(x)))).
typedef struct {
  const qc_linear *qkv[3];  // q, k, v; or one that computes all three side by side
  const qc_linear *output;
  const qc_linear *gate_up[2];  // gate, up; or one that computes both side by side
  const qc_linear *down;
  const float *input_norm;      // [hidden], this and the next three: before attention
  const float *attention_norm;  // after attention, before the residual is added
  const float *mlp_norm;        // before gate and up
  const float *after_mlp_norm;  // before the residual is added
  const float *query_norm, *key_norm;  // before rotary: [E] per head, or [H·E] and [K·E]
  const qc_cache *cache;
  qc_attention_rule rule;
  float norm_epsilon;
  float residual_scale;  // s, of what is added to the residual
  int32_t qkv_parts, gate_up_parts;
  int32_t hidden, intermediate;
  int32_t rotary_width;    // leading dimensions of each head that are rotated, in halves; 0: none
  int32_t activation;      // qc_activation
  int32_t norm_all_heads;  // query_norm and key_norm are over all heads together
} qc_layer;

// What all layers of a step share.
typedef struct {
  const qc_segment *segments;
  int64_t segment_count;
  const float *cosines, *sines;  // [T, rotary_width]
  qc_paging paging;
  int32_t rows;  // T
  int32_t threads;
} qc_step;

// One draw from the distribution that a row of logits is.
typedef struct {
  const float *logits;
  double temperature;     // above 0
  double top_p, min_p;    // 1 and 0: nothing is left out
  double uniform;         // in [0, 1)
  int64_t top_k;          // 0: all
} qc_draw;

// A head in seven bits: tiles of 16 out-features, in them eights of columns, in those pairs (i, i + 4), as store_pairs
// has them. weight = (code - 64) · step, to within an error whose length is given, that of computing included.
typedef struct {
  const uint8_t *codes;         // [N, ceil(D/8), 4, 16, 2]
  const float *steps, *errors;  // [N, 16]
} qc_screen;

// The interface that a library was built with: another number whenever callers have to change with it.
enum { QC_INTERFACE = 2 };
int32_t qc_interface(void);

// What operations return that need memory besides their arguments. Without it nothing was written.
enum qc_result { QC_DONE = 0, QC_NOT_HERE = -1, QC_NO_MEMORY = -2 };

// Instruction sets: what this processor and this build can run, best last; the one in use.
int32_t qc_isa_available(int32_t isa);
int32_t qc_isa_active(void);
int32_t qc_isa_use(int32_t isa);   // 0, or -1 if it is not available
int32_t qc_isa_bf16(int32_t isa);  // qc_bf16: its products of medium precision

// How long helper threads look for work before they sleep, microseconds.
void qc_spin_for(int64_t microseconds);

// y[:, offset of part i] = x Wᵢᵀ + biasᵢ + the update of each row's adapter, parts side by side; or += .
int32_t qc_linear_forward(const qc_linear *const *parts, int32_t part_count, const float *x, int64_t ldx, float *y,
                          int64_t ldy, int32_t rows, const qc_segment *segments, int64_t segment_count,
                          int32_t accumulate, int32_t threads);

// y += the update of each row's adapter alone.
int32_t qc_lora_delta(const qc_linear *const *parts, int32_t part_count, const float *x, int64_t ldx, float *y,
                      int64_t ldy, const qc_segment *segments, int64_t segment_count, int32_t threads);

// keys [T, K, E], values [T, K, E'] into the cache at each row's position.
void qc_cache_write(const qc_cache *cache, const qc_paging *paging, const float *keys, int64_t ldk,
                    const float *values, int64_t ldv, int32_t rows, int32_t threads);

// out [T, H, E'] = softmax(rule(q kᵀ)) v over each row's own past and itself, read through the block tables.
void qc_attention(const qc_cache *cache, const qc_paging *paging, const qc_attention_rule *rule, const float *q,
                  int64_t ldq, float *out, int64_t ldo, int32_t rows, int32_t threads);

// y = weight · x / sqrt(mean(x²) + epsilon), row by row.
void qc_rms_norm(const float *x, int64_t ldx, const float *weight, float *y, int64_t ldy, int32_t rows,
                 int32_t width, float epsilon, int32_t threads);

// x [T, heads, width] rotated in place: halves of the first rotary_width dimensions, as Llama does.
void qc_rotary(float *x, int64_t ldx, int32_t heads, int32_t width, const float *cosines, const float *sines,
               int32_t rotary_width, int32_t rows, int32_t threads);

// y [T, width] = act(x[:, :width]) · x[:, width:].
void qc_gated(const float *x, int64_t ldx, float *y, int64_t ldy, int32_t rows, int32_t width, int32_t activation,
              int32_t threads);

// x [T, hidden], contiguous, becomes the output of the last of the layers, each taking that of the one before.
int32_t qc_layers_forward(const qc_layer *const *layers, int64_t count, const qc_step *step, float *x);

// Index of the largest value of each row, the first of equals; -1 if any value of the row is not finite.
void qc_argmax(const float *x, int64_t ldx, int64_t *index, int32_t rows, int64_t width, int32_t threads);

// The token at which each row's probabilities, likeliest first, reach `uniform` of the sum of those that top_k, then
// top_p and min_p leave; -1 where the likeliest 256 do not settle it, or a logit is not finite.
void qc_draw_tokens(const qc_draw *draws, int32_t count, int64_t width, int64_t *tokens, int32_t threads);

// Index of the largest of x Wᵀ in each row, the first of equals, -1 if the row is not finite: what qc_argmax finds in
// the products of a bfloat16 head of medium precision without bias. QC_NOT_HERE where there are no such products.
int32_t qc_likeliest(const qc_linear *head, const qc_screen *screen, const float *x, int64_t ldx, int32_t rows,
                     int64_t *index, int32_t threads);

#ifdef __cplusplus
}
#endif
