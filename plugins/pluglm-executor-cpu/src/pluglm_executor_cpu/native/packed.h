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
    // For packed weights: for each group the sum of x; and, if the plan rounds, x = step * code to the nearest.
    const float *sums, *steps;  // [rows, groups]
    const std::int8_t *codes;   // [rows, groups, 32]
    i64 groups;                 // from one row to the next
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
    return __builtin_convertvector((I)SHUFFLE(bytes, from), V);
#else
    return __builtin_convertvector(SIGNED ? (I)(bytes << (24 - 8 * J) & 0xff000000u) : (I)(bytes >> 8 * J & 0xffu), V);
#endif
}

template <int R, int C, bool SIGNED, int J>
TARGET inline void add_column(V (&sum)[R][C], U bytes, const float *x, i64 stride) {
    const V v = column<SIGNED, J>(bytes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sum[r][J % C] += v * all(x[r * stride + J]);
}

template <int R, int C, bool SIGNED>
TARGET inline void add_columns(V (&sum)[R][C], U bytes, const float *x, i64 stride) {
    add_column<R, C, SIGNED, 0>(sum, bytes, x, stride);
    add_column<R, C, SIGNED, 1>(sum, bytes, x, stride);
    add_column<R, C, SIGNED, 2>(sum, bytes, x, stride);
    add_column<R, C, SIGNED, 3>(sum, bytes, x, stride);
}

// One group of R rows for a register of outputs: the sums of code * x, times 2^24 for 8 bits.
template <int R, bool EIGHT>
TARGET inline void exact_group(const std::uint8_t *codes, const Rows &rows, i64 first, i64 g, V (&to)[R]) {
    constexpr int C = R <= 2 ? 4 : 2;  // independent sums, to hide an addition's latency
    V sum[R][C] = {};
    const float *x = rows.x + first * rows.stride + g * GROUP;
#pragma GCC unroll 8
    for (int u = 0; u < (EIGHT ? 8 : 4); u++) {
        const U bytes = load_unit(codes + 64 * u);
        if (EIGHT) {
            add_columns<R, C, true>(sum, bytes, x + 4 * u, rows.stride);
        } else {
            add_columns<R, C, false>(sum, bytes & 0x0f0f0f0fu, x + 8 * u, rows.stride);
            add_columns<R, C, false>(sum, bytes >> 4 & 0x0f0f0f0fu, x + 8 * u + 4, rows.stride);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        to[r] = sum[r][0];
#pragma GCC unroll 4
        for (int i = 1; i < C; i++) to[r] += sum[r][i];
    }
}

// x rounded to bytes: a group's products and sums are whole numbers. In `w` and `x` a lane holds four bytes.

#if defined(SHUFFLE) && WIDTH == 8
// Two products of at most 128 * 127 fit 16 bits together; of those of codes up to 15, sixteen do.
TARGET inline I add_signed(I sum, U w, U x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), _mm256_sign_epi8((__m256i)x, (__m256i)w));
    return sum + (I)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
TARGET inline I add_small(I sum, U w, U x) {
    return (I)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)w, (__m256i)x));
}
TARGET inline I sum_of_small(I sum) { return (I)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
#elif defined(SHUFFLE) && WIDTH == 16
TARGET inline I add_signed(I sum, U w, U x) {
    const __m512i zero = _mm512_setzero_si512(), a = (__m512i)w, b = (__m512i)x;
    const __m512i turned = _mm512_mask_sub_epi8(b, _mm512_movepi8_mask(a), zero, b);
    return sum + (I)_mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_abs_epi8(a), turned), _mm512_set1_epi16(1));
}
TARGET inline I add_small(I sum, U w, U x) {
    return (I)_mm512_add_epi16((__m512i)sum, _mm512_maddubs_epi16((__m512i)w, (__m512i)x));
}
TARGET inline I sum_of_small(I sum) { return (I)_mm512_madd_epi16((__m512i)sum, _mm512_set1_epi16(1)); }
#else
TARGET inline I add_signed(I sum, U w, U x) {
#pragma GCC unroll 4
    for (int j = 24; j >= 0; j -= 8) sum += ((I)(w << j) >> 24) * ((I)(x << j) >> 24);
    return sum;
}
TARGET inline I add_small(I sum, U w, U x) { return add_signed(sum, w, x); }
TARGET inline I sum_of_small(I sum) { return sum; }
#endif

TARGET inline U four(const std::int8_t *x) {
    std::uint32_t word;
    __builtin_memcpy(&word, x, sizeof word);
    return U{} + word;
}

