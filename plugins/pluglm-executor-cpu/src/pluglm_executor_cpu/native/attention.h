// Attention of new queries over the keys and values of a slot. Included once for each instruction set, by kernels.h.
//
// A unit of work is one key head of one row of the batch: all query heads of its group, for all T tokens, read a cell
// once. The cells that a unit sees are cut into ranges, each with a softmax of its own (Dao et al. 2023,
// "Flash-Decoding"); the last thread to end one of a unit's ranges puts them together. How cells are cut depends on the
// pass alone, not on the number of threads, and ranges are added up in their order: any number of threads computes the
// same bits.
//
// A range is read some cells at a time (a tile), with a softmax that goes along (Milakov & Gimelshein 2018, "Online
// normalizer calculation for softmax").

constexpr i64 TILE = 64;         // cells that are scored before their values are added: they stay in the first cache
constexpr i64 RANGE_TILES = 2;   // of the shortest range
constexpr i64 MOST_PIECES = 128;  // units times ranges, unless there are more units
constexpr float LOWEST = -3.4e38f;  // the score of what is not seen
constexpr i64 PAIR = 2 * WIDTH;  // numbers that are widened together

// How the cells of one operation are shared out, and the room it takes.
struct Shares {
    i64 units, ranges, cells;  // cells: of a range
    i64 rows;                  // query heads of a group times T
    i64 q_row;                 // floats of a row's query
    i64 part_row;  // of its part of a range: sums of values; the last 16: highest score, total of weights, a factor
    i64 own() const { return rows * (q_row + TILE + part_row); }  // floats of a thread's own
    i64 parts() const { return ranges > 1 ? units * ranges * rows * part_row : 0; }  // floats of all together
};

TARGET inline Shares shares(const Op &op, const Pass &pass) {
    Shares s;
    i64 span = pass.groups[pass.slots[op.slot].group].length;
    if (op.window && op.window + pass.T - 1 < span) span = op.window + pass.T - 1;
    if (op.chunk && op.chunk + pass.T - 1 < span) span = op.chunk + pass.T - 1;
    s.units = pass.B * op.num_kv_heads;
    const i64 shortest = TILE * RANGE_TILES, most = s.units < MOST_PIECES ? MOST_PIECES / s.units : 1;
    i64 ranges = (span + shortest - 1) / shortest;
    ranges = ranges < 1 ? 1 : ranges > most ? most : ranges;
    s.cells = (span + ranges * TILE - 1) / (ranges * TILE) * TILE;
    s.ranges = s.cells ? (span + s.cells - 1) / s.cells : 1;
    s.rows = op.num_heads / op.num_kv_heads * pass.T;
    s.q_row = (op.head_dim + 31) / 32 * 32;  // whole pairs of every instruction set
    s.part_row = (op.v_head_dim + 31) / 32 * 32 + 16;
    return s;
}

// Numbers of a cell, two registers of them: float32 in order; of bfloat16 the even ones, then the odd ones, because
// that takes one step each. Queries are laid out alike, and what was summed is put back into order at the end.

TARGET inline void load_pair(const float *p, V &a, V &b) {
    a = load(p);
    b = load(p + WIDTH);
}

TARGET inline void load_pair(const std::uint16_t *p, V &a, V &b) {
    U pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    a = (V)(pair << 16);
    b = (V)(pair & 0xffff0000u);
}

// Where number i of a cell comes to lie.
TARGET inline i64 laid(const float *, i64 i) { return i; }
TARGET inline i64 laid(const std::uint16_t *, i64 i) { return i / PAIR * PAIR + i % 2 * WIDTH + i % PAIR / 2; }

// The last numbers of a cell, where they do not fill the registers: nothing beyond them is read.
template <class T>
TARGET inline void load_rest(const T *p, i64 count, V &a, V &b) {
    T rest[PAIR] = {};
    __builtin_memcpy(rest, p, (std::size_t)count * sizeof(T));
    load_pair(rest, a, b);
}

#ifdef SHUFFLE
typedef float Eight __attribute__((vector_size(32)));

TARGET inline Eight folded(V v) {
    Eight parts[WIDTH / 8];
    __builtin_memcpy(parts, &v, sizeof parts);
    return WIDTH == 8 ? parts[0] : parts[0] + parts[WIDTH / 8 - 1];
}

