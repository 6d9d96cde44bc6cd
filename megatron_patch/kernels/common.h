// What the kernels share.  bfloat16 is widened on reading, computed in 32 bits and rounded once on writing.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include <omp.h>

namespace {

using Index = std::int64_t;

// Elements between neighbours of states [S, B, heads, d], whose heads lie in one piece each.
struct Strides {
    Index place, record, head;
};

// Fewer elements than this are done before another thread has woken up.
constexpr Index PARALLEL = 1 << 14;

struct bfloat16 {
    std::uint16_t bits;
};

inline float read(float value) { return value; }

inline float read(bfloat16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void write(float &place, float value) { place = value; }

// To nearest, ties to even.  A NaN made of 16 bits has no low bits that could carry it into infinity.
inline void write(bfloat16 &place, float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    place.bits = static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// e^x by e^r 2^n with |r| <= ln(2) / 2 and Taylor's first eight terms, whose rest is below 1e-8; written out because a
// call of the library's would keep the loop from being vectorised.  Beyond the bounds a float has no other value than
// the bound's for what is made of it here.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float n = std::nearbyint(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const std::int32_t bits = (static_cast<std::int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

// The halves of a head turned against each other by the angles [half] of its place, from `in` to `out`, which may be
// one (Su et al. 2021, arXiv:2104.09864, eq. 34); direction 1 turns forward, -1 back.
template <typename State, typename T>
inline void turn_halves(Index half, const State *in, const T *cosine, const T *sine, float direction, State *out) {
#pragma omp simd
    for (Index i = 0; i < half; ++i) {
        const float first = read(in[i]), second = read(in[i + half]);
        const float along = read(cosine[i]), across = read(sine[i]) * direction;
        write(out[i], first * along - second * across);
        write(out[i + half], second * along + first * across);
    }
}

}  // namespace
