// _entmax_attn_summary on the CPU.
#include "ops/summary.h"

#include <torch/library.h>

#include <atomic>
#include <vector>

#include "cpu/call.h"
#include "cpu/kernels.h"
#include "ops/attention_checks.h"

namespace adasplash {
namespace {

using namespace cpu;

SummaryResult summary(const at::Tensor& query, const at::Tensor& key, const SavedForBackward& saved,
                      const AttentionOptions& options) {
  constexpr const char* name = "_entmax_attn_summary";
  check_attention(name, query, key, key, options);
  check_saved(name, query, key, saved, options);
  auto result = allocate_summary(query, key, saved, options);
  at::Tensor &support_size = std::get<0>(result), &largest_weight = std::get<1>(result),
             &tile_counts = std::get<2>(result);
  if (options.q_seqlens) {  // padding is what rows that see nothing are
    support_size.zero_();
    largest_weight.zero_();
  }
  tile_counts.zero_();
  ADASPLASH_DISPATCH(query.scalar_type(), name, [&] {
    using A = Accumulate<scalar_t>;
    const Call<scalar_t> call(query, key, key, options, saved);
    const auto& kernel = kernels<scalar_t, A>();
    const Blocks blocks = call.query_blocks();
    int64_t* const counts = tile_counts.mutable_data_ptr<int64_t>();
    run_tasks(blocks.count(), kernel.summarize_scratch(query.size(-1)), [&](int64_t index, char* scratch) {
      const auto [sequence, h, first] = blocks[index];
      const int64_t first_row = call.first_row(call.sequences[sequence], h);
      SummaryHead<scalar_t, A> head;
      call.describe(sequence, h, head);
      head.support_size = support_size.mutable_data_ptr<int32_t>() + first_row;
      head.largest_weight = largest_weight.mutable_data_ptr<A>() + first_row;
      const TileCounts found = kernel.summarize(head, first, scratch);
      int64_t* const of_head = counts + 2 * (static_cast<int64_t>(sequence) * call.heads + h);
      std::atomic_ref(of_head[0]).fetch_add(found.visible, std::memory_order_relaxed);
      std::atomic_ref(of_head[1]).fetch_add(found.weighing, std::memory_order_relaxed);
    });
  });
  return result;
}

}  // namespace
}  // namespace adasplash

TORCH_LIBRARY_IMPL(adasplash, CPU, m) { m.impl("_entmax_attn_summary", adasplash::summary_op<adasplash::summary>); }
