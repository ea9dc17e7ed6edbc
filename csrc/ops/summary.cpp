#include "ops/summary.h"

#include <ATen/ops/empty.h>

#include "ops/dispatcher.h"

namespace adasplash {

SummaryResult allocate_summary(const at::Tensor& query, const at::Tensor& key, const SavedForBackward& saved,
                               const AttentionOptions& options) {
  const auto sizes = saved.row_state.sym_sizes();
  const auto rows = sizes.slice(0, sizes.size() - 1);
  const auto shape = AttentionShape::of(query, key, key, options);
  return {at::empty_symint(rows, query.options().dtype(at::kInt)), at::empty_symint(rows, saved.row_state.options()),
          at::empty_symint({shape.batch, shape.heads, 2}, query.options().dtype(at::kLong))};
}

SummaryResult call_summary(const at::Tensor& query, const at::Tensor& key, const SavedForBackward& saved,
                           const AttentionOptions& options) {
  using Flat = FlatSummary<decltype(kFirstOptions), decltype(kLaterOptions)>;
  static const auto op = find_op<decltype(Flat::call<SummaryKernel{}>)>("adasplash::_entmax_attn_summary");
  return call_with(op, std::tie(query, key, saved.row_state, saved.support, saved.tiles),
                   get_options(options, kFirstOptions), get_options(options, kLaterOptions));
}

}  // namespace adasplash