// Neighbours are added: in each half, two sums of a and then two of b.
TARGET inline Eight pairs(Eight a, Eight b) {
    return (Eight)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88) + (Eight)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd);
}
#endif

// The sums of four registers.
TARGET inline void four_sums(V a, V b, V c, V d, float *to) {
#ifdef SHUFFLE
    const __m256 halves = (__m256)pairs(pairs(folded(a), folded(b)), pairs(folded(c), folded(d)));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#else
    to[0] = sum(a);
    to[1] = sum(b);
    to[2] = sum(c);
    to[3] = sum(d);
#endif
}

// Some cells of a unit that at least one of its tokens sees.
struct Tile {
    i64 count, at[TILE];       // at: which cells
    i64 positions[TILE];
    bool partly[MAX_ROWS];     // token t does not see them all, but those of `seen`
    bool seen[MAX_ROWS][TILE];
};

// q times four cells from `j` on, of R rows: s [R, TILE].
template <int R, class T>
TARGET inline void score(const Tile &tile, i64 j, const T *k, i64 k_cell, const float *q, i64 q_row, i64 D, float *s) {
    const T *cell[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) cell[i] = k + tile.at[j + i < tile.count ? j + i : tile.count - 1] * k_cell;
    V total[R][4] = {}, a, b;
    i64 i = 0;
    for (; i + PAIR <= D; i += PAIR)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            load_pair(cell[c] + i, a, b);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                total[r][c] += a * load(q + r * q_row + i);
                total[r][c] += b * load(q + r * q_row + i + WIDTH);
            }
        }
    if (i < D)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            load_rest(cell[c] + i, D - i, a, b);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                total[r][c] += a * load(q + r * q_row + i);
                total[r][c] += b * load(q + r * q_row + i + WIDTH);
            }
        }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) four_sums(total[r][0], total[r][1], total[r][2], total[r][3], s + r * TILE + j);
}

TARGET inline void fetch(const void *cell, i64 bytes) {
    for (i64 i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)cell + i);
}

// Of at most four rows. ahead: fetch the values of these cells, and keys of the tile after it, between the products.
template <class T>
TARGET inline void scores(const Op &op, const Slot &slot, const Tile &tile, i64 rows, const T *k, const T *v,
                          const float *q, i64 q_row, float *s, bool ahead) {
    const i64 k_cell = slot.k_cell, D = op.head_dim;
    for (i64 j = 0; j < tile.count; j += 4) {
        if (ahead)
            for (i64 i = j; i < j + 4 && i < tile.count; i++) {
                fetch(v + tile.at[i] * slot.v_cell, op.v_head_dim * (i64)sizeof(T));
                fetch(k + (tile.at[i] + TILE) * k_cell, D * (i64)sizeof(T));
            }
        switch (rows) {
            case 1: score<1>(tile, j, k, k_cell, q, q_row, D, s); break;
            case 2: score<2>(tile, j, k, k_cell, q, q_row, D, s); break;
            case 3: score<3>(tile, j, k, k_cell, q, q_row, D, s); break;
            default: score<4>(tile, j, k, k_cell, q, q_row, D, s);
        }
    }
}

// to = to * factor + the values of a tile, weighed, of R rows: N pairs of registers, or what is left of one.
template <int R, int N, class T>
TARGET inline void add_values(const Tile &tile, const T *v, i64 v_cell, const float *s, const float *factor, i64 left,
                              float *to, i64 to_row) {
    V total[R][2 * N];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int n = 0; n < 2 * N; n++) total[r][n] = load(to + r * to_row + n * WIDTH) * all(factor[r * to_row]);
    for (i64 j = 0; j < tile.count; j++) {
        const T *value = v + tile.at[j] * v_cell;
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            V a, b;
            if (left) load_rest(value, left, a, b);
            else load_pair(value + n * PAIR, a, b);
            // Weights are read again for each pair: they would take registers from the sums.
            __asm__("" : "+r"(s));
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                total[r][2 * n] += a * all(s[r * TILE + j]);
                total[r][2 * n + 1] += b * all(s[r * TILE + j]);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int n = 0; n < 2 * N; n++) store(to + r * to_row + n * WIDTH, total[r][n]);
}

