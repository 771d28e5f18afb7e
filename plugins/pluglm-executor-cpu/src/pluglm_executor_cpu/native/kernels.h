// The operations of abi.h. Included once for each instruction set, after vectors.h and packed.h.

// What one thread needs beside the operation: the pass, its share, and room of its own.
struct Context {
    const Plan &plan;
    const Pass &pass;
    int thread, count;
    float *normed;       // [MAX_ROWS, plan.scratch_rows]
    float *sums, *steps;   // [MAX_ROWS, groups of plan.scratch_rows]
    std::int8_t *codes;    // [MAX_ROWS, groups, 3, GROUP]
    std::int32_t *starts;  // [MAX_ROWS, groups, 3]
    float *attention;  // for attention: a thread's own room, and what all share
    float *parts;
    int *arrived;
    i64 rows() const { return pass.B * pass.T; }
    i64 from(i64 units) const { return units * thread / count; }
    i64 to(i64 units) const { return units * (thread + 1) / count; }
    i64 position(i64 row) const {
        return pass.positions[row / pass.T * pass.positions_row + row % pass.T * pass.positions_column];
    }
};

// Normalisation

struct Moments { float mean, factor; };

TARGET inline Moments moments(const Norm &norm, const float *x) {
    const i64 size = norm.size;
    float mean = 0.0f;
    if (norm.kind == LAYER) {
        V total = {};
        i64 i = 0;
        for (; i + WIDTH <= size; i += WIDTH) total += load(x + i);
        mean = sum(total);
        for (; i < size; i++) mean += x[i];
        mean /= (float)size;
    }
    V total = {};
    i64 i = 0;
    for (; i + WIDTH <= size; i += WIDTH) {
        const V v = load(x + i) - all(mean);
        total += v * v;
    }
    float squares = sum(total);
    for (; i < size; i++) squares += (x[i] - mean) * (x[i] - mean);
    return {mean, 1.0f / std::sqrt(squares / (float)size + (float)norm.eps)};
}

// `count` numbers from `first` on of a vector whose moments are known.
TARGET inline void normalise(const Norm &norm, Moments m, const float *x, float *to, i64 first, i64 count) {
    const float scale = (float)norm.scale;
    for (i64 i = 0; i < count; i++) {
        float v = norm.kind == NO_NORM ? x[i] : (x[i] - m.mean) * m.factor;
        if (norm.weight) v *= norm.weight[first + i];
        if (norm.bias) v += norm.bias[first + i];
        to[i] = v * scale;
    }
}

TARGET inline void normalise(const Norm &norm, const float *x, float *to) {
    normalise(norm, norm.kind == NO_NORM ? Moments{} : moments(norm, x), x, to, 0, norm.size);
}

TARGET inline void whole_rows(const Op &op, Context &c) {
    for (i64 m = c.from(c.rows()); m < c.to(c.rows()); m++) {
        float *to = op.dst + m * op.dst_row;
        if (!op.add) {
            normalise(op.norm, op.src + m * op.src_row, to);
            continue;
        }
        normalise(op.norm, op.src + m * op.src_row, c.normed);
        for (i64 i = 0; i < op.norm.size; i++) to[i] += c.normed[i];
    }
}

// Embedding

// One row of a packed matrix; see packed.h.
TARGET inline void unpack_row(const Matrix &w, i64 row, float *to) {
    const bool eight = w.form == EIGHT_BITS;
    const i64 groups = w.columns / GROUP, bytes = eight ? 512 : 256, lane = row % 16;
    const std::uint8_t *codes = (const std::uint8_t *)w.numbers + row / 16 * groups * bytes + 4 * lane;
    const i64 first = row / 16 * groups * 16 + lane / WIDTH * WIDTH;
    for (i64 g = 0; g < groups; g++, codes += bytes, to += GROUP) {
        const float s = load_half(w.scale + first + 16 * g)[lane % WIDTH];
        const float o = w.offset ? load_half(w.offset + first + 16 * g)[lane % WIDTH] : eight ? 0.0f : -8.0f * s;
        for (i64 u = 0; u < bytes / 64; u++)
            for (i64 j = 0; j < 4; j++) {
                const std::uint8_t code = codes[64 * u + j];
                if (eight) {
                    to[4 * u + j] = s * (float)(std::int8_t)code + o;
                } else {
                    to[8 * u + j] = s * (float)(code & 15) + o;
                    to[8 * u + 4 + j] = s * (float)(code >> 4) + o;
                }
            }
    }
}

