// The token of a row from its logits: the most likely one, or drawn. Included once for each instruction set, after
// vectors.h.
//
// A draw must give the token that the torch code of the strategies gives. That adds up in other orders, so its sums
// differ from these in the last places; wherever a decision is closer than all such differences can be together, nothing
// is chosen here, and the caller decides from the logits.

constexpr i64 UNDECIDED = -1;

// Of x [from, to). A NaN among them is the score.
template <class L>
TARGET inline Best highest(const L *x, i64 from, i64 to) {
    constexpr i64 CHUNK = 512;  // only in the best chunk is looked for the place
    Best best = {-INFINITY, from};
    bool odd = false;
    for (i64 at = from; at < to; at += CHUNK) {
        const i64 end = at + CHUNK < to ? at + CHUNK : to;
        V top = all(-INFINITY);
        I nans = {};
        i64 i = at;
        for (; i + WIDTH <= end; i += WIDTH) {
            const V v = load(x + i);
            top = larger(v, top);
            nans |= v != v;
        }
        float score = -INFINITY;
        for (int lane = 0; lane < WIDTH; lane++) {
            score = top[lane] > score ? top[lane] : score;
            odd |= nans[lane] != 0;
        }
        for (; i < end; i++) {
            const float v = widen(x[i]);
            score = v > score ? v : score;
            odd |= v != v;
        }
        if (score > best.score) best = {score, at};
    }
    if (odd) return {NAN, from};
    while (best.token < to && widen(x[best.token]) != best.score) best.token++;
    return best;
}

// weights = exp(scores - best), 0 for -inf; relative errors of a few 2^-53. As `exponential`, in float64.
TARGET inline void weigh(const float *scores, float best, double *weights, i64 count) {
    const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to a whole number, in the lowest bits
    for (i64 i = 0; i < count; i++) {
        double x = (double)scores[i] - (double)best;
        x = x < -700.0 ? -700.0 : x;
        const double shifted = x * 1.4426950408889634 + magic, n = shifted - magic;
        const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
        double p = 1.0 / 6227020800.0;
        p = p * r + 1.0 / 479001600.0;
        p = p * r + 1.0 / 39916800.0;
        p = p * r + 1.0 / 3628800.0;
        p = p * r + 1.0 / 362880.0;
        p = p * r + 1.0 / 40320.0;
        p = p * r + 1.0 / 5040.0;
        p = p * r + 1.0 / 720.0;
        p = p * r + 1.0 / 120.0;
        p = p * r + 1.0 / 24.0;
        p = p * r + 1.0 / 6.0;
        p = p * r + 0.5;
        p = p * r + 1.0;
        p = p * r + 1.0;
        std::uint64_t bits, power;
        __builtin_memcpy(&bits, &p, sizeof bits);
        __builtin_memcpy(&power, &shifted, sizeof power);
        bits += power << 52;
        __builtin_memcpy(&p, &bits, sizeof p);
        weights[i] = scores[i] == -INFINITY ? 0.0 : p;
    }
}

TARGET inline double total(const double *x, i64 count) {
    double sums[8] = {};
    i64 i = 0;
    for (; i + 8 <= count; i += 8)
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) sums[j] += x[i + j];
    for (; i < count; i++) sums[0] += x[i];
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Top-k: what is below the k-th best score becomes -inf. The k best so far are a heap, the least of them at its front.
inline void keep_best(float *scores, i64 count, i64 k, float *heap) {
    if (k >= count) return;
    for (i64 i = 0; i < k; i++) heap[i] = scores[i];
    std::make_heap(heap, heap + k, std::greater<float>());
    for (i64 i = k; i < count; i++) {
        if (scores[i] <= heap[0]) continue;
        std::pop_heap(heap, heap + k, std::greater<float>());
        heap[k - 1] = scores[i];
        std::push_heap(heap, heap + k, std::greater<float>());
    }
    const float least = heap[0];
    for (i64 i = 0; i < count; i++) scores[i] = scores[i] < least ? -INFINITY : scores[i];
}

