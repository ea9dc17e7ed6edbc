// What a call attended to, in a few numbers a row and a head: the private op that finds them in what the forward saved.
#pragma once

#include <tuple>

#include "adasplash.h"
#include "ops/attention.h"

namespace adasplash {

// support_size (B, H, M) int32: how many keys have weight. largest_weight, of row_state's type, likewise. tile_counts
// (B, H, 2) int64: how many 64 x 64 tiles have a key that a query of theirs sees, and how many of these hold weight. In
// the packed form the first two have no B.
using SummaryResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// The op that a user called, for messages.
inline const char* summary_name(const AttentionOptions& options) {
  return options.packed() ? "entmax_attn_varlen_summary" : "entmax_attn_summary";
}

SummaryResult allocate_summary(const at::Tensor& query, const at::Tensor& key, const SavedForBackward& saved,
                               const AttentionOptions& options);

// Through the dispatcher.
SummaryResult call_summary(const at::Tensor& query, const at::Tensor& key, const SavedForBackward& saved,
                           const AttentionOptions& options);

// What a backend implements, and what of it is registered for _entmax_attn_summary.
using SummaryKernel = SummaryResult (*)(const at::Tensor& query, const at::Tensor& key, const SavedForBackward& saved,
                                        const AttentionOptions& options);

template <typename FirstOptions, typename LaterOptions>
struct FlatSummary;
template <typename... First, typename... Later>
struct FlatSummary<const std::tuple<Option<First>...>, const std::tuple<Option<Later>...>> {
  template <SummaryKernel kernel>
  static SummaryResult call(const at::Tensor& query, const at::Tensor& key, const at::Tensor& row_state,
                            const at::Tensor& support, const at::Tensor& tiles, OptionArgument<First>... first,
                            OptionArgument<Later>... later) {
    AttentionOptions options;
    set_options(options, kAllOptions, std::move(first)..., std::move(later)...);
    return kernel(query, key, {.row_state = row_state, .support = support, .tiles = tiles, .out = {}}, options);
  }
};
template <SummaryKernel kernel>
constexpr auto* summary_op = &FlatSummary<decltype(kFirstOptions), decltype(kLaterOptions)>::template call<kernel>;

}  // namespace adasplash