template <class T>
TARGET inline void embed(const Op &op, Context &c) {
    const T *table = (const T *)op.weight, *learned = (const T *)op.positions_table;
    const i64 size = op.columns;
    for (i64 m = c.from(c.rows()); m < c.to(c.rows()); m++) {
        const i64 id = c.pass.ids[m / c.pass.T * c.pass.ids_row + m % c.pass.T * c.pass.ids_column];
        const i64 position = c.position(m);
        const T *place = learned + ((position < 0 ? 0 : position) + op.position_offset) * size;
        float *to = op.dst + m * op.dst_row;
        if (op.packed) unpack_row(op.matrices[0], id, to);
        else
            for (i64 i = 0; i < size; i++) to[i] = widen(table[id * size + i]);
        for (i64 i = 0; i < size; i++) {
            to[i] *= (float)op.scale;
            if (learned) to[i] += widen(place[i]);
        }
    }
}

template <class T>
TARGET inline void plain_block(const Matrix &w, i64 index, const Rows &rows, i64 count, float *out) {
    plain_rows<false>((const T *)w.numbers + index * 16 * w.columns, rows.x, rows.stride, w.columns, count, out);
}

// 16 outputs of `count` rows, the bias added: out [count, 16].
TARGET inline void block(const Plan &plan, const Matrix &w, i64 index, const Rows &rows, i64 count, float *out) {
    if (w.form == PLAIN_FLOAT32) plain_block<float>(w, index, rows, count, out);
    else if (w.form == PLAIN_BFLOAT16) plain_block<std::uint16_t>(w, index, rows, count, out);
    else if (w.form == EIGHT_BITS) packed_block<true>(w, index, rows, count, plan.rounds, out);
    else packed_block<false>(w, index, rows, count, plan.rounds, out);
    if (!w.bias) return;
    for (i64 r = 0; r < count; r++)
        for (int i = 0; i < 16; i++) out[16 * r + i] += w.bias[16 * index + i];
}

struct Silu { TARGET V of(V x) const { return x / (all(1.0f) + exponential(-x)); } };
struct Relu { TARGET V of(V x) const { return larger(x, V{}); } };
struct Relu2 { TARGET V of(V x) const { const V y = larger(x, V{}); return y * y; } };
struct QuickGelu { TARGET V of(V x) const { return x / (all(1.0f) + exponential(all(-1.702f) * x)); } };
struct GeluTanh {
    TARGET V of(V x) const {
        return all(0.5f) * x * (all(1.0f) + tanh_(all(0.79788456f) * (x + all(0.044715f) * x * x * x)));
    }
};
struct Cap {
    float cap;
    TARGET V of(V x) const { return all(cap) * tanh_(x / all(cap)); }
};

TARGET inline void activate(i64 activation, float *x, i64 count) {
    switch (activation) {
        case SILU: return each(x, count, Silu{});
        case RELU: return each(x, count, Relu{});
        case RELU2: return each(x, count, Relu2{});
        case QUICK_GELU: return each(x, count, QuickGelu{});
        case GELU_TANH: return each(x, count, GeluTanh{});
        case GELU:
            for (i64 i = 0; i < count; i++) x[i] *= 0.5f * (1.0f + std::erf(x[i] * 0.70710678f));
    }
}

// The rows that an operation reads, normalised and rounded by every thread for itself: cheaper than a barrier.
TARGET inline Rows read_rows(const Op &op, Context &c, i64 keep) {
    const i64 T = c.pass.T, rows = c.pass.B * keep, groups = (c.plan.scratch_rows + GROUP - 1) / GROUP;
    Rows read = {op.src, op.src_row, c.sums, c.steps, c.codes, c.starts, groups};
    if (op.norm.kind != NO_NORM || op.norm.scale != 1.0 || keep != T) {
        read.x = c.normed;
        read.stride = c.plan.scratch_rows;
        for (i64 m = 0; m < rows; m++) {
            float *to = c.normed + m * read.stride;
            normalise(op.norm, op.src + (m / keep * T + T - keep + m % keep) * op.src_row, to);
            for (i64 i = op.norm.size; i < op.columns && i < read.stride; i++) to[i] = 0.0f;  // for the filled columns
        }
    }
    if (!op.packed) return read;
    bool whole = c.plan.rounds;
    for (i64 i = 0; i < op.num_matrices; i++)
        whole |= (op.matrices[i].form == EIGHT_BITS && in_three_bytes<true>(rows)) ||
                 (op.matrices[i].form == FOUR_BITS && in_three_bytes<false>(rows));
    for (i64 m = 0; m < rows; m++) {
        const float *x = read.x + m * read.stride;
        const i64 count = op.norm.size / GROUP, at = m * groups;
        if (c.plan.rounds) prepare<1>(x, count, c.sums + at, c.steps + at, c.codes + at * GROUP, c.starts + at);
        else if (whole)
            prepare<3>(x, count, c.sums + at, c.steps + at, c.codes + 3 * at * GROUP, c.starts + 3 * at);
        else prepare<0>(x, count, c.sums + at, nullptr, nullptr, nullptr);
    }
    return read;
}

