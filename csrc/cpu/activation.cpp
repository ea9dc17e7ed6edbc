// _entmax_forward and _entmax_backward on the CPU: rows to threads. Every row has one thread and sums of its own.
#include "ops/activation.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"
#include "ops/attention_checks.h"

namespace adasplash {
namespace {

using namespace cpu;

constexpr int64_t kEntriesOfATask = 16384;

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

// Calls f(begin, end, scratch) for ranges of rows, on all threads.
template <typename F>
void for_rows(const at::Tensor& input, int64_t scratch_bytes, const F& f) {
  const int64_t n = input.size(-1);
  at::parallel_for(0, input.numel() / n, std::max<int64_t>(1, kEntriesOfATask / n), [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = c10::GetCPUAllocator()->allocate(scratch_bytes);
    f(begin, end, static_cast<char*>(scratch.get()));
  });
}

// alpha as the kernels take it; `contiguous` keeps the tensor alive.
template <typename A>
RowAlpha<A> alpha_of(const ActivationAlpha& alpha, const at::Tensor& contiguous) {
  return {alpha.number, contiguous.defined() ? contiguous.const_data_ptr<A>() : nullptr};
}

at::Tensor dense(const ActivationAlpha& alpha) { return alpha.per_row ? alpha.per_row->contiguous() : at::Tensor(); }

#define ADASPLASH_DISPATCH(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, TYPE, NAME, __VA_ARGS__)

template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

at::Tensor forward(const at::Tensor& given, const ActivationAlpha& alpha) {
  constexpr const char* name = "_entmax_forward";
  check_activation(name, given, alpha);
  const at::Tensor input = given.contiguous(), row_alpha = dense(alpha);
  check_values(name, input, row_alpha);
  at::Tensor out = allocate_activation(input);
  if (out.numel() == 0) return out;
  ADASPLASH_DISPATCH(input.scalar_type(), name, [&] {
    using A = Accumulate<scalar_t>;
    const auto& kernel = kernels<scalar_t, A>();
    const int64_t n = input.size(-1);
    const auto* from = input.const_data_ptr<scalar_t>();
    auto* to = out.mutable_data_ptr<scalar_t>();
    const auto alphas = alpha_of<A>(alpha, row_alpha);
    for_rows(input, kernel.activate_scratch(n), [&](int64_t begin, int64_t end, char* scratch) {
      kernel.activate(from, n, alphas, begin, end, to, scratch);
    });
  });
  return out;
}

ActivationGradients backward(const at::Tensor& given_grad, const at::Tensor& given_output,
                             const ActivationAlpha& alpha) {
  constexpr const char* name = "_entmax_backward";
  check_activation_backward(given_grad, given_output, alpha);
  const at::Tensor grad_out = given_grad.contiguous(), output = given_output.contiguous(), row_alpha = dense(alpha);
  check_values(name, output, row_alpha);
  auto result = allocate_activation_gradients(output, alpha);
  auto& [grad_input, grad_alpha] = result;
  if (output.numel() == 0) {
    grad_alpha.zero_();
    return result;
  }
  ADASPLASH_DISPATCH(output.scalar_type(), name, [&] {
    using A = Accumulate<scalar_t>;
    const auto& kernel = kernels<scalar_t, A>();
    const int64_t n = output.size(-1);
    const auto *grad = grad_out.const_data_ptr<scalar_t>(), *weights = output.const_data_ptr<scalar_t>();
    auto* to = grad_input.mutable_data_ptr<scalar_t>();
    A* to_alpha = alpha.per_row ? grad_alpha.mutable_data_ptr<A>() : nullptr;
    const auto alphas = alpha_of<A>(alpha, row_alpha);
    for_rows(output, kernel.activate_backward_scratch(n), [&](int64_t begin, int64_t end, char* scratch) {
      kernel.activate_backward(grad, weights, n, alphas, begin, end, to, to_alpha, scratch);
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
