// Products with packed weights: whole numbers of 8 or 4 bits with a scale, perhaps an offset, for 32 columns of a row.
// Included once for each instruction set, after vectors.h.
//
// A block is 16 rows, group after group (`RowBlocks` in pluglm/contracts/packed.py): a group is 8 units of 64 bytes for
// 8 bits and 4 for 4 bits, a unit 16 rows of 4 bytes. So a register holds rows, and no sum runs across it. A byte is a
// signed code of one column; or two codes from 0 to 15, its low half of column 8u + i and its high half of 8u + 4 + i.
//
// Row o times x is, summed over the groups g: scale[o, g] * (sum of code * x) + offset[o, g] * (sum of x). Codes of 4
// bits without an offset mean code - 8.

constexpr i64 GROUP = 32;

// Rows of x as every kind of product reads them.
struct Rows {
    const float *x;  // [rows, stride]
    i64 stride;
    // For packed weights: for each group the sum of x; and x = step * whole number to the nearest, if it is met so.
    const float *sums, *steps;   // [rows, groups]
    const std::int8_t *codes;    // [rows, groups, S, 32]: S bytes of each whole number, the largest first
    const std::int32_t *starts;  // [rows, groups, S]: what a group's sum starts from, so that codes are centred
    i64 groups;                  // from one row to the next
};

TARGET inline U load_unit(const std::uint8_t *p) {
    U u;
    __builtin_memcpy(&u, p, sizeof u);
    return u;
}

// x in float32

// A signed byte times 2^24, or an unsigned byte, of column J of a unit's rows.
template <bool SIGNED, int J>
TARGET inline V column(U bytes) {
#ifdef SHUFFLE
    U from;
    for (int lane = 0; lane < WIDTH; lane++) {
        const std::uint32_t byte = (std::uint32_t)(lane % 4 * 4 + J);
        from[lane] = SIGNED ? byte << 24 | 0x808080u : byte | 0x80808000u;
    }
    if (SIGNED && J == 3) return __builtin_convertvector((I)(bytes & 0xff000000u), V);
    if (SIGNED && J == 0) return __builtin_convertvector((I)(bytes << 24), V);
    return __builtin_convertvector((I)SHUFFLE(bytes, from), V);
#else
    return __builtin_convertvector(SIGNED ? (I)(bytes << (24 - 8 * J) & 0xff000000u) : (I)(bytes >> 8 * J & 0xffu), V);
#endif
}

template <int R, int C, bool SIGNED, int J>
TARGET inline void add_column(V (&sum)[R][C][PARTS], const U (&bytes)[PARTS], const float *const (&x)[R], int at) {
    V v[PARTS];
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) v[p] = column<SIGNED, J>(bytes[p]);
    add_products<R, C>(sum, at + J, v, x);
}

// Four columns of R rows.
template <int R, int C, bool SIGNED>
TARGET inline void add_columns(V (&sum)[R][C][PARTS], const U (&bytes)[PARTS], const float *const (&x)[R], int at) {
    add_column<R, C, SIGNED, 0>(sum, bytes, x, at);
    add_column<R, C, SIGNED, 1>(sum, bytes, x, at);
    add_column<R, C, SIGNED, 2>(sum, bytes, x, at);
    add_column<R, C, SIGNED, 3>(sum, bytes, x, at);
}

