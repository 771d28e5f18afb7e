// Attention of a few queries to keys and values in pages, with the softmax taken block by block.
//
// One task is one row of the batch and one stretch of its cells: it goes from block to block, and in a block from key
// head to key head, because that is how pages lie in memory; the query heads of a group share what is read. A stretch
// gives the largest score, the sum and the weighted values of each query; stretches are then joined.
// Scores and sums are float32 whatever the inputs. What a query sees comes as bytes: this file knows no kind of mask.
//
// Sources: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3; Dao et al. 2023,
// "Flash-Decoding" (stretches in parallel); Kwon et al. 2023, "PagedAttention", section 4.1.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

// One library for every x86-64 machine. PLUGLM_PLAIN: the build found that this compiler cannot do it.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(PLUGLM_PLAIN)
#define FOR_EACH_MACHINE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_MACHINE
#endif

namespace {

constexpr int64_t kBlock = 64;         // cells whose scores are held at a time
constexpr int64_t kManyRows = 4;       // queries that are worth turning a block of keys on its side
constexpr int64_t kLeastStretch = 256; // cells that are worth a task of their own
constexpr double kLeastWork = 4e5;     // multiplications that are worth a thread: some 50 microseconds
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// One call. Strides count elements. Mirrored, field by field, by `Call` in native.py.
struct Call {
    const void *q, *k, *v;      // [B, H, T, D], [P, page_size, K, D], [P, page_size, K, Dv]; the last stride is 1
    void *o;                    // [B, H, T, Dv], contiguous
    const int32_t *table;       // [B, pages of a row]
    const uint8_t *visible;     // [B, T, end] not 0 where a query sees a cell; null: everywhere
    const float *bias;          // [B, H, T, end] or null
    const float *sinks;         // [H] or null
    const float *slopes;        // [H] or null; with it:
    const int64_t *q_positions; // [B, T]
    const int64_t *k_positions; // [B, end]
    int64_t q_row, q_head, q_token, k_page, k_cell, k_head, v_page, v_cell, v_head, table_row;
    int64_t visible_row, visible_token, bias_row, bias_head, bias_token, q_positions_row, k_positions_row;
    int64_t B, H, K, T, D, Dv, num_pages, page_size, start, end;
    float scale, softcap;       // softcap 0: none
    int32_t threads, bfloat16;
};

struct Job {
    const Call &c;
    int64_t stretches, stretch; // of a row's cells, and how many each has
    std::vector<float> parts;   // of each task and query: largest score, sum, weighted values [Dv]
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};

    float *part(int64_t task, int64_t h, int64_t t) {
        return parts.data() + ((task * c.H + h) * c.T + t) * (c.Dv + 2);
    }
};

INLINE float widened(float x) { return x; }

INLINE float widened(uint16_t x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

INLINE void put(float *to, float x) { *to = x; }

INLINE void put(uint16_t *to, float x) { // to nearest, ties to even; x is finite
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    *to = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp(x) for x <= 0, relative error below 3e-7; 0 below -87. The polynomial is that of Cephes' expf.
INLINE float exponential(float x) {
    const float y = x < -87.0f ? -87.0f : x;
    const float n = (y * 1.44269504f + 12582912.0f) - 12582912.0f; // rounded to a whole number
    const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : p * power;
}

INLINE float dot(const float *a, const float *b, int64_t size) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
    return sum;
}

// to += p[0] * x[0] + p[1] * x[1] + …, four terms at a time so that `to` is read less often.
INLINE void add_weighted(float *to, const float *p, const float *const *x, int64_t terms, int64_t size) {
    int64_t j = 0;
    for (; j + 4 <= terms; j += 4) {
        const float p0 = p[j], p1 = p[j + 1], p2 = p[j + 2], p3 = p[j + 3];
        const float *x0 = x[j], *x1 = x[j + 1], *x2 = x[j + 2], *x3 = x[j + 3];
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) to[i] += (p0 * x0[i] + p1 * x1[i]) + (p2 * x2[i] + p3 * x3[i]);
    }
    for (; j < terms; ++j) {
        const float pj = p[j];
        const float *xj = x[j];
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) to[i] += pj * xj[i];
    }
}

// Where the cells [first, first + count) of one key head lie; inputs of half the size are widened into `room`.
template <class T>
INLINE void find(const float **found, float *room, const void *base, const int32_t *table, int64_t page_size, int64_t first,
                 int64_t count, int64_t page_stride, int64_t cell_stride, int64_t head_offset, int64_t size) {
    for (int64_t j = 0; j < count; ++j) {
        const int64_t cell = first + j;
        const T *at = static_cast<const T *>(base) + table[cell / page_size] * page_stride +
                      (cell % page_size) * cell_stride + head_offset;
        if constexpr (sizeof(T) == sizeof(float)) {
            found[j] = reinterpret_cast<const float *>(at);
        } else {
            float *wide = room + j * size;
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) wide[i] = widened(at[i]);
            found[j] = wide;
        }
    }
}

