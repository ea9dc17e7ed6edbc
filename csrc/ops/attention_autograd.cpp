// entmax_attn, entmax_attn_varlen and the two that add a summary, above the private ops: the Autograd kernels, which
// save what the backward needs, and the kernels for where no autograd key is set (inference mode).
#include <ATen/core/grad_mode.h>
#include <ATen/ops/clamp_min.h>
#include <ATen/ops/div.h>
#include <ATen/ops/sub.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <type_traits>
#include <utility>

#include "cuda/ops.h"
#include "ops/attention.h"
#include "ops/attention_checks.h"
#include "ops/softmax.h"
#include "ops/summary.h"

namespace adasplash {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Support entries listed for each row. The CPU's backward and summary walk the lists; the CUDA kernels walk tile bits.
int64_t listed_support(const at::Tensor& query) { return cuda::serves(query.device()) ? 0 : 128; }

// … and how many places there are where a backward follows, for which the CUDA kernels keep marks of keys there.
c10::SymInt support_capacity(const at::Tensor& query, const at::Tensor& key, const AttentionOptions& options) {
  return cuda::serves(query.device()) ? cuda::support_capacity(query, key, options) : listed_support(query);
}

OptionalTensor if_defined(const Variable& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

template <typename F>
void for_each_option(const F& f) {
  std::apply([&](const auto&... option) { (f(option), ...); }, kAllOptions);
}

// What the backward needs of a call.
struct SavedCall {
  at::Tensor query, key, value;
  SavedForBackward saved;
  AttentionOptions options;

  static void save(AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                   const SavedForBackward& saved, const AttentionOptions& options) {
    variable_list tensors = {
        query, key, value, saved.row_state, saved.support, saved.tiles, saved.out.value_or(at::Tensor())};
    for_each_option([&]<typename T>(const Option<T>& option) {
      if constexpr (std::is_same_v<T, OptionalTensor>) {
        tensors.push_back((options.*option.member).value_or(at::Tensor()));
      } else {  // as IValues and not as one object, so that compiled autograd can trace them
        ctx->saved_data[option.name] = options.*option.member;
      }
    });
    ctx->save_for_backward(std::move(tensors));
  }

  // Reads what `save` wrote, in its order.
  static SavedCall load(AutogradContext* ctx) {
    const variable_list tensors = ctx->get_saved_variables();
    auto next = tensors.begin();
    SavedCall call;
    for (at::Tensor* tensor :
         {&call.query, &call.key, &call.value, &call.saved.row_state, &call.saved.support, &call.saved.tiles}) {
      *tensor = *next++;
    }
    call.saved.out = if_defined(*next++);
    for_each_option([&]<typename T>(const Option<T>& option) {
      if constexpr (std::is_same_v<T, OptionalTensor>) {
        call.options.*option.member = if_defined(*next++);
      } else {
        call.options.*option.member = ctx->saved_data.at(option.name).template to<T>();
      }
    });
    return call;
  }
};

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

// What is saved goes to `told` too, where somebody asks for it.
class EntmaxAttn : public torch::autograd::Function<EntmaxAttn> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& query, const Variable& key, const Variable& value,
                          const OptionalTensor& /*head_alpha*/, const AttentionOptions& options,
                          SavedForBackward* told) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, row_state, support, tiles] =
        call_forward(query, key, value, options, support_capacity(query, key, options));
    const auto kept_out = cuda::serves(query.device()) ? OptionalTensor(out) : std::nullopt;
    const SavedForBackward saved{.row_state = row_state, .support = support, .tiles = tiles, .out = kept_out};
    SavedCall::save(ctx, query, key, value, saved, options);
    if (told != nullptr) *told = saved;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto [query, key, value, saved, options] = SavedCall::load(ctx);
    const auto g = EntmaxAttnBackward::apply(grad[0], query, key, value, options.head_alpha, saved, options);
    return {g[0], g[1], g[2], options.head_alpha ? g[3] : Variable(), Variable(), Variable()};
  }
};

void refuse_forward_mode(const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor.defined() || !tensor._fw_grad(/*level=*/0).defined(),
                              "entmax_attn: forward-mode AD is not supported; use reverse mode");
}

// Whether the call is to be recorded. Throws where it could not be.
bool is_training(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                 const AttentionOptions& options) {
  bool training = false;
  for (const auto& t : {query, key, value, options.head_alpha.value_or(at::Tensor())}) {
    refuse_forward_mode(t);
    training |= t.defined() && t.requires_grad();
  }
  refuse_forward_mode(options.alibi_slopes.value_or(at::Tensor()));
  training &= at::GradMode::is_enabled();
  TORCH_CHECK(!at::GradMode::is_enabled() || !options.alibi_slopes || !options.alibi_slopes->requires_grad(),
              public_name(options), ": alibi_slopes have no gradient; detach them");
  return training;
}

// What leaves nothing for a backward. Softmax and dropout are not what an index is for.
at::Tensor forward_for_inference(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                 const AttentionOptions& options) {
  if (options.key_index && !options.softmax() && options.dropout_p == 0) {
    return call_indexed(query, key, value, options);
  }
  return std::get<0>(call_forward(query, key, value, options, kInference));
}

