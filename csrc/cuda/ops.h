// The CUDA kernels of the private ops.
#pragma once

#include "ops/activation.h"
#include "ops/attention.h"
#include "ops/summary.h"

namespace adasplash::cuda {

// Whether the CUDA kernels serve tensors on this device: CUDA devices, and in tests the CPU.
bool serves(c10::Device device);

ForwardResult forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      const AttentionOptions& options, const c10::SymInt& support_capacity);
BackwardResult backward(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
                        const at::Tensor& value, const SavedForBackward& saved, const AttentionOptions& options);
SummaryResult summarize(const at::Tensor& query, const at::Tensor& key, const SavedForBackward& saved,
                        const AttentionOptions& options);

at::Tensor activation(const at::Tensor& input, const ActivationAlpha& alpha);
ActivationGradients activation_backward(const at::Tensor& grad_out, const at::Tensor& output,
                                        const ActivationAlpha& alpha);

}  // namespace adasplash::cuda
