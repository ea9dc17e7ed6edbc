// entmax_attn and entmax_attn_varlen above their two private ops: the Autograd kernel, which saves what the backward
// needs, and the kernel for where no autograd key is set (inference mode), which saves nothing.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "cuda/ops.h"
#include "ops/attention.h"
#include "ops/attention_checks.h"

namespace adasplash {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Support entries kept for each row. The CPU's backward walks the lists; the CUDA kernels walk tile bits.
int64_t support_capacity(const at::Tensor& query) { return cuda::serves(query.device()) ? 0 : 128; }

// The options that are tensors, in the order in which they are saved.
constexpr OptionalTensor AttentionOptions::* kTensorOptions[] = {
    &AttentionOptions::head_alpha,   &AttentionOptions::q_seqlens,    &AttentionOptions::kv_seqlens,
    &AttentionOptions::cu_seqlens_q, &AttentionOptions::cu_seqlens_k, &AttentionOptions::alibi_slopes};

constexpr size_t kFirstOption = 7;  // their place among the saved tensors

OptionalTensor if_defined(const Variable& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

void save_for_backward(AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                       const SavedForBackward& saved, const AttentionOptions& o) {
  variable_list tensors = {
      query, key, value, saved.row_state, saved.support, saved.tiles, saved.out.value_or(at::Tensor())};
  TORCH_INTERNAL_ASSERT(tensors.size() == kFirstOption);
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
  auto tensor = tensors.begin() + kFirstOption;
  for (const auto option : kTensorOptions) o.*option = if_defined(*tensor++);
  return o;
}

// _entmax_attn_backward has no derivative of its own; the node says so instead of giving silent zeros. The arguments
// say what it depends on, which alpha among the options would not.
class EntmaxAttnBackward : public torch::autograd::Function<EntmaxAttnBackward> {
 public:
  static variable_list forward(AutogradContext*, const Variable& grad_out, const Variable& query, const Variable& key,
                               const Variable& value, const OptionalTensor& /*head_alpha*/,
                               const SavedForBackward& saved, const AttentionOptions& options) {
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
                          const OptionalTensor& /*head_alpha*/, const AttentionOptions& options) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, row_state, support, tiles] = call_forward(query, key, value, options, support_capacity(query));
    const auto kept = cuda::serves(query.device()) ? OptionalTensor(out) : std::nullopt;
    save_for_backward(ctx, query, key, value, {row_state, support, tiles, kept}, options);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto v = ctx->get_saved_variables();
    const AttentionOptions options = load_options(ctx, v);
    const SavedForBackward saved{v[3], v[4], v[5], if_defined(v[6])};
    const auto g = EntmaxAttnBackward::apply(grad[0], v[0], v[1], v[2], options.head_alpha, saved, options);
    return {g[0], g[1], g[2], options.head_alpha ? g[3] : Variable(), Variable()};
  }
};

// alpha = 1 is softmax, for which torch's own kernels serve wherever they mean the same.
at::Tensor softmax_attn(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const AttentionOptions& o) {
  const auto refuse_if = [](bool given, const char* option) {
    TORCH_CHECK(!given, "entmax_attn: alpha = 1 (softmax) goes to scaled_dot_product_attention, which has no ", option,
                "; leave it at its default, or use alpha from 1.01 to 2");
  };
  refuse_if(o.q_seqlens.has_value(), "q_seqlens");
  refuse_if(o.kv_seqlens.has_value(), "kv_seqlens");
  refuse_if(o.window[0] != -1 || o.window[1] != -1, "window");
  refuse_if(o.alibi_slopes.has_value(), "alibi_slopes");
  const auto shape = AttentionShape::of(query, key, value, o);
  TORCH_CHECK(!o.is_causal || shape.queries == shape.keys,
              "entmax_attn: alpha = 1 (softmax) with is_causal needs as many queries as keys, got ", shape.queries,
              " and ", shape.keys, "; scaled_dot_product_attention aligns its mask top left, this op bottom right");
  TORCH_CHECK(shape.head_dim == shape.value_dim,
              "entmax_attn: alpha = 1 (softmax) needs value's head_dim to be "
              "query's, got ",
              shape.value_dim, " and ", shape.head_dim);
  // Its CUDA kernels fail where there is nothing to do (2.11 divides by the number of heads).
  if (query.sym_numel() == 0 || key.sym_numel() == 0) {
    return std::get<0>(at::_scaled_dot_product_attention_math(query, key, value, {}, /*dropout_p=*/0.0, o.is_causal,
                                                              /*dropout_mask=*/{}, o.scale,
                                                              /*enable_gqa=*/shape.heads != shape.kv_heads))
        .contiguous();
  }
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

void check_public(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const AttentionOptions& options) {
  check_attention(public_name(options), query, key, value, options, /*softmax_elsewhere=*/!options.packed());
}

at::Tensor attention_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const AttentionOptions& options) {
  check_public(query, key, value, options);
  if (!options.head_alpha && options.alpha == 1) return softmax_attn(query, key, value, options);
  bool training = false;
  for (const auto& t : {query, key, value, options.head_alpha.value_or(at::Tensor())}) {
    refuse_forward_mode(t);
    training |= t.defined() && t.requires_grad();
  }
  training &= at::GradMode::is_enabled();
  TORCH_CHECK(!at::GradMode::is_enabled() || !options.alibi_slopes || !options.alibi_slopes->requires_grad(),
              public_name(options), ": alibi_slopes have no gradient; detach them");
  if (training) return EntmaxAttn::apply(query, key, value, options.head_alpha, options);
  at::AutoDispatchBelowADInplaceOrView guard;
  return std::get<0>(call_forward(query, key, value, options, kInference));
}

