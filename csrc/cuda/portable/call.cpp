#include "cuda/portable/call.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace adasplash::cuda {
namespace {

constexpr int64_t kAlignment = 16;  // bytes that rows start at multiples of
// Elements from a row to the next: offsets inside a block of rows, which has up to 256, are 32 bits wide.
constexpr int64_t kLongestRow = 1 << 23;
constexpr int64_t kLongest = (1 << 29) - 1;  // positions are 32 bits wide, with room for four numbers a row

// The dimensions of a tensor (B, H, M, D), or packed (M, H, D), by their meaning.
struct Dims {
  explicit Dims(const at::Tensor& t) : batch(t.dim() == 4 ? 0 : -1), head(1), row(t.dim() == 4 ? 2 : 0) {}
  int64_t batch, head, row;
};

// Where a dimension has one entry, or is not there, its stride does not matter; 0 keeps odd ones from looking
// unaligned.
int64_t stride_of(const at::Tensor& t, int64_t dim) { return dim >= 0 && t.size(dim) > 1 ? t.stride(dim) : 0; }

// From a row to the next; a copy is closest, so that what is too far apart even there is an error.
int64_t row_stride(const at::Tensor& t) {
  const int64_t stride = stride_of(t, Dims(t).row);
  TORCH_CHECK(stride <= kLongestRow, "adasplash: rows may be at most ", kLongestRow, " elements apart on the GPU, got ",
              stride);
  return stride;
}

// Elements that a row of this many takes, rounded up to the alignment.
int64_t aligned_width(const at::Tensor& t) {
  const int64_t unit = kAlignment / t.element_size();
  return (t.sizes().back() + unit - 1) / unit * unit;
}

bool is_aligned(const at::Tensor& t) {
  const Dims dims(t);
  const int64_t elements =
      stride_of(t, dims.batch) | stride_of(t, dims.head) | stride_of(t, dims.row) | t.sizes().back();
  return (reinterpret_cast<uintptr_t>(t.const_data_ptr()) | elements * t.element_size()) % kAlignment == 0;
}

// Rows for the tiles of a batch, the same for queries and keys as saved_sizes has them for queries.
int64_t count_tile_rows(int64_t rows, int64_t batch, bool packed) {
  return (((packed ? rows / kTile + batch : count_tiles(rows)) + 1) / 2) * 2;
}

// Lengths as the kernels take them: a copy, which nobody changes while they run. Offsets of packed sequences must not
// fall, or two sequences would have scratch in common; values out of the range of int32 must not wrap into it.
at::Tensor as_lengths(const OptionalTensor& padded, const OptionalTensor& packed) {
  if (!padded && !packed) return {};
  const at::Tensor lengths = packed ? std::get<0>(packed->cummax(0)) : *padded;
  return lengths.clamp(0, std::numeric_limits<int32_t>::max()).to(at::kInt).contiguous();
}

at::DimVector padded_sizes(const at::Tensor& t) {
  at::DimVector sizes(t.sizes());
  sizes.back() = aligned_width(t);
  return sizes;
}

at::Tensor as_floats(const OptionalTensor& given) { return given ? given->to(at::kFloat).contiguous() : at::Tensor(); }

template <typename T>
const T* pointer(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

// `lengths_q` to `slopes`: what the options hold of these, as the kernels take it.
CallArguments arguments_of(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const AttentionOptions& options, const at::Tensor& lengths_q, const at::Tensor& lengths_k,
                           const at::Tensor& alphas, const at::Tensor& slopes) {
  TORCH_CHECK(query.scalar_type() != at::kDouble, op,
              ": float64 runs on the CPU only; the GPU takes float32, float16 and bfloat16");
  const auto narrow = [op](const char* what, const c10::SymInt& given) {
    const int64_t size = given.expect_int();
    TORCH_CHECK(size <= kLongest, op, ": ", what, " must be at most ", kLongest, " on the GPU, got ", size);
    return static_cast<int32_t>(size);
  };
  const auto longest = [&options](const c10::SymInt& given, int32_t rows) {
    return static_cast<int32_t>(longest_sequence(options, given, rows).expect_int());
  };
  const auto bound = [](int64_t given) {
    return given < 0 ? kUnlimited : static_cast<int32_t>(std::min<int64_t>(given, kUnlimited));
  };
  const auto shape = AttentionShape::of(query, key, value, options);
  const bool packed = options.packed();
  const int32_t queries = narrow("the number of queries", shape.queries),
                keys = narrow("the number of keys", shape.keys), heads = narrow("query's number of heads", shape.heads);
  const int64_t batch = shape.batch.expect_int();
  const SavedSizes sizes = saved_sizes(query, key, options, 0);
  const auto kind = [packed](const OptionalTensor& padded) {
    return static_cast<int32_t>(packed ? Lengths::kPacked : padded ? Lengths::kPadded : Lengths::kNone);
  };
  const AlphaFrom alpha = !options.head_alpha             ? AlphaFrom::kNumber
                          : options.head_alpha->dim() > 0 ? AlphaFrom::kPerHead
                                                          : AlphaFrom::kShared;
  const int64_t head_dim = shape.head_dim.expect_int();
  return {
      .lengths_q = pointer<int32_t>(lengths_q),
      .lengths_k = pointer<int32_t>(lengths_k),
      .alphas = pointer<float>(alphas),
      .slopes = pointer<float>(slopes),
      .slopes_batch = slopes.defined() && slopes.dim() == 2 ? slopes.size(1) : int64_t{0},
      .state_batch = packed ? int64_t{0} : int64_t{heads} * queries,
      .heads = heads,
      .group = static_cast<int32_t>(heads / std::max<int64_t>(shape.kv_heads.expect_int(), 1)),
      .rows_q = queries,
      .rows_k = keys,
      .limit_q = longest(options.max_seqlen_q, queries),
      .limit_k = longest(options.max_seqlen_k, keys),
      .tile_rows = static_cast<int32_t>(sizes.tiles.rbegin()[1].expect_int()),
      .key_tile_rows = static_cast<int32_t>(count_tile_rows(keys, batch, packed)),
      .tile_words = static_cast<int32_t>(sizes.tiles.back().expect_int()),
      .width = static_cast<int32_t>(aligned_width(query)),
      .width_v = static_cast<int32_t>(aligned_width(value)),
      .kind_q = kind(options.q_seqlens),
      .kind_k = kind(options.kv_seqlens),
      .kind_alpha = static_cast<int32_t>(alpha),
      .has_slopes = static_cast<int32_t>(options.alibi_slopes.has_value()),
      .window_left = bound(options.window[0]),
      .window_right = options.is_causal ? 0 : bound(options.window[1]),
      .scale = static_cast<float>(options.scale.value_or(1 / std::sqrt(static_cast<double>(head_dim)))),
      .alpha = static_cast<float>(options.alpha),
  };
}

}  // namespace

Rows rows_of(const at::Tensor& t) {
  const Dims dims(t);
  return {t.const_data_ptr(), stride_of(t, dims.batch), stride_of(t, dims.head), row_stride(t)};
}

MutableRows mutable_rows_of(const at::Tensor& t) {
  const Dims dims(t);
  return {t.mutable_data_ptr(), stride_of(t, dims.batch), stride_of(t, dims.head), row_stride(t)};
}

at::Tensor with_aligned_rows(const at::Tensor& t) {
  const bool dense = t.sizes().back() <= 1 || t.strides().back() == 1;
  if (dense && is_aligned(t) && stride_of(t, Dims(t).row) <= kLongestRow) return t;
  const int64_t width = t.sizes().back(), missing = aligned_width(t) - width;
  if (missing == 0) return t.clone(at::MemoryFormat::Contiguous);
  const at::Tensor rows = at::empty(padded_sizes(t), t.options());
  rows.narrow(-1, 0, width).copy_(t);
  rows.narrow(-1, width, missing).zero_();
  return rows;
}

Result::Result(const at::Tensor& result)
    : rows(is_aligned(result) ? result : at::empty(padded_sizes(result), result.options())), result_(result) {}

void Result::finish() const {
  if (!rows.is_same(result_)) result_.copy_(rows.narrow(-1, 0, result_.sizes().back()));
}

Call::Call(const char* op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionOptions& o)
    : guard_(q.device()),
      lengths_q_(as_lengths(o.q_seqlens, o.cu_seqlens_q)),
      lengths_k_(as_lengths(o.kv_seqlens, o.cu_seqlens_k)),
      alphas_(as_floats(o.head_alpha)),
      slopes_(as_floats(o.alibi_slopes)),
      packed(o.packed()),
      query(with_aligned_rows(o.scale.value_or(1.0) < 0 ? q.neg() : q)),
      key(with_aligned_rows(k)),
      value(with_aligned_rows(v)),
      place(place_of(q.device())),
      heads(AttentionShape::of(q, k, v, o).batch.expect_int() * q.size(1)),
      kv_heads(AttentionShape::of(q, k, v, o).batch.expect_int() * k.size(1)),
      arguments(arguments_of(op, q, k, v, o, lengths_q_, lengths_k_, alphas_, slopes_)) {}

const Variant& Call::variant(Kernel kernel, bool marked) const {
  // The code for any alpha is also that for the other options.
  const bool general = alphas_.defined() || slopes_.defined();
  return find_variant(kernel, query.scalar_type(), std::max(arguments.width.value, arguments.width_v.value),
                      general ? Alpha::kAny : alpha_kind(arguments.alpha.value), place.device, marked);
}

int64_t Call::stored_heads() const { return packed ? int64_t{arguments.heads.value} : heads; }

int64_t Call::query_tile_rows() const { return stored_heads() * arguments.tile_rows.value; }

int64_t Call::query_tile_pairs() const { return query_tile_rows() * count_tiles(arguments.limit_k.value); }

int64_t Call::key_tile_rows() const {
  return (packed ? key.size(1) : kv_heads) * int64_t{arguments.key_tile_rows.value};
}

int64_t Call::key_tile_pairs() const { return key_tile_rows() * count_tiles(arguments.limit_q.value); }

int64_t Call::state_rows() const { return stored_heads() * arguments.rows_q.value; }

int64_t Call::tile_words() const { return query_tile_rows() * arguments.tile_words.value; }

at::Tensor Call::empty_ints(int64_t count) const { return at::empty({count}, query.options().dtype(at::kInt)); }

}  // namespace adasplash::cuda
