// _entmax_attn_forward and _entmax_attn_backward on the CPU: tensors to heads, heads to blocks, blocks to threads.
#include "ops/attention.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/attention.h"
#include "cpu/call.h"
#include "cpu/few.h"
#include "cpu/kernels.h"
#include "cpu/tasks.h"
#include "cpu/types.h"
#include "ops/attention_checks.h"
#include "ops/key_index.h"

namespace adasplash {
namespace cpu {

void attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const AttentionOptions& options,
            const SavedForBackward& saved, const at::Tensor& out) {
  ADASPLASH_DISPATCH(query.scalar_type(), "adasplash attention", [&] {
    using A = Accumulate<scalar_t>;
    const Call<scalar_t> call(query, key, value, options, saved);
    const auto& kernel = kernels<scalar_t, A>();
    const at::Tensor out_by_head = by_head(out, options.packed());
    FewQueries<scalar_t>(call, out_by_head).run();
    auto others = call.sequences;
    for (Sequence& s : others) {
      if (has_few_queries(s, call.group)) s.queries = 0;
    }
    const Blocks blocks = call.query_blocks(others);
    run_tasks(blocks.count(), kernel.forward_scratch(query.size(-1), value.size(-1)),
              [&](int64_t index, char* scratch) {
                const auto [sequence, h, first] = blocks[index];
                const Sequence& s = call.sequences[sequence];
                ForwardHead<scalar_t, A> head;
                call.describe(sequence, h, head);
                head.out = rows_of<scalar_t>(out_by_head, s.entry, h, s.first_query);
                kernel.forward(head, first, scratch);
              });
  });
}

}  // namespace cpu

namespace {

using namespace cpu;

ForwardResult forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      const AttentionOptions& options, const c10::SymInt& support_capacity) {
  constexpr const char* name = "_entmax_attn_forward";
  check_attention(name, query, key, value, options);
  if (options.key_index) check_key_index_header("entmax_attn", key.transpose(1, 2), *options.key_index);
  auto result = allocate_forward(query, key, value, options, support_capacity);
  auto& [out, row_state, support, tiles] = result;
  tiles.zero_();
  if (options.q_seqlens) {  // padding is what rows that see nothing are
    out.zero_();
    support.fill_(kEndOfSupport);
    if (support_capacity != kInference) {
      row_state.select(-1, 0).zero_();
      row_state.select(-1, 1).fill_(std::numeric_limits<double>::infinity());
    }
  }
  attend(query, key, value, options, {row_state, support, tiles, /*out=*/{}}, out);
  return result;
}

// dalpha from every row's part (entries, heads, rows), in an order that no thread count changes.
void sum_alpha_terms(const at::Tensor& terms, at::Tensor& dalpha) {
  const int64_t entries = terms.size(0), heads = terms.size(1), rows = terms.size(2);
  const at::Tensor sums = at::zeros({heads}, at::kDouble);
  double* const sum = sums.mutable_data_ptr<double>();
  const double* const term = terms.const_data_ptr<double>();
  cpu::parallel_for(heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      for (int64_t b = 0; b < entries; ++b) {
        const double* const row = term + (b * heads + h) * rows;
        sum[h] = std::accumulate(row, row + rows, sum[h]);
      }
    }
  });
  dalpha.copy_(dalpha.dim() == 0 ? at::scalar_tensor(std::accumulate(sum, sum + heads, 0.0), at::kDouble) : sums);
}

// The two passes of the backward of one call.
template <typename T>
class Backward {
 public:
  Backward(const Call<T>& call, const at::Tensor& grad_out, const AttentionOptions& options, int64_t capacity,
           const BackwardResult& result)
      : call_(call),
        grad_out_(with_dense_rows(by_head(grad_out, options.packed()))),
        dq_(by_head(std::get<0>(result), options.packed())),
        dk_(by_head(std::get<1>(result), options.packed_keys())),
        dv_(by_head(std::get<2>(result), options.packed_keys())),
        row_terms_(at::empty({call.rows() * int64_t(sizeof(RowTerms<A>))}, at::kByte)),
        scratch_bytes_(kernel_.backward_scratch(call.query.size(-1), call.value.size(-1), capacity)) {
    if (options.head_alpha) {
      alpha_terms = at::zeros({call.query.size(0), call.heads, call.query.size(2)}, at::kDouble);
    }
  }

