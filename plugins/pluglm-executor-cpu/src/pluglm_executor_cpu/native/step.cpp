// One decode pass of a decoder in one call: see abi.h for what is handed over, kernels.h for what is computed.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <new>
#include <vector>

#include "abi.h"
#include "draws.h"
#include "pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace portable {
#define TARGET
#define WIDTH 4
#include "one_isa.h"
}  // namespace portable

#if defined(__x86_64__)
#ifndef PLUGLM_EMULATED  // a test build defines them as what its machine has: tests/emulated.h
#define ON_AVX2 "avx2,fma,f16c"
#define ON_AVXVNNI ON_AVX2 ",avxvnni"
#define ON_AVX512 ON_AVX2 ",avx512f,avx512bw,avx512dq,avx512vl"
#define ON_AVX512VNNI ON_AVX512 ",avx512vnni"
#endif
#if defined(PLUGLM_EMULATED) || (defined(__clang__) ? __clang_major__ >= 13 : __GNUC__ >= 11)
#define HAS_AVXVNNI  // the compiler knows it
#endif

namespace avx2 {
#define TARGET __attribute__((target(ON_AVX2)))
#define WIDTH 8
#include "one_isa.h"
}  // namespace avx2

#ifdef HAS_AVXVNNI
namespace avxvnni {
#define TARGET __attribute__((target(ON_AVXVNNI)))
#define WIDTH 8
#define DOT4(sum, u, s) (I)_mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(u), (__m256i)(s))
#include "one_isa.h"
}  // namespace avxvnni
#endif

namespace avx512 {
#define TARGET __attribute__((target(ON_AVX512)))
#define WIDTH 16
#include "one_isa.h"
}  // namespace avx512

namespace avx512vnni {
#define TARGET __attribute__((target(ON_AVX512VNNI)))
#define WIDTH 16
#define DOT4(sum, u, s) (I)_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(u), (__m512i)(s))
#include "one_isa.h"
}  // namespace avx512vnni
#endif

namespace {

struct Scratch {
    std::vector<float> normed, sums, steps, attention;
    std::vector<std::int8_t> codes;
    std::vector<std::int32_t> starts;
};

struct Worker {
    Pool pool;
    std::vector<Scratch> scratch;
    std::vector<float> parts;  // of the ranges of attention
    std::vector<int> arrived;  // how many of a unit's ranges are done
    std::vector<Room> rooms;  // for draws
    explicit Worker(int threads) : pool(threads), scratch((std::size_t)threads) {}
};

struct Call {
    Worker &worker;
    const Plan &plan;
    const Pass &pass;
};

// After the last barrier the caller is gone, and the call with it: nothing of it is read there.
#define STEPS_OF(isa, target)                                                                     \
    target void steps_##isa(void *what, int thread, int count) {                                  \
        Call &call = *(Call *)what;                                                               \
        Scratch &own = call.worker.scratch[(std::size_t)thread];                                  \
        isa::Context context{call.plan, call.pass, thread, count, own.normed.data(), own.sums.data(), \
                             own.steps.data(), own.codes.data(), own.starts.data(), own.attention.data(), \
                             call.worker.parts.data(), call.worker.arrived.data()};               \
        Pool &pool = call.worker.pool;                                                            \
        const Op *op = call.plan.ops, *end = op + call.plan.num_ops;                              \
        for (; op != end; op++) {                                                                 \
            isa::carry_out(*op, context);                                                         \
            pool.barrier();                                                                       \
        }                                                                                         \
    }

STEPS_OF(portable, )
#if defined(__x86_64__)
STEPS_OF(avx2, __attribute__((target(ON_AVX2))))
#ifdef HAS_AVXVNNI
STEPS_OF(avxvnni, __attribute__((target(ON_AVXVNNI))))
#endif
STEPS_OF(avx512, __attribute__((target(ON_AVX512))))
STEPS_OF(avx512vnni, __attribute__((target(ON_AVX512VNNI))))
#endif

Pool::Job steps(i64 isa) {
#if defined(__x86_64__)
    if (isa == AVX512VNNI) return steps_avx512vnni;
    if (isa == AVX512) return steps_avx512;
#ifdef HAS_AVXVNNI
    if (isa == AVXVNNI) return steps_avxvnni;
#endif
    if (isa == AVX2) return steps_avx2;
#endif
    (void)isa;
    return steps_portable;
}

// One token a row from the logits of a pass.
struct Choice {
    Worker &worker;
    const Plan &plan;
    const Pass &pass;
    const Run &run;
    i64 number;  // of the draw
    Best best[MAX_ROWS];  // of all threads
    std::vector<Best> &parts;  // [threads, MAX_ROWS]
    bool goes_on(i64 row) const { return !run.ended || !run.ended[row]; }
};

