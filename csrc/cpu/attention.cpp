// _entmax_attn_forward and _entmax_attn_backward on the CPU: tensors to heads, heads to blocks, blocks to threads.
#include "attention.h"

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "blas.h"
#include "checks.h"
#include "kernels.h"

namespace adasplash {
namespace {

using namespace cpu;

template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Keys are counted in int32. Checked here and not with the other checks, where it would bound what a model is exported
// for.
void check_key_count(const char* op, const at::Tensor& key) {
  TORCH_CHECK(key.size(2) <= INT32_MAX, op, ": key must hold at most ", INT32_MAX, " keys, got ", key.size(2));
}

// The kernels read rows through BLAS: dense, not overlapping, with a stride that fits an int.
at::Tensor with_dense_rows(const at::Tensor& t) {
  const bool dense = (t.size(3) <= 1 || t.stride(3) == 1) &&
                     (t.size(2) <= 1 || (t.stride(2) >= t.size(3) && t.stride(2) <= INT32_MAX));
  return dense ? t : t.contiguous();
}

#ifndef INTRA_OP_PARALLEL
#error "at::parallel_for would run on one thread: compile with OpenMP"
#endif

// Runs task(index, scratch) for every index, on all threads. Threads take the next task when they are done with one, as
// causal blocks differ in length; which thread runs a task changes nothing in its result.
template <typename F>
void run_tasks(int64_t count, int64_t scratch_bytes, const F& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const SingleThreadedBlas alone;
    const at::DataPtr memory = at::getCPUAllocator()->allocate(scratch_bytes);
    char* const scratch = static_cast<char*>(memory.get());
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(index, scratch);
    }
  });
}

int64_t blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }

template <typename T>
Rows<const T> rows_of(const at::Tensor& t, int64_t b, int64_t h) {
  // A single row's stride may be anything; BLAS still wants one that a row fits in.
  return {t.const_data_ptr<T>() + b * t.stride(0) + h * t.stride(1),
          t.size(2) <= 1 ? std::max<int64_t>(t.size(3), 1) : t.stride(2)};
}

// One call's tensors and options, from which the description of each head is filled in.
template <typename T>
struct Call {
  using A = Accumulate<T>;

  const at::Tensor query, key, value;
  const AttentionOptions& options;
  const at::Tensor &row_state, &support, &tiles;

  int64_t batch() const { return query.size(0); }
  int64_t heads() const { return query.size(1); }
  int64_t kv_heads() const { return key.size(1); }
  int64_t group_size() const { return heads() / std::max<int64_t>(kv_heads(), 1); }

  void describe(int64_t b, int64_t h, Head<T, A>& head) const {
    const int64_t kv_head = h / group_size();
    head.query = rows_of<T>(query, b, h);
    head.key = rows_of<T>(key, b, kv_head);
    head.value = rows_of<T>(value, b, kv_head);
    head.queries = query.size(2);
    head.keys = key.size(2);
    head.head_dim = query.size(3);
    head.value_dim = value.size(3);
    if (options.is_causal) head.right = 0;
    head.alpha = options.alpha;
    head.scale = options.scale.value_or(1 / std::sqrt(static_cast<double>(head.head_dim)));
    if (row_state.dim() == 4) {
      const int64_t rows = (b * heads() + h) * head.queries;
      head.capacity = support.size(3);
      head.tile_words = tiles.size(3);
      head.row_state = row_state.data_ptr<A>() + rows * 2;
      head.support = support.data_ptr<int32_t>() + rows * head.capacity;
      head.tiles = tiles.data_ptr<int32_t>() + (b * heads() + h) * tiles.size(2) * head.tile_words;
    }
  }
};

#define ADASPLASH_DISPATCH(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, TYPE, NAME, __VA_ARGS__)

ForwardResult forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      const AttentionOptions& options, const c10::SymInt& support_capacity) {
  constexpr const char* name = "_entmax_attn_forward";
  check_attention(name, query, key, value, options);
  check_key_count(name, key);
  auto result = allocate_forward(query, key, value, options, support_capacity);
  auto& [out, row_state, support, tiles] = result;
  tiles.zero_();
  ADASPLASH_DISPATCH(query.scalar_type(), name, [&] {
    using A = Accumulate<scalar_t>;
    const Call<scalar_t> call{
        with_dense_rows(query), with_dense_rows(key), with_dense_rows(value), options, row_state, support, tiles};
    const auto& kernel = kernels<scalar_t, A>();
    const int64_t queries = query.size(2), per_head = blocks(queries, kQueryBlock);
    run_tasks(call.batch() * call.heads() * per_head, kernel.forward_scratch(query.size(3), value.size(3)),
              [&](int64_t index, char* scratch) {
                const int64_t head_index = index / per_head, b = head_index / call.heads(),
                              h = head_index % call.heads();
                ForwardHead<scalar_t, A> head;
                call.describe(b, h, head);
                head.out = out.template data_ptr<scalar_t>() + head_index * queries * head.value_dim;
                // Causal heads have their longest blocks last; those go first.
                kernel.forward(head, (per_head - 1 - index % per_head) * kQueryBlock, scratch);
              });
  });
  return result;
}

