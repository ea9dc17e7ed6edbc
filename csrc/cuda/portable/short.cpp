#include "cuda/portable/short.h"

#include <algorithm>
#include <atomic>

#include "cuda/sides.h"

namespace adasplash::cuda::portable {
namespace {

// Keys that there is code for (BLOCK_N).
constexpr int64_t kNarrow = 256, kWide = 512;
// Programs that keep a large GPU busy, a few on each multiprocessor one after the other.
constexpr int64_t kManyPrograms = 1024;

std::atomic<int64_t> limit{kWide};  // keys

}  // namespace

ShortKeys ShortKeys::of(const AttentionInputs& inputs) {
  const auto& [op, query, key, value, options, first] = inputs;
  ShortKeys found{
      .longest = StoredSide::of_keys(inputs).max_seqlen,
      .lengths_vary = options.packed() || options.paged() || options.kv_seqlens || options.kv_starts,
  };
  if (options.dropout_p > 0) return found;  // dropped weights have no code there
  if (found.longest > kWide && !found.lengths_vary) return found;
  const int device = place_of(query.device()).device;
  const auto has = [&](Kernel kernel) {
    return has_variant(kernel, query.scalar_type(), std::max(query.sizes().back(), value.sizes().back()), device);
  };
  const int64_t most = has(Kernel::kAttendShort512) ? kWide : has(Kernel::kAttendShort256) ? kNarrow : -1;
  found.most = std::min(most, limit.load());
  return found;
}

void attend_short(const PreparedCall& call, const ShortKeys& short_keys, const at::Tensor& out, float* row_state,
                  int32_t* tiles) {
  call.over_keys([&]<typename KeyMatrix>(const KeyMatrix& key, const KeyMatrix& value) {
    using Kernels = KeyKernels<KeyMatrix>;
    // Of sequences that have at least `fewest` keys, and no more than the code is for.
    const auto launch = [&](const auto& kernel, Kernel code, int64_t fewest) {
      const Variant& variant = call.variant(code);
      const int64_t blocks = call.query_programs(variant) / std::max<int64_t>(call.heads, 1);
      const int64_t sharers =
          std::clamp<int64_t>(kManyPrograms / std::max<int64_t>(call.heads, 1), 1, std::max<int64_t>(blocks, 1));
      kernel(variant, call.place, sharers * call.heads,
             {
                 .query = matrix_of(call.query),
                 .key = key,
                 .value = value,
                 .out = mutable_matrix_of(out),
                 .row_state = row_state,
                 .tiles = tiles,
                 .fewest_keys = static_cast<int32_t>(fewest),
                 .sharers = static_cast<int32_t>(sharers),
                 .call = call.arguments,
             });
    };
    const bool narrow = short_keys.lengths_vary || short_keys.longest <= kNarrow;
    if (narrow) launch(Kernels::attend_short_256, Kernels::kAttendShort256, 0);
    if (short_keys.longest > kNarrow && short_keys.most > kNarrow) {
      launch(Kernels::attend_short_512, Kernels::kAttendShort512, kNarrow + 1);
    }
  });
}

}  // namespace adasplash::cuda::portable

// For tests and measurements: of at most how many keys (256 or 512; -1: none) sequences go this way, where there is
// code for them. Returns what it was.
extern "C" __attribute__((visibility("default"))) int64_t adasplash_short_keys(int64_t most) {
  return adasplash::cuda::portable::limit.exchange(most);
}
