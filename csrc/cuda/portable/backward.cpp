// _entmax_attn_backward on the GPU.
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <atomic>

#include "cuda/ops.h"
#include "cuda/part.h"
#include "cuda/portable/call.h"
#include "ops/attention_checks.h"

namespace adasplash::cuda {
namespace {

// From how many queries and keys on it is probed whether to gather what weighs, and below which share of the probed
// keys, in per cent, that pays: docs/cuda.md. The matrix products of large heads hide more of what gathering costs.
std::atomic<int32_t> probe_from{8192};
std::atomic<int32_t> gather_below_small{30}, gather_below_large{50};
constexpr int64_t kSmallHead = 64;

// An entry of a list; and to gather, two words of marked keys, four numbers of 16 bits of marked rows, and chosen ones.
constexpr Scratch kWalking{.of_pair = 1, .of_tile_row = 0}, kGathering{.of_pair = 1 + 2 + 2, .of_tile_row = kRoom};

// The per cent that kernels take; 0 if there is nothing to probe.
int32_t gather_below(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const AttentionOptions& options) {
  const int64_t rows = options.packed() ? 0 : 2;
  const auto shorter = std::min(longest_sequence(options, options.max_seqlen_q, query.size(rows)).expect_int(),
                                longest_sequence(options, options.max_seqlen_k, key.size(rows)).expect_int());
  if (shorter < probe_from || query.numel() == 0) return 0;
  return std::max(query.sizes().back(), value.sizes().back()) <= kSmallHead ? gather_below_small : gather_below_large;
}

// The gradient of alpha from what each row adds to it.
void sum_to_alpha(const at::Tensor& rows, const at::Tensor& dalpha) {  // (B, H, M), or packed (H, M)
  if (rows.numel() == 0) {
    dalpha.zero_();
  } else if (dalpha.dim() == 0) {
    dalpha.copy_(rows.sum());
  } else if (rows.dim() == 2) {
    dalpha.copy_(rows.sum(1));
  } else {
    dalpha.copy_(rows.sum(at::IntArrayRef({0, 2})));
  }
}

// A row's share of what the kernels hand on to each other: (high, low, delta, share), and of the gradient of alpha.
struct OfRows {
  at::Tensor terms, alpha_terms;
};

// The gradients of one part's heads.
void backward_part(const Call& call, int32_t gather_below, const at::Tensor& given_grad, const SavedForBackward& saved,
                   const OfRows& of_rows, const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) {
  const Result of_query(dq), of_key(dk), of_value(dv);
  const at::Tensor grad_out = with_aligned_rows(given_grad),
                   out = with_aligned_rows(saved.out ? *saved.out : at::zeros_like(given_grad));
  if (call.packed) {  // tokens that no sequence has, where lengths contradict the tensors
    for (const at::Tensor& t : {of_query.rows, of_key.rows, of_value.rows}) t.zero_();
  }

  const bool probed = gather_below > 0;
  const int64_t pairs = call.query_tile_pairs(), listed = std::max(pairs, call.key_tile_pairs());
  const int64_t chosen = probed ? std::max(call.query_tile_rows(), call.key_tile_rows()) * kRoom : 0;
  const int64_t counts = probed ? 2 * call.kv_heads : 0;  // of each key head: probed keys that weigh, all
  const int64_t marked_words = probed ? 2 * pairs : 0;    // of keys, and as many of rows
  const at::Tensor scratch = call.empty_ints(listed + chosen + counts + 2 * marked_words);
  int32_t* const lists = scratch.mutable_data_ptr<int32_t>();
  int32_t* const chosen_rows = lists + listed;
  int32_t* const shares = chosen_rows + chosen;
  int32_t* const key_marks = shares + counts;
  int32_t* const row_marks = key_marks + marked_words;
  const int32_t *const found_shares = shares, *const found_keys = key_marks, *const found_rows = row_marks;

  if (probed) {
    scratch.narrow(0, listed + chosen, counts).zero_();
    const Variant& variant = call.variant(Kernel::kMark);
    const int64_t blocks = call.query_programs(variant) / call.heads;
    for (const bool probe : {true, false}) {
      mark(variant, call.place, (probe ? (blocks + kProbed - 1) / kProbed : blocks) * call.heads,
           {
               .query = rows_of(call.query),
               .key = rows_of(call.key),
               .row_state = saved.row_state.const_data_ptr<float>(),
               .tiles = saved.tiles.const_data_ptr<int32_t>(),
               .lists = lists,
               .key_marks = key_marks,
               .row_marks = reinterpret_cast<int16_t*>(row_marks),
               .shares = shares,
               .gather_below = gather_below,
               .probe_from = probe ? static_cast<int32_t>(probe_from) : 0,
               .call = call.arguments,
           });
    }
  }
  // Of each key head one of both does the work; the GPU knows which.
  for (int marked = 0; marked <= int{probed} && dq.numel() > 0; ++marked) {
    const Variant& variant = call.variant(Kernel::kGradQuery, marked);
    grad_query(variant, call.place, call.query_programs(variant),
               {
                   .query = rows_of(call.query),
                   .key = rows_of(call.key),
                   .value = rows_of(call.value),
                   .out = rows_of(out),
                   .grad_out = rows_of(grad_out),
                   .grad_query = mutable_rows_of(of_query.rows),
                   .terms = of_rows.terms.mutable_data_ptr<float>(),
                   .alpha_terms = of_rows.alpha_terms.mutable_data_ptr<float>(),
                   .row_state = saved.row_state.const_data_ptr<float>(),
                   .tiles = saved.tiles.const_data_ptr<int32_t>(),
                   .lists = lists,
                   .marks = found_keys,
                   .chosen = chosen_rows,
                   .shares = found_shares,
                   .gather_below = gather_below,
                   .call = call.arguments,
               });
  }
  if (call.heads == 0) {  // keys that no head asks for
    of_key.rows.zero_();
    of_value.rows.zero_();
  }
  for (int marked = 0; marked <= int{probed} && call.heads > 0 && dk.numel() > 0; ++marked) {
    const Variant& variant = call.variant(Kernel::kGradKeyValue, marked);
    grad_key_value(variant, call.place, call.key_programs(variant),
                   {
                       .query = rows_of(call.query),
                       .key = rows_of(call.key),
                       .value = rows_of(call.value),
                       .grad_out = rows_of(grad_out),
                       .grad_key = mutable_rows_of(of_key.rows),
                       .grad_value = mutable_rows_of(of_value.rows),
                       .terms = of_rows.terms.const_data_ptr<float>(),
                       .tiles = saved.tiles.const_data_ptr<int32_t>(),
                       .lists = lists,
                       .marks = found_rows,
                       .chosen = chosen_rows,
                       .shares = found_shares,
                       .gather_below = gather_below,
                       .call = call.arguments,
                   });
  }
  for (const Result* gradient : {&of_query, &of_key, &of_value}) gradient->finish();
}

}  // namespace

BackwardResult backward(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
                        const at::Tensor& value, const SavedForBackward& saved, const AttentionOptions& options) {
  constexpr const char* name = "_entmax_attn_backward";
  check_backward(grad_out, query, key, value, saved, options);
  auto result = allocate_backward(query, key, value, options);
  auto& [dq, dk, dv, dalpha] = result;
  const at::Tensor state = saved.row_state.contiguous(), tiles = saved.tiles.contiguous();
  at::DimVector rows(state.sizes().begin(), state.sizes().end() - 1), four(rows);
  four.push_back(4);
  const at::Tensor terms = at::empty(four, state.options()), alpha_terms = options.head_alpha
                                                                               ? at::empty(rows, state.options())
                                                                               : at::empty({0}, state.options());
  if (options.packed()) {
    terms.zero_();
    alpha_terms.zero_();
  }
  const int32_t below = gather_below(query, key, value, options);
  for (const Part& part : Part::all(query, key, options, below > 0 ? kGathering : kWalking)) {
    const Call call(name, part.queries(query), part.keys(key), part.keys(value), part.options(options));
    const SavedForBackward of_part{
        part.rows(state), {}, part.rows(tiles), saved.out ? OptionalTensor(part.queries(*saved.out)) : std::nullopt};
    backward_part(call, below, part.queries(grad_out), of_part,
                  {part.rows(terms), options.head_alpha ? part.rows(alpha_terms) : alpha_terms}, part.queries(dq),
                  part.keys(dk), part.keys(dv));
  }
  if (options.head_alpha) sum_to_alpha(dq.numel() > 0 ? alpha_terms : alpha_terms.zero_(), dalpha);
  return result;
}

}  // namespace adasplash::cuda

// For tests: sets from which length on it is probed whether to gather, and below which per cent it is done.
extern "C" __attribute__((visibility("default"))) void adasplash_gather(int32_t from, int32_t below) {
  adasplash::cuda::probe_from = from;
  adasplash::cuda::gather_below_small = adasplash::cuda::gather_below_large = below;
}
