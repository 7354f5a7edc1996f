// Dropout masks for the *_simd.cpp files, from Philox4x32-10 (Salmon et al., "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011), a counter-based generator: the mask is a function of an
// element's position, so the backward pass computes it again instead of reading it.
//
//     key     = the 64-bit seed
//     counter = (quad, low word), (quad, high word), head, rng_offset
//
// One call gives the random words of the four elements of a quad.  In an elementwise dropout the
// quad is element / 4 and head is 0; in attention the words of quad are key row / 4 and query row.
// An element is kept when its word is at least floor(p * 2^32), and is then scaled by 1 / (1 - p).

#pragma once

#include <cstdint>
#include <cstring>

#include "dropout.h"
#include "simd_math.h"

namespace superbert::SUPERBERT_ISA {

// The generator works on 64-bit lanes of which the low halves count; the high halves hold what a
// product or an exclusive or left there.
using Wide = VectorOf<uint64_t>::type;
constexpr int kWideLanes = kVectorBytes / 8;
// Side by side, since a round is a chain of dependent products; four numbers each, in registers.
constexpr int kVectors = kVectorBytes == 64 ? 4 : 2;
constexpr int kQuads = kVectors * kWideLanes;

// The 64-bit products of the low halves with `factor`.
inline Wide multiply_low(Wide a, uint32_t factor) {
#if defined(__AVX512F__)
  return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(factor));
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(factor));
#else
  return (a & 0xffffffff) * factor;
#endif
}

// Stores the keep factors, 0 or 1 / (1 - p), of the quads whose words 0 and 1, 2 and 3 stand in the
// halves of each lane.
inline void store_factors(const Dropout& dropout, Wide words01, Wide words23, float* factors) {
  Wide first, second; // lanes of one and the other in turn
  for (int lane = 0; lane < kWideLanes; ++lane) {
    first[lane] = lane % 2 * kWideLanes + lane / 2;
    second[lane] = first[lane] + kWideLanes / 2;
  }
  const Wide words[2] = {__builtin_shuffle(words01, words23, first),
                         __builtin_shuffle(words01, words23, second)};
  for (int half = 0; half < 2; ++half) {
    const Floats kept =
        load_bits<Words>(&words[half]) >= dropout.threshold ? splat(dropout.scale) : Floats{};
    store(factors + half * kWidth, kept);
  }
}

// Quads side by side, as 64-bit counter words.
struct Quads {
  Wide words[kVectors];
};

// Keep factors of kQuads quads: factors[4 * i + word].
inline void keep_factors(const Dropout& dropout, const Quads& quads, uint32_t head,
                         float* factors) {
  Wide c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    c0[v] = quads.words[v];
    c1[v] = c0[v] >> 32;
    c2[v] = Wide{} + head;
    c3[v] = Wide{} + dropout.rng_offset;
  }
  uint32_t key0 = static_cast<uint32_t>(dropout.seed);
  uint32_t key1 = static_cast<uint32_t>(dropout.seed >> 32);
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Wide product0 = multiply_low(c0[v], 0xD2511F53);
      const Wide product1 = multiply_low(c2[v], 0xCD9E8D57);
      c0[v] = (product1 >> 32) ^ c1[v] ^ key0;
      c1[v] = product1;
      c2[v] = (product0 >> 32) ^ c3[v] ^ key1;
      c3[v] = product0;
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    store_factors(dropout, (c0[v] & 0xffffffff) | (c1[v] << 32),
                  (c2[v] & 0xffffffff) | (c3[v] << 32), factors + v * 4 * kWideLanes);
  }
}

inline Wide wide_lane_numbers() {
  Wide lanes;
  for (int lane = 0; lane < kWideLanes; ++lane) lanes[lane] = lane;
  return lanes;
}

// Floats that element_factors() needs for `count` elements.
constexpr int64_t element_factor_floats(int64_t count) { return count + 4 * kQuads + 4; }

// Factors of the elements first .. first + count of an elementwise dropout.  The result points
// into `buffer`.
inline const float* element_factors(const Dropout& dropout, int64_t first, int64_t count,
                                    float* buffer) {
  const uint64_t first_quad = static_cast<uint64_t>(first) / 4;
  const int64_t quads = (first + count + 3) / 4 - static_cast<int64_t>(first_quad);
  for (int64_t done = 0; done < quads; done += kQuads) {
    Quads next;
    for (int v = 0; v < kVectors; ++v) {
      next.words[v] = wide_lane_numbers() + (first_quad + done + v * kWideLanes);
    }
    keep_factors(dropout, next, 0, buffer + 4 * done);
  }
  return buffer + first % 4;
}

// Factors of queries x keys of one attention head, keys padded to whole quads: a row has
// 4 * attention_quads(first_key, keys) floats, and the first one's is first_key % 4.
inline int64_t attention_quads(int64_t first_key, int64_t keys) {
  return (first_key + keys + 3) / 4 - first_key / 4;
}

// `buffer` has room for kQuads quads more than the tile.
inline void attention_factors(const Dropout& dropout, int64_t head, int64_t first_query,
                              int64_t queries, int64_t first_key, int64_t keys, float* buffer) {
  const int64_t quads = attention_quads(first_key, keys), total = queries * quads;
  // Quad i of the tile stands in row i / quads, at i % quads; a vector on, both move by a constant.
  const Wide lane = wide_lane_numbers();
  const uint64_t in_row = static_cast<uint64_t>(quads);
  const uint64_t rows_on = kWideLanes / in_row, quads_on = kWideLanes % in_row;
  Wide row = Wide{} + static_cast<uint64_t>(first_query), quad = lane;
  for (uint64_t end = in_row; end < kWideLanes; end += in_row) {
    const Wide behind = (Wide)(lane >= end); // a comparison's true is -1
    row -= behind;
    quad -= behind & in_row;
  }
  for (int64_t done = 0; done < total; done += kQuads) {
    Quads next;
    for (int v = 0; v < kVectors; ++v) {
      next.words[v] = (row << 32) | (quad + static_cast<uint64_t>(first_key / 4));
      row += rows_on;
      quad += quads_on;
      const Wide row_ends = (Wide)(quad >= in_row);
      row -= row_ends;
      quad -= row_ends & in_row;
    }
    keep_factors(dropout, next, static_cast<uint32_t>(head), buffer + 4 * done);
  }
}

} // namespace superbert::SUPERBERT_ISA
