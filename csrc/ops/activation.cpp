#include "ops/activation.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include "ops/attention_checks.h"

namespace adasplash {
namespace {

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

c10::SymDimVector row_sizes(const at::Tensor& input) {
  const auto sizes = input.sym_sizes();
  return c10::SymDimVector(sizes.begin(), sizes.end() - 1);
}

}  // namespace

at::ScalarType sum_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_activation_input(const char* op, const at::Tensor& input) {
  TORCH_CHECK(input.defined(), op, ": input must be a tensor, got none");
  const auto type = input.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kHalf || type == at::kBFloat16 || type == at::kDouble, op,
              ": input must be float32, float16, bfloat16 or float64, got ", type);
  TORCH_CHECK(input.layout() == at::kStrided, op, ": input must be a dense (strided) tensor, got layout ",
              input.layout());
}

void check_activation(const char* op, const at::Tensor& input, const ActivationAlpha& alpha) {
  check_activation_input(op, input);
  TORCH_CHECK(input.dim() >= 1, op, ": input must have at least one dimension, got none");
  if (!alpha.per_row) return check_alpha(op, alpha.number);
  const at::Tensor& per_row = *alpha.per_row;
  TORCH_CHECK(per_row.layout() == at::kStrided && per_row.scalar_type() == sum_type(input) &&
                  per_row.device() == input.device(),
              op, ": row_alpha must be a dense ", sum_type(input), " tensor on ", input.device(), ", got a ",
              per_row.layout(), " ", per_row.scalar_type(), " tensor on ", per_row.device());
  const auto sizes = row_sizes(input);
  TORCH_CHECK(per_row.sym_sizes() == c10::SymIntArrayRef(sizes), op, ": row_alpha must have sizes ",
              c10::SymIntArrayRef(sizes), ", those of input without the last, got ", per_row.sym_sizes());
}

void check_activation_backward(const at::Tensor& grad_out, const at::Tensor& output, const ActivationAlpha& alpha) {
  constexpr const char* op = "_entmax_backward";
  check_activation(op, output, alpha);
  TORCH_CHECK(grad_out.layout() == at::kStrided && grad_out.scalar_type() == output.scalar_type() &&
                  grad_out.device() == output.device(),
              op, ": grad_out must be a dense ", output.scalar_type(), " tensor on ", output.device(), ", got a ",
              grad_out.layout(), " ", grad_out.scalar_type(), " tensor on ", grad_out.device());
  TORCH_CHECK(grad_out.sym_sizes() == output.sym_sizes(), op, ": grad_out must have output's sizes ",
              output.sym_sizes(), ", got ", grad_out.sym_sizes());
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
