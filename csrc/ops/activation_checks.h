// Argument checks of the activation, shared by all backends, as attention_checks.h has them for attention.
#pragma once

#include "ops/activation.h"

namespace adasplash {

// Throw unless the arguments fit.
void check_activation_input(const char* op, const at::Tensor& input);
void check_activation(const char* op, const at::Tensor& input, const ActivationAlpha& alpha);
void check_activation_backward(const at::Tensor& grad_out, const at::Tensor& output, const ActivationAlpha& alpha);

}  // namespace adasplash