// 16 outputs of R rows from `first` on, x as it is: out [R, 16].
template <int R, bool EIGHT>
TARGET inline void exact_dot(const Matrix &w, i64 index, const Rows &rows, i64 first, float *out) {
    constexpr i64 BYTES = EIGHT ? 512 : 256;  // of a group
    constexpr int C = chains<R>() < 4 ? chains<R>() : 4;
    const i64 groups = w.columns / GROUP;
    const std::uint8_t *codes = (const std::uint8_t *)w.numbers + index * groups * BYTES;
    const std::uint16_t *scale = w.scale + index * groups * 16;
    const std::uint16_t *offset = w.offset ? w.offset + index * groups * 16 : nullptr;
    const float *x[R];
    point(x, rows.x + first * rows.stride, rows.stride);
    V total[R][PARTS] = {};
    for (i64 g = 0; g < groups; g++, codes += BYTES, move(x, GROUP)) {
#pragma GCC unroll 8
        for (i64 line = 0; line < BYTES; line += 64) __builtin_prefetch(codes + 4096 + line);
        V sum[R][C][PARTS] = {};  // times 2^24 for 8 bits
#pragma GCC unroll 8
        for (int u = 0; u < (EIGHT ? 8 : 4); u++) {
            U bytes[PARTS], low[PARTS], high[PARTS];
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) {
                bytes[p] = load_unit(codes + 64 * u + 4 * WIDTH * p);
                low[p] = bytes[p] & 0x0f0f0f0fu;
                high[p] = bytes[p] >> 4 & 0x0f0f0f0fu;
            }
            if (EIGHT) {
                add_columns<R, C, true>(sum, bytes, x, 4 * u);
            } else {
                add_columns<R, C, false>(sum, low, x, 8 * u);
                add_columns<R, C, false>(sum, high, x, 8 * u + 4);
            }
        }
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) {
            const V s = load_half(scale + 16 * g + WIDTH * p), factor = EIGHT ? s * all(1.0f / 16777216) : s;
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                V all_of = sum[r][0][p];
#pragma GCC unroll 4
                for (int i = 1; i < C; i++) all_of += sum[r][i][p];
                total[r][p] += all_of * factor;
            }
            if (EIGHT && !offset) continue;
            const V o = offset ? load_half(offset + 16 * g + WIDTH * p) : s * all(-8.0f);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) total[r][p] += o * all(rows.sums[(first + r) * rows.groups + g]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) store(out + 16 * r + WIDTH * p, total[r][p]);
}

// A group as floats [32, 16]: scale * code is exact in float32.
template <bool EIGHT>
TARGET inline void unpack_group(const std::uint8_t *codes, const std::uint16_t *scale, const std::uint16_t *offset,
                                float *to) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) {
        const V s = load_half(scale + WIDTH * p), factor = EIGHT ? s * all(1.0f / 16777216) : s;
        const V o = offset ? load_half(offset + WIDTH * p) : EIGHT ? V{} : s * all(-8.0f);
#pragma GCC unroll 8
        for (int u = 0; u < 8; u++) {
            const U bytes = load_unit(codes + 64 * (EIGHT ? u : u / 2) + 4 * WIDTH * p);
            const U four = EIGHT ? bytes : bytes >> (u % 2 * 4) & 0x0f0f0f0fu;
            float *column_u = to + 64 * u + WIDTH * p;
            store(column_u, column<EIGHT, 0>(four) * factor + o);
            store(column_u + 16, column<EIGHT, 1>(four) * factor + o);
            store(column_u + 32, column<EIGHT, 2>(four) * factor + o);
            store(column_u + 48, column<EIGHT, 3>(four) * factor + o);
        }
    }
}

// 16 outputs of `count` rows, x as it is: a group is unpacked once for all of them.
template <bool EIGHT>
TARGET inline void exact_rows(const Matrix &w, i64 index, const Rows &rows, i64 count, float *out) {
    constexpr i64 BYTES = EIGHT ? 512 : 256;
    const i64 groups = w.columns / GROUP;
    const std::uint8_t *codes = (const std::uint8_t *)w.numbers + index * groups * BYTES;
    alignas(64) float group[GROUP * 16];
    for (i64 i = 0; i < 16 * count; i += WIDTH) store(out + i, V{});
    for (i64 g = 0; g < groups; g++, codes += BYTES) {
        const i64 at = (index * groups + g) * 16;
        for (i64 line = 0; line < BYTES; line += 64) __builtin_prefetch(codes + 2048 + line);
        unpack_group<EIGHT>(codes, w.scale + at, w.offset ? w.offset + at : nullptr, group);
        plain_rows<true>((const float *)group, rows.x + g * GROUP, rows.stride, GROUP, count, out);
    }
}

// x as whole numbers: one byte a number if it is rounded, else three, 65536 a + 256 b + c, which is float32's own
// precision for the largest of a group. Products and sums of a group are whole then. In `w` and `x` a lane holds four
// bytes.

