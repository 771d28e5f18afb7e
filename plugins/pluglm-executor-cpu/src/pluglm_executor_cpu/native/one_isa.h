// Everything for one instruction set, inside its namespace. Defined before, gone after: TARGET, WIDTH and perhaps DOT4,
// which adds the products of four unsigned with four signed bytes to each lane.

// Keeps the order of additions to `v`, so that sums stay in their registers: compilers would add as in a tree.
#if WIDTH == 16 && !defined(PLUGLM_EMULATED)
#define HOLD(v) asm("" : "+v"(v))
#elif WIDTH == 8
#define HOLD(v) asm("" : "+x"(v))
#else
#define HOLD(v)
#endif

// SHUFFLE(bytes, from): _mm_shuffle_epi8 in each 16 bytes of a register. Without it the plain C++ is compiled.
#if WIDTH == 16
#define SHUFFLE(bytes, from) _mm512_shuffle_epi8((__m512i)(bytes), (__m512i)(from))
#define LOAD_HALF(p) (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define MULTIPLY(u, s) _mm512_maddubs_epi16((__m512i)(u), (__m512i)(s))
#define ADD_PAIRS(pairs) _mm512_madd_epi16((__m512i)(pairs), _mm512_set1_epi16(1))
#define SIZE_OF(w) _mm512_abs_epi8((__m512i)(w))
#define SIGN_OF(x, w)                                                                                    \
    _mm512_mask_sub_epi8((__m512i)(x), _mm512_movepi8_mask((__m512i)(w)), _mm512_setzero_si512(), (__m512i)(x))
#elif WIDTH == 8
#define SHUFFLE(bytes, from) _mm256_shuffle_epi8((__m256i)(bytes), (__m256i)(from))
#define LOAD_HALF(p) (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define MULTIPLY(u, s) _mm256_maddubs_epi16((__m256i)(u), (__m256i)(s))
#define ADD_PAIRS(pairs) _mm256_madd_epi16((__m256i)(pairs), _mm256_set1_epi16(1))
#define SIZE_OF(w) _mm256_abs_epi8((__m256i)(w))
#define SIGN_OF(x, w) _mm256_sign_epi8((__m256i)(x), (__m256i)(w))
#endif

#include "vectors.h"
#include "plain.h"
#include "packed.h"
#include "kernels.h"
#include "choose.h"

#undef TARGET
#undef WIDTH
#undef HOLD
#undef SHUFFLE
#undef LOAD_HALF
#undef MULTIPLY
#undef ADD_PAIRS
#undef SIZE_OF
#undef SIGN_OF
#undef DOT4
