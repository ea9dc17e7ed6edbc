// Every schema of the library. Files saved by users (TorchScript, torch.export, AOTInductor) refer to these, the
// private ones included, so they only ever grow at the end, with defaults.
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "ops/options.h"

namespace {

using namespace adasplash;

// Each option of a list as "type name" or "type name=default".
template <typename... T>
std::vector<std::string> declarations(const std::tuple<Option<T>...>& list, bool with_defaults) {
  const auto declaration = [with_defaults]<typename U>(const Option<U>& option) {
    const std::string declared = std::string(OptionType<U>::schema) + " " + option.name;
    return with_defaults ? declared + "=" + option.default_value : declared;
  };
  return std::apply([&](const Option<T>&... option) { return std::vector<std::string>{declaration(option)...}; }, list);
}

std::string joined(const std::vector<std::string>& parts) {
  std::string all;
  for (const std::string& part : parts) all += (all.empty() ? "" : ", ") + part;
  return all;
}

// What a public op takes after alpha.
template <typename List>
std::string public_options(const List& list) {
  auto declared = declarations(list, /*with_defaults=*/true);
  declared.insert(declared.begin() + 1, "*");  // what follows is taken by name only
  return joined(declared);
}

std::string later_options() {
  std::string all;
  for (const std::string& option : declarations(kLaterOptions, /*with_defaults=*/true)) all += ", " + option;
  return all;
}

// Ops are registered once in a process. A second copy of the library would be ended by torch, which throws where
// nothing can catch it; this runs before anything of the copy registers, and says it in one sentence.
__attribute__((constructor(101))) void refuse_to_be_a_second_copy() {
  if (!c10::Dispatcher::singleton().findSchema({"adasplash::entmax_attn", ""})) return;
  Dl_info here{};
  dladdr(reinterpret_cast<void*>(&refuse_to_be_a_second_copy), &here);
  std::fprintf(
      stderr,
      "torch-adasplash: %s cannot be loaded into a process that has another copy of this library, as its ops can "
      "be registered only once\n",
      here.dli_fname);
  std::abort();
}

}  // namespace

TORCH_LIBRARY(adasplash, m) {
  const auto define = [&m](const std::string& schema) { m.def(schema.c_str()); };
  const std::string tensors = "Tensor query, Tensor key, Tensor value, ";
  const std::string lengths = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, ";
  const std::string padded = public_options(kPaddedOptions), packed = public_options(kPackedOptions);
  // Overloads with a tensor alpha come first: an eager call tries them in order, and the float overload would take a
  // one-element tensor as a number and lose its gradient.
  define("entmax_attn.per_head(" + tensors + "Tensor alpha, " + padded + ") -> Tensor");
  define("entmax_attn(" + tensors + "float alpha=1.5, " + padded + ") -> Tensor");
  define("entmax_attn_varlen.per_head(" + tensors + lengths + "Tensor alpha, " + packed + ") -> Tensor");
  define("entmax_attn_varlen(" + tensors + lengths + "float alpha=1.5, " + packed + ") -> Tensor");
  const std::string summary =
      "(Tensor out, Tensor support_size, Tensor largest_weight, Tensor maximum, Tensor gap, Tensor empty_tiles)";
  define("entmax_attn_summary.per_head(" + tensors + "Tensor alpha, " + padded + ") -> " + summary);
  define("entmax_attn_summary(" + tensors + "float alpha=1.5, " + padded + ") -> " + summary);
  define("entmax_attn_varlen_summary.per_head(" + tensors + lengths + "Tensor alpha, " + packed + ") -> " + summary);
  define("entmax_attn_varlen_summary(" + tensors + lengths + "float alpha=1.5, " + packed + ") -> " + summary);
  // On a paged cache of keys and values. Ops that change an argument return nothing: functionalisation would lose it.
  const std::string cache =
                        "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor kv_seqlens, ",
                    paged = public_options(kPagedOptions);
  define("entmax_attn_paged.per_head" + cache + "Tensor alpha, " + paged + ") -> Tensor");
  define("entmax_attn_paged" + cache + "float alpha=1.5, " + paged + ") -> Tensor");
  define(
      "entmax_cache_append(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots, *, "
      "Tensor(c!)? key_index=None) -> ()");
  define("entmax_make_key_index(Tensor key_cache) -> Tensor");
  define("entmax_key_index_update(Tensor key_cache, Tensor slots, Tensor(a!) key_index) -> ()");
  define("entmax.tensor_alpha(Tensor input, Tensor alpha, int dim=-1) -> Tensor");
  define("entmax(Tensor input, float alpha=1.5, int dim=-1) -> Tensor");

  // The kernels take any strides: a compiler need not keep those that it saw while tracing.
  const auto define_private = [&m](const std::string& schema) { m.def(schema.c_str(), {at::Tag::flexible_layout}); };
  const std::string first = joined(declarations(kFirstOptions, /*with_defaults=*/false)), later = later_options();
  define_private("_entmax_attn_forward(" + tensors + first + ", SymInt support_capacity" + later +
                 ") -> (Tensor out, Tensor row_state, Tensor support, Tensor tiles)");
  // The forward for inference, of keys that have an index.
  define_private("_entmax_attn_indexed(" + tensors + first + ", Tensor key_index" + later + ") -> Tensor");
  define_private("_entmax_attn_backward(Tensor grad_out, " + tensors +
                 "Tensor row_state, Tensor support, Tensor tiles, " + first + ", Tensor? out=None" + later +
                 ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dalpha)");
  define_private("_entmax_attn_summary(Tensor query, Tensor key, Tensor row_state, Tensor support, Tensor tiles, " +
                 first + later + ") -> (Tensor support_size, Tensor largest_weight, Tensor tile_counts)");

  // value, a number for each row of input, as a function whose derivative in input is `gradient`.
  define_private("_with_gradient(Tensor value, Tensor input, Tensor gradient) -> Tensor");

  // The activation over the last dimension; row_alpha has the sizes of the others.
  define_private("_entmax_forward(Tensor input, Tensor? row_alpha, float alpha) -> Tensor");
  define_private(
      "_entmax_backward(Tensor grad_out, Tensor output, Tensor? row_alpha, float alpha) "
      "-> (Tensor grad_input, Tensor grad_alpha)");
}