enum { SINGLE, PAIRS, DOTS };

#if defined(DOT4)  // sum + the products of four unsigned with four signed bytes, in each lane
constexpr int PRODUCTS = DOTS;
TARGET inline I add_signed(I sum, U w, U x) { return DOT4(sum, w ^ 0x80808080u, x); }
TARGET inline I add_small(I sum, U w, U x) { return DOT4(sum, w, x); }
TARGET inline I sum_of_small(I sum) { return sum; }
TARGET inline std::int32_t start(int even, int odd) { return -8 * (even + odd); }
#elif defined(SHUFFLE)  // the products of unsigned with signed bytes, two added in each 16 bits
typedef std::int16_t S16 __attribute__((vector_size(4 * WIDTH)));
// Two products of at most 128 * 127 fit 16 bits together; of those of codes up to 15, sixteen do.
constexpr int PRODUCTS = PAIRS;
TARGET inline I sum_of_small(I sum) { return (I)ADD_PAIRS(sum); }
TARGET inline I add_signed(I sum, U w, U x) { return sum + sum_of_small((I)MULTIPLY(SIZE_OF(w), SIGN_OF(x, w))); }
TARGET inline I add_small(I sum, U w, U x) { return (I)((S16)sum + (S16)MULTIPLY(w, x)); }
TARGET inline std::int32_t start(int even, int odd) {
    return (std::int32_t)(((std::uint32_t)(-8 * even) & 0xffffu) | (std::uint32_t)(-8 * odd) << 16);
}
#else
constexpr int PRODUCTS = SINGLE;
TARGET inline I add_signed(I sum, U w, U x) {
#pragma GCC unroll 4
    for (int j = 24; j >= 0; j -= 8) sum += ((I)(w << j) >> 24) * ((I)(x << j) >> 24);
    return sum;
}
TARGET inline I add_small(I sum, U w, U x) { return add_signed(sum, w, x); }
TARGET inline I sum_of_small(I sum) { return sum; }
TARGET inline std::int32_t start(int even, int odd) { return -8 * (even + odd); }
#endif

TARGET inline U four(const std::int8_t *x) {
    std::uint32_t word;
    __builtin_memcpy(&word, x, sizeof word);
    return U{} + word;
}

// Adds four columns of R rows, each in S bytes, times registers of codes.
template <int R, int S, bool EIGHT>
TARGET inline void add_unit(I (&sum)[R][S][PARTS], const U (&w)[PARTS], const std::int8_t *const (&x)[R], int at) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int s = 0; s < S; s++) {
            const U v = four(x[r] + GROUP * s + at);
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) {
                sum[r][s][p] = EIGHT ? add_signed(sum[r][s][p], w[p], v) : add_small(sum[r][s][p], w[p], v);
                HOLD(sum[r][s][p]);
            }
        }
}

