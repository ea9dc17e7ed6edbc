// Sequences of few queries, as in decoding. An implementation may give them a way of their own, on which their keys are
// split over programs.
#pragma once

#include <algorithm>

#include "cuda/implementation.h"

namespace adasplash::cuda {

// Which sequences of a call go this way: those of at most `most` queries, by their own lengths, so that no bit depends
// on what else is in the batch, nor on whether it is padded or packed. None do where `most` is negative.
struct FewQueries {
  static FewQueries of(const AttentionInputs& inputs);

  // Whether all do, whatever lengths the GPU has.
  bool all() const { return longest <= most; }
  // Whether some may: of what is neither packed nor has lengths, all do or none.
  bool some() const { return all() || (lengths_vary && most >= 0); }
  // The most queries of one of them.
  int64_t queries() const { return std::min(longest, most); }

  int64_t most = -1, longest = 0;
  bool lengths_vary = false;
};

// Whether keys and values are in pages for which kernels have code of their own: an EvenPagedMatrix, of a type that has
// such code.
bool has_even_pages(const AttentionInputs& inputs);

// Whether the keys of these sequences are found by their index, where one is given; else all are read, to the same
// bits. They are found so where that was faster (docs/notes/2026-11-30-key-index.md), unless ADASPLASH_KEY_INDEX in the
// environment says "read" or "leave". The same for all parts of a call.
bool uses_index(const AttentionInputs& inputs);

// Adds what scratch for them is counted by, for some key heads of all sequences. `stored_kv_heads` have room for keys:
// the sequences of a packed batch share theirs.
void add_few(Extents& extents, const AttentionInputs& inputs, int64_t kv_heads, int64_t stored_kv_heads);

}  // namespace adasplash::cuda
