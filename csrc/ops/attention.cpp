#include "ops/attention.h"

#include <ATen/ops/empty.h>

#include "ops/dispatcher.h"

namespace adasplash {
namespace {

c10::SymInt ceil_div(const c10::SymInt& n, int64_t d) { return (n + (d - 1)) / d; }

}  // namespace

// Tile rows and words come in pairs: torch.compile would guard on a size that can be 1, and compile again for sequences
// of up to one tile.
c10::SymInt tile_row_count(const c10::SymInt& rows, const c10::SymInt& batch, bool packed) {
  return 2 * (packed ? ceil_div(packed_tile_row(batch, rows), 2) : ceil_div(rows, 2 * kTile));
}

c10::SymDimVector out_sizes(const at::Tensor& query, const at::Tensor& value) {
  c10::SymDimVector sizes(query.sym_sizes().begin(), query.sym_sizes().end());
  sizes.back() = value.sym_size(-1);
  return sizes;
}

SavedSizes saved_sizes(const at::Tensor& query, const at::Tensor& key, const AttentionOptions& options,
                       const c10::SymInt& support_capacity) {
  const auto words = [](const c10::SymInt& keys) { return 2 * ceil_div(keys, 2 * 32 * kTile); };
  const auto shape = AttentionShape::of(query, key, key, options);
  const auto &b = shape.batch, &h = shape.heads, &m = shape.queries;
  const c10::SymInt tile_rows = tile_row_count(m, b, options.packed());
  if (options.packed()) {
    const c10::SymInt longest = longest_sequence(options, options.max_seqlen_k, shape.keys);
    return {{h, m, 2}, {h, m, support_capacity}, {h, tile_rows, words(longest)}};
  }
  return {{b, h, m, 2}, {b, h, m, support_capacity}, {b, h, tile_rows, words(shape.keys)}};
}

at::ScalarType row_state_type(const at::Tensor& query) {
  return query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

ForwardResult allocate_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const AttentionOptions& options, const c10::SymInt& support_capacity) {
  TORCH_CHECK(support_capacity >= kInference, "_entmax_attn_forward: support_capacity must be ", kInference,
              " (inference) or more, got ", support_capacity);
  at::Tensor out = at::empty_symint(out_sizes(query, value), query.options());
  const auto state = query.options().dtype(row_state_type(query));
  const auto integers = query.options().dtype(at::kInt);
  if (support_capacity < 0) {
    return {out, at::empty({0}, state), at::empty({0}, integers), at::empty({0}, integers)};
  }
  const SavedSizes sizes = saved_sizes(query, key, options, support_capacity);
  return {out, at::empty_symint(sizes.row_state, state), at::empty_symint(sizes.support, integers),
          at::empty_symint(sizes.tiles, integers)};
}

BackwardResult allocate_backward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                 const AttentionOptions& options) {
  const auto contiguous = [](const at::Tensor& t) { return at::empty_symint(t.sym_sizes(), t.options()); };
  return {contiguous(query), contiguous(key), contiguous(value),
          options.head_alpha ? contiguous(*options.head_alpha)
                             : at::empty({0}, query.options().dtype(row_state_type(query)))};
}

ForwardResult call_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const AttentionOptions& options, const c10::SymInt& support_capacity) {
  using Signature = decltype(FlatKernels::forward<ForwardKernel{}>);
  static const auto op = find_op<Signature>("adasplash::_entmax_attn_forward");
  return call_with(op, std::tie(query, key, value), get_options(options, kFirstOptions), std::tie(support_capacity),
                   get_options(options, kLaterOptions));
}

at::Tensor call_padded(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                       const AttentionOptions& options) {
  static const auto by_number = find_op<PaddedSignature<double>>("adasplash::entmax_attn");
  static const auto by_head = find_op<PaddedSignature<PerHead>>("adasplash::entmax_attn", "per_head");
  const auto tensors = std::tie(query, key, value);
  const auto rest = get_options(options, kPaddedOptions);
  return options.head_alpha ? call_with(by_head, tensors, std::tie(*options.head_alpha), rest)
                            : call_with(by_number, tensors, std::tie(options.alpha), rest);
}

at::Tensor call_indexed(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const AttentionOptions& options) {
  using Signature = decltype(FlatKernels::indexed<ForwardKernel{}>);
  static const auto op = find_op<Signature>("adasplash::_entmax_attn_indexed");
  return call_with(op, std::tie(query, key, value), get_options(options, kFirstOptions), std::tie(*options.key_index),
                   get_options(options, kLaterOptions));
}

BackwardResult call_backward(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
                             const at::Tensor& value, const SavedForBackward& saved, const AttentionOptions& options) {
  using Signature = decltype(FlatKernels::backward<BackwardKernel{}>);
  static const auto op = find_op<Signature>("adasplash::_entmax_attn_backward");
  return call_with(op, std::tie(grad_out, query, key, value, saved.row_state, saved.support, saved.tiles),
                   get_options(options, kFirstOptions), std::tie(saved.out), get_options(options, kLaterOptions));
}

}  // namespace adasplash
