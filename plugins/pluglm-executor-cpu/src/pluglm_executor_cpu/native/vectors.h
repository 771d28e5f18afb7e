// Arithmetic on WIDTH floats at once. Included once for each instruction set, inside its namespace: TARGET is put on
// every function, WIDTH floats fill one of its registers.

typedef float V __attribute__((vector_size(4 * WIDTH)));
typedef std::int32_t I __attribute__((vector_size(4 * WIDTH)));
typedef std::uint32_t U __attribute__((vector_size(4 * WIDTH)));
typedef std::uint16_t H __attribute__((vector_size(2 * WIDTH)));

constexpr int PARTS = 16 / WIDTH;  // registers of a block of 16 outputs

TARGET inline V load(const float *p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

TARGET inline void store(float *p, V v) { __builtin_memcpy(p, &v, sizeof v); }

// x - 0 and not x + 0: the same number also for x = -0, so that nothing is computed.
TARGET inline V all(float x) { return x - V{}; }

// bfloat16 is the upper half of a float32.
TARGET inline V load(const std::uint16_t *p) {
    H h;
    __builtin_memcpy(&h, p, sizeof h);
    return (V)(__builtin_convertvector(h, U) << 16);
}

// float16: its bits, three to the right, are those of a float32 2^112 times smaller; infinities and NaN apart.
TARGET inline V load_half(const std::uint16_t *p) {
#ifdef LOAD_HALF
    return LOAD_HALF(p);
#else
    H h;
    __builtin_memcpy(&h, p, sizeof h);
    const U u = __builtin_convertvector(h, U), size = (u & 0x7fffu) << 13, sign = (u & 0x8000u) << 16;
    const U finite = (U)((V)size * all(5.192296858534828e33f));
    return (V)(sign | (size >= 0x0f800000u ? size | 0x7f800000u : finite));
#endif
}

TARGET inline float widen(float x) { return x; }

TARGET inline float widen(std::uint16_t x) {
    const std::uint32_t bits = (std::uint32_t)x << 16;
    float f;
    __builtin_memcpy(&f, &bits, sizeof f);
    return f;
}

// To the nearest, ties to even; a NaN stays one.
TARGET inline void narrow(std::uint16_t *to, float x) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    *to = (std::uint16_t)(x != x ? (bits >> 16) | 64 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

TARGET inline void narrow(float *to, float x) { *to = x; }

TARGET inline float sum(V v) {
    float lanes[WIDTH];
    store(lanes, v);
#pragma GCC unroll 4
    for (int half = WIDTH / 2; half >= 1; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

TARGET inline V larger(V a, V b) { return a > b ? a : b; }
TARGET inline V smaller(V a, V b) { return a < b ? a : b; }

// exp(x) with a relative error below 3e-7; x is kept where the result is a normal number.
// x = n ln 2 + r, |r| <= ln 2 / 2 (Cody & Waite 1980); the series of exp(r) up to r^6 / 720.
TARGET inline V exponential(V x) {
    x = smaller(larger(x, all(-87.3f)), all(88.0f));
    const V magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const V n = (x * all(1.44269504f) + magic) - magic;
    const V r = (x - n * all(0.693359375f)) + n * all(2.12194440e-4f);
    V p = all(1.0f / 720);
    p = p * r + all(1.0f / 120);
    p = p * r + all(1.0f / 24);
    p = p * r + all(1.0f / 6);
    p = p * r + all(0.5f);
    p = p * r + all(1.0f);
    p = p * r + all(1.0f);
    const I power = (__builtin_convertvector(n, I) + 127) << 23;
    return p * (V)power;
}

TARGET inline V tanh_(V x) { return all(1.0f) - all(2.0f) / (exponential(x + x) + all(1.0f)); }

// f over `count` floats in place; the rest of a register is filled up and not written back.
template <class F>
TARGET inline void each(float *x, i64 count, F f) {
    i64 i = 0;
    for (; i + WIDTH <= count; i += WIDTH) store(x + i, f.of(load(x + i)));
    const int left = (int)(count - i);
    if (left == 0) return;
    float rest[WIDTH] = {};
    for (int j = 0; j < WIDTH; j++) rest[j] = j < left ? x[i + j] : 0.0f;
    store(rest, f.of(load(rest)));
    for (int j = 0; j < WIDTH && j < left; j++) x[i + j] = rest[j];
}
