#include "cuda/call.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

namespace adasplash::cuda {
namespace {

constexpr int64_t kAlignment = 16;     // bytes, of the rows that `aligned` variants touch
constexpr int64_t kLongest = 1 << 30;  // positions are 32 bits wide, with room for a window bound

// Where a dimension has one entry its stride does not matter; 0 keeps odd ones from looking unaligned.
int64_t stride_of(const at::Tensor& t, int64_t dim) { return t.size(dim) > 1 ? t.stride(dim) : 0; }

bool is_aligned(const at::Tensor& t) {
  const int64_t elements = stride_of(t, 0) | stride_of(t, 1) | stride_of(t, 2) | t.size(3);
  return (reinterpret_cast<uintptr_t>(t.const_data_ptr()) | elements * t.element_size()) % kAlignment == 0;
}

int64_t count_tiles(int64_t rows) { return (rows + kTile - 1) / kTile; }

Shape shape_of(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
               const AttentionOptions& options) {
  TORCH_CHECK(query.scalar_type() != at::kDouble, op,
              ": float64 runs on the CPU only; the GPU takes float32, float16 and bfloat16");
  TORCH_CHECK(options.alpha > 1, op, ": alpha must be from 1.01 to 2, got ", options.alpha);
  const auto narrow = [op](const char* what, int64_t size) {
    TORCH_CHECK(size <= kLongest, op, ": ", what, " must be at most ", kLongest, " on the GPU, got ", size);
    return static_cast<int32_t>(size);
  };
  const auto bound = [](int64_t given) {
    return given < 0 ? kUnlimited : static_cast<int32_t>(std::min<int64_t>(given, kUnlimited));
  };
  const int32_t queries = narrow("the number of queries", query.size(2)),
                keys = narrow("the number of keys", key.size(2));
  const SavedSizes sizes = saved_sizes(query, key, options, 0);
  const int64_t group = query.size(1) / std::max<int64_t>(key.size(1), 1);
  const auto no_lengths = static_cast<int32_t>(Lengths::kNone);
  return {
      .heads = narrow("query's number of heads", query.size(1)),
      .group = narrow("the number of queries' heads for one of key", group),
      .rows_q = queries,
      .rows_k = keys,
      .limit_q = queries,
      .limit_k = keys,
      .tile_rows = static_cast<int32_t>(sizes.tiles[2].expect_int()),
      .tile_words = static_cast<int32_t>(sizes.tiles[3].expect_int()),
      .width = static_cast<int32_t>(query.size(3)),
      .width_v = static_cast<int32_t>(value.size(3)),
      .kind_q = no_lengths,
      .kind_k = no_lengths,
      .window_left = bound(options.window[0]),
      .window_right = options.is_causal ? 0 : bound(options.window[1]),
      .scale = static_cast<float>(options.scale.value_or(1 / std::sqrt(static_cast<double>(query.size(3))))),
      .alpha = static_cast<float>(options.alpha),
  };
}

}  // namespace

Rows rows_of(const at::Tensor& t) { return {t.const_data_ptr(), stride_of(t, 0), stride_of(t, 1), stride_of(t, 2)}; }

MutableRows mutable_rows_of(const at::Tensor& t) {
  return {t.mutable_data_ptr(), stride_of(t, 0), stride_of(t, 1), stride_of(t, 2)};
}

at::Tensor with_dense_rows(const at::Tensor& t) { return t.size(3) <= 1 || t.stride(3) == 1 ? t : t.contiguous(); }

void check_available(const char* op, const AttentionOptions& options) {
  const auto refuse_if = [op](bool given, const char* name) {
    TORCH_CHECK_NOT_IMPLEMENTED(!given, op, ": ", name, " is not available on the GPU yet; leave it at its default");
  };
  refuse_if(options.head_alpha.has_value(), "alpha as a tensor");
  refuse_if(options.q_seqlens.has_value(), "q_seqlens");
  refuse_if(options.kv_seqlens.has_value(), "kv_seqlens");
  refuse_if(options.packed(), "cu_seqlens_q and cu_seqlens_k");
  refuse_if(options.window[0] != -1 || options.window[1] != -1, "window");
  refuse_if(options.alibi_slopes.has_value(), "alibi_slopes");
}

Call::Call(const char* op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
           const AttentionOptions& options)
    : guard_(q.device()),
      query(with_dense_rows(q)),
      key(with_dense_rows(k)),
      value(with_dense_rows(v)),
      place(place_of(q.device())),
      heads(q.size(0) * q.size(1)),
      kv_heads(k.size(0) * k.size(1)),
      state_batch(q.size(1) * q.size(2)),
      shape(shape_of(op, q, k, v, options)) {}

const Variant& Call::variant(Kernel kernel, std::initializer_list<at::Tensor> more) const {
  const bool aligned =
      is_aligned(query) && is_aligned(key) && is_aligned(value) && std::all_of(more.begin(), more.end(), is_aligned);
  return find_variant(kernel, query.scalar_type(), std::max(query.size(3), value.size(3)), shape.alpha.value, aligned,
                      place.device);
}

at::Tensor Call::empty_per_tile(at::ScalarType type) const {
  return at::empty({query.size(0), query.size(1), count_tiles(query.size(2)), count_tiles(key.size(2))},
                   query.options().dtype(type));
}

}  // namespace adasplash::cuda