#define CHOICES_OF(isa, target)                                                                       \
    template <class L>                                                                                \
    target void choose_##isa(Choice &c, int thread, int count) {                                      \
        const i64 size = c.plan.vocab_size;                                                           \
        for (i64 b = 0; b < c.pass.B; b++) {                                                          \
            const L *x = (const L *)c.pass.logits + b * size;                                         \
            if (!c.goes_on(b)) continue;                                                              \
            if (!c.run.seeds)                                                                         \
                c.parts[(std::size_t)(thread * MAX_ROWS + b)] =                                       \
                    isa::highest(x, size * thread / count, size * (thread + 1) / count);              \
            else if (b % count == thread) {                                                           \
                const double where = uniform((std::uint64_t)c.run.seeds[b], (std::uint64_t)c.number); \
                const i64 token = isa::drawn(c.run, x, size, where, c.worker.rooms[(std::size_t)thread]); \
                c.best[b] = {token == isa::UNDECIDED ? NAN : 0.0f, token};                            \
            }                                                                                         \
        }                                                                                             \
    }                                                                                                 \
    target void choices_##isa(void *what, int thread, int count) {                                    \
        Choice &c = *(Choice *)what;                                                                  \
        Pool &pool = c.worker.pool;                                                                   \
        if (c.plan.logits_dtype == BFLOAT16) choose_##isa<std::uint16_t>(c, thread, count);           \
        else choose_##isa<float>(c, thread, count);                                                   \
        pool.barrier();                                                                               \
    }

CHOICES_OF(portable, )
#if defined(__x86_64__)
CHOICES_OF(avx2, __attribute__((target(ON_AVX2))))
CHOICES_OF(avx512, __attribute__((target(ON_AVX512))))
#endif

Pool::Job choices(i64 isa) {
#if defined(__x86_64__)
    if (isa >= AVX512) return choices_avx512;
    if (isa >= AVX2) return choices_avx2;
#endif
    (void)isa;
    return choices_portable;
}

// Writes the next token of every row; false: that of a row that goes on cannot be said. ends: whether such a row ends.
bool choose(Choice &c, i64 *tokens, i64 row, bool &ends) {
    c.worker.pool.run(choices(c.pass.isa), &c);
    for (i64 b = 0; b < c.pass.B; b++) {
        if (!c.goes_on(b)) continue;
        if (!c.run.seeds) {
            c.best[b] = c.parts[(std::size_t)b];
            for (int i = 1; i < c.worker.pool.count(); i++) {
                const Best &part = c.parts[(std::size_t)(i * MAX_ROWS + b)];
                if (part.score > c.best[b].score || part.score != part.score) c.best[b] = part;
            }
        }
        if (!std::isfinite(c.best[b].score)) return false;
    }
    for (i64 b = 0; b < c.pass.B; b++) {
        const i64 token = c.goes_on(b) ? c.best[b].token : c.run.pad;
        tokens[b * row] = token;
        for (i64 i = 0; i < c.run.num_ends; i++) ends |= c.goes_on(b) && token == c.run.ends[i];
    }
    return true;
}

// Everything that could lead out of a table, before anything is written.
i64 fault(const Plan &plan, const Pass &pass) {
    for (i64 m = 0; m < pass.B * pass.T; m++) {
        const i64 b = m / pass.T, t = m % pass.T;
        const i64 id = pass.ids[b * pass.ids_row + t * pass.ids_column];
        const i64 position = pass.positions[b * pass.positions_row + t * pass.positions_column];
        if (id < 0 || id >= plan.vocab_size) return BAD_TOKEN;
        for (i64 i = 0; i < plan.num_ops; i++) {
            const Op &op = plan.ops[i];
            if (op.kind == EMBED && op.positions_table && position + op.position_offset >= op.positions_rows)
                return BAD_POSITION;
            if (op.kind == HEADS && op.rotation >= 0) {
                const i64 rows = pass.rotations[op.rotation].positions;
                if (rows && position >= rows) return BAD_POSITION;
            }
        }
    }
    return OK;
}

template <class T>
void grow(std::vector<T> &room, i64 size) {
    if ((i64)room.size() < size) room.resize((std::size_t)(size + size / 2));
}

void make_room(Worker &worker, const Plan &plan, const Pass &pass) {
    i64 own_floats = 0, parts = 0, units = 0;
    for (i64 i = 0; i < plan.num_ops; i++)
        if (plan.ops[i].kind == ATTEND) {
            const portable::Shares share = portable::shares(plan.ops[i], pass);
            own_floats = share.own() > own_floats ? share.own() : own_floats;
            parts = share.parts() > parts ? share.parts() : parts;
            units = share.units > units ? share.units : units;
        }
    grow(worker.parts, parts);
    grow(worker.arrived, units);
    for (Scratch &own : worker.scratch) {
        const std::size_t groups = (std::size_t)(MAX_ROWS * ((plan.scratch_rows + 31) / 32));
        own.normed.resize((std::size_t)(MAX_ROWS * plan.scratch_rows));
        own.sums.resize(groups);
        own.steps.resize(groups);
        own.codes.resize(3 * 32 * groups);
        own.starts.resize(3 * groups);
        grow(own.attention, own_floats);
    }
}

