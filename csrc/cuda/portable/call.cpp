#include "cuda/portable/call.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "cuda/few.h"
#include "cuda/key_index.h"
#include "cuda/sides.h"

namespace adasplash::cuda::portable {
namespace {

constexpr int64_t kAlignment = 16;  // bytes that rows start at multiples of
// Elements from a row to the next: offsets inside a block of rows, which has up to 256, are 32 bits wide.
constexpr int64_t kMostApart = 1 << 23;
constexpr int64_t kMostRows = (1 << 29) - 1;  // positions are 32 bits wide, with room for four numbers a row

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
  TORCH_CHECK(stride <= kMostApart, "adasplash: rows may be at most ", kMostApart, " elements apart on the GPU, got ",
              stride);
  return stride;
}

// Elements that a row of this many takes, rounded up to the alignment.
int64_t aligned_size(const at::Tensor& t) {
  const int64_t unit = kAlignment / t.element_size();
  return (t.sizes().back() + unit - 1) / unit * unit;
}

bool has_dense_rows(const at::Tensor& t) { return t.sizes().back() <= 1 || t.strides().back() == 1; }

bool is_aligned(const at::Tensor& t) {
  const Dims dims(t);
  const int64_t elements =
      stride_of(t, dims.batch) | stride_of(t, dims.head) | stride_of(t, dims.row) | t.sizes().back();
  return (reinterpret_cast<uintptr_t>(t.const_data_ptr()) | elements * t.element_size()) % kAlignment == 0;
}

// Rows that a user's tensor names, as the kernels take them: a copy, which nobody changes while they run. Values out of
// the range of int32 must not wrap into it.
at::Tensor as_rows(const at::Tensor& given) {
  return given.clamp(0, std::numeric_limits<int32_t>::max()).to(at::kInt).contiguous();
}

// Lengths, or the packed form's offsets, which must not fall, or two sequences would have scratch in common.
at::Tensor as_lengths(const OptionalTensor& padded, const OptionalTensor& packed) {
  if (packed) return as_rows(std::get<0>(packed->cummax(0)));
  if (!padded) return {};
  // As they are, if they can be: two launches less in every step of decoding. The kernels clamp them where they read.
  return padded->scalar_type() == at::kInt && padded->is_contiguous() ? *padded : as_rows(*padded);
}

// The same for keys, which may have starts: then (B, 2), where each sequence starts and ends.
at::Tensor as_key_lengths(const at::Tensor& key, const AttentionOptions& options) {
  if (!options.kv_starts) return as_lengths(options.kv_seqlens, options.cu_seqlens_k);
  const at::Tensor starts = as_rows(*options.kv_starts);
  const at::Tensor ends = options.kv_seqlens ? as_rows(*options.kv_seqlens) : at::full_like(starts, key.size(2));
  return at::stack({starts, ends}, 1);
}

// Places of first queries, which may be negative, likewise.
at::Tensor as_positions(const OptionalTensor& given) {
  return given ? given->clamp(-kFarthestPosition, kFarthestPosition).to(at::kInt).contiguous() : at::Tensor();
}

// A table of int32 with dense rows is read as it is: its entries are clamped where they are read.
at::Tensor as_block_table(const OptionalTensor& given) {
  if (!given) return {};
  return given->scalar_type() == at::kInt && has_dense_rows(*given) ? *given : as_rows(*given);
}

at::DimVector padded_sizes(const at::Tensor& t) {
  at::DimVector sizes(t.sizes());
  sizes.back() = aligned_size(t);
  return sizes;
}

// What dropout counts from: 32 bits of each number.
at::Tensor as_origins(const OptionalTensor& given) { return given ? given->to(at::kInt).contiguous() : at::Tensor(); }

at::Tensor as_floats(const OptionalTensor& given) { return given ? given->to(at::kFloat).contiguous() : at::Tensor(); }

template <typename T>
const T* pointer(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

int64_t batch_of(const AttentionInputs& inputs) {
  return AttentionShape::of(inputs.query, inputs.key, inputs.value, inputs.options).batch.expect_int();
}

// A number of rows or heads as the kernels take it.
int32_t checked_count(const char* op, const char* what, const c10::SymInt& given) {
  const int64_t count = given.expect_int();
  TORCH_CHECK(count <= kMostRows, op, ": ", what, " must be at most ", kMostRows, " on the GPU, got ", count);
  return static_cast<int32_t>(count);
}

// How many elements a cache's pages, or their rows, are apart: the kernels multiply numbers of 32 bits.
int32_t checked_stride(const char* op, const char* what, const at::Tensor& cache, int64_t dim) {
  const int64_t stride = stride_of(cache, dim);
  TORCH_CHECK(stride <= std::numeric_limits<int32_t>::max(), op, ": ", what,
              " may be at most 2^31 - 1 elements apart on the GPU, got ", stride);
  return static_cast<int32_t>(stride);
}

// One side's sequences; `lengths` are one of OptionTensors. These functions make the parts of a Call of the options.
Sequences sequences_argument(const char* op, const char* what, const at::Tensor& lengths, const StoredSide& side) {
  const LengthsKind kind = side.packed          ? LengthsKind::kPacked
                           : !lengths.defined() ? LengthsKind::kNone
                           : lengths.dim() == 2 ? LengthsKind::kBounds
                                                : LengthsKind::kPadded;
  return {
      .lengths = pointer<int32_t>(lengths),
      .lengths_kind = static_cast<int32_t>(kind),
      .rows = checked_count(op, what, side.rows),
      .max_seqlen = static_cast<int32_t>(side.max_seqlen),
      .tile_rows = static_cast<int32_t>(side.tile_rows),
  };
}

Alpha alpha_argument(const at::Tensor& alphas, const AttentionOptions& options) {
  const AlphaSource source = !alphas.defined()  ? AlphaSource::kNumber
                             : alphas.dim() > 0 ? AlphaSource::kPerHead
                                                : AlphaSource::kShared;
  return {
      .per_head = pointer<float>(alphas),
      .source = static_cast<int32_t>(source),
      .number = static_cast<float>(options.alpha),
  };
}

int32_t window_bound(int64_t given) {
  return given < 0 ? kUnlimited : static_cast<int32_t>(std::min<int64_t>(given, kUnlimited));
}

Scores scores_argument(const OptionTensors& tensors, int64_t head_dim, const AttentionOptions& options) {
  const at::Tensor &slopes = tensors.slopes, &positions = tensors.q_positions;
  return {
      .slopes = pointer<float>(slopes),
      .slopes_batch_stride = slopes.defined() && slopes.dim() == 2 ? slopes.size(1) : int64_t{0},
      .has_slopes = static_cast<int32_t>(slopes.defined()),
      .scale = static_cast<float>(options.scale.value_or(1 / std::sqrt(static_cast<double>(head_dim)))),
      .window_left = window_bound(options.window[0]),
      .window_right = window_bound(options.window_right()),
      .q_positions = pointer<int32_t>(positions),
      .has_positions = static_cast<int32_t>(positions.defined()),
  };
}

// Without dropout the threshold is 0, and nothing reads the seed.
Dropout dropout_argument(const FirstHead& first, const at::Tensor& origins, const AttentionOptions& options) {
  const uint32_t threshold = options.dropout_threshold();
  return {
      .seed = threshold ? options.dropout_seed->const_data_ptr<int64_t>() : nullptr,
      .threshold = static_cast<int32_t>(threshold),
      .scale = static_cast<float>(1 / (1 - options.dropout_p)),
      .first_batch = static_cast<int32_t>(first.entry),
      .first_head = static_cast<int32_t>(first.head),
      .origins = pointer<int32_t>(origins),
      .has_origins = static_cast<int32_t>(origins.defined()),
  };
}

Call call_argument(const AttentionInputs& inputs, const OptionTensors& tensors) {
  const auto& [op, query, key, value, options, first] = inputs;
  const Sequences queries =
      sequences_argument(op, "the number of queries", tensors.query_lengths, StoredSide::of_queries(inputs));
  const int32_t heads = checked_count(op, "query's number of heads", query.size(1));
  // Of a call on a paged cache nobody wants the bits of tiles.
  const int64_t tile_words = options.paged() ? 0 : saved_sizes(query, key, options, 0).tiles.back().expect_int();
  return {
      .queries = queries,
      .keys = sequences_argument(op, "the number of keys", tensors.key_lengths, StoredSide::of_keys(inputs)),
      .alpha = alpha_argument(tensors.alphas, options),
      .scores = scores_argument(tensors, query.sizes().back(), options),
      .dropout = dropout_argument(first, tensors.dropout_origins, options),
      .state_batch_stride = options.packed() ? int64_t{0} : int64_t{heads} * queries.rows.value,
      .heads = heads,
      .group = static_cast<int32_t>(heads / key.size(1)),
      .tile_words = static_cast<int32_t>(tile_words),
      .head_dim = static_cast<int32_t>(aligned_size(query)),
      .value_dim = static_cast<int32_t>(aligned_size(value)),
      .few_queries = static_cast<int32_t>(FewQueries::of(inputs).most),
  };
}

// A cache as it is. It may be most of the memory, and is never copied.
const at::Tensor& with_aligned_pages(const char* op, const char* name, const at::Tensor& cache) {
  TORCH_CHECK(has_dense_rows(cache) && is_aligned(cache), op, ": on the GPU rows of ", name,
              " must be dense and start at multiples of ", kAlignment, " bytes: its address, the size of its last ",
              "dimension and its strides in the others must be multiples of ", kAlignment / cache.element_size(),
              " elements, got sizes ", cache.transpose(1, 2).sizes(), " and strides ", cache.transpose(1, 2).strides(),
              "; a cache is not copied");
  return cache;
}

}  // namespace

Matrix matrix_of(const at::Tensor& t) {
  const Dims dims(t);
  return {t.const_data_ptr(), stride_of(t, dims.batch), stride_of(t, dims.head), row_stride(t)};
}

MutableMatrix mutable_matrix_of(const at::Tensor& t) {
  const Dims dims(t);
  return {t.mutable_data_ptr(), stride_of(t, dims.batch), stride_of(t, dims.head), row_stride(t)};
}

at::Tensor with_aligned_rows(const at::Tensor& t) {
  if (has_dense_rows(t) && is_aligned(t) && stride_of(t, Dims(t).row) <= kMostApart) return t;
  const int64_t width = t.sizes().back(), missing = aligned_size(t) - width;
  if (missing == 0) return t.clone(at::MemoryFormat::Contiguous);
  const at::Tensor rows = at::empty(padded_sizes(t), t.options());
  rows.narrow(-1, 0, width).copy_(t);
  rows.narrow(-1, width, missing).zero_();
  return rows;
}

// Zeros where the kernels may leave rows out: tokens that no sequence has, and keys before the first of theirs.
AlignedResult::AlignedResult(const at::Tensor& result)
    : rows(is_aligned(result) ? result : at::zeros(padded_sizes(result), result.options())), result_(result) {}

void AlignedResult::finish() const {
  if (!rows.is_same(result_)) result_.copy_(rows.narrow(-1, 0, result_.sizes().back()));
}

PreparedCall::PreparedCall(const AttentionInputs& inputs)
    : inputs_(inputs),
      tensors_{.query_lengths = as_lengths(inputs.options.q_seqlens, inputs.options.cu_seqlens_q),
               .key_lengths = as_key_lengths(inputs.key, inputs.options),
               .block_table = as_block_table(inputs.options.block_table),
               .alphas = as_floats(inputs.options.head_alpha),
               .slopes = as_floats(inputs.options.alibi_slopes),
               .q_positions = as_positions(inputs.options.q_positions),
               .dropout_origins = as_origins(inputs.options.dropout_origin)},
      packed(inputs.options.packed()),
      query(with_aligned_rows(inputs.options.scale.value_or(1.0) < 0 ? inputs.query.neg() : inputs.query)),
      key(inputs.options.paged() ? with_aligned_pages(inputs.op, "key_cache", inputs.key)
                                 : with_aligned_rows(inputs.key)),
      value(inputs.options.paged() ? with_aligned_pages(inputs.op, "value_cache", inputs.value)
                                   : with_aligned_rows(inputs.value)),
      place(place_of(inputs.query.device())),
      heads(batch_of(inputs) * inputs.query.size(1)),
      kv_heads(batch_of(inputs) * inputs.key.size(1)),
      stored_kv_heads(inputs.options.packed_keys() ? inputs.key.size(1) : kv_heads),
      arguments(call_argument(inputs, tensors_)) {}

const Variant& PreparedCall::variant(Kernel kernel, bool gather) const {
  // The code for any alpha is also the only code for some options: every option that the code for 1.5 and 2 does not
  // have (triton_src/lib/scores.py) must be named here, or a call with it and such an alpha would run as if without it.
  const bool general = tensors_.alphas.defined() || tensors_.slopes.defined() || arguments.dropout.threshold.value != 0;
  return find_variant(kernel, query.scalar_type(), std::max(arguments.head_dim.value, arguments.value_dim.value),
                      general ? AlphaCode::kAny : alpha_code(arguments.alpha.number.value), place.device, gather);
}

const Variant& PreparedCall::variant_of_turns(Kernel kernel) const {
  return find_variant(kernel, query.scalar_type(), query.sizes().back(), AlphaCode::kAny, place.device);
}

Extents PreparedCall::extents() const {
  // The sequences of a packed batch share row_state.
  const int64_t stored_heads = packed ? query.size(1) : heads;
  const auto side = [](const Sequences& sequences, int64_t stored) {
    return Extents::Side{.tile_rows = stored * sequences.tile_rows.value, .max_seqlen = sequences.max_seqlen.value};
  };
  Extents extents = Extents::of_tiles(side(arguments.queries, stored_heads), side(arguments.keys, stored_kv_heads));
  extents.state_rows = stored_heads * arguments.queries.rows.value;
  extents.kv_heads = kv_heads;
  add_few(extents, inputs_, kv_heads, stored_kv_heads);
  return extents;
}

std::optional<KeyIndex> PreparedCall::key_index() const {
  return uses_index(inputs_) ? std::optional(key_index_of(inputs_)) : std::nullopt;
}

PagedMatrix PreparedCall::paged_matrix_of(const at::Tensor& cache) const {
  constexpr int kPositionBits = 30;  // of a row, see kMostRows; so the inverse below fits 31
  const Dims dims(cache);
  const int64_t page_size = cache.size(dims.row);
  const int shift = std::bit_width(static_cast<uint64_t>(page_size - 1));
  const int64_t inverse = ((int64_t{1} << (kPositionBits + shift)) + page_size - 1) / page_size;
  return {
      .data = cache.const_data_ptr(),
      .block_stride = checked_stride(inputs_.op, "pages", cache, dims.batch),
      .head_stride = stride_of(cache, dims.head),
      .row_stride = int64_t{checked_stride(inputs_.op, "rows of a page", cache, dims.row)},
      .table = tensors_.block_table.const_data_ptr<int32_t>(),
      .table_stride = stride_of(tensors_.block_table, 0),
      .blocks = checked_count(inputs_.op, "the number of pages", cache.size(dims.batch)),
      .page_size = static_cast<int32_t>(page_size),
      .page_inverse = static_cast<int32_t>(inverse),
      .page_shift = static_cast<int32_t>(shift),
  };
}

EvenPagedMatrix PreparedCall::even_paged_matrix_of(const at::Tensor& cache) const {
  const Dims dims(cache);
  return {
      .data = cache.const_data_ptr(),
      .block_stride = checked_stride(inputs_.op, "pages", cache, dims.batch),
      .head_stride = stride_of(cache, dims.head),
      .row_stride = int64_t{checked_stride(inputs_.op, "rows of a page", cache, dims.row)},
      .table = tensors_.block_table.const_data_ptr<int32_t>(),
      .table_stride = stride_of(tensors_.block_table, 0),
      .blocks = checked_count(inputs_.op, "the number of pages", cache.size(dims.batch)),
      .page_bits = static_cast<int32_t>(std::countr_zero(static_cast<uint64_t>(cache.size(dims.row)))),
  };
}

}  // namespace adasplash::cuda::portable