// 16 outputs of R rows from `first` on, of x in S bytes: out [R, 16].
template <int R, int S, bool EIGHT>
TARGET inline void whole_dot(const Matrix &w, i64 index, const Rows &rows, i64 first, float *out) {
    constexpr i64 BYTES = EIGHT ? 512 : 256;  // of a group
    const i64 groups = w.columns / GROUP, row = rows.groups * GROUP * S;
    const std::uint8_t *codes = (const std::uint8_t *)w.numbers + index * groups * BYTES;
    const std::uint16_t *scale = w.scale + index * groups * 16;
    const std::uint16_t *offset = w.offset ? w.offset + index * groups * 16 : nullptr;
    const std::int8_t *x[R];
    point(x, rows.codes + first * row, row);
    const float *steps = rows.steps + first * rows.groups, *sums = rows.sums + first * rows.groups;
    const std::int32_t *starts = rows.starts + first * rows.groups * S;
    const bool centred = EIGHT ? PRODUCTS == DOTS : !offset;
    V total[R][PARTS] = {};
    for (i64 g = 0; g < groups; g++, codes += BYTES, move(x, GROUP * S)) {
#pragma GCC unroll 8
        for (i64 line = 0; line < BYTES; line += 64) __builtin_prefetch(codes + 4096 + line);
        I sum[R][S][PARTS];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int s = 0; s < S; s++) {
                const I at = centred ? I{} + starts[(r * rows.groups + g) * S + s] * (EIGHT ? 16 : 1) : I{};
#pragma GCC unroll 4
                for (int p = 0; p < PARTS; p++) sum[r][s][p] = at;
            }
#pragma GCC unroll 8
        for (int u = 0; u < (EIGHT ? 8 : 4); u++) {
            U bytes[PARTS], low[PARTS], high[PARTS];
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) {
                bytes[p] = load_unit(codes + 64 * u + 4 * WIDTH * p);
                low[p] = bytes[p] & 0x0f0f0f0fu;
                high[p] = bytes[p] >> 4 & 0x0f0f0f0fu;
            }
            if (EIGHT) {
                add_unit<R, S, true>(sum, bytes, x, 4 * u);
            } else {
                add_unit<R, S, false>(sum, low, x, 8 * u);
                add_unit<R, S, false>(sum, high, x, 8 * u + 4);
            }
        }
        V factor[PARTS];
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) factor[p] = load_half(scale + 16 * g + WIDTH * p);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) {
                I part[S];
#pragma GCC unroll 4
                for (int s = 0; s < S; s++) part[s] = EIGHT ? sum[r][s][p] : sum_of_small(sum[r][s][p]);
                V whole;
                if (S == 1) whole = __builtin_convertvector(part[0], V);
                else whole = __builtin_convertvector(part[0] * 256 + part[S > 1], V) * all(256.0f) +
                             __builtin_convertvector(part[S - 1], V);
                total[r][p] += whole * all(steps[r * rows.groups + g]) * factor[p];
            }
        if (!offset) continue;
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) {
            const V o = load_half(offset + 16 * g + WIDTH * p);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) total[r][p] += o * all(sums[r * rows.groups + g]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) store(out + 16 * r + WIDTH * p, total[r][p]);
}

// Rows of x at once: as many as there are registers for their sums.
template <int S>
constexpr int whole_rows_at_once() { return S == 1 ? (WIDTH == 16 ? 8 : WIDTH == 8 ? 4 : 2) : (WIDTH == 16 ? 4 : 2); }

// 16 outputs of `count` rows, x in S bytes: out [count, 16].
template <int S, bool EIGHT>
TARGET inline void whole_block(const Matrix &w, i64 index, const Rows &rows, i64 count, float *out) {
    constexpr int MANY = whole_rows_at_once<S>(), SOME = MANY / 2 < 2 ? 1 : MANY / 2;
    i64 r = 0;
    for (; r + MANY <= count; r += MANY) whole_dot<MANY, S, EIGHT>(w, index, rows, r, out + 16 * r);
    for (; SOME > 1 && r + SOME <= count; r += SOME) whole_dot<SOME, S, EIGHT>(w, index, rows, r, out + 16 * r);
    for (; r < count; r++) whole_dot<1, S, EIGHT>(w, index, rows, r, out + 16 * r);
}

// Whether x that is not rounded is met as whole numbers: where that is faster.
template <bool EIGHT>
constexpr bool in_three_bytes(i64 count) { return PRODUCTS == DOTS || (PRODUCTS == PAIRS && !EIGHT && count < 4); }

template <bool EIGHT>
TARGET inline void packed_block(const Matrix &w, i64 index, const Rows &rows, i64 count, bool rounds, float *out) {
    if (rounds) return whole_block<1, EIGHT>(w, index, rows, count, out);
    if constexpr (in_three_bytes<EIGHT>(1))
        if (in_three_bytes<EIGHT>(count)) return whole_block<3, EIGHT>(w, index, rows, count, out);
    if constexpr (!in_three_bytes<EIGHT>(MAX_ROWS)) {
        if (count >= 12) return exact_rows<EIGHT>(w, index, rows, count, out);
        constexpr int FOUR = MOST < 4 ? MOST : 4;
        i64 r = 0;
        for (; r + FOUR <= count; r += FOUR) exact_dot<FOUR, EIGHT>(w, index, rows, r, out + 16 * r);
        for (; r < count; r++) exact_dot<1, EIGHT>(w, index, rows, r, out + 16 * r);
    }
}

