/* Reads memory as fast as it comes: what decoding, which reads every weight once a token, cannot exceed by much. */
#include <stddef.h>
#include <stdint.h>

uint64_t read_words(const uint64_t *words, size_t count) {
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (size_t i = 0; i + 32 <= count; i += 32)
        for (size_t j = 0; j < 32; j += 4) {
            a += words[i + j];
            b += words[i + j + 1];
            c += words[i + j + 2];
            d += words[i + j + 3];
        }
    return a + b + c + d;
}