template <class T>
void pack(const T *weight, i64 rows, i64 columns, i64 row, T *out) {
    const i64 filled = (columns + 7) / 8 * 8;
    for (i64 b = 0; 16 * b < rows; b++) {
        T *to = out + b * 16 * filled;
        for (i64 i = 0; i < 16 * filled; i++) to[i] = 0;
        const i64 width = rows - 16 * b < 16 ? rows - 16 * b : 16;
        for (i64 r = 0; r < width; r++) {
            const T *from = weight + (16 * b + r) * row;
            for (i64 k = 0; k < columns; k++)
                to[sizeof(T) == 2 ? k / 2 * 32 + 2 * r + k % 2 : k * 16 + r] = from[k];
        }
    }
}

}  // namespace

EXPORT i64 pluglm_cpu_sizes() {
    const std::size_t sizes[] = {sizeof(Norm), sizeof(Matrix), sizeof(Experts), sizeof(Op),       sizeof(Plan),
                                 sizeof(Slot), sizeof(Group),  sizeof(Rotation), sizeof(Pass),
                                 sizeof(Run),  (std::size_t)MAX_ROWS};
    std::uint64_t all = 0;
    for (std::size_t size : sizes) all = (all * 1009 + size) % (1ull << 53);
    return (i64)all;
}

// A bit for each instruction set that this machine has and the library has code for: 1 << Isa.
EXPORT i64 pluglm_cpu_isas() {
    i64 found = 1 << PORTABLE;
#if defined(PLUGLM_EMULATED)
    found = (1 << (AVX512VNNI + 1)) - 1;
#elif defined(__x86_64__)
    unsigned a, b, c, d;
    __builtin_cpu_init();
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C)) return found;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return found;
    found |= 1 << AVX2;
#ifdef HAS_AVXVNNI
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 16)) found |= 1 << AVXVNNI;
#endif
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return found;
    found |= 1 << AVX512;
    if (__builtin_cpu_supports("avx512vnni")) found |= 1 << AVX512VNNI;
#endif
    return found;
}

// weight [rows, columns], rows `row` elements apart, becomes the blocks of out.
EXPORT void pluglm_cpu_pack(const void *weight, i64 dtype, i64 rows, i64 columns, i64 row, void *out) {
    if (dtype == BFLOAT16)
        pack((const std::uint16_t *)weight, rows, columns, row, (std::uint16_t *)out);
    else
        pack((const float *)weight, rows, columns, row, (float *)out);
}

EXPORT void *pluglm_cpu_start(i64 threads) {
    try {
        return new Worker((int)threads);
    } catch (const std::exception &) {
        return nullptr;
    }
}

EXPORT void pluglm_cpu_stop(void *worker) { delete (Worker *)worker; }

EXPORT i64 pluglm_cpu_step(void *worker, const Plan *plan, const Pass *pass) {
    const i64 found = fault(*plan, *pass);
    if (found != OK) return found;
    try {
        make_room(*(Worker *)worker, *plan, *pass);
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
    Call call{*(Worker *)worker, *plan, *pass};
    call.worker.pool.run(steps(pass->isa), &call);
    return OK;
}

// Passes of one token a row, with the tokens chosen between them, until one ends a row or is not to be chosen here.
EXPORT i64 pluglm_cpu_decode(void *what, const Plan *plan, const Pass *pass, Run *run) {
    const auto started = std::chrono::steady_clock::now();
    Worker &worker = *(Worker *)what;
    std::vector<Group> groups;
    std::vector<Best> parts;
    try {
        groups.assign(pass->groups, pass->groups + run->num_groups);
        parts.resize((std::size_t)(worker.pool.count() * MAX_ROWS));
        const std::size_t size = run->seeds ? (std::size_t)plan->vocab_size : 0;
        worker.rooms.resize((std::size_t)worker.pool.count());
        for (Room &room : worker.rooms)
            if (room.scores.size() < size) {
                room.scores.resize(size);
                room.weights.resize(size);
                room.order.resize(size);
            }
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
    Pass one = *pass;
    one.T = one.keep = 1;
    one.ids_row = run->count + 1;
    one.groups = groups.data();
    run->made = run->fed = 0;
    bool ends = false;
    for (i64 t = 0; t < run->count && !ends; t++) {
        one.ids = run->tokens + t;
        one.positions = pass->positions + t * pass->positions_column;
        for (i64 g = 0; g < run->num_groups; g++)
            groups[(std::size_t)g].length = pass->groups[g].length - (run->count - 1 - t);
        const i64 failed = pluglm_cpu_step(what, plan, &one);
        if (failed != OK && t == 0) return failed;  // later it is the next call's
        if (failed != OK) break;
        run->fed++;
        Choice choice{worker, *plan, one, *run, run->first + t, {}, parts};
        if (!choose(choice, run->tokens + t + 1, run->count + 1, ends)) break;
        run->made++;
    }
    run->seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    return OK;
}