// One block of one matrix, for all rows, to its place in dst.
TARGET inline void linear_block(const Op &op, Context &c, const Matrix &w, i64 b, const Rows &x) {
    alignas(64) float out[16 * MAX_ROWS];
    const i64 M = c.rows(), width = w.rows - 16 * b < 16 ? w.rows - 16 * b : 16;
    block(c.plan, w, b, x, M, out);
    for (i64 m = 0; m < M; m++) {
        float *y = out + 16 * m, *to = op.dst + m * op.dst_row + w.at + 16 * b;
        if (op.clip > 0)
            for (int i = 0; i < 16; i++) {
                y[i] = y[i] < -(float)op.clip ? -(float)op.clip : y[i];
                y[i] = y[i] > (float)op.clip ? (float)op.clip : y[i];
            }
        activate(op.activation, y, 16);
        float scale = (float)op.scale;
        if (op.gates) scale /= 1.0f + std::exp(-op.gates[m * op.gates_row]);
        for (int i = 0; i < 16; i++) y[i] *= scale;
        if (op.add)
            for (i64 i = 0; i < width; i++) to[i] += y[i];
        else
            for (i64 i = 0; i < width; i++) to[i] = y[i];
    }
}

// The blocks of all matrices are shared out together, as if they were one matrix.
TARGET inline void linear(const Op &op, Context &c) {
    const Rows x = read_rows(op, c, c.pass.T);
    i64 blocks = 0, before = 0;
    for (i64 i = 0; i < op.num_matrices; i++) blocks += (op.matrices[i].rows + 15) / 16;
    const i64 from = c.from(blocks), to = c.to(blocks);
    for (i64 i = 0; i < op.num_matrices; i++) {
        const Matrix &w = op.matrices[i];
        const i64 count = (w.rows + 15) / 16, end = to - before < count ? to - before : count;
        for (i64 b = from > before ? from - before : 0; b < end; b++) linear_block(op, c, w, b, x);
        before += count;
    }
}

// One thread has the same rows of the gate and of up at hand.
TARGET inline void gated(const Op &op, Context &c) {
    const i64 M = c.rows(), rows = op.matrices[0].rows, blocks = (rows + 15) / 16;
    const Rows x = read_rows(op, c, c.pass.T);
    alignas(64) float gate[16 * MAX_ROWS], up[16 * MAX_ROWS];
    for (i64 b = c.from(blocks); b < c.to(blocks); b++) {
        block(c.plan, op.matrices[0], b, x, M, gate);
        block(c.plan, op.matrices[1], b, x, M, up);
        const i64 width = rows - 16 * b < 16 ? rows - 16 * b : 16;
        for (i64 m = 0; m < M; m++) {
            float *g = gate + 16 * m, *u = up + 16 * m, *to = op.dst + m * op.dst_row + 16 * b;
            for (int i = 0; i < 16; i++) g[i] *= (float)op.gate_scale;
            activate(op.activation, g, 16);
            for (i64 i = 0; i < width; i++) to[i] = g[i] * u[i];
        }
    }
}

template <class L>
TARGET inline void logits(const Op &op, Context &c) {
    const Matrix &w = op.matrices[0];
    const i64 kept = c.pass.B * c.pass.keep, blocks = (w.rows + 15) / 16;
    if (kept == 0) return;
    const Rows x = read_rows(op, c, c.pass.keep);
    alignas(64) float out[16 * MAX_ROWS];
    for (i64 b = c.from(blocks); b < c.to(blocks); b++) {
        block(c.plan, w, b, x, kept, out);
        const i64 width = w.rows - 16 * b < 16 ? w.rows - 16 * b : 16;
        for (i64 m = 0; m < kept; m++) {
            float *y = out + 16 * m;
            for (int i = 0; i < 16; i++) y[i] *= (float)op.scale;
            if (op.softcap > 0) each(y, 16, Cap{(float)op.softcap});
            L *to = (L *)c.pass.logits + m * w.rows + 16 * b;
            for (i64 i = 0; i < width; i++) narrow(to + i, y[i]);
        }
    }
}

