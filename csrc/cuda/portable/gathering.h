// Whether a call looks for the keys and rows that weigh, to gather them instead of walking whole tiles. When that pays
// was measured: docs/notes/2026-11-27-gathering.md, and for the forward 2026-11-30-gathering-forward.md.
#pragma once

#include <cstdint>

#include "cuda/implementation.h"

namespace adasplash::cuda::portable {

// For the kernels, which look at each sequence's own lengths.
struct Gathering {
  int32_t from = 0;  // how long a sequence must be
  // Less than so many per cent of the keys must weigh; 0 if no sequence can be long enough.
  int32_t below = 0;

  // By the number of keys that a query may see, and by the shorter side.
  static Gathering of_forward(const AttentionInputs& inputs);
  static Gathering of_backward(const AttentionInputs& inputs);

  bool possible() const { return below > 0; }
};

}  // namespace adasplash::cuda::portable
