// entmax_attn_paged, entmax_cache_append and entmax_key_index_update on the GPU.
#include "ops/cache.h"

#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>

#include <limits>

#include "cuda/implementation.h"
#include "cuda/key_index.h"
#include "cuda/launchers.h"
#include "cuda/ops.h"
#include "cuda/part.h"
#include "ops/key_index.h"

namespace adasplash::cuda {
namespace {

// The rows of new keys or values, (T, H_kv, D), whose columns are next to each other.
at::Tensor with_dense_rows(const at::Tensor& t) { return t.size(2) <= 1 || t.stride(2) == 1 ? t : t.contiguous(); }

Matrix source_matrix(const at::Tensor& t) { return {t.const_data_ptr(), int64_t{0}, t.stride(1), t.stride(0)}; }

Matrix source_rows(const at::Tensor& cache) {
  return {cache.const_data_ptr(), cache.stride(0), cache.stride(2), cache.stride(1)};
}

MutableMatrix cache_matrix(const at::Tensor& cache) {
  return {cache.mutable_data_ptr(), cache.stride(0), cache.stride(2), cache.stride(1)};
}

// Throws unless a cache is of a type and form that kernels have code for.
void check_on_gpu(const char* op, const char* name, const at::Tensor& cache) {
  TORCH_CHECK(cache.scalar_type() != at::kDouble, op,
              ": float64 runs on the CPU only; the GPU takes float32, float16 and bfloat16");
  TORCH_CHECK(cache.size(3) <= 1 || cache.stride(3) == 1, op, ": the last dimension of ", name,
              " must be dense on the GPU, got strides ", cache.strides());
}

int32_t checked_size(const char* op, const at::Tensor& cache, int64_t dim, const char* what) {
  const int64_t size = cache.size(dim);
  TORCH_CHECK(size <= std::numeric_limits<int32_t>::max(), op, ": ", what, " must be at most 2^31 - 1 on the GPU, got ",
              size);
  return static_cast<int32_t>(size);
}

// Slots as kernels take them: those that are given, or a copy of another type, negated or with numbers apart.
at::Tensor as_places(const at::Tensor& slots) { return slots.to(at::kLong).resolve_neg().contiguous(); }

// Makes the entries of some slots in an index of the cache.
void index_slots(const char* op, const at::Tensor& given, const at::Tensor& places, const at::Tensor& key_index) {
  if (places.numel() == 0 || given.numel() == 0) return;
  const at::Tensor key_cache = given.resolve_neg();
  checked_size(op, key_cache, 0, "the number of pages");
  checked_size(op, key_cache, 1, "the page size");
  const Place place = place_of(key_cache.device());
  const Variant& variant =
      find_variant(Kernel::kIndexKeys, key_cache.scalar_type(), key_cache.size(3), AlphaCode::kAny, place.device);
  index_keys(variant, place, places.size(0) * key_cache.size(2),
             {
                 .key_cache = source_rows(key_cache),
                 .slots = places.const_data_ptr<int64_t>(),
                 .index = mutable_key_index(op, key_index, key_cache),
             });
}

// The slots, with -1 for each token whose slot a later token has too. Nothing of it waits for the GPU.
at::Tensor last_of_each_slot(const at::Tensor& slots) {
  const auto [sorted, order] = slots.sort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
  const int64_t pairs = slots.size(0) - 1;
  const at::Tensor followed = sorted.narrow(0, 0, pairs).eq(sorted.narrow(0, 1, pairs));
  sorted.narrow(0, 0, pairs).masked_fill_(followed, -1);
  return at::empty_like(slots).scatter_(0, order, sorted);
}

}  // namespace

void attend_cache(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const AttentionOptions& options, const at::Tensor& out) {
  if (out.numel() == 0) return;
  const AttentionInputs inputs{"entmax_attn_paged", query, key, value, options};
  const Implementation& implementation = implementation_for(inputs);
  const c10::DeviceGuard guard(query.device());
  // Without a page no row sees a key, whatever lengths say; an entry of a table can't be clamped to one.
  const bool no_keys = key.numel() == 0 || options.block_table->numel() == 0;
  // Of packed queries: for tokens that no sequence has, where lengths contradict the tensors.
  if (no_keys || options.packed()) out.zero_();
  if (no_keys) return;
  for (const Part& part : Part::all(inputs, implementation.forward_scratch(inputs, /*training=*/false))) {
    implementation.forward(
        {inputs.op, part.queries(query), part.keys(key), part.keys(value), part.options(options), part.first()},
        {part.queries(out), at::Tensor(), at::Tensor(), at::Tensor()});
  }
}

void append_to_cache(const at::Tensor& key, const at::Tensor& value, const at::Tensor& key_cache,
                     const at::Tensor& value_cache, const at::Tensor& slots, const OptionalTensor& key_index) {
  constexpr const char* op = "entmax_cache_append";
  check_append(key, value, key_cache, value_cache, slots, key_index);
  check_on_gpu(op, "key_cache", key_cache);
  check_on_gpu(op, "value_cache", value_cache);
  if (key.numel() == 0 && value.numel() == 0) return;
  const c10::DeviceGuard guard(key.device());
  const Place place = place_of(key.device());
  const int64_t tokens = key.size(0), heads = key.size(1);
  const Variant& variant = find_variant(Kernel::kAppend, key.scalar_type(), std::max(key.size(2), value.size(2)),
                                        AlphaCode::kAny, place.device);
  const bool compares = tokens <= variant.block_n;
  const at::Tensor places = as_places(slots), own = compares ? places : last_of_each_slot(places);
  const at::Tensor keys = with_dense_rows(apart_from(key, key_cache, value_cache)),
                   values = with_dense_rows(apart_from(value, key_cache, value_cache));
  append(variant, place, tokens * ((heads + variant.block_m - 1) / variant.block_m),
         {
             .key = source_matrix(keys),
             .value = source_matrix(values),
             .key_cache = cache_matrix(key_cache),
             .value_cache = cache_matrix(value_cache),
             .slots = own.const_data_ptr<int64_t>(),
             .compared = static_cast<int32_t>(compares ? tokens : 0),
             .heads = static_cast<int32_t>(heads),
             .head_dim = static_cast<int32_t>(key.size(2)),
             .value_dim = static_cast<int32_t>(value.size(2)),
             .page_size = checked_size(op, key_cache, 1, "the page size"),
             .blocks = checked_size(op, key_cache, 0, "the number of pages"),
         });
  if (key_index) index_slots(op, key_cache, places, *key_index);
}

void update_key_index(const at::Tensor& key_cache, const at::Tensor& slots, const at::Tensor& key_index) {
  constexpr const char* op = "entmax_key_index_update";
  check_key_index_update(key_cache, slots, key_index);
  check_on_gpu(op, "key_cache", key_cache);
  const c10::DeviceGuard guard(key_cache.device());
  index_slots(op, key_cache, as_places(slots), key_index);
}

}  // namespace adasplash::cuda