// Heads and the cache

TARGET inline void rotate(const Op &op, Context &c, i64 row, float *head) {
    if (op.rotation < 0) return;
    const Rotation &r = c.pass.rotations[op.rotation];
    const i64 position = c.position(row) < 0 ? 0 : c.position(row);
    const i64 at = r.positions ? position * r.half : row / c.pass.T * r.row + row % c.pass.T * r.half;
    const float *cos = r.cos + at, *sin = r.sin + at;
    const i64 half = r.half, step = op.interleaved ? 2 : 1, other = op.interleaved ? 1 : half;
    for (i64 i = 0; i < half; i++) {
        const float a = head[step * i], b = head[step * i + other];
        head[step * i] = a * cos[i] - b * sin[i];
        head[step * i + other] = b * cos[i] + a * sin[i];
    }
}

// One head of a projection, normed if there is a norm. `projected`: the whole projection, `index`: which head.
TARGET inline void head(const Op &op, const Norm &norm, const float *projected, i64 index, i64 size, float *to) {
    const float *from = projected + index * size;
    const bool whole = op.norm_all && norm.kind != NO_NORM;
    const Moments m = norm.kind == NO_NORM ? Moments{} : moments(norm, whole ? projected : from);
    normalise(norm, m, from, to, whole ? index * size : 0, size);
}

template <class T>
TARGET inline void keep(char *base, i64 at, const float *from, i64 count) {
    T *to = (T *)base + at;
    for (i64 i = 0; i < count; i++) narrow(to + i, from[i]);
}

template <class T>
TARGET inline void heads(const Op &op, Context &c) {
    const i64 q = op.num_heads, k = op.num_kv_heads, D = op.head_dim, Dv = op.v_head_dim;
    const i64 units = op.appends ? q + 2 * k : q;
    const Slot &slot = c.pass.slots[op.slot];
    const Group &group = c.pass.groups[slot.group];
    const i64 all_units = c.rows() * units;
    for (i64 u = c.from(all_units); u < c.to(all_units); u++) {
        const i64 m = u / units, index = u % units;
        const i64 b = m / c.pass.T, cell = group.shift + group.length - c.pass.T + m % c.pass.T;
        const float *row = op.src + m * op.src_row;
        if (index < q) {
            float *to = op.dst + m * op.dst_row + index * D;
            head(op, op.q_norm, row, index, D, to);
            rotate(op, c, m, to);
        } else if (index < q + k) {
            const i64 h = index - q;
            head(op, op.k_norm, row + q * D, h, D, c.normed);
            rotate(op, c, m, c.normed);
            keep<T>(slot.k, b * slot.k_row + h * slot.k_head + cell * slot.k_cell, c.normed, D);
        } else {
            const i64 h = index - q - k;
            keep<T>(slot.v, b * slot.v_row + h * slot.v_head + cell * slot.v_cell, row + (q + k) * D + h * Dv, Dv);
        }
    }
}

#include "attention.h"
#include "experts.h"

TARGET inline void carry_out(const Op &op, Context &c) {
    switch (op.kind) {
        case EMBED: return op.dtype == BFLOAT16 ? embed<std::uint16_t>(op, c) : embed<float>(op, c);
        case NORMALISE: return whole_rows(op, c);
        case LINEAR: return linear(op, c);
        case GATED: return gated(op, c);
        case CHOOSE: return choose_experts(op, c);
        case EXPERTS_IN: return experts_in(op, c);
        case EXPERTS_OUT: return experts_out(op, c);
        case LOGITS: return c.plan.logits_dtype == BFLOAT16 ? logits<std::uint16_t>(op, c) : logits<float>(op, c);
    }
    const bool half_cache = c.pass.slots[op.slot].dtype == BFLOAT16;
    if (op.kind == HEADS) return half_cache ? heads<std::uint16_t>(op, c) : heads<float>(op, c);
    return half_cache ? attend<std::uint16_t>(op, c) : attend<float>(op, c);
}
