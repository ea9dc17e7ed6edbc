// _entmax_forward and _entmax_backward on the CPU: rows to threads. Every row has one thread and sums of its own.
#include "ops/activation.h"

#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/tasks.h"
#include "cpu/types.h"
#include "ops/activation_checks.h"
#include "ops/attention_checks.h"

namespace adasplash {
namespace {

using namespace cpu;

constexpr int64_t kEntriesOfARange = 16384;

void check_values(const char* op, const at::Tensor& input, const at::Tensor& row_alpha) {
  TORCH_CHECK(input.size(-1) <= INT32_MAX, op, ": a row must hold at most ", INT32_MAX, " entries, got ",
              input.size(-1));
  if (!row_alpha.defined()) return;
  AT_DISPATCH_FLOATING_TYPES(row_alpha.scalar_type(), "row_alpha", [&] {
    const auto* alpha = row_alpha.const_data_ptr<scalar_t>();
    for (int64_t row = 0; row < row_alpha.numel(); ++row) {
      TORCH_CHECK(alpha[row] >= kMinAlphaRounded && alpha[row] <= 2, op, ": alpha must be from 1.01 to 2, got ",
                  alpha[row]);
    }
  });
}

// Calls f(begin, end, scratch) for ranges of the input's rows. Rows cost about the same, so each thread gets its ranges
// at once, side by side, and does not come back for more as with run_tasks.
template <typename F>
void for_rows(const at::Tensor& input, int64_t scratch_bytes, const F& f) {
  const int64_t n = input.size(-1);
  run_ranges(input.numel() / n, std::max<int64_t>(1, kEntriesOfARange / n), scratch_bytes, f);
}

at::Tensor contiguous_row_alpha(const ActivationAlpha& alpha) {
  return alpha.per_row ? alpha.per_row->contiguous() : at::Tensor();
}

// alpha as the kernels take it, who read `row_alpha` where it is defined.
template <typename A>
RowAlpha<A> kernel_alpha(double number, const at::Tensor& row_alpha) {
  return {number, row_alpha.defined() ? row_alpha.const_data_ptr<A>() : nullptr};
}

at::Tensor forward(const at::Tensor& input, const ActivationAlpha& alpha) {
  constexpr const char* name = "_entmax_forward";
  check_activation(name, input, alpha);
  const at::Tensor scores = input.contiguous(), row_alpha = contiguous_row_alpha(alpha);
  check_values(name, scores, row_alpha);
  at::Tensor out = allocate_activation(scores);
  if (out.numel() == 0) return out;
  ADASPLASH_DISPATCH(scores.scalar_type(), name, [&] {
    using A = Accumulate<scalar_t>;
    const auto& kernel = kernels<scalar_t, A>();
    const int64_t n = scores.size(-1);
    const auto* from = scores.const_data_ptr<scalar_t>();
    auto* to = out.mutable_data_ptr<scalar_t>();
    const auto alphas = kernel_alpha<A>(alpha.number, row_alpha);
    for_rows(scores, kernel.activate_scratch(n), [&](int64_t begin, int64_t end, char* scratch) {
      kernel.activate(from, n, alphas, begin, end, to, scratch);
    });
  });
  return out;
}

ActivationGradients backward(const at::Tensor& grad_out, const at::Tensor& output, const ActivationAlpha& alpha) {
  constexpr const char* name = "_entmax_backward";
  check_activation_backward(grad_out, output, alpha);
  const at::Tensor grads = grad_out.contiguous(), weights = output.contiguous(),
                   row_alpha = contiguous_row_alpha(alpha);
  check_values(name, weights, row_alpha);
  auto result = allocate_activation_gradients(weights, alpha);
  at::Tensor &grad_input = std::get<0>(result), &grad_alpha = std::get<1>(result);
  if (weights.numel() == 0) {
    grad_alpha.zero_();
    return result;
  }
  ADASPLASH_DISPATCH(weights.scalar_type(), name, [&] {
    using A = Accumulate<scalar_t>;
    const auto& kernel = kernels<scalar_t, A>();
    const int64_t n = weights.size(-1);
    const auto *from_grads = grads.const_data_ptr<scalar_t>(), *from_weights = weights.const_data_ptr<scalar_t>();
    auto* to = grad_input.mutable_data_ptr<scalar_t>();
    A* to_alpha = alpha.per_row ? grad_alpha.mutable_data_ptr<A>() : nullptr;
    const auto alphas = kernel_alpha<A>(alpha.number, row_alpha);
    for_rows(weights, kernel.activate_backward_scratch(n), [&](int64_t begin, int64_t end, char* scratch) {
      kernel.activate_backward(from_grads, from_weights, n, alphas, begin, end, to, to_alpha, scratch);
    });
  });
  return result;
}

}  // namespace
}  // namespace adasplash

TORCH_LIBRARY_IMPL(adasplash, CPU, m) {
  using namespace adasplash;
  m.impl("_entmax_forward", activation_op<forward>);
  m.impl("_entmax_backward", activation_backward_op<backward>);
}