  // dq, and what it leaves of each row: row_terms, alpha_terms. False where a saved list of keys is not what a forward
  // can have written.
  bool query_pass() const {
    const Blocks blocks = call_.query_blocks();
    std::atomic<bool> lists_fit{true};
    run_tasks(blocks.count(), scratch_bytes_, [&](int64_t index, char* scratch) {
      const auto [sequence, h, first] = blocks[index];
      BackwardHead<T, A> head;
      describe(sequence, h, head);
      if (!kernel_.backward_query(head, first, scratch)) lists_fit = false;
    });
    return lists_fit;
  }

  // dk and dv. Needs the row_terms of the first pass.
  void key_pass() const {
    const Blocks blocks = call_.key_blocks();
    run_tasks(blocks.count(), scratch_bytes_, [&](int64_t index, char* scratch) {
      const auto [sequence, kv_head, first] = blocks[index];
      const Sequence& s = call_.sequences[sequence];
      std::vector<BackwardHead<T, A>> heads(call_.group);
      for (int64_t g = 0; g < call_.group; ++g) describe(sequence, kv_head * call_.group + g, heads[g]);
      kernel_.backward_key(heads.data(), call_.group, first, rows_of<T>(dk_, s.entry, kv_head, s.first_key),
                           rows_of<T>(dv_, s.entry, kv_head, s.first_key), scratch);
    });
  }

  at::Tensor alpha_terms;  // (entries, heads, rows); undefined where alpha is a number

 private:
  using A = Accumulate<T>;

  void describe(size_t sequence, int64_t h, BackwardHead<T, A>& head) const {
    const Sequence& s = call_.sequences[sequence];
    call_.describe(sequence, h, head);
    head.grad_out = rows_of<const T>(grad_out_, s.entry, h, s.first_query);
    head.dq = rows_of<T>(dq_, s.entry, h, s.first_query);
    head.row_terms = reinterpret_cast<RowTerms<A>*>(row_terms_.mutable_data_ptr<uint8_t>()) + call_.first_row(s, h);
    if (alpha_terms.defined()) head.alpha_terms = alpha_terms.mutable_data_ptr<double>() + call_.first_row(s, h);
  }

  const Call<T>& call_;
  const Kernels<T, A>& kernel_ = kernels<T, A>();
  const at::Tensor grad_out_, dq_, dk_, dv_, row_terms_;
  const int64_t scratch_bytes_;
};

BackwardResult backward(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
                        const at::Tensor& value, const SavedForBackward& saved, const AttentionOptions& options) {
  constexpr const char* name = "_entmax_attn_backward";
  check_backward(grad_out, query, key, value, saved, options);
  auto result = allocate_backward(query, key, value, options);
  at::Tensor &dq = std::get<0>(result), &dk = std::get<1>(result), &dv = std::get<2>(result);
  if (options.q_seqlens) dq.zero_();
  if (options.kv_seqlens || options.kv_starts || query.size(1) == 0) {  // keys of padding, or that no head asks for
    dk.zero_();
    dv.zero_();
  }
  ADASPLASH_DISPATCH(query.scalar_type(), name, [&] {
    const Call<scalar_t> call(query, key, value, options, saved);
    const Backward<scalar_t> passes(call, grad_out, options, saved.support.size(-1), result);
    TORCH_CHECK(passes.query_pass(), name,
                ": support must hold ascending keys that its row sees, as _entmax_attn_forward "
                "returned it for these arguments");
    if (passes.alpha_terms.defined()) sum_alpha_terms(passes.alpha_terms, std::get<3>(result));
    if (call.heads > 0) passes.key_pass();
  });
  return result;
}

}  // namespace
}  // namespace adasplash

TORCH_LIBRARY_IMPL(adasplash, CPU, m) {
  m.impl("_entmax_attn_forward", adasplash::forward_op<adasplash::forward>);
  m.impl("_entmax_attn_indexed", adasplash::indexed_op<adasplash::forward>);
  m.impl("_entmax_attn_backward", adasplash::backward_op<adasplash::backward>);
}
