// entmax_attn above its two private ops: the Autograd kernel, which saves what the backward needs, and the kernel for
// where no autograd key is set (inference mode), which saves nothing.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "attention.h"
#include "checks.h"
#include "cuda/ops.h"

namespace adasplash {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Support entries kept for each row. The CPU's backward walks the lists; the CUDA kernels walk tile bits.
int64_t support_capacity(const at::Tensor& query) { return cuda::serves(query.device()) ? 0 : 64; }

// The options that are tensors, in the order in which they are saved.
constexpr OptionalTensor AttentionOptions::* kTensorOptions[] = {
    &AttentionOptions::head_alpha,   &AttentionOptions::q_seqlens,    &AttentionOptions::kv_seqlens,
    &AttentionOptions::cu_seqlens_q, &AttentionOptions::cu_seqlens_k, &AttentionOptions::alibi_slopes};

void save_for_backward(AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                       const SavedForBackward& saved, const AttentionOptions& o) {
  variable_list tensors = {query, key, value, saved.row_state, saved.support, saved.tiles};
  for (const auto option : kTensorOptions) tensors.push_back((o.*option).value_or(at::Tensor()));
  ctx->save_for_backward(std::move(tensors));
  // As IValues and not as one object, so that compiled autograd can trace them.
  auto& data = ctx->saved_data;
  data["alpha"] = o.alpha;
  data["is_causal"] = o.is_causal;
  data["scale"] = o.scale;
  data["max_seqlen_q"] = o.max_seqlen_q;
  data["max_seqlen_k"] = o.max_seqlen_k;
  data["window"] = std::vector<int64_t>(o.window.begin(), o.window.end());
}

AttentionOptions load_options(AutogradContext* ctx, const variable_list& tensors) {
  auto& data = ctx->saved_data;
  AttentionOptions o;
  o.alpha = data["alpha"].toDouble();
  o.is_causal = data["is_causal"].toBool();
  o.scale = data["scale"].toOptional<double>();
  o.max_seqlen_q = data["max_seqlen_q"].toSymInt();
  o.max_seqlen_k = data["max_seqlen_k"].toSymInt();
  o.window = window_pair(data["window"].toIntVector());
  auto tensor = tensors.begin() + 6;
  for (const auto option : kTensorOptions) {
    if (tensor->defined()) o.*option = *tensor;
    ++tensor;
  }
  return o;
}

// _entmax_attn_backward has no derivative of its own; the node says so instead of giving silent zeros.
class EntmaxAttnBackward : public torch::autograd::Function<EntmaxAttnBackward> {
 public:
  static variable_list forward(AutogradContext*, const Variable& grad_out, const Variable& query, const Variable& key,
                               const Variable& value, const SavedForBackward& saved, const AttentionOptions& options) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [dq, dk, dv, dalpha] = call_backward(grad_out, query, key, value, saved, options);
    return {dq, dk, dv, dalpha};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "entmax_attn: double backward is not supported; its gradient cannot be "
                                "differentiated again");
  }
};

class EntmaxAttn : public torch::autograd::Function<EntmaxAttn> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& query, const Variable& key, const Variable& value,
                          const OptionalTensor& /*head_alpha*/, const AttentionOptions& options, int64_t capacity) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, row_state, support, tiles] = call_forward(query, key, value, options, capacity);
    if (capacity != kInference) save_for_backward(ctx, query, key, value, {row_state, support, tiles}, options);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto v = ctx->get_saved_variables();
    const AttentionOptions options = load_options(ctx, v);
    const auto g = EntmaxAttnBackward::apply(grad[0], v[0], v[1], v[2], SavedForBackward{v[3], v[4], v[5]}, options);
    return {g[0], g[1], g[2], options.head_alpha ? g[3] : Variable(), Variable(), Variable()};
  }
};