// Whether any query of the row sees any of these cells.
INLINE bool any_visible(const Call &c, int64_t b, int64_t first, int64_t count) {
    if (!c.visible) return true;
    for (int64_t t = 0; t < c.T; ++t) {
        const uint8_t *seen = c.visible + b * c.visible_row + t * c.visible_token + first;
        if (std::any_of(seen, seen + count, [](uint8_t x) { return x != 0; })) return true;
    }
    return false;
}

// Scores of one query: soft cap, ALiBi and bias, mask; in this order.
INLINE void adjust(const Call &c, float *s, int64_t b, int64_t h, int64_t t, int64_t first, int64_t count) {
    if (c.softcap > 0.0f)
        for (int64_t j = 0; j < count; ++j) s[j] = c.softcap * std::tanh(s[j] / c.softcap);
    if (c.slopes) {
        const int64_t at = c.q_positions[b * c.q_positions_row + t];
        const int64_t *keys = c.k_positions + b * c.k_positions_row + first;
        for (int64_t j = 0; j < count; ++j) s[j] -= c.slopes[h] * static_cast<float>(at - keys[j]);
    }
    if (c.bias) {
        const float *bias = c.bias + b * c.bias_row + h * c.bias_head + t * c.bias_token + first;
        for (int64_t j = 0; j < count; ++j) s[j] += bias[j];
    }
    if (c.visible) {
        const uint8_t *seen = c.visible + b * c.visible_row + t * c.visible_token + first;
        for (int64_t j = 0; j < count; ++j) s[j] = seen[j] ? s[j] : kNothing;
    }
}

// One step of the online softmax: scores s and values of a block join a part. The scores become weights.
INLINE void add_block(float *s, const float *const *values, int64_t count, int64_t Dv, float *part) {
    float largest = kNothing, *o = part + 2;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < count; ++j) largest = s[j] > largest ? s[j] : largest;
    if (largest == kNothing) return;
    if (largest > part[0]) { // what was summed so far refers to a smaller score
        const float less = part[0] == kNothing ? 0.0f : exponential(part[0] - largest);
        part[0] = largest;
        part[1] *= less;
#pragma omp simd
        for (int64_t d = 0; d < Dv; ++d) o[d] *= less;
    }
    const float top = part[0];
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; ++j) {
        s[j] = exponential(s[j] - top);
        sum += s[j];
    }
    part[1] += sum;
    add_weighted(o, s, values, count, Dv);
}

template <class T> INLINE void work(Job &job) {
    const Call &c = job.c;
    const int64_t G = c.H / c.K, D = c.D, Dv = c.Dv;
    const bool sideways = G * c.T >= kManyRows;
    std::vector<float> q(c.H * c.T * D), s(kBlock), k_room, v_room, k_turned;
    if (sizeof(T) != sizeof(float)) k_room.resize(kBlock * D), v_room.resize(kBlock * Dv);
    if (sideways) k_turned.resize(kBlock * D);
    const float *keys[kBlock], *values[kBlock];
    std::vector<const float *> turned; // [D] pointers to kBlock numbers: the same coordinate of every key
    for (int64_t d = 0; sideways && d < D; ++d) turned.push_back(k_turned.data() + d * kBlock);
    for (int64_t task; (task = job.next++) < c.B * job.stretches;) {
        const int64_t b = task / job.stretches, from = c.start + task % job.stretches * job.stretch;
        const int64_t to = std::min(c.end, from + job.stretch);
        const int32_t *table = c.table + b * c.table_row;
        for (int64_t h = 0; h < c.H; ++h)
            for (int64_t t = 0; t < c.T; ++t) {
                const T *x = static_cast<const T *>(c.q) + b * c.q_row + h * c.q_head + t * c.q_token;
                float *query = q.data() + (h * c.T + t) * D, *part = job.part(task, h, t);
                for (int64_t d = 0; d < D; ++d) query[d] = widened(x[d]) * c.scale;
                part[0] = kNothing;
                std::fill(part + 1, part + 2 + Dv, 0.0f);
            }
        for (int64_t first = from; first < to; first += kBlock) {
            const int64_t count = std::min(kBlock, to - first);
            if (!any_visible(c, b, first, count)) continue;
            for (int64_t g = 0; g < c.K; ++g) {
                find<T>(keys, k_room.data(), c.k, table, c.page_size, first, count, c.k_page, c.k_cell, g * c.k_head, D);
                find<T>(values, v_room.data(), c.v, table, c.page_size, first, count, c.v_page, c.v_cell, g * c.v_head,
                        Dv);
                if (sideways)
                    for (int64_t j = 0; j < count; ++j)
                        for (int64_t d = 0; d < D; ++d) k_turned[d * kBlock + j] = keys[j][d];
                for (int64_t r = 0; r < G * c.T; ++r) {
                    const int64_t h = g * G + r / c.T, t = r % c.T;
                    const float *query = q.data() + (h * c.T + t) * D;
                    if (sideways) { // no sum across a vector: every key has a lane of its own
                        std::fill(s.begin(), s.end(), 0.0f);
                        add_weighted(s.data(), query, turned.data(), D, kBlock);
                    } else {
                        for (int64_t j = 0; j < count; ++j) s[j] = dot(query, keys[j], D);
                    }
                    adjust(c, s.data(), b, h, t, first, count);
                    add_block(s.data(), values, count, Dv, job.part(task, h, t));
                }
            }
        }
    }
}

