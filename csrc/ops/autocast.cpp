// Autocast: query, key and value go to the region's lower precision, as for torch's own attention, and the activation's
// input to fp32 where torch.softmax's goes there, which is on CUDA. Nothing else is cast.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <utility>

#include "adasplash.h"

namespace adasplash {
namespace {

template <c10::DeviceType device>
struct Autocast {
  static constexpr auto key =
      device == c10::DeviceType::CUDA ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;

  static at::Tensor cast(const at::Tensor& t) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device);
  }

  // Alpha is the same in both overloads: a number, or a tensor that stays as it is.
  template <typename Alpha>
  static at::Tensor entmax_attn(const at::Tensor& query, const at::Tensor& key_, const at::Tensor& value, Alpha alpha,
                                bool is_causal, std::optional<double> scale, const std::optional<at::Tensor>& q_seqlens,
                                const std::optional<at::Tensor>& kv_seqlens, c10::IntArrayRef window,
                                const std::optional<at::Tensor>& alibi_slopes) {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    return adasplash::entmax_attn(cast(query), cast(key_), cast(value), alpha, is_causal, scale, q_seqlens, kv_seqlens,
                                  window, alibi_slopes);
  }

  template <typename Alpha>
  static at::Tensor entmax_attn_varlen(const at::Tensor& query, const at::Tensor& key_, const at::Tensor& value,
                                       const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                                       c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k, Alpha alpha, bool is_causal,
                                       std::optional<double> scale, c10::IntArrayRef window,
                                       const std::optional<at::Tensor>& alibi_slopes) {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    return adasplash::entmax_attn_varlen(cast(query), cast(key_), cast(value), cu_seqlens_q, cu_seqlens_k,
                                         std::move(max_seqlen_q), std::move(max_seqlen_k), alpha, is_causal, scale,
                                         window, alibi_slopes);
  }

  static void register_in(torch::Library& m) {
    m.impl("entmax_attn", entmax_attn<double>);
    m.impl("entmax_attn.per_head", entmax_attn<const at::Tensor&>);
    m.impl("entmax_attn_varlen", entmax_attn_varlen<double>);
    m.impl("entmax_attn_varlen.per_head", entmax_attn_varlen<const at::Tensor&>);
  }
};

template <typename Alpha>
at::Tensor entmax_in_fp32(const at::Tensor& input, Alpha alpha, int64_t dim) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  return adasplash::entmax(at::autocast::cached_cast(at::kFloat, input, c10::DeviceType::CUDA), alpha, dim);
}

}  // namespace
}  // namespace adasplash

TORCH_LIBRARY_IMPL(adasplash, AutocastCPU, m) { adasplash::Autocast<c10::DeviceType::CPU>::register_in(m); }
TORCH_LIBRARY_IMPL(adasplash, AutocastCUDA, m) {
  using namespace adasplash;
  Autocast<c10::DeviceType::CUDA>::register_in(m);
  m.impl("entmax", entmax_in_fp32<double>);
  m.impl("entmax.tensor_alpha", entmax_in_fp32<const at::Tensor&>);
}
