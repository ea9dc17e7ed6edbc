// The types that tensors may have, and what is computed in for each.
#pragma once

#include <ATen/Dispatch.h>

#include <type_traits>

// Runs the lambda with scalar_t as the C++ type of TYPE; NAME is the op's, for messages.
#define ADASPLASH_DISPATCH(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, TYPE, NAME, __VA_ARGS__)

namespace adasplash::cpu {

// The type of scores, thresholds and sums for tensors of type T.
template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace adasplash::cpu