// The sums of a row's groups; and x = step * whole number, if S > 0. S = 1: the largest of a group is 127 steps, as in
// Q8_0 of llama.cpp. S = 3: a step is a power of two, the largest of a group 2^21 to LARGEST steps; so numbers of few
// bits, like whole ones, stay as they are.
constexpr float LARGEST = 8355711.0f;  // 127 * 65536 + 127 * 256 + 127

typedef std::int8_t B __attribute__((vector_size(WIDTH)));

TARGET inline void step_of(float most, int S, float &step, float &inverse) {
    if (S == 1) {
        step = most / 127.0f;
        inverse = most > 0.0f ? 127.0f / most : 0.0f;
        return;
    }
    std::uint32_t bits;
    __builtin_memcpy(&bits, &most, sizeof bits);
    std::int32_t exponent = (std::int32_t)(bits >> 23) - 22;  // most = 2^22 steps or more, if it is a normal number
    if ((float)((bits & 0x7fffffu) | 0x800000u) > 2 * LARGEST) exponent++;
    if (exponent < 1) exponent = 1;
    const std::uint32_t up = (std::uint32_t)exponent << 23, down = (std::uint32_t)(254 - exponent) << 23;
    __builtin_memcpy(&step, &up, sizeof step);
    __builtin_memcpy(&inverse, &down, sizeof inverse);
}

template <int S>
TARGET inline void prepare(const float *x, i64 groups, float *sums, float *steps, std::int8_t *codes,
                           std::int32_t *starts) {
    for (i64 g = 0; g < groups; g++, x += GROUP) {
        V total = {}, largest = {};
#pragma GCC unroll 8
        for (i64 i = 0; i < GROUP; i += WIDTH) {
            const V v = load(x + i);
            total += v;
            largest = larger(largest, larger(v, -v));
        }
        sums[g] = sum(total);
        if (S == 0) continue;
        float lanes[WIDTH], most = 0.0f, inverse;
        store(lanes, largest);
        for (int i = 0; i < WIDTH; i++) most = lanes[i] > most ? lanes[i] : most;
        step_of(most, S, steps[g], inverse);
        steps[g] += 0.0f * sums[g];  // what is no number stays none
        I part_sums[3] = {};
#pragma GCC unroll 8
        for (i64 i = 0; i < GROUP; i += WIDTH) {
            const V v = load(x + i) * all(inverse), magic = all(12582912.0f);  // 1.5 * 2^23: rounds to a whole number
            I near[3];
            near[0] = (I)(v + magic) - (I)magic;
            if (S == 3) {
                const I all_of = __builtin_convertvector(v < V{} ? v - all(0.5f) : v + all(0.5f), I);
                near[1] = (all_of + 128) >> 8;
                near[2] = all_of - (near[1] << 8);
                near[0] = (near[1] + 128) >> 8;
                near[1] -= near[0] << 8;
            }
#pragma GCC unroll 4
            for (int s = 0; s < S; s++) {
                const B bytes = __builtin_convertvector(near[s], B);
                __builtin_memcpy(codes + GROUP * s + i, &bytes, sizeof bytes);
                part_sums[s] += near[s];
            }
        }
        int whole = 0;
#pragma GCC unroll 4
        for (int s = 0; s < S; s++) {
            std::int32_t lane[WIDTH];
            __builtin_memcpy(lane, &part_sums[s], sizeof lane);
            int even = 0, odd = 0;  // of columns 0, 1 and of columns 2, 3 of four
            for (int i = 0; i < WIDTH; i += 4) {
                even += lane[i] + lane[i + 1];
                odd += lane[i + 2] + lane[i + 3];
            }
            *starts++ = start(even, odd);
            whole = even + odd;
        }
        if (S == 1) sums[g] = steps[g] * (float)whole;
        codes += GROUP * S;
    }
}
