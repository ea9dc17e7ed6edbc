// Which weights dropout makes zero: a function of the seed and of where the weight is, so that forward and backward
// need to remember nothing and threads, batches and the GPU (triton_src/lib/dropout.py) agree to the bit.
#pragma once

#include <cstdint>

#include "cpu/inline.h"

namespace adasplash::cpu {

// What the weights of one row are kept or dropped by. Two rounds of Ellis' 32-bit mixer "lowbias32", each keyed with a
// word of the row's own, so that no two rows have related masks.
struct RowDropout {
  uint32_t first_word, second_word, threshold, first_key;

  ADASPLASH_INLINE static uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352d;
    x ^= x >> 15;
    x *= 0x846ca68b;
    return x ^ x >> 16;
  }

  // Whether the weight of a key, counted from the start of its sequence, becomes zero.
  ADASPLASH_INLINE bool drops(int64_t key) const {
    return mix(mix((static_cast<uint32_t>(key) + first_key) ^ first_word) + second_word) < threshold;
  }
};

// The dropout of a head.
struct Dropout {
  uint64_t seed = 0;
  uint32_t head = 0, entry = 0;             // of the whole call: its query head, and its batch entry or packed sequence
  uint32_t first_query = 0, first_key = 0;  // what its sequence's are counted as
  uint32_t threshold = 0;                   // of 2^32 numbers, how many drop a weight
  double kept = 1;                          // what the others are multiplied by, 1 / (1 - p)

  ADASPLASH_INLINE bool given() const { return kept != 1; }

  // The words of a query, counted from the start of its sequence, by Philox4x32-10: Salmon et al., "Parallel random
  // numbers: as easy as 1, 2, 3" (2011).
  ADASPLASH_INLINE RowDropout of_row(int64_t query) const {
    uint32_t counter[4] = {static_cast<uint32_t>(query) + first_query, head, entry, 0};
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
      const uint64_t even = uint64_t{0xd2511f53} * counter[0], odd = uint64_t{0xcd9e8d57} * counter[2];
      counter[0] = static_cast<uint32_t>(odd >> 32) ^ counter[1] ^ key[0];
      counter[2] = static_cast<uint32_t>(even >> 32) ^ counter[3] ^ key[1];
      counter[1] = static_cast<uint32_t>(odd);
      counter[3] = static_cast<uint32_t>(even);
      key[0] += 0x9e3779b9;
      key[1] += 0xbb67ae85;
    }
    return {counter[0], counter[1], threshold, first_key};
  }
};

}  // namespace adasplash::cpu
