// One decode pass of a decoder in one call: see abi.h for what is handed over, kernels.h for what is computed.
#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

#include "abi.h"
#include "pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

// SHUFFLE(bytes, from): _mm_shuffle_epi8 in each 16 bytes of a register. Without it the plain C++ is compiled.
namespace portable {
#define TARGET
#define WIDTH 4
#include "vectors.h"
#include "packed.h"
#include "kernels.h"
#undef TARGET
#undef WIDTH
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define WIDTH 8
#define SHUFFLE(bytes, from) _mm256_shuffle_epi8((__m256i)(bytes), (__m256i)(from))
#define LOAD_HALF(p) (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#include "vectors.h"
#include "packed.h"
#include "kernels.h"
#undef TARGET
#undef WIDTH
#undef SHUFFLE
#undef LOAD_HALF
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define WIDTH 16
#define SHUFFLE(bytes, from) _mm512_shuffle_epi8((__m512i)(bytes), (__m512i)(from))
#define LOAD_HALF(p) (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#include "vectors.h"
#include "packed.h"
#include "kernels.h"
#undef TARGET
#undef WIDTH
#undef SHUFFLE
#undef LOAD_HALF
}  // namespace avx512
#endif

namespace {

struct Scratch {
    std::vector<float> normed, sums, steps, scores;
    std::vector<std::int8_t> codes;
    std::vector<int> seen;
};

struct Worker {
    Pool pool;
    std::vector<Scratch> scratch;
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
                             own.steps.data(), own.codes.data(), own.scores.data(), own.seen.data()}; \
        Pool &pool = call.worker.pool;                                                            \
        const Op *op = call.plan.ops, *end = op + call.plan.num_ops;                              \
        for (; op != end; op++) {                                                                 \
            isa::carry_out(*op, context);                                                         \
            pool.barrier();                                                                       \
        }                                                                                         \
    }

STEPS_OF(portable, )
#if defined(__x86_64__)
STEPS_OF(avx2, __attribute__((target("avx2,fma,f16c"))))
STEPS_OF(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))))
#endif

Pool::Job steps(i64 isa) {
#if defined(__x86_64__)
    if (isa == AVX512) return steps_avx512;
    if (isa == AVX2) return steps_avx2;
#endif
    (void)isa;
    return steps_portable;
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

void make_room(Worker &worker, const Plan &plan, const Pass &pass) {
    i64 cells = 0;
    for (i64 i = 0; i < plan.num_ops; i++)
        if (plan.ops[i].kind == ATTEND) {
            const i64 length = pass.groups[pass.slots[plan.ops[i].slot].group].length;
            cells = length > cells ? length : cells;
        }
    for (Scratch &own : worker.scratch) {
        const std::size_t groups = (std::size_t)(MAX_ROWS * ((plan.scratch_rows + 31) / 32));
        own.normed.resize((std::size_t)(MAX_ROWS * plan.scratch_rows));
        own.sums.resize(groups);
        own.steps.resize(groups);
        own.codes.resize(32 * groups);
        if ((i64)own.scores.size() < cells) {
            own.scores.resize((std::size_t)(cells + cells / 2 + 16));
            own.seen.resize(own.scores.size());
        }
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
    const std::size_t sizes[] = {sizeof(Norm), sizeof(Matrix), sizeof(Op),       sizeof(Plan),
                                 sizeof(Slot), sizeof(Group),  sizeof(Rotation), sizeof(Pass)};
    std::uint64_t all = 0;
    for (std::size_t size : sizes) all = (all * 1009 + size) % (1ull << 53);
    return (i64)all;
}

EXPORT i64 pluglm_cpu_best_isa() {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    __builtin_cpu_init();
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C)) return PORTABLE;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PORTABLE;
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
