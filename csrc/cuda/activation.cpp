// _entmax_forward and _entmax_backward on the GPU.
#include "ops/activation.h"

#include <c10/core/DeviceGuard.h>

#include "cuda/launchers.h"
#include "cuda/ops.h"
#include "ops/activation_checks.h"

namespace adasplash::cuda {
namespace {

constexpr int64_t kLongest = 1 << 30;  // LONGEST_ROW of triton_src/variants.py

// One call's rows in the terms of the kernels. While it lives its device is the current one.
class ActivationCall {
 public:
  ActivationCall(const char* op, Kernel kernel, const at::Tensor& tensor, const ActivationAlpha& given)
      : guard_(tensor.device()),
        place(place_of(tensor.device())),
        rows(tensor.numel() / tensor.size(-1)),
        length(length_of(op, tensor)),
        alpha(static_cast<float>(given.number)),
        row_alpha(given.per_row ? given.per_row->contiguous() : at::Tensor()),
        // Code of its own has alpha where it is a number only.
        variant(find_variant(kernel, tensor.scalar_type(), length, given.per_row ? AlphaCode::kAny : alpha_code(alpha),
                             place.device)) {}

  int64_t programs() const { return (rows + variant.block_m - 1) / variant.block_m; }
  int64_t own_alphas() const { return row_alpha.defined() ? rows : 0; }
  const float* row_alphas() const { return row_alpha.defined() ? row_alpha.const_data_ptr<float>() : nullptr; }

 private:
  static int32_t length_of(const char* op, const at::Tensor& tensor) {
    TORCH_CHECK(tensor.scalar_type() != at::kDouble, op,
                ": float64 runs on the CPU only; the GPU takes float32, float16 and bfloat16");
    TORCH_CHECK(tensor.size(-1) <= kLongest, op, ": a row must hold at most ", kLongest, " entries on the GPU, got ",
                tensor.size(-1));
    return static_cast<int32_t>(tensor.size(-1));
  }

  const c10::DeviceGuard guard_;

 public:
  const Place place;
  const int64_t rows;
  const int32_t length;
  const float alpha;
  const at::Tensor row_alpha;
  const Variant& variant;
};

}  // namespace

at::Tensor activation(const at::Tensor& given, const ActivationAlpha& alpha) {
  constexpr const char* name = "_entmax_forward";
  check_activation(name, given, alpha);
  at::Tensor out = allocate_activation(given);
  if (out.numel() == 0) return out;
  const at::Tensor input = given.contiguous();
  const ActivationCall call(name, Kernel::kActivate, input, alpha);
  activate(call.variant, call.place, call.programs(),
           {
               .input = input.const_data_ptr(),
               .out = out.mutable_data_ptr(),
               .row_alpha = call.row_alphas(),
               .own_alphas = call.own_alphas(),
               .rows = call.rows,
               .length = call.length,
               .alpha = call.alpha,
           });
  return out;
}

ActivationGradients activation_backward(const at::Tensor& given_grad, const at::Tensor& given_output,
                                        const ActivationAlpha& alpha) {
  constexpr const char* name = "_entmax_backward";
  check_activation_backward(given_grad, given_output, alpha);
  auto result = allocate_activation_gradients(given_output, alpha);
  auto& [grad_input, grad_alpha] = result;
  if (given_output.numel() == 0) {
    grad_alpha.zero_();
    return result;
  }
  const at::Tensor grad_out = given_grad.contiguous(), output = given_output.contiguous();
  const ActivationCall call(name, Kernel::kActivateGrad, output, alpha);
  activate_grad(call.variant, call.place, call.programs(),
                {
                    .grad_out = grad_out.const_data_ptr(),
                    .output = output.const_data_ptr(),
                    .grad_input = grad_input.mutable_data_ptr(),
                    .row_alpha = call.row_alphas(),
                    .grad_alpha = alpha.per_row ? grad_alpha.mutable_data_ptr<float>() : nullptr,
                    .own_alphas = call.own_alphas(),
                    .rows = call.rows,
                    .length = call.length,
                    .alpha = call.alpha,
                });
  return result;
}

}  // namespace adasplash::cuda
