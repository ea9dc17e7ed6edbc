// `entmax` above its two private ops: which dimension the rows lie along, alpha for each row, and autograd.
#include <ATen/ops/mul.h>
#include <ATen/ops/softmax.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>

#include "ops/activation.h"
#include "ops/activation_checks.h"
#include "ops/attention_checks.h"

namespace adasplash {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// _entmax_backward has no derivative of its own; the node says so instead of giving silent zeros.
class EntmaxBackward : public torch::autograd::Function<EntmaxBackward> {
 public:
  static variable_list forward(AutogradContext*, const Variable& grad_out, const Variable& output,
                               const std::optional<at::Tensor>& row_alpha, double alpha) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [grad_input, grad_alpha] = call_activation_backward(grad_out, output, {row_alpha, alpha});
    return {grad_input, grad_alpha};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, "entmax: double backward is not supported; its gradient cannot be differentiated again");
  }
};

// The weights are all that the backward needs: p says where the support is and what u = p^(2 - alpha) is.
class Entmax : public torch::autograd::Function<Entmax> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& input, const std::optional<at::Tensor>& row_alpha,
                          double alpha) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor output = call_activation(input, {row_alpha, alpha});
    ctx->save_for_backward({output, row_alpha.value_or(at::Tensor())});
    ctx->saved_data["alpha"] = alpha;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const auto row_alpha = saved[1].defined() ? std::optional(saved[1]) : std::nullopt;
    const auto g = EntmaxBackward::apply(grad[0], saved[0], row_alpha, ctx->saved_data["alpha"].toDouble());
    return {g[0], row_alpha ? g[1] : Variable(), Variable()};
  }
};

void refuse_forward_mode(const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor._fw_grad(/*level=*/0).defined(),
                              "entmax: forward-mode AD is not supported; use reverse mode");
}

at::Tensor with_autograd(const at::Tensor& rows, const ActivationAlpha& alpha) {
  refuse_forward_mode(rows);
  if (alpha.per_row) refuse_forward_mode(*alpha.per_row);
  return Entmax::apply(rows, alpha.per_row, alpha.number);
}

// The loss's gradient is the weights less the target's one, which no chain of operations gives without passes of its
// own.
class RowsTimesGradient : public torch::autograd::Function<RowsTimesGradient> {
 public:
  // `value` is there to be depended on, so that a second derivative is refused and not silently taken for zero.
  static Variable forward(AutogradContext*, const Variable& grad, const Variable& gradient, const Variable& /*value*/) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return grad.unsqueeze(-1).mul(gradient);
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, "entmax_loss: double backward is not supported; its gradient cannot be differentiated again");
  }
};

class WithGradient : public torch::autograd::Function<WithGradient> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& value, const Variable& /*input*/,
                          const Variable& gradient) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor copy = value.clone();
    ctx->save_for_backward({gradient, copy});
    return copy;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    return {Variable(), RowsTimesGradient::apply(grad[0], saved[0], saved[1]), Variable()};
  }
};

at::Tensor with_gradient(const at::Tensor& value, const at::Tensor& input, const at::Tensor& gradient) {
  refuse_forward_mode(input);
  return WithGradient::apply(value, input, gradient);
}

at::Tensor value_of(const at::Tensor& value, const at::Tensor& /*input*/, const at::Tensor& /*gradient*/) {
  return value.clone();
}

// One alpha for each row, of the sizes of input without dim, from a tensor whose sizes broadcast to those of input with
// 1 at dim.
at::Tensor expanded_to_rows(const at::Tensor& alpha, const at::Tensor& input, int64_t dim) {
  TORCH_CHECK(alpha.is_floating_point(), "entmax: alpha must be a number or a floating point tensor, got ",
              alpha.scalar_type());
  TORCH_CHECK(alpha.device() == input.device(), "entmax: alpha must be on input's device ", input.device(), ", got ",
              alpha.device());
  c10::SymDimVector sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  if (!sizes.empty()) sizes[dim] = 1;
  bool broadcasts = alpha.dim() <= input.dim();
  for (int64_t d = 1; broadcasts && d <= alpha.dim(); ++d) {
    const auto &size = alpha.sym_size(-d), &wanted = sizes[sizes.size() - d];
    broadcasts = size == 1 || size == wanted;
  }
  TORCH_CHECK(broadcasts, "entmax: alpha must broadcast over the rows of input, to sizes ", c10::SymIntArrayRef(sizes),
              ", got ", alpha.sym_sizes());
  const at::Tensor expanded = alpha.to(sum_type(input)).expand_symint(sizes);
  return sizes.empty() ? expanded : expanded.squeeze(dim);
}

// The activation for both overloads, Alpha being double or a tensor; `kernel` works along the last dimension.
template <ActivationKernel kernel, typename Alpha>
at::Tensor entmax(const at::Tensor& input, Alpha alpha, int64_t dim) {
  check_activation_input("entmax", input);
  const int64_t dims = std::max<int64_t>(input.dim(), 1);
  TORCH_CHECK_INDEX(dim >= -dims && dim < dims, "entmax: dim must be from ", -dims, " to ", dims - 1, ", got ", dim);
  if (dim < 0) dim += dims;
  ActivationAlpha row_alpha;
  if constexpr (std::is_same_v<Alpha, double>) {
    check_alpha("entmax", alpha, /*takes_softmax=*/true);
    if (alpha == 1) return at::softmax(input, dim).contiguous();
    row_alpha.number = alpha;
  } else {
    row_alpha.per_row = expanded_to_rows(alpha, input, dim);
  }
  // One number is a row of one.
  const at::Tensor rows = input.dim() == 0 ? input.unsqueeze(0) : input.movedim(dim, -1);
  const at::Tensor weights = kernel(rows.contiguous(), row_alpha);
  return input.dim() == 0 ? weights.squeeze(0) : weights.movedim(-1, dim).contiguous();
}

// The backward op called by hand, as an exported training graph does.
ActivationGradients backward_autograd(const at::Tensor& grad_out, const at::Tensor& output,
                                      const ActivationAlpha& alpha) {
  const auto g = EntmaxBackward::apply(grad_out, output, alpha.per_row, alpha.number);
  return {g[0], g[1]};
}

}  // namespace
}  // namespace adasplash

TORCH_LIBRARY_IMPL(adasplash, Autograd, m) {
  using namespace adasplash;
  m.impl("entmax", entmax<with_autograd, double>);
  m.impl("entmax.tensor_alpha", entmax<with_autograd, const at::Tensor&>);
  m.impl("_with_gradient", with_gradient);
  m.impl("_entmax_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_entmax_backward", activation_backward_op<backward_autograd>);
}

// Where no autograd key is set (inference mode).
TORCH_LIBRARY_IMPL(adasplash, CompositeExplicitAutograd, m) {
  using namespace adasplash;
  m.impl("entmax", entmax<call_activation, double>);
  m.impl("entmax.tensor_alpha", entmax<call_activation, const at::Tensor&>);
  m.impl("_with_gradient", value_of);
}
