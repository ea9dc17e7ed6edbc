// Whether a call looks for the keys and rows that weigh, to gather them instead of walking whole tiles. When that pays
// was measured: docs/notes/2026-11-27-gathering.md, and for the forward 2026-11-30-gathering-forward.md. And where the
// marks of keys are that the forward keeps for the backward, whichever implementations compute the two.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <cstdint>

#include "cuda/implementation.h"

namespace adasplash::cuda {

// For the kernels, which look at each sequence's own lengths.
struct Gathering {
  int32_t from = 0;  // how many keys a sequence must have, and in the backward queries
  // Less than so many per cent of the keys must weigh; 0 if no sequence can be long enough.
  int32_t below = 0;

  // By the number of keys that a query may see, and by the shorter side.
  static Gathering of_forward(const AttentionInputs& inputs);
  static Gathering of_backward(const AttentionInputs& inputs);

  // How many places a row of support has, for training, where the forward may gather keys and keeps marks of them for
  // the backward; otherwise none. Which sequences' marks have room there follows from their own lengths: a query takes
  // a bit for every 64 keys, more the longer they are, so it is those of up to kMostKeptKeys keys.
  static c10::SymInt kept_capacity(const at::Tensor& query, const at::Tensor& key, const AttentionOptions& options);

  // How many places rows of this support have, as the kernels are told: 0 where nothing is kept, as in inference, which
  // has no support, and where the capacity is not that one, so that these may be lists.
  static int32_t capacity_of(const at::Tensor& support, const AttentionInputs& inputs);

  bool possible() const { return below > 0; }
};

}  // namespace adasplash::cuda
