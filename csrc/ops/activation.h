// The activation below its dim: two private ops over the last dimension. `entmax` moves any dimension there.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/DimVector.h>

#include <optional>
#include <tuple>

namespace adasplash {

// alpha of every row: row_alpha, of the sizes of the input without the last, where it is given, else one number.
struct ActivationAlpha {
  std::optional<at::Tensor> per_row;  // in sum_type of the input
  double number = 1.5;
};

using ActivationGradients = std::tuple<at::Tensor, at::Tensor>;  // of the input, and per_row (empty without one)

// The type of thresholds, sums and alpha: float32, and float64 for float64.
at::ScalarType sum_type(const at::Tensor& input);

// The sizes of the input without the last: one entry for each row.
c10::SymDimVector row_sizes(const at::Tensor& input);

// What every backend returns: contiguous, of shapes that follow from the arguments' alone.
at::Tensor allocate_activation(const at::Tensor& input);
ActivationGradients allocate_activation_gradients(const at::Tensor& output, const ActivationAlpha& alpha);

// Through the dispatcher, so that tracers and profilers see the two ops.
at::Tensor call_activation(const at::Tensor& input, const ActivationAlpha& alpha);
ActivationGradients call_activation_backward(const at::Tensor& grad_out, const at::Tensor& output,
                                             const ActivationAlpha& alpha);

// Adapters from the schema's flat arguments to a backend's kernel.
using ActivationKernel = at::Tensor (*)(const at::Tensor& input, const ActivationAlpha& alpha);
using ActivationBackwardKernel = ActivationGradients (*)(const at::Tensor& grad_out, const at::Tensor& output,
                                                         const ActivationAlpha& alpha);

template <ActivationKernel kernel>
at::Tensor activation_op(const at::Tensor& input, const std::optional<at::Tensor>& row_alpha, double alpha) {
  return kernel(input, {row_alpha, alpha});
}

template <ActivationBackwardKernel kernel>
ActivationGradients activation_backward_op(const at::Tensor& grad_out, const at::Tensor& output,
                                           const std::optional<at::Tensor>& row_alpha, double alpha) {
  return kernel(grad_out, output, {row_alpha, alpha});
}

}  // namespace adasplash
