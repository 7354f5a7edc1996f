// Dropout masks for the *_simd.cpp files, from Philox4x32-10 (Salmon et al., "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011), a counter-based generator: the mask is a function of
// where an element stands, so the backward pass computes it again instead of reading it.
//
//     key     = the 64-bit seed
//     counter = (quad, low word), (quad, high word), head, stream
//
// One call gives the random words of the four elements of a quad.  In an elementwise dropout the
// quad is element / 4 and head is 0; in attention the words of quad are key row / 4 and query row.
// An element is kept when its word is at least floor(p * 2^32), and is then scaled by 1 / (1 - p).

#pragma once

#include <cstdint>
#include <cstring>

#include "dropout.h"

namespace superbert::SUPERBERT_ISA {

constexpr int kQuads = 16; // Philox calls made side by side

// Keep factors (0 or 1 / (1 - p)) of kQuads quads: factors[4 * i + word].
inline void keep_factors(const Dropout& dropout, const uint32_t* low, const uint32_t* high,
                         uint32_t head, float* factors) {
  uint32_t c0[kQuads], c1[kQuads], c2[kQuads], c3[kQuads];
  for (int i = 0; i < kQuads; ++i) {
    c0[i] = low[i];
    c1[i] = high[i];
    c2[i] = head;
    c3[i] = dropout.stream;
  }
  uint32_t key0 = static_cast<uint32_t>(dropout.seed);
  uint32_t key1 = static_cast<uint32_t>(dropout.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kQuads; ++i) {
      const uint64_t product0 = static_cast<uint64_t>(c0[i]) * 0xD2511F53u;
      const uint64_t product1 = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
      c0[i] = static_cast<uint32_t>(product1 >> 32) ^ c1[i] ^ key0;
      c1[i] = static_cast<uint32_t>(product1);
      c2[i] = static_cast<uint32_t>(product0 >> 32) ^ c3[i] ^ key1;
      c3[i] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int i = 0; i < kQuads; ++i) {
    factors[4 * i + 0] = c0[i] >= dropout.threshold ? dropout.scale : 0.0f;
    factors[4 * i + 1] = c1[i] >= dropout.threshold ? dropout.scale : 0.0f;
    factors[4 * i + 2] = c2[i] >= dropout.threshold ? dropout.scale : 0.0f;
    factors[4 * i + 3] = c3[i] >= dropout.threshold ? dropout.scale : 0.0f;
  }
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
    uint32_t low[kQuads], high[kQuads];
    for (int i = 0; i < kQuads; ++i) {
      const uint64_t quad = first_quad + done + i;
      low[i] = static_cast<uint32_t>(quad);
      high[i] = static_cast<uint32_t>(quad >> 32);
    }
    keep_factors(dropout, low, high, 0, buffer + 4 * done);
  }
  return buffer + first % 4;
}

// Factors of queries x keys of one attention head.  The factor of (query i, key j), counted from
// the first of each, is buffer[i * ld + first_key % 4 + j]; ld is at least keys + 6.
inline void attention_factors(const Dropout& dropout, int64_t head, int64_t first_query,
                              int64_t queries, int64_t first_key, int64_t keys, float* buffer,
                              int64_t ld) {
  const int64_t first_quad = first_key / 4;
  const int64_t quads = (first_key + keys + 3) / 4 - first_quad;
  uint32_t low[kQuads], high[kQuads];
  float factors[4 * kQuads];
  int64_t query = 0, quad = 0;
  while (query < queries) {
    float* to[kQuads];
    int filled = 0;
    for (; filled < kQuads && query < queries; ++filled) {
      low[filled] = static_cast<uint32_t>(first_quad + quad);
      high[filled] = static_cast<uint32_t>(first_query + query);
      to[filled] = buffer + query * ld + 4 * quad;
      if (++quad == quads) quad = 0, ++query;
    }
    for (int i = filled; i < kQuads; ++i) low[i] = high[i] = 0;
    keep_factors(dropout, low, high, static_cast<uint32_t>(head), factors);
    for (int i = 0; i < filled; ++i) std::memcpy(to[i], factors + 4 * i, 4 * sizeof(float));
  }
}

} // namespace superbert::SUPERBERT_ISA