template <int R, int N, class T>
TARGET inline void row_values(const Tile &tile, const T *v, i64 v_cell, const float *s, float *to, i64 to_row, i64 Dv) {
    const float *factor = to + to_row - 14;
    i64 i = 0;
    for (; i + N * PAIR <= Dv; i += N * PAIR) add_values<R, N>(tile, v + i, v_cell, s, factor, 0, to + i, to_row);
    for (; i + PAIR <= Dv; i += PAIR) add_values<R, 1>(tile, v + i, v_cell, s, factor, 0, to + i, to_row);
    if (i < Dv) add_values<R, 1>(tile, v + i, v_cell, s, factor, Dv - i, to + i, to_row);
}

// Of at most four rows, with as many sums as there are registers for.
template <class T>
TARGET inline void values(const Tile &tile, i64 rows, const T *v, i64 v_cell, const float *s, float *to, i64 to_row,
                          i64 Dv) {
    switch (rows) {
        case 1: return row_values<1, 4>(tile, v, v_cell, s, to, to_row, Dv);
        case 2: return row_values<2, 2>(tile, v, v_cell, s, to, to_row, Dv);
        case 3: return row_values<3, 2>(tile, v, v_cell, s, to, to_row, Dv);
        default: return row_values<4, 1>(tile, v, v_cell, s, to, to_row, Dv);
    }
}

struct Softmax {
    float highest;
    TARGET V of(V x) const { return exponential(x - all(highest)); }
};

// Scores of one row become weights, relative to the highest score so far. Returns the factor on what came before.
TARGET inline float weigh(const Tile &tile, i64 t, float *s, float &highest, float &total) {
    const i64 filled = (tile.count + WIDTH - 1) / WIDTH * WIDTH;
    for (i64 j = tile.count; j < filled; j++) s[j] = LOWEST;
    if (tile.partly[t])
        for (i64 j = 0; j < tile.count; j++) s[j] = tile.seen[t][j] ? s[j] : LOWEST;
    V top = all(highest);
    for (i64 j = 0; j < filled; j += WIDTH) top = larger(load(s + j), top);
    float most = highest, lanes[WIDTH];
    store(lanes, top);
    for (int i = 0; i < WIDTH; i++) most = lanes[i] > most ? lanes[i] : most;
    V sums = {};
    for (i64 j = 0; j < filled; j += WIDTH) {
        const V x = load(s + j);
        const V weight = x == all(LOWEST) ? V{} : exponential(x - all(most)) + (x - x);  // what is no number stays none
        sums += weight;
        store(s + j, weight);
    }
    const float factor = highest == LOWEST ? 0.0f : std::exp(highest - most);
    total = total * factor + sum(sums);
    highest = most;
    return factor;
}

// One key head of one row of the batch, and what its tokens see.
struct Unit {
    i64 b, kv;
    i64 first, end;                    // the cells that any of them sees lie within these
    i64 from[MAX_ROWS], to[MAX_ROWS];  // of each token, where cells hold positions in a row; else all cells
};

TARGET inline void see(const Op &op, const Context &c, const Group &g, Unit &unit) {
    const i64 T = c.pass.T;
    unit.first = g.length;
    unit.end = 0;
    for (i64 t = 0; t < T; t++) {
        const i64 position = c.position(unit.b * T + t);
        i64 from = 0, to = position < 0 ? 0 : g.length;
        if (g.start >= 0 && position >= 0) {
            i64 lowest = g.start, end = g.start + g.length;  // positions
            if (op.causal && position + 1 < end) end = position + 1;
            if (op.window && position - op.window + 1 > lowest) lowest = position - op.window + 1;
            if (op.chunk) {
                const i64 chunk = position / op.chunk * op.chunk;
                if (chunk > lowest) lowest = chunk;
                if (chunk + op.chunk < end) end = chunk + op.chunk;
            }
            from = lowest - g.start;
            to = end - g.start;
        }
        if (to <= from) from = to = 0;
        unit.from[t] = from;
        unit.to[t] = to;
        if (from == to) continue;
        unit.first = from < unit.first ? from : unit.first;
        unit.end = to > unit.end ? to : unit.end;
    }
    if (unit.end == 0) unit.first = 0;
}

