// Products with a weight
//
// Packed as blocks of 16 output rows, so that a register holds outputs and no sum runs across it: float32 as
// [blocks][columns][16], bfloat16 as [blocks][columns / 2][16][2]. Columns are filled up to a multiple of 8 and rows to
// one of 16, with zeros.

constexpr int MOST = WIDTH == 16 ? 8 : WIDTH == 8 ? 4 : 2;  // rows of x at once

// Independent sums a row and register: enough to hide an addition's latency, no more than there are registers.
template <int R>
constexpr int chains() {
    const int room = (WIDTH == 16 ? 16 : 8) / (R * PARTS);
    return room < 1 ? 1 : room > 8 ? 8 : room;
}

// Compilers keep one pointer for each load otherwise, more than there are registers.
template <int R, class T>
TARGET inline void point(const T *(&to)[R], const T *first, i64 row) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) to[r] = first + r * row;
}

template <int R, class T>
TARGET inline void move(const T *(&to)[R], i64 by) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        to[r] += by;
        asm("" : "+r"(to[r]));
    }
}

// Column j of a chain of sums, R rows: x is spread once for all registers of outputs.
template <int R, int C>
TARGET inline void add_products(V (&total)[R][C][PARTS], int at, const V (&w)[PARTS], const float *const (&x)[R]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        const V v = all(x[r][at]);
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) {
            total[r][at % C][p] += w[p] * v;
            HOLD(total[r][at % C][p]);
        }
    }
}

template <bool ADD, int R, int C>
TARGET inline void put(const V (&total)[R][C][PARTS], float *out) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++, out += WIDTH) {
            V v = total[r][0][p];
#pragma GCC unroll 8
            for (int i = 1; i < C; i++) v += total[r][i][p];
            store(out, ADD ? load(out) + v : v);
        }
}

template <bool ADD, int R>
TARGET inline void dot(const float *w, const float *x, i64 x_row, i64 columns, float *out) {
    constexpr int C = chains<R>();
    V total[R][C][PARTS] = {};
    const float *from[R];
    point(from, x, x_row);
    for (i64 k = 0; k < columns; k += 8, w += 128, move(from, 8)) {
#pragma GCC unroll 8
        for (int line = 0; line < (ADD ? 0 : 8); line++) __builtin_prefetch(w + 1024 + 16 * line);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            V v[PARTS];
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) v[p] = load(w + 16 * j + WIDTH * p);
            add_products<R, C>(total, j, v, from);
        }
    }
    put<ADD>(total, out);
}

template <bool ADD, int R>
TARGET inline void dot(const std::uint16_t *w, const float *x, i64 x_row, i64 columns, float *out) {
    constexpr int C = chains<R>();
    V total[R][C][PARTS] = {};
    const float *from[R];
    point(from, x, x_row);
    for (i64 k = 0; k < columns; k += 8, w += 128, move(from, 8)) {
#pragma GCC unroll 4
        for (int line = 0; line < 4; line++) __builtin_prefetch(w + 2048 + 32 * line);
#pragma GCC unroll 4
        for (int j = 0; j < 8; j += 2) {
            V even[PARTS], odd[PARTS];
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) {
                U pair;
                __builtin_memcpy(&pair, w + 16 * j + 2 * WIDTH * p, sizeof pair);
                even[p] = (V)(pair << 16);
                odd[p] = (V)(pair & 0xffff0000u);
            }
            add_products<R, C>(total, j, even, from);
            add_products<R, C>(total, j + 1, odd, from);
        }
    }
    put<ADD>(total, out);
}

// 16 outputs of `count` rows: out [count, 16], added to it or in its place.
template <bool ADD, class T>
TARGET inline void plain_rows(const T *w, const float *x, i64 x_row, i64 columns, i64 count, float *out) {
    i64 r = 0;
    for (; r + MOST <= count; r += MOST) dot<ADD, MOST>(w, x + r * x_row, x_row, columns, out + 16 * r);
    if (MOST > 4)
        for (; r + 4 <= count; r += 4) dot<ADD, MOST < 4 ? MOST : 4>(w, x + r * x_row, x_row, columns, out + 16 * r);
    for (; r + 2 <= count; r += 2) dot<ADD, 2>(w, x + r * x_row, x_row, columns, out + 16 * r);
    for (; r < count; r++) dot<ADD, 1>(w, x + r * x_row, x_row, columns, out + 16 * r);
}
