// The launches for sequences of few keys (triton_src/attention/short.py).
#pragma once

#include "cuda/portable/call.h"

namespace adasplash::cuda::portable {

// Which sequences of a call go this way: those of at most `most` keys whose queries are not few (cuda/few.h), by their
// own lengths, so that no bit depends on what else is in the batch, nor on how it is stored. None do where `most` is
// negative.
struct ShortKeys {
  static ShortKeys of(const AttentionInputs& inputs);

  // Whether the keys of all are few enough, whatever lengths the GPU has.
  bool all() const { return longest <= most; }
  // Whether those of some may be: without lengths all are or none.
  bool some() const { return all() || (lengths_vary && most >= 0); }

  int64_t most = -1, longest = 0;
  bool lengths_vary = false;
};

void attend_short(const PreparedCall& call, const ShortKeys& short_keys, const at::Tensor& out, float* row_state,
                  int32_t* tiles);

}  // namespace adasplash::cuda::portable
