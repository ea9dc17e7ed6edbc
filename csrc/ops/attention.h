// What the private attention ops pass around: the options of the contract as one struct, the shapes of what they
// return, and the typed calls into the dispatcher. The flat argument list of the schema stands here and nowhere else.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/DimVector.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

namespace adasplash {

using OptionalTensor = std::optional<at::Tensor>;

// Everything of the contract besides query, key and value. Exactly one of alpha and head_alpha counts: head_alpha,
// of shape (H,) or (), where it is given.
struct AttentionOptions {
  OptionalTensor head_alpha;
  double alpha = 1.5;
  bool is_causal = false;
  std::optional<double> scale;
  OptionalTensor q_seqlens, kv_seqlens;       // (B,), padded form
  OptionalTensor cu_seqlens_q, cu_seqlens_k;  // (B + 1,), packed form
  c10::SymInt max_seqlen_q = 0, max_seqlen_k = 0;
  std::array<int64_t, 2> window = {-1, -1};  // (left, right), inclusive; -1 is unlimited
  OptionalTensor alibi_slopes;               // (H,) or (B, H) float32

  // Whether this is the packed form, whose sequences stand behind each other in one dimension of tokens.
  bool packed() const { return cu_seqlens_q.has_value() || cu_seqlens_k.has_value(); }
};

// Extents of one call. Padded: query (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v). Packed: query
// (M, H, D), key (N, H_kv, D), value (N, H_kv, D_v), where M and N count the tokens of all B sequences.
struct AttentionShape {
  c10::SymInt batch, heads, kv_heads, queries, keys, head_dim, value_dim;

  static AttentionShape of(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const AttentionOptions& options) {
    const int64_t token = options.packed() ? 0 : 2;
    return {options.packed() ? options.cu_seqlens_q->sym_size(0) - 1 : query.sym_size(0),
            query.sym_size(1),
            key.sym_size(1),
            query.sym_size(token),
            key.sym_size(token),
            query.sym_size(-1),
            value.sym_size(-1)};
  }
};

// What the forward leaves for the backward, beside its inputs. Inference (kInference) leaves all of it empty. The
// packed form has no dimension B. Keys and tiles are counted from the start of their sequence.
struct SavedForBackward {
  at::Tensor row_state;  // (B, H, M, 2): row maximum m and tau - m, in units of z = (alpha - 1) * score
  at::Tensor support;    // (B, H, M, capacity) int32: ascending keys, kEndOfSupport after the last one
  at::Tensor tiles;      // (B, H, tile rows, words) int32: bit t % 32 of word t / 32 is tile t; see saved_sizes
  OptionalTensor out;    // the output: dO.out shifts what the CUDA kernels sum, to round less; others do without
};
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

constexpr int64_t kInference = -1;        // support_capacity of a call that needs no backward
constexpr int32_t kEndOfSupport = -1;     // the row's support ends here
constexpr int32_t kSupportOverflow = -2;  // in the first place: the row's support did not fit, rebuild it
constexpr int64_t kTile = 64;             // edge of the tiles that the tile bits speak of

constexpr int64_t count_tiles(int64_t rows) { return (rows + kTile - 1) / kTile; }

// The most rows that one sequence has, of all `rows`. The bound that is given for the packed form may be any number.
inline c10::SymInt longest_sequence(const AttentionOptions& options, const c10::SymInt& max_seqlen,
                                    const c10::SymInt& rows) {
  return options.packed() ? max_seqlen.min(rows) : rows;
}

// Sizes of what every backend returns. They follow from shapes alone, as a C++ meta kernel knows nothing else.
c10::SymDimVector out_sizes(const at::Tensor& query, const at::Tensor& value);
struct SavedSizes {
  c10::SymDimVector row_state, support, tiles;
};
SavedSizes saved_sizes(const at::Tensor& query, const at::Tensor& key, const AttentionOptions& options,
                       const c10::SymInt& support_capacity);
// Where the tile rows of a packed sequence start, for the index of the sequence and that of its first query. They are
// as many as saved_sizes says; those of one sequence end before those of the next begin.
constexpr int64_t packed_tile_row(int64_t sequence, int64_t first_query) { return first_query / kTile + sequence; }
at::ScalarType row_state_type(const at::Tensor& query);  // float32, and float64 for float64

ForwardResult allocate_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const AttentionOptions& options, const c10::SymInt& support_capacity);
BackwardResult allocate_backward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                 const AttentionOptions& options);

// The op that a user called, for messages.
inline const char* public_name(const AttentionOptions& options) {
  return options.packed() ? "entmax_attn_varlen" : "entmax_attn";
}

// The schema's int[2] is a list of any length to those who call through torch.ops.
std::array<int64_t, 2> window_pair(c10::IntArrayRef window);

// Through the dispatcher, so that tracers and profilers see the two ops.
ForwardResult call_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const AttentionOptions& options, c10::SymInt support_capacity);
BackwardResult call_backward(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
                             const at::Tensor& value, const SavedForBackward& saved, const AttentionOptions& options);

// Adapters from the schema's flat arguments to a backend's kernel.
using ForwardKernel = ForwardResult (*)(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                        const AttentionOptions& options, const c10::SymInt& support_capacity);
using BackwardKernel = BackwardResult (*)(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
                                          const at::Tensor& value, const SavedForBackward& saved,
                                          const AttentionOptions& options);

template <ForwardKernel kernel>
ForwardResult forward_op(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                         const OptionalTensor& head_alpha, double alpha, bool is_causal, std::optional<double> scale,
                         const OptionalTensor& q_seqlens, const OptionalTensor& kv_seqlens,
                         const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                         c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k, c10::IntArrayRef window,
                         const OptionalTensor& alibi_slopes, c10::SymInt support_capacity) {
  return kernel(query, key, value,
                {head_alpha, alpha, is_causal, scale, q_seqlens, kv_seqlens, cu_seqlens_q, cu_seqlens_k,
                 std::move(max_seqlen_q), std::move(max_seqlen_k), window_pair(window), alibi_slopes},
                support_capacity);
}

template <BackwardKernel kernel>
BackwardResult backward_op(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
                           const at::Tensor& value, const at::Tensor& row_state, const at::Tensor& support,
                           const at::Tensor& tiles, const OptionalTensor& head_alpha, double alpha, bool is_causal,
                           std::optional<double> scale, const OptionalTensor& q_seqlens,
                           const OptionalTensor& kv_seqlens, const OptionalTensor& cu_seqlens_q,
                           const OptionalTensor& cu_seqlens_k, c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k,
                           c10::IntArrayRef window, const OptionalTensor& alibi_slopes, const OptionalTensor& out) {
  return kernel(grad_out, query, key, value, {row_state, support, tiles, out},
                {head_alpha, alpha, is_causal, scale, q_seqlens, kv_seqlens, cu_seqlens_q, cu_seqlens_k,
                 std::move(max_seqlen_q), std::move(max_seqlen_k), window_pair(window), alibi_slopes});
}

}  // namespace adasplash
