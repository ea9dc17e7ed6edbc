// Every schema of the library. Files saved by users (TorchScript, torch.export, AOTInductor) refer to these, the
// private ones included, so they only ever grow at the end, with defaults.
#include <torch/library.h>

#include <string>

namespace {

// What entmax_attn takes after alpha, and what the packed form takes there.
const std::string kAttnOptions =
    "bool is_causal=False, *, float? scale=None, Tensor? q_seqlens=None, Tensor? kv_seqlens=None, "
    "int[2] window=[-1, -1], Tensor? alibi_slopes=None) -> Tensor";
const std::string kVarlenTensors =
    "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, ";
const std::string kVarlenOptions =
    "bool is_causal=False, *, float? scale=None, int[2] window=[-1, -1], Tensor? alibi_slopes=None) -> Tensor";

// The private pair serves the padded and the packed form, alpha as a number (head_alpha absent) and per head.
const std::string kResolvedOptions =
    "Tensor? head_alpha, float alpha, bool is_causal, float? scale, Tensor? q_seqlens, Tensor? kv_seqlens, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, int[2] window, "
    "Tensor? alibi_slopes";

}  // namespace

TORCH_LIBRARY(adasplash, m) {
  const auto define = [&m](const std::string& schema) { m.def(schema.c_str()); };
  // Overloads with a tensor alpha come first: an eager call tries them in order, and the float overload would take a
  // one-element tensor as a number and lose its gradient.
  define("entmax_attn.per_head(Tensor query, Tensor key, Tensor value, Tensor alpha, " + kAttnOptions);
  define("entmax_attn(Tensor query, Tensor key, Tensor value, float alpha=1.5, " + kAttnOptions);
  define("entmax_attn_varlen.per_head(" + kVarlenTensors + "Tensor alpha, " + kVarlenOptions);
  define("entmax_attn_varlen(" + kVarlenTensors + "float alpha=1.5, " + kVarlenOptions);
  define("entmax.tensor_alpha(Tensor input, Tensor alpha, int dim=-1) -> Tensor");
  define("entmax(Tensor input, float alpha=1.5, int dim=-1) -> Tensor");

  // The kernels take any strides: a compiler need not keep those that it saw while tracing.
  const auto define_private = [&m](const std::string& schema) { m.def(schema.c_str(), {at::Tag::flexible_layout}); };
  define_private("_entmax_attn_forward(Tensor query, Tensor key, Tensor value, " + kResolvedOptions +
                 ", SymInt support_capacity) -> (Tensor out, Tensor row_state, Tensor support, Tensor tiles)");
  define_private(
      "_entmax_attn_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor row_state, "
      "Tensor support, Tensor tiles, " +
      kResolvedOptions + ", Tensor? out=None) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dalpha)");

  // value, a number for each row of input, as a function whose derivative in input is `gradient`.
  define_private("_with_gradient(Tensor value, Tensor input, Tensor gradient) -> Tensor");

  // The activation over the last dimension; row_alpha has the sizes of the others.
  define_private("_entmax_forward(Tensor input, Tensor? row_alpha, float alpha) -> Tensor");
  define_private(
      "_entmax_backward(Tensor grad_out, Tensor output, Tensor? row_alpha, float alpha) "
      "-> (Tensor grad_input, Tensor grad_alpha)");
}