BackwardResult backward(const at::Tensor& grad_out_, const at::Tensor& query, const at::Tensor& key,
                        const at::Tensor& value, const SavedForBackward& saved, const AttentionOptions& options) {
  constexpr const char* name = "_entmax_attn_backward";
  check_backward(grad_out_, query, key, value, saved, options);
  check_key_count(name, key);
  auto result = allocate_backward(query, key, value, options);
  auto& [dq, dk, dv, dalpha] = result;
  const at::Tensor row_state = saved.row_state.contiguous(), support = saved.support.contiguous(),
                   tiles = saved.tiles.contiguous();
  ADASPLASH_DISPATCH(query.scalar_type(), name, [&] {
    using A = Accumulate<scalar_t>;
    const Call<scalar_t> call{
        with_dense_rows(query), with_dense_rows(key), with_dense_rows(value), options, row_state, support, tiles};
    const at::Tensor grad_out = with_dense_rows(grad_out_);
    const auto& kernel = kernels<scalar_t, A>();
    const int64_t queries = query.size(2), keys = key.size(2), heads = call.heads(), kv_heads = call.kv_heads();
    const int64_t scratch_bytes = kernel.backward_scratch(query.size(3), value.size(3), support.size(3));

    const at::Tensor terms = at::empty({call.batch() * heads * queries * int64_t(sizeof(RowTerms<A>))}, at::kByte);
    const auto describe = [&](int64_t index, BackwardHead<scalar_t, A>& head) {
      const int64_t b = index / heads, h = index % heads;
      call.describe(b, h, head);
      head.grad_out = rows_of<scalar_t>(grad_out, b, h);
      head.row_terms = reinterpret_cast<RowTerms<A>*>(terms.data_ptr<uint8_t>()) + index * queries;
      head.dq = dq.template data_ptr<scalar_t>() + index * queries * query.size(3);
    };

    const int64_t query_blocks = blocks(queries, kQueryBlock);
    std::atomic<bool> lists_fit{true};
    run_tasks(call.batch() * heads * query_blocks, scratch_bytes, [&](int64_t index, char* scratch) {
      const int64_t first = (query_blocks - 1 - index % query_blocks) * kQueryBlock;
      BackwardHead<scalar_t, A> head;
      describe(index / query_blocks, head);
      if (!kernel.backward_query(head, first, scratch)) lists_fit = false;
    });
    TORCH_CHECK(lists_fit, name,
                ": support must hold ascending keys that its row sees, as _entmax_attn_forward "
                "returned it for these arguments");

    if (heads == 0) {  // keys that no head asks for
      dk.zero_();
      dv.zero_();
      return;
    }
    const int64_t key_blocks = blocks(keys, kKeyBlock);
    run_tasks(call.batch() * kv_heads * key_blocks, scratch_bytes, [&](int64_t index, char* scratch) {
      const int64_t kv_index = index / key_blocks, first = index % key_blocks * kKeyBlock;
      scalar_t* dk_head = dk.template data_ptr<scalar_t>() + kv_index * keys * query.size(3);
      scalar_t* dv_head = dv.template data_ptr<scalar_t>() + kv_index * keys * value.size(3);
      std::vector<BackwardHead<scalar_t, A>> group(call.group_size());
      for (int64_t g = 0; g < call.group_size(); ++g) describe(kv_index * call.group_size() + g, group[g]);
      kernel.backward_key(group.data(), call.group_size(), first, dk_head, dv_head, scratch);
    });
  });
  return result;
}

}  // namespace
}  // namespace adasplash

TORCH_LIBRARY_IMPL(adasplash, CPU, m) {
  m.impl("_entmax_attn_forward", adasplash::forward_op<adasplash::forward>);
  m.impl("_entmax_attn_backward", adasplash::backward_op<adasplash::backward>);
}
