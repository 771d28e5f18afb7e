// What Python hands over: `native.py` mirrors every struct here, field by field. All numbers are 8 bytes wide, so that
// there is no padding to get wrong; `pluglm_cpu_sizes` lets Python check that both sides agree.
//
// A model is a list of operations on rows of float32. A pass has M = B*T rows, row m = b*T + t. Every operation is
// carried out by all threads together, each doing its share, and ends at a barrier.
#pragma once
#include <cstdint>

using i64 = std::int64_t;

enum Dtype : i64 { FLOAT32 = 0, BFLOAT16 = 1 };
enum Form : i64 { PLAIN_FLOAT32 = 0, PLAIN_BFLOAT16 = 1, EIGHT_BITS = 2, FOUR_BITS = 3 };
enum NormKind : i64 { NO_NORM = 0, RMS = 1, LAYER = 2 };
enum Activation : i64 { NONE = 0, SILU, GELU, GELU_TANH, RELU, RELU2, QUICK_GELU };
enum Scoring : i64 { SOFTMAX = 0, SOFTMAX_TOP_K = 1, SIGMOID = 2 };
enum OpKind : i64 {
    EMBED = 0,   // dst = scale * table[id] + positions_table[position + offset]
    NORMALISE,   // dst (+)= scale * norm(src), whole rows
    LINEAR,      // dst (+)= scale * act(norm(src) @ W.T + bias), for each of its matrices
    GATED,       // dst = act(gate_scale * gate) * up, two matrices over norm(src)
    HEADS,       // src = projected (q, k, v): norm and rotate the heads; q to dst, k and v to the cache
    ATTEND,      // dst = attention of src = q over the keys and values of a slot
    LOGITS,      // logits = softcap(scale * (norm(src) @ W.T + bias)) of the kept rows
    CHOOSE,      // src = the router's outputs: weights and experts of each row
    EXPERTS_IN,  // dst = each chosen expert's act(gate) * up, or act(up), over norm(src); up of all, then the gates
    EXPERTS_OUT,  // dst (+)= scale * the sum of weight * (src @ W.T + bias) over each row's experts
};

// dst = scale * (src - mean) / sqrt(variance + eps) * weight + bias, the mean only if LAYER. NO_NORM: scale * src.
struct Norm {
    const float *weight, *bias;  // null: none. An offset is already added to the weight.
    i64 kind, size;
    double eps, scale;
};

// A weight [rows, columns] as blocks of 16 rows: plain numbers as in kernels.h, whole numbers as in packed.h.
struct Matrix {
    const void *numbers;
    const std::uint16_t *scale, *offset;  // float16, of whole numbers; offset: null is none
    const float *bias;                    // filled up to whole blocks; null: none
    i64 form, rows, columns;
    i64 at;  // its first output in a row of dst
};

// What the three operations of a mixture share.
struct Experts {
    i64 count, top_k, scoring, normalise, num_groups, top_k_groups, gated;
    i64 inner;                   // floats from the inner numbers of one chosen expert to the next
    double scale, clamp, alpha;  // clamp: 0 is none
    const float *correction;     // [count] or null: added to the scores that are compared
    float *weights;              // [MAX_ROWS, top_k], of those chosen
    i64 *chosen;                 // likewise
};

struct Op {
    i64 kind;
    float *src, *dst;
    i64 src_row, dst_row;  // floats from one row to the next
    Norm norm;
    const Matrix *matrices;  // LINEAR: side by side in dst; GATED: the gate, then up; LOGITS: one; EMBED: one if packed
    i64 num_matrices;
    i64 packed;              // some of them hold whole numbers
    const void *weight;      // EMBED: the table as it is, unless it is packed
    i64 dtype, rows, columns;  // of the tables; columns of the widest matrix
    i64 activation, add;       // add: to dst, instead of replacing it
    double scale, gate_scale, clip, softcap;  // clip, softcap: 0 is none
    const void *positions_table;              // EMBED; null: none
    i64 positions_rows, position_offset;
    i64 slot, num_heads, num_kv_heads, head_dim, v_head_dim;  // HEADS and ATTEND
    i64 appends;                        // HEADS: k and v follow q and belong into the cache
    i64 norm_all;                       // q_norm and k_norm run over all heads together
    i64 rotation, interleaved;          // rotation: index of a Rotation, or -1
    Norm q_norm, k_norm;
    const float *sinks, *slopes;        // [H] or null
    i64 causal, window, chunk;          // window, chunk: 0 is none
    const float *gates;                 // LINEAR: null, or one number a row, whose sigmoid is a factor
    i64 gates_row;
    const Experts *experts;             // CHOOSE, EXPERTS_IN, EXPERTS_OUT
};

struct Plan {
    const Op *ops;
    i64 num_ops, vocab_size, logits_dtype;
    i64 scratch_rows;  // floats of one normalised row, the longest
    i64 rounds;        // what meets packed weights is rounded to 8 bits, by groups of 32
};

// Keys and values of one slot where they lie; strides in elements.
struct Slot {
    char *k, *v;  // of the cell that a group's shift counts from
    i64 k_row, k_head, k_cell, v_row, v_head, v_cell;
    i64 dtype, group;
};

// What slots of one geometry hand out in this pass: `length` cells from `shift` on; the last T of them are the pass's.
struct Group {
    i64 shift, length;
    i64 start;               // cell j holds position start + j in every row; negative: look into `positions`
    const i64 *positions;    // [B or 1, length]
    i64 positions_row;
};

struct Rotation {
    const float *cos, *sin;
    i64 half;       // numbers of a position
    i64 positions;  // rows of a table by position; 0: one row a token instead, [B or 1, T, half]
    i64 row;        // floats from one row of the batch to the next
};

struct Pass {
    i64 B, T, keep;  // logits of the last `keep` of each row's T tokens
    const i64 *ids, *positions;
    i64 ids_row, ids_column, positions_row, positions_column;
    void *logits;  // [B, keep, V]
    const Slot *slots;
    const Group *groups;
    const Rotation *rotations;
    i64 isa;
};

// Several tokens of every row: passes of one token, each with what was chosen from the one before.
struct Run {
    i64 count;         // tokens a row at most; the groups of the pass are as after all of them
    i64 *tokens;       // [B, count + 1]: the last token of each row, then what is chosen
    const i64 *ended;  // [B] or null; what ended rows get is `pad`
    i64 pad;
    const i64 *ends;  // ids that end a row, and so the run
    i64 num_ends, num_groups;
    const i64 *seeds;  // [B]; null: the most likely token
    i64 first;         // number of the first draw
    double temperature;
    i64 top_k;           // 0: off
    double tail, share;  // 1 - top_p and min_p; 0: off
    i64 made, fed;       // result: tokens chosen, passes made. One pass more: its logits are for the caller
    double seconds;      // result: spent in here
};

constexpr i64 MAX_ROWS = 32;  // of one call
constexpr i64 MOST_EXPERTS = 1024;  // of one mixture
enum Failure : i64 { OK = 0, BAD_TOKEN = 1, BAD_POSITION = 2, NO_MEMORY = 3 };
enum Isa : i64 { PORTABLE = 0, AVX2 = 1, AVXVNNI = 2, AVX512 = 3, AVX512VNNI = 4 };  // the later, the better