// Where cells hold any positions, or none.
TARGET inline bool sees(const Op &op, i64 position, i64 at) {
    return position >= 0 && at >= 0 && !(op.causal && at > position) && !(op.window && position - at >= op.window) &&
           !(op.chunk && at / op.chunk != position / op.chunk);
}

// The next cells of a range, from `cell` on; returns the cell after them.
TARGET inline i64 next_tile(const Op &op, const Context &c, const Group &g, const Unit &unit, i64 cell, i64 end,
                            Tile &tile) {
    const i64 T = c.pass.T;
    tile.count = 0;
    if (g.start >= 0) {
        const i64 to = cell + TILE < end ? cell + TILE : end;
        tile.count = to - cell;
        for (i64 j = 0; j < tile.count; j++) {
            tile.at[j] = cell + j;
            tile.positions[j] = g.start + cell + j;
        }
        for (i64 t = 0; t < T; t++) {
            tile.partly[t] = unit.from[t] > cell || unit.to[t] < to;
            if (!tile.partly[t]) continue;
            for (i64 j = 0; j < tile.count; j++) tile.seen[t][j] = unit.from[t] <= cell + j && cell + j < unit.to[t];
        }
        return to;
    }
    const i64 *positions = g.positions + unit.b * g.positions_row;
    for (; cell < end && tile.count < TILE; cell++) {
        bool any = false;
        for (i64 t = 0; t < T; t++) {
            const bool seen = sees(op, c.position(unit.b * T + t), positions[cell]);
            tile.seen[t][tile.count] = seen;
            any |= seen;
        }
        if (!any) continue;
        tile.positions[tile.count] = positions[cell];
        tile.at[tile.count++] = cell;
    }
    for (i64 t = 0; t < T; t++) tile.partly[t] = T > 1;
    return cell;
}

// Row r of a unit is query head r / T of the group, token r % T. Scale, soft cap, ALiBi, softmax, values: the order of
// `AttentionSpec`.
template <class T>
TARGET inline void attend_range(const Op &op, Context &c, const Shares &share, const Unit &unit, i64 first, i64 end,
                                const float *q, float *s, float *part) {
    const Slot &slot = c.pass.slots[op.slot];
    const Group &g = c.pass.groups[slot.group];
    const i64 Dv = op.v_head_dim, rows = share.rows, tokens = c.pass.T, row = share.part_row;
    const T *k = (const T *)slot.k + unit.b * slot.k_row + unit.kv * slot.k_head + g.shift * slot.k_cell;
    const T *v = (const T *)slot.v + unit.b * slot.v_row + unit.kv * slot.v_head + g.shift * slot.v_cell;
    for (i64 r = 0; r < rows; r++) {
        float *to = part + r * row;
        for (i64 i = 0; i < row; i++) to[i] = 0.0f;
        to[row - 16] = LOWEST;
    }
    Tile tile;
    for (i64 cell = first; cell < end;) {
        cell = next_tile(op, c, g, unit, cell, end, tile);
        if (tile.count == 0) continue;
        for (i64 r = 0; r < rows; r += 4)
            scores(op, slot, tile, rows - r, k, v, q + r * share.q_row, share.q_row, s + r * TILE, r == 0);
        for (i64 r = 0; r < rows; r++) {
            float *own = s + r * TILE, *to = part + r * row;
            const i64 h = unit.kv * (op.num_heads / op.num_kv_heads) + r / tokens, t = r % tokens;
            if (op.softcap > 0) each(own, tile.count, Cap{(float)op.softcap});
            if (op.slopes) {
                const i64 position = c.position(unit.b * tokens + t);
                for (i64 j = 0; j < tile.count; j++) own[j] -= op.slopes[h] * (float)(position - tile.positions[j]);
            }
            to[row - 14] = weigh(tile, t, own, to[row - 16], to[row - 15]);
        }
        for (i64 r = 0; r < rows; r += 4)
            values(tile, rows - r, v, slot.v_cell, s + r * TILE, part + r * row, row, Dv);
    }
}

