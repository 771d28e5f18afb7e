// What choosing a token needs and no instruction set changes: random numbers by seed and place, room to work in.
#pragma once
#include <cstdint>
#include <vector>

#include "abi.h"

// The highest score of some tokens, and the first that has it. Not finite: no token can be chosen.
struct Best {
    float score;
    i64 token;
};

// One thread's room for a draw, as many entries as there are tokens.
struct Room {
    std::vector<float> scores;
    std::vector<double> weights;
    std::vector<int> order;
};

// In [0, 1), 53 random bits: Philox4x32-10 with the seed as key and the number as counter (Salmon et al. 2011, "Parallel
// random numbers: as easy as 1, 2, 3", section 3.3; constants of Random123 1.09).
inline double uniform(std::uint64_t seed, std::uint64_t number) {
    std::uint32_t c[4] = {(std::uint32_t)number, (std::uint32_t)(number >> 32), 0, 0};
    std::uint32_t k[2] = {(std::uint32_t)seed, (std::uint32_t)(seed >> 32)};
    for (int round = 0; round < 10; round++) {
        const std::uint64_t a = (std::uint64_t)c[0] * 0xD2511F53u, b = (std::uint64_t)c[2] * 0xCD9E8D57u;
        const std::uint32_t mixed[4] = {(std::uint32_t)(b >> 32) ^ c[1] ^ k[0], (std::uint32_t)b,
                                        (std::uint32_t)(a >> 32) ^ c[3] ^ k[1], (std::uint32_t)a};
        for (int i = 0; i < 4; i++) c[i] = mixed[i];
        k[0] += 0x9E3779B9u;
        k[1] += 0xBB67AE85u;
    }
    return (double)((std::uint64_t)(c[0] >> 5) * (1u << 26) + (c[1] >> 6)) / 9007199254740992.0;
}