// Top-p: the least likely tokens whose mass together is at most `tail` get weight 0, the best one stays. False: what the
// strategies' sums in float32 forbid is not certain, or two tokens on either side of the border are equally likely.
inline bool keep_mass(const float *scores, double *weights, i64 count, double tail, int *order) {
    // A softmax in float32 adds a quarter of the tokens one after the other at most; of the rest 256 is a generous part.
    const double unsure = ((double)count / 4 + 256) / 16777216.0;
    const double all_mass = total(weights, count), border = tail * all_mass, near = border * unsure;
    i64 n = 0;
    for (i64 i = 0; i < count; i++)
        if (weights[i] > 0) order[n++] = (int)i;
    const auto better = [scores](int a, int b) { return scores[a] > scores[b]; };
    i64 sorted = n < 256 ? n : 256;
    while (sorted < n) {  // until the last of them is certainly forbidden
        std::nth_element(order, order + sorted - 1, order + n, better);
        double before = 0;
        for (i64 r = 0; r < sorted - 1; r++) before += weights[order[r]];
        if (all_mass - before < border - near) break;
        sorted = 8 * sorted < n ? 8 * sorted : n;
    }
    std::sort(order, order + sorted, better);
    double before = 0;
    i64 kept = 0;
    for (; kept < sorted; kept++) {
        const double mass = all_mass - before;  // of this token and all that are less likely
        if (kept > 0 && std::fabs(mass - border) <= near) return false;
        if (kept > 0 && mass <= border) break;
        before += weights[order[kept]];
    }
    if (kept == n) return true;
    if (scores[order[kept]] == scores[order[kept - 1]]) return false;
    const float least = scores[order[kept - 1]];
    for (i64 i = 0; i < count; i++)
        if (scores[i] < least) weights[i] = 0.0;
    return true;
}

// Min-p: what is less likely than `share` times the best, of weight 1, gets weight 0. False: too close to call.
inline bool keep_likely(double *weights, i64 count, double share) {
    const double near = share * (16 - 2 * std::log(share)) / 16777216.0;
    for (i64 i = 0; i < count; i++) {
        if (weights[i] == 0.0) continue;
        if (std::fabs(weights[i] - share) <= near) return false;
        if (weights[i] < share) weights[i] = 0.0;
    }
    return true;
}

// The token at `where` in [0, 1) of the cumulative distribution, or UNDECIDED next to an edge.
TARGET inline i64 token_at(const double *weights, i64 count, double where) {
    constexpr i64 CHUNK = 256;
    const double all_mass = total(weights, count), target = where * all_mass;
    const double near = 8.0 * (double)count / 9007199254740992.0 * all_mass;
    double edge = 0;
    for (i64 at = 0; at < count; at += CHUNK) {
        const i64 end = at + CHUNK < count ? at + CHUNK : count;
        const double mass = total(weights + at, end - at);
        if (edge + mass < target - near) {
            edge += mass;
            continue;
        }
        for (i64 i = at; i < end; i++) {
            const double before = edge;
            edge += weights[i];
            if (edge > target + near) return before < target - near || i == 0 || before == 0.0 ? i : UNDECIDED;
        }
        return UNDECIDED;
    }
    return UNDECIDED;
}

// UNDECIDED also where the best score is not finite.
template <class L>
TARGET inline i64 drawn(const Run &run, const L *x, i64 count, double where, Room &room) {
    const float temperature = (float)run.temperature;
    float *scores = room.scores.data();
    for (i64 i = 0; i < count; i++) scores[i] = widen(x[i]);
    if (temperature != 1.0f)
        for (i64 i = 0; i < count; i++) scores[i] /= temperature;
    const Best best = highest(scores, 0, count);
    if (!std::isfinite(best.score)) return UNDECIDED;
    double *weights = room.weights.data();
    if (run.top_k > 0) keep_best(scores, count, run.top_k, (float *)weights);
    weigh(scores, best.score, weights, count);
    if (run.tail > 0 && !keep_mass(scores, weights, count, run.tail, room.order.data())) return UNDECIDED;
    if (run.share > 0 && !keep_likely(weights, count, run.share)) return UNDECIDED;
    return token_at(weights, count, where);
}
