#include "ops/activation.h"

#include <ATen/ops/empty.h>

#include "ops/dispatcher.h"

namespace adasplash {

c10::SymDimVector row_sizes(const at::Tensor& input) {
  const auto sizes = input.sym_sizes();
  return c10::SymDimVector(sizes.begin(), sizes.end() - 1);
}

at::ScalarType sum_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor allocate_activation(const at::Tensor& input) { return at::empty_symint(input.sym_sizes(), input.options()); }

ActivationGradients allocate_activation_gradients(const at::Tensor& output, const ActivationAlpha& alpha) {
  const auto options = output.options().dtype(sum_type(output));
  return {allocate_activation(output),
          alpha.per_row ? at::empty_symint(row_sizes(output), options) : at::empty({0}, options)};
}

at::Tensor call_activation(const at::Tensor& input, const ActivationAlpha& alpha) {
  using Signature = decltype(activation_op<ActivationKernel{}>);
  static const auto op = find_op<Signature>("adasplash::_entmax_forward");
  return op.call(input, alpha.per_row, alpha.number);
}

ActivationGradients call_activation_backward(const at::Tensor& grad_out, const at::Tensor& output,
                                             const ActivationAlpha& alpha) {
  using Signature = decltype(activation_backward_op<ActivationBackwardKernel{}>);
  static const auto op = find_op<Signature>("adasplash::_entmax_backward");
  return op.call(grad_out, output, alpha.per_row, alpha.number);
}

}  // namespace adasplash
