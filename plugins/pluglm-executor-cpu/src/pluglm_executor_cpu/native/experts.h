// A mixture of experts: which are chosen for a row, and the products of those alone. Included once for each instruction
// set, by kernels.h.
//
// The arithmetic is that of `pluglm_blocks.experts`, in float32 throughout. A part of an expert that several rows chose
// is read once for all of them.

TARGET inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// The highest of x that is not taken; -1: all are.
TARGET inline i64 highest_left(const float *x, const bool *taken, i64 count) {
    i64 best = -1;
    for (i64 i = 0; i < count; i++)
        if (!taken[i] && (best < 0 || x[i] > x[best])) best = i;
    return best;
}

// Takes the experts of all groups but the best. A group's score: its best expert's; with a correction, its best two's.
TARGET inline void take_lost_groups(const Experts &e, const float *x, bool *taken) {
    const i64 size = e.count / e.num_groups;
    float scores[MOST_EXPERTS];
    for (i64 g = 0; g < e.num_groups; g++) {
        bool seen[MOST_EXPERTS] = {};
        const float *group = x + g * size;
        const i64 best = highest_left(group, seen, size);
        scores[g] = group[best];
        seen[best] = true;
        if (e.correction) scores[g] += group[highest_left(group, seen, size)];
    }
    bool kept[MOST_EXPERTS] = {};
    for (i64 i = 0; i < e.top_k_groups; i++) kept[highest_left(scores, kept, e.num_groups)] = true;
    for (i64 i = 0; i < e.count; i++) taken[i] = !kept[i / size];
}

// src: the router's outputs [rows, count].
TARGET inline void choose_experts(const Op &op, Context &c) {
    const Experts &e = *op.experts;
    float scores[MOST_EXPERTS], compared[MOST_EXPERTS];
    for (i64 m = c.from(c.rows()); m < c.to(c.rows()); m++) {
        const float *x = op.src + m * op.src_row;
        float highest = x[0], total = 0.0f;
        for (i64 i = 1; i < e.count; i++) highest = x[i] > highest ? x[i] : highest;
        for (i64 i = 0; i < e.count; i++) {
            scores[i] = e.scoring == SIGMOID ? sigmoid(x[i]) : std::exp(x[i] - highest);
            total += scores[i];
        }
        if (e.scoring == SOFTMAX)
            for (i64 i = 0; i < e.count; i++) scores[i] /= total;
        for (i64 i = 0; i < e.count; i++) compared[i] = e.correction ? scores[i] + e.correction[i] : scores[i];
        bool taken[MOST_EXPERTS] = {};
        if (e.num_groups > 1) take_lost_groups(e, compared, taken);
        float *weights = e.weights + m * e.top_k, sum = 0.0f;
        for (i64 i = 0; i < e.top_k; i++) {
            const i64 best = highest_left(e.scoring == SOFTMAX_TOP_K ? x : compared, taken, e.count);
            taken[best] = true;
            e.chosen[m * e.top_k + i] = best;
            weights[i] = scores[best];
            sum += weights[i];
        }
        // Sigmoids may all be zero.
        const float factor = (float)e.scale / (e.scoring == SOFTMAX_TOP_K ? sum : e.normalise ? sum + 1e-20f : 1.0f);
        for (i64 i = 0; i < e.top_k; i++) weights[i] *= factor;
    }
}

// gate * sigmoid(alpha * gate) * (1 + up), the gate cut off above, up on both sides.
TARGET inline float clamped(float gate, float up, float limit, float alpha) {
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    return gate * sigmoid(alpha * gate) * (up + 1.0f);
}

// 16 of an expert's inner numbers for one row.
TARGET inline void expert_block(const Op &op, Context &c, i64 expert, i64 b, const Rows &x, float *to) {
    const Experts &e = *op.experts;
    alignas(64) float gate[16], up[16];
    const Matrix &w = op.matrices[expert];
    const i64 width = w.rows - 16 * b < 16 ? w.rows - 16 * b : 16;
    block(c.plan, w, b, x, 1, up);
    if (!e.gated) {
        activate(op.activation, up, 16);
        for (i64 i = 0; i < width; i++) to[16 * b + i] = up[i];
        return;
    }
    block(c.plan, op.matrices[e.count + expert], b, x, 1, gate);
    for (int i = 0; i < 16; i++) gate[i] *= (float)op.gate_scale;
    if (e.clamp > 0) {
        for (i64 i = 0; i < width; i++) to[16 * b + i] = clamped(gate[i], up[i], (float)e.clamp, (float)e.alpha);
        return;
    }
    activate(op.activation, gate, 16);
    for (i64 i = 0; i < width; i++) to[16 * b + i] = gate[i] * up[i];
}

TARGET inline bool is_first(const i64 *chosen, i64 p) {
    for (i64 i = 0; i < p; i++)
        if (chosen[i] == chosen[p]) return false;
    return true;
}

// dst [rows, top_k, inner]: inner numbers of the chosen experts. The blocks of all that are chosen are shared out.
TARGET inline void experts_in(const Op &op, Context &c) {
    const Experts &e = *op.experts;
    const Rows x = read_rows(op, c, c.pass.T);
    const i64 pairs = c.rows() * e.top_k, blocks = (op.matrices[0].rows + 15) / 16;
    const i64 *chosen = e.chosen;
    i64 distinct = 0, before = 0;
    for (i64 p = 0; p < pairs; p++) distinct += is_first(chosen, p);
    const i64 from = c.from(distinct * blocks), to = c.to(distinct * blocks);
    for (i64 p = 0; p < pairs && before < to; p++) {
        if (!is_first(chosen, p)) continue;
        const i64 end = to - before < blocks ? to - before : blocks;
        for (i64 b = from > before ? from - before : 0; b < end; b++)
            for (i64 q = p; q < pairs; q++) {
                if (chosen[q] != chosen[p]) continue;
                Rows one = x;
                one.x += q / e.top_k * x.stride;
                expert_block(op, c, chosen[p], b, one, op.dst + q / e.top_k * op.dst_row + q % e.top_k * e.inner);
            }
        before += blocks;
    }
}

// dst (+)= scale * the sum of weight * (inner @ W.T + bias) of each row's experts.
TARGET inline void experts_out(const Op &op, Context &c) {
    const Experts &e = *op.experts;
    const i64 rows = op.matrices[0].rows, blocks = (rows + 15) / 16;
    alignas(64) float out[16];
    for (i64 b = c.from(blocks); b < c.to(blocks); b++) {
        const i64 width = rows - 16 * b < 16 ? rows - 16 * b : 16;
        for (i64 m = 0; m < c.rows(); m++) {
            alignas(64) float total[16] = {};
            for (i64 i = 0; i < e.top_k; i++) {
                Rows one = {};
                one.x = op.src + m * op.src_row + i * e.inner;
                one.stride = op.src_row;
                block(c.plan, op.matrices[e.chosen[m * e.top_k + i]], b, one, 1, out);
                for (int j = 0; j < 16; j++) total[j] += e.weights[m * e.top_k + i] * out[j];
            }
            float *to = op.dst + m * op.dst_row + 16 * b;
            for (i64 j = 0; j < width; j++) to[j] = (op.add ? to[j] : 0.0f) + total[j] * (float)op.scale;
        }
    }
}