FOR_EACH_MACHINE void work_float32(Job &job) { work<float>(job); }
FOR_EACH_MACHINE void work_bfloat16(Job &job) { work<uint16_t>(job); }

// Join the stretches of every query, with its head's sink, and divide. A query that saw nothing gives zeros.
template <class T> void join(Job &job) {
    const Call &c = job.c;
    std::vector<float> o(c.Dv);
    for (int64_t b = 0; b < c.B; ++b)
        for (int64_t h = 0; h < c.H; ++h)
            for (int64_t t = 0; t < c.T; ++t) {
                const int64_t first = b * job.stretches;
                float top = c.sinks ? c.sinks[h] : kNothing;
                for (int64_t i = 0; i < job.stretches; ++i) top = std::max(top, job.part(first + i, h, t)[0]);
                float sum = c.sinks ? std::exp(c.sinks[h] - top) : 0.0f;
                std::fill(o.begin(), o.end(), 0.0f);
                for (int64_t i = 0; i < job.stretches; ++i) {
                    const float *part = job.part(first + i, h, t);
                    if (part[0] == kNothing) continue;
                    const float less = std::exp(part[0] - top);
                    sum += part[1] * less;
                    for (int64_t d = 0; d < c.Dv; ++d) o[d] += part[2 + d] * less;
                }
                T *to = static_cast<T *>(c.o) + ((b * c.H + h) * c.T + t) * c.Dv;
                for (int64_t d = 0; d < c.Dv; ++d) put(to + d, sum > 0.0f ? o[d] / sum : 0.0f);
            }
}

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void attend(const Call &c) {
    const int64_t cells = c.end - c.start;
    const double multiplications = double(c.B) * c.H * c.T * cells * (c.D + c.Dv);
    int64_t threads = std::clamp<int64_t>(int64_t(multiplications / kLeastWork), 1, std::max(1, c.threads));
    const int64_t wanted = threads == 1 ? 1 : divided_up(2 * threads, c.B);
    const int64_t stretches = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, cells / kLeastStretch));
    Job job{c, stretches, divided_up(cells, stretches), {}};
    job.parts.resize(c.B * stretches * c.H * c.T * (c.Dv + 2));
    threads = std::min(threads, c.B * stretches);
    const auto run = [&job] {
        try {
            job.c.bfloat16 ? work_bfloat16(job) : work_float32(job);
        } catch (...) { // an exception must not leave a thread
            job.failed = true;
        }
    };
    std::vector<std::thread> others;
    others.reserve(threads);
    try {
        for (int64_t i = 1; i < threads; ++i) others.emplace_back(run);
    } catch (const std::system_error &) {
        // No more threads are to be had; those that run and this one do all the tasks.
    }
    run();
    for (std::thread &other : others) other.join();
    if (job.failed) throw std::bad_alloc();
    if (c.bfloat16) join<uint16_t>(job);
    else join<float>(job);
}

} // namespace

// Changes with every change of `Call`.
EXPORT int32_t pluglm_paged_version() { return 1; }

// 0: done; 1: the block table names a page that is not there, and nothing was read; 2: no memory.
EXPORT int32_t pluglm_paged_attend(const Call *c) {
    for (int64_t b = 0; b < c->B; ++b)
        for (int64_t n = c->start / c->page_size; n < divided_up(c->end, c->page_size); ++n) {
            const int32_t page = c->table[b * c->table_row + n];
            if (page < 0 || page >= c->num_pages) return 1;
        }
    try {
        attend(*c);
    } catch (...) {
        return 2;
    }
    return 0;
}