// alpha = 1 is softmax, for which torch's own kernels serve wherever they mean the same.
at::Tensor softmax_attn(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const AttentionOptions& o) {
  const auto shape = AttentionShape::of(query, key, value);
  TORCH_CHECK(!o.is_causal || shape.queries == shape.keys,
              "entmax_attn: alpha = 1 (softmax) with is_causal needs as many queries as keys, got ", shape.queries,
              " and ", shape.keys, "; scaled_dot_product_attention aligns its mask top left, this op bottom right");
  TORCH_CHECK(shape.head_dim == shape.value_dim,
              "entmax_attn: alpha = 1 (softmax) needs value's head_dim to be "
              "query's, got ",
              shape.value_dim, " and ", shape.head_dim);
  // Its fused kernels want dense rows; without them it would build the M x N matrix.
  const auto dense = [](const at::Tensor& t) { return t.sym_stride(3) == 1 ? t : t.contiguous(); };
  return at::scaled_dot_product_attention(dense(query), dense(key), dense(value), {}, /*dropout_p=*/0.0, o.is_causal,
                                          o.scale, /*enable_gqa=*/shape.heads != shape.kv_heads)
      .contiguous();
}

void refuse_forward_mode(const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor.defined() || !tensor._fw_grad(/*level=*/0).defined(),
                              "entmax_attn: forward-mode AD is not supported; use reverse mode");
}

at::Tensor attention_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const AttentionOptions& options) {
  check_attention("entmax_attn", query, key, value, options, /*softmax_elsewhere=*/true);
  if (!options.head_alpha && options.alpha == 1) return softmax_attn(query, key, value, options);
  bool training = false;
  for (const auto& t : {query, key, value, options.head_alpha.value_or(at::Tensor())}) {
    refuse_forward_mode(t);
    training |= t.defined() && t.requires_grad();
  }
  training &= at::GradMode::is_enabled();
  return EntmaxAttn::apply(query, key, value, options.head_alpha, options,
                           training ? support_capacity(query) : kInference);
}

at::Tensor attention_inference(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const AttentionOptions& options) {
  check_attention("entmax_attn", query, key, value, options, /*softmax_elsewhere=*/true);
  if (!options.head_alpha && options.alpha == 1) return softmax_attn(query, key, value, options);
  return std::get<0>(call_forward(query, key, value, options, kInference));
}

using AttentionKernel = at::Tensor (*)(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                       const AttentionOptions&);

// Both overloads: Alpha is double, or a tensor.
template <AttentionKernel kernel, typename Alpha>
at::Tensor entmax_attn(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, Alpha alpha,
                       bool is_causal, std::optional<double> scale, const OptionalTensor& q_seqlens,
                       const OptionalTensor& kv_seqlens, c10::IntArrayRef window, const OptionalTensor& alibi_slopes) {
  AttentionOptions o;
  if constexpr (std::is_same_v<Alpha, double>) {
    o.alpha = alpha;
  } else {
    o.head_alpha = alpha;
  }
  o.is_causal = is_causal;
  o.scale = scale;
  o.q_seqlens = q_seqlens;
  o.kv_seqlens = kv_seqlens;
  o.window = window_pair(window);
  o.alibi_slopes = alibi_slopes;
  return kernel(query, key, value, o);
}

// The backward op called by hand, as an exported training graph does.
BackwardResult backward_autograd(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
                                 const at::Tensor& value, const SavedForBackward& saved,
                                 const AttentionOptions& options) {
  const auto g = EntmaxAttnBackward::apply(grad_out, query, key, value, saved, options);
  return {g[0], g[1], g[2], g[3]};
}

}  // namespace
}  // namespace adasplash

TORCH_LIBRARY_IMPL(adasplash, Autograd, m) {
  using namespace adasplash;
  m.impl("entmax_attn", entmax_attn<attention_autograd, double>);
  m.impl("entmax_attn.per_head", entmax_attn<attention_autograd, const at::Tensor&>);
  m.impl("_entmax_attn_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_entmax_attn_backward", backward_op<backward_autograd>);
}

TORCH_LIBRARY_IMPL(adasplash, CompositeExplicitAutograd, m) {
  using namespace adasplash;
  m.impl("entmax_attn", entmax_attn<attention_inference, double>);
  m.impl("entmax_attn.per_head", entmax_attn<attention_inference, const at::Tensor&>);
}
