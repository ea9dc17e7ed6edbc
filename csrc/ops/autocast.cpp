// Autocast: query, key and value go to the region's lower precision, as for torch's own attention, and the activation's
// input to fp32 where torch.softmax's goes there, which is on CUDA. A cache keeps its type, to which goes what meets
// it. Nothing else is cast.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <utility>

#include "adasplash.h"
#include "ops/attention.h"
#include "ops/cache.h"
#include "ops/options.h"

namespace adasplash {
namespace {

template <c10::DeviceType device>
constexpr auto kAutocastKey =
    device == c10::DeviceType::CUDA ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;

template <c10::DeviceType device>
at::Tensor in_lower_precision(const at::Tensor& t) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device);
}

// A function of adasplash.h with its first three tensors cast; the others, `rest`, are handed on.
template <c10::DeviceType device, auto function>
struct Autocast;
template <c10::DeviceType device, typename Result, typename... Rest,
          Result (*function)(const at::Tensor&, const at::Tensor&, const at::Tensor&, Rest...)>
struct Autocast<device, function> {
  static Result call(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, Rest... rest) {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(kAutocastKey<device>);
    const auto cast = in_lower_precision<device>;
    return function(cast(query), cast(key), cast(value), std::forward<Rest>(rest)...);
  }
};

// An index is of the keys as they are: of rounded ones it says nothing, and the call does without.
template <c10::DeviceType device>
at::Tensor attend_padded(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                         AttentionOptions options) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(kAutocastKey<device>);
  const auto cast = in_lower_precision<device>;
  const at::Tensor keys = cast(key);
  if (keys.scalar_type() != key.scalar_type()) options.key_index.reset();
  return call_padded(cast(query), keys, cast(value), options);
}

template <c10::DeviceType device>
at::Tensor attend_paged(const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
                        const at::Tensor& block_table, const at::Tensor& kv_seqlens, const AttentionOptions& options) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(kAutocastKey<device>);
  return call_paged(at::autocast::cached_cast(key_cache.scalar_type(), query, device), key_cache, value_cache,
                    block_table, kv_seqlens, options);
}

template <c10::DeviceType device>
void append(const at::Tensor& key, const at::Tensor& value, const at::Tensor& key_cache, const at::Tensor& value_cache,
            const at::Tensor& slots, const OptionalTensor& key_index) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(kAutocastKey<device>);
  entmax_cache_append(at::autocast::cached_cast(key_cache.scalar_type(), key, device),
                      at::autocast::cached_cast(value_cache.scalar_type(), value, device), key_cache, value_cache,
                      slots, key_index);
}

// The casts name overloads.
template <c10::DeviceType device>
void implement_attention(torch::Library& m) {
  m.impl("entmax_attn", PaddedOp<attend_padded<device>, PaddedSignature<double>>::call);
  m.impl("entmax_attn.per_head", PaddedOp<attend_padded<device>, PaddedSignature<PerHead>>::call);
  m.impl("entmax_attn_varlen", Autocast<device, static_cast<PackedSignature<double>*>(entmax_attn_varlen)>::call);
  m.impl("entmax_attn_varlen.per_head",
         Autocast<device, static_cast<PackedSignature<PerHead>*>(entmax_attn_varlen)>::call);
  using S = AttentionSummary;
  m.impl("entmax_attn_summary", Autocast<device, static_cast<PaddedSignature<double, S>*>(entmax_attn_summary)>::call);
  m.impl("entmax_attn_summary.per_head",
         Autocast<device, static_cast<PaddedSignature<PerHead, S>*>(entmax_attn_summary)>::call);
  m.impl("entmax_attn_varlen_summary",
         Autocast<device, static_cast<PackedSignature<double, S>*>(entmax_attn_varlen_summary)>::call);
  m.impl("entmax_attn_varlen_summary.per_head",
         Autocast<device, static_cast<PackedSignature<PerHead, S>*>(entmax_attn_varlen_summary)>::call);
  implement_paged<attend_paged<device>>(m);
  m.impl("entmax_cache_append", append<device>);
}

template <typename Alpha>
at::Tensor entmax_in_fp32(const at::Tensor& input, Alpha alpha, int64_t dim) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  return adasplash::entmax(at::autocast::cached_cast(at::kFloat, input, c10::DeviceType::CUDA), alpha, dim);
}

}  // namespace
}  // namespace adasplash

TORCH_LIBRARY_IMPL(adasplash, AutocastCPU, m) { adasplash::implement_attention<c10::DeviceType::CPU>(m); }
TORCH_LIBRARY_IMPL(adasplash, AutocastCUDA, m) {
  using namespace adasplash;
  implement_attention<c10::DeviceType::CUDA>(m);
  m.impl("entmax", entmax_in_fp32<double>);
  m.impl("entmax.tensor_alpha", entmax_in_fp32<const at::Tensor&>);
}