at::Tensor attention_inference(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const AttentionOptions& options) {
  check_public(query, key, value, options);
  if (!options.head_alpha && options.alpha == 1) return softmax_attn(query, key, value, options);
  return std::get<0>(call_forward(query, key, value, options, kInference));
}

using AttentionKernel = at::Tensor (*)(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                       const AttentionOptions&);

void set_alpha(AttentionOptions& o, double alpha) { o.alpha = alpha; }
void set_alpha(AttentionOptions& o, const at::Tensor& alpha) { o.head_alpha = alpha; }

// Both overloads of each op: Alpha is double, or a tensor.
template <AttentionKernel kernel, typename Alpha>
at::Tensor entmax_attn(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, Alpha alpha,
                       bool is_causal, std::optional<double> scale, const OptionalTensor& q_seqlens,
                       const OptionalTensor& kv_seqlens, c10::IntArrayRef window, const OptionalTensor& alibi_slopes) {
  AttentionOptions o;
  set_alpha(o, alpha);
  o.is_causal = is_causal;
  o.scale = scale;
  o.q_seqlens = q_seqlens;
  o.kv_seqlens = kv_seqlens;
  o.window = window_pair(window);
  o.alibi_slopes = alibi_slopes;
  return kernel(query, key, value, o);
}

template <AttentionKernel kernel, typename Alpha>
at::Tensor entmax_attn_varlen(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, c10::SymInt max_seqlen_q,
                              c10::SymInt max_seqlen_k, Alpha alpha, bool is_causal, std::optional<double> scale,
                              c10::IntArrayRef window, const OptionalTensor& alibi_slopes) {
  AttentionOptions o;
  set_alpha(o, alpha);
  o.is_causal = is_causal;
  o.scale = scale;
  o.cu_seqlens_q = cu_seqlens_q;
  o.cu_seqlens_k = cu_seqlens_k;
  o.max_seqlen_q = std::move(max_seqlen_q);
  o.max_seqlen_k = std::move(max_seqlen_k);
  o.window = window_pair(window);
  o.alibi_slopes = alibi_slopes;
  return kernel(query, key, value, o);
}

// Registers both overloads of both ops.
template <AttentionKernel kernel>
void implement(torch::Library& m) {
  m.impl("entmax_attn", entmax_attn<kernel, double>);
  m.impl("entmax_attn.per_head", entmax_attn<kernel, const at::Tensor&>);
  m.impl("entmax_attn_varlen", entmax_attn_varlen<kernel, double>);
  m.impl("entmax_attn_varlen.per_head", entmax_attn_varlen<kernel, const at::Tensor&>);
}

// The backward op called by hand, as an exported training graph does.
BackwardResult backward_autograd(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
                                 const at::Tensor& value, const SavedForBackward& saved,
                                 const AttentionOptions& options) {
  const auto g = EntmaxAttnBackward::apply(grad_out, query, key, value, options.head_alpha, saved, options);
  return {g[0], g[1], g[2], g[3]};
}

}  // namespace
}  // namespace adasplash

TORCH_LIBRARY_IMPL(adasplash, Autograd, m) {
  using namespace adasplash;
  implement<attention_autograd>(m);
  m.impl("_entmax_attn_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_entmax_attn_backward", backward_op<backward_autograd>);
}

TORCH_LIBRARY_IMPL(adasplash, CompositeExplicitAutograd, m) { adasplash::implement<adasplash::attention_inference>(m); }