// The parts of a unit's ranges, in their order, and the sinks become its outputs.
template <class T>
TARGET inline void put_together(const Op &op, Context &c, const Shares &share, const Unit &unit, const float *parts) {
    const i64 Dv = op.v_head_dim, tokens = c.pass.T, row = share.part_row, size = row - 16;
    const i64 next = share.rows * row;  // from one range's part to the next
    for (i64 r = 0; r < share.rows; r++, parts += row) {
        const i64 h = unit.kv * (op.num_heads / op.num_kv_heads) + r / tokens, m = unit.b * tokens + r % tokens;
        float *o = op.dst + m * op.dst_row + h * Dv, factors[MOST_PIECES], highest = LOWEST;
        for (i64 i = 0; i < share.ranges; i++)
            highest = parts[i * next + size] > highest ? parts[i * next + size] : highest;
        if (op.sinks && op.sinks[h] > highest) highest = op.sinks[h];
        for (i64 i = 0; i < share.ranges; i++) factors[i] = parts[i * next + size];
        each(factors, share.ranges, Softmax{highest});
        float total = 0.0f;
        for (i64 i = 0; i < share.ranges; i++) total += parts[i * next + size + 1] * factors[i];
        const float sink = op.sinks ? std::exp(op.sinks[h] - highest) : 0.0f;
        const float inverse = total == 0.0f ? 0.0f : 1.0f / (total + sink);  // 0: no cell is seen
        alignas(64) float ordered[PAIR];
        for (i64 at = 0; at < size; at += PAIR) {
            V a = {}, b = {};
            for (i64 i = 0; i < share.ranges; i++) {
                a += load(parts + i * next + at) * all(factors[i]);
                b += load(parts + i * next + at + WIDTH) * all(factors[i]);
            }
            store(ordered, a * all(inverse));
            store(ordered + WIDTH, b * all(inverse));
            for (i64 i = 0; i < PAIR && at + i < Dv; i++) o[at + i] = ordered[laid((const T *)nullptr, i)];
        }
    }
}

template <class T>
TARGET inline void attend(const Op &op, Context &c) {
    const Shares share = shares(op, c.pass);
    const Group &g = c.pass.groups[c.pass.slots[op.slot].group];
    const i64 D = op.head_dim, tokens = c.pass.T, part = share.rows * share.part_row;
    float *q = c.attention, *s = q + share.rows * share.q_row, *own = s + share.rows * TILE;
    i64 laid_out = -1;  // the unit whose queries are in q
    Unit unit;
    for (i64 piece = c.thread; piece < share.units * share.ranges; piece += c.count) {
        const i64 u = piece / share.ranges, range = piece % share.ranges;
        if (u != laid_out) {
            unit.b = u / op.num_kv_heads;
            unit.kv = u % op.num_kv_heads;
            see(op, c, g, unit);
            for (i64 i = 0; i < share.rows * share.q_row; i++) q[i] = 0.0f;
            for (i64 r = 0; r < share.rows; r++) {
                const i64 h = unit.kv * (op.num_heads / op.num_kv_heads) + r / tokens;
                const float *from = op.src + (unit.b * tokens + r % tokens) * op.src_row + h * D;
                float *row = q + r * share.q_row;
                for (i64 i = 0; i < D; i++) row[laid((const T *)nullptr, i)] = from[i] * (float)op.scale;
            }
            laid_out = u;
        }
        const i64 first = unit.first + range * share.cells, rest = first + share.cells;
        const i64 end = range + 1 == share.ranges || rest > unit.end ? unit.end : rest;
        float *parts = share.ranges > 1 ? c.parts + u * share.ranges * part : own;
        attend_range<T>(op, c, share, unit, first, end, q, s, share.ranges > 1 ? parts + range * part : own);
        if (share.ranges > 1) {
            // The last to arrive sees what the others wrote; the barrier after the operation shows the others its zero.
            if (__atomic_add_fetch(c.arrived + u, 1, __ATOMIC_ACQ_REL) != share.ranges) continue;
            __atomic_store_n(c.arrived + u, 0, __ATOMIC_RELAXED);
        }
        put_together<T>(op, c, share, unit, parts);
    }
}