at::Tensor attention_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const AttentionOptions& options) {
  check_attention(public_name(options), query, key, value, options);
  if (torch_serves(query, key, value, options)) return softmax_attn(query, key, value, options);
  if (is_training(query, key, value, options)) {
    return EntmaxAttn::apply(query, key, value, options.head_alpha, options, nullptr);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return forward_for_inference(query, key, value, options);
}

at::Tensor attention_inference(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const AttentionOptions& options) {
  check_attention(public_name(options), query, key, value, options);
  if (torch_serves(query, key, value, options)) return softmax_attn(query, key, value, options);
  return forward_for_inference(query, key, value, options);
}

// What is told of a call beside its output, from what its forward saved.
AttentionSummary with_summary(const at::Tensor& out, const at::Tensor& query, const at::Tensor& key,
                              const SavedForBackward& saved, const AttentionOptions& options) {
  auto [support_size, largest_weight, tile_counts] = call_summary(query, key, saved, options);
  const at::Tensor visible = tile_counts.select(-1, 0), weighing = tile_counts.select(-1, 1);
  const at::Tensor empty_tiles = at::div(at::sub(visible, weighing).to(at::kDouble), at::clamp_min(visible, 1));
  return {out,
          support_size,
          largest_weight,
          saved.row_state.select(-1, 0).clone(),
          saved.row_state.select(-1, 1).clone(),
          empty_tiles};
}

// The forward of ours, for its output and for what it saves.
std::pair<at::Tensor, SavedForBackward> forward_and_saved(const at::Tensor& query, const at::Tensor& key,
                                                          const at::Tensor& value, const AttentionOptions& options) {
  auto [out, row_state, support, tiles] = call_forward(query, key, value, options, listed_support(query));
  return {out, {.row_state = row_state, .support = support, .tiles = tiles, .out = {}}};
}

// The output is that of the op without a summary, torch's where torch serves; dropout is of the output alone.
AttentionSummary summary_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                  const AttentionOptions& options) {
  check_attention(summary_name(options), query, key, value, options);
  at::Tensor out;
  SavedForBackward saved;
  if (torch_serves(query, key, value, options)) {
    out = softmax_attn(query, key, value, options);
  } else if (is_training(query, key, value, options)) {
    out = EntmaxAttn::apply(query, key, value, options.head_alpha, options, &saved);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  if (!saved.row_state.defined()) {
    at::Tensor ours;
    std::tie(ours, saved) = forward_and_saved(query, key, value, options);
    if (!out.defined()) out = ours;
  }
  return with_summary(out, query, key, saved, options);
}

AttentionSummary summary_inference(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                   const AttentionOptions& options) {
  check_attention(summary_name(options), query, key, value, options);
  const auto [ours, saved] = forward_and_saved(query, key, value, options);
  const bool by_torch = torch_serves(query, key, value, options);
  return with_summary(by_torch ? softmax_attn(query, key, value, options) : ours, query, key, saved, options);
}

// What PaddedOp is for the padded form.
template <auto kernel, typename Signature>
struct PackedOp;
template <auto kernel, typename Result, typename Alpha, typename... Options>
struct PackedOp<kernel, Result(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                               const at::Tensor&, c10::SymInt, c10::SymInt, Alpha, Options...)> {
  static Result call(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, c10::SymInt max_seqlen_q,
                     c10::SymInt max_seqlen_k, Alpha alpha, Options... options) {
    AttentionOptions o;
    set_alpha(o, alpha);
    o.cu_seqlens_q = cu_seqlens_q;
    o.cu_seqlens_k = cu_seqlens_k;
    o.max_seqlen_q = std::move(max_seqlen_q);
    o.max_seqlen_k = std::move(max_seqlen_k);
    set_options(o, kPackedOptions, options...);
    return kernel(query, key, value, o);
  }
};

// Registers both overloads of all four ops.
template <auto attention, auto summary>
void implement(torch::Library& m) {
  m.impl("entmax_attn", PaddedOp<attention, PaddedSignature<double>>::call);
  m.impl("entmax_attn.per_head", PaddedOp<attention, PaddedSignature<PerHead>>::call);
  m.impl("entmax_attn_varlen", PackedOp<attention, PackedSignature<double>>::call);
  m.impl("entmax_attn_varlen.per_head", PackedOp<attention, PackedSignature<PerHead>>::call);
  using S = AttentionSummary;
  m.impl("entmax_attn_summary", PaddedOp<summary, PaddedSignature<double, S>>::call);
  m.impl("entmax_attn_summary.per_head", PaddedOp<summary, PaddedSignature<PerHead, S>>::call);
  m.impl("entmax_attn_varlen_summary", PackedOp<summary, PackedSignature<double, S>>::call);
  m.impl("entmax_attn_varlen_summary.per_head", PackedOp<summary, PackedSignature<PerHead, S>>::call);
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
  implement<attention_autograd, summary_autograd>(m);
  m.impl("_entmax_attn_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_entmax_attn_indexed", torch::autograd::autogradNotImplementedFallback());
  m.impl("_entmax_attn_summary", torch::autograd::autogradNotImplementedFallback());
  m.impl("_entmax_attn_backward", backward_op<backward_autograd>);
}

TORCH_LIBRARY_IMPL(adasplash, CompositeExplicitAutograd, m) {
  adasplash::implement<adasplash::attention_inference, adasplash::summary_inference>(m);
}