template <int R, bool EIGHT>
TARGET inline void rounded_group(const std::uint8_t *codes, const Rows &rows, i64 first, i64 g, V (&to)[R]) {
    I sum[R] = {};
    const std::int8_t *x = rows.codes + (first * rows.groups + g) * GROUP;
    const i64 row = rows.groups * GROUP;
#pragma GCC unroll 8
    for (int u = 0; u < (EIGHT ? 8 : 4); u++) {
        const U bytes = load_unit(codes + 64 * u), low = bytes & 0x0f0f0f0fu, high = bytes >> 4 & 0x0f0f0f0fu;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            if (EIGHT) {
                sum[r] = add_signed(sum[r], bytes, four(x + r * row + 4 * u));
            } else {
                sum[r] = add_small(sum[r], low, four(x + r * row + 8 * u));
                sum[r] = add_small(sum[r], high, four(x + r * row + 8 * u + 4));
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        const V whole = __builtin_convertvector(EIGHT ? sum[r] : sum_of_small(sum[r]), V);
        to[r] = whole * all(rows.steps[(first + r) * rows.groups + g]);
    }
}

// 16 outputs of R rows from `first` on: out [R, 16].
template <int R, bool EIGHT, bool ROUNDED>
TARGET inline void packed_dot(const Matrix &w, i64 index, const Rows &rows, i64 first, float *out) {
    constexpr i64 BYTES = EIGHT ? 512 : 256;  // of a group
    const i64 groups = w.columns / GROUP;
    const std::uint8_t *codes = (const std::uint8_t *)w.numbers + index * groups * BYTES;
    const std::uint16_t *scale = w.scale + index * groups * 16;
    const std::uint16_t *offset = w.offset ? w.offset + index * groups * 16 : nullptr;
    V total[R][PARTS] = {};
    for (i64 g = 0; g < groups; g++, codes += BYTES) {
#pragma GCC unroll 8
        for (i64 line = 0; line < BYTES; line += 64) __builtin_prefetch(codes + 4096 + line);
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) {
            V sum[R];
            if (ROUNDED) rounded_group<R, EIGHT>(codes + 4 * WIDTH * p, rows, first, g, sum);
            else exact_group<R, EIGHT>(codes + 4 * WIDTH * p, rows, first, g, sum);
            const V s = load_half(scale + 16 * g + WIDTH * p);
            const V factor = EIGHT && !ROUNDED ? s * all(1.0f / 16777216) : s;
            if (EIGHT && !offset) {
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) total[r][p] += sum[r] * factor;
                continue;
            }
            const V o = offset ? load_half(offset + 16 * g + WIDTH * p) : s * all(-8.0f);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                total[r][p] += sum[r] * factor + o * all(rows.sums[(first + r) * rows.groups + g]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) store(out + 16 * r + WIDTH * p, total[r][p]);
}

// 16 outputs of `count` rows: out [count, 16].
template <bool EIGHT, bool ROUNDED>
TARGET inline void packed_block(const Matrix &w, i64 index, const Rows &rows, i64 count, float *out) {
    i64 r = 0;
    for (; r + 4 <= count; r += 4) packed_dot<4, EIGHT, ROUNDED>(w, index, rows, r, out + 16 * r);
    for (; r + 2 <= count; r += 2) packed_dot<2, EIGHT, ROUNDED>(w, index, rows, r, out + 16 * r);
    for (; r < count; r++) packed_dot<1, EIGHT, ROUNDED>(w, index, rows, r, out + 16 * r);
}

// The sums of a row's groups; and x = step * code, the largest of a group being 127 steps, as Q8_0 of llama.cpp does.
TARGET inline void prepare(const float *x, i64 groups, bool round, float *sums, float *steps, std::int8_t *codes) {
    for (i64 g = 0; g < groups; g++, x += GROUP, codes += GROUP) {
        V total = {}, largest = {};
#pragma GCC unroll 8
        for (i64 i = 0; i < GROUP; i += WIDTH) {
            const V v = load(x + i);
            total += v;
            largest = larger(largest, larger(v, -v));
        }
        sums[g] = sum(total);
        if (!round) continue;
        float lanes[WIDTH], most = 0.0f;
        store(lanes, largest);
        for (int i = 0; i < WIDTH; i++) most = lanes[i] > most ? lanes[i] : most;
        const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
        int whole = 0;
        for (i64 i = 0; i < GROUP; i += WIDTH) {
            const V magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
            const I near = (I)(load(x + i) * all(inverse) + magic) - (I)magic;
            for (int j = 0; j < WIDTH; j++) {
                codes[i + j] = (std::int8_t)near[j];
                whole += codes[i + j];
            }
        }
        steps[g] = most / 127.0f + 0.0f * sums[g];  // what is no number stays none
        sums[g] = steps[g] * (float)whole;
    }
}
