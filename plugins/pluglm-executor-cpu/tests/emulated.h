// A test build of step.cpp for machines without AVX-512 and VNNI: SIMDe computes their instructions with AVX2.
// The README says how to build and run it.
#pragma once
#define PLUGLM_EMULATED
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#define __m512i simde__m512i

#define ON_AVX2 "avx2,fma,f16c"
#define ON_AVXVNNI ON_AVX2
#define ON_AVX512 ON_AVX2
#define ON_AVX512VNNI ON_AVX2

#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps(halves) emulated_cvtph(halves)
static inline simde__m512 emulated_cvtph(__m256i halves) {
    float floats[16];
    _mm256_storeu_ps(floats, _mm256_cvtph_ps(_mm256_castsi256_si128(halves)));
    _mm256_storeu_ps(floats + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)));
    return simde_mm512_loadu_ps(floats);
}
#undef _mm512_madd_epi16  // its alias has too many arguments in SIMDe 0.7.4
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32(sum, u, s) simde_mm256_dpbusd_epi32(sum, u, s)
