#include "ops/activation_checks.h"

#include <c10/util/Exception.h>

#include "ops/attention_checks.h"

namespace adasplash {

void check_activation_input(const char* op, const at::Tensor& input) {
  TORCH_CHECK(input.defined(), op, ": input must be a tensor, got none");
  check_type(op, "input", input);
  TORCH_CHECK(input.layout() == at::kStrided, op, ": input must be a dense (strided) tensor, got layout ",
              input.layout());
}

void check_activation(const char* op, const at::Tensor& input, const ActivationAlpha& alpha) {
  check_activation_input(op, input);
  TORCH_CHECK(input.dim() >= 1, op, ": input must have at least one dimension, got none");
  if (!alpha.per_row) return check_alpha(op, alpha.number, /*takes_softmax=*/false);
  const at::Tensor& row_alpha = *alpha.per_row;
  check_type_and_device(op, "row_alpha", row_alpha, sum_type(input), input.device());
  const auto sizes = row_sizes(input);
  TORCH_CHECK(row_alpha.sym_sizes() == c10::SymIntArrayRef(sizes), op, ": row_alpha must have sizes ",
              c10::SymIntArrayRef(sizes), ", those of input without the last, got ", row_alpha.sym_sizes());
}

void check_activation_backward(const at::Tensor& grad_out, const at::Tensor& output, const ActivationAlpha& alpha) {
  constexpr const char* op = "_entmax_backward";
  check_activation(op, output, alpha);
  check_type_and_device(op, "grad_out", grad_out, output.scalar_type(), output.device());
  TORCH_CHECK(grad_out.sym_sizes() == output.sym_sizes(), op, ": grad_out must have output's sizes ",
              output.sym_sizes(), ", got ", grad_out.sym_sizes());
}

}  // namespace adasplash
