// torch-adasplash for libtorch users: alpha-entmax attention without Python.
//
// Linking AdaSplash::adasplash registers torch.ops.adasplash, so that TorchScript and AOTInductor models that use it
// load; the functions below call the same ops directly, with autograd.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#define ADASPLASH_API __attribute__((visibility("default")))

namespace adasplash {

// Attention whose weights are the alpha-entmax of the scaled scores: exactly zero for most keys. Peters, Niculae and
// Martins, "Sparse Sequence-to-Sequence Models" (2019), equation 6; alpha = 1 is softmax, alpha = 2 sparsemax.
//
//   query  (B, H, M, D)      key  (B, H_kv, N, D)      value  (B, H_kv, N, D_v)      result  (B, H, M, D_v)
//
// All four share one type (float32, float16, bfloat16, or float64 on the CPU) and one device. H is a multiple of
// H_kv; D and D_v are from 1 to 256. alpha is 1 or from 1.01 to 2. scale defaults to 1 / sqrt(D). A causal mask is
// aligned bottom right: query i sees the keys up to i + N - M. Differentiable once in query, key and value.
// Throws c10::Error when an argument does not fit, naming it.
//
//   q_seqlens, kv_seqlens  (B,) int32 or int64: lengths of right-padded batch entries, which then are M and N. Padded
//                          queries give zeros; what padding holds reaches nothing.
//   window                 (left, right), inclusive, -1 for no limit: query i sees the keys from i + N - M - left to
//                          i + N - M + right
//   alibi_slopes           (H,) or (B, H) float32: takes slope * |i + N - M - j| off the scaled score of key j
//   kv_starts              (B,) int32 or int64: the first key of each batch entry, for caches and batches that are
//                          padded on the left. kv_seqlens then says where its keys end; N is their difference, and j
//                          is counted from the start. An entry whose start is not before its end sees nothing.
//   dropout_p, dropout_seed  the share of weights that become zero, 0 or more and below 1, while the others are divided
//                          by 1 - dropout_p; and one int64 on query's device, from which alone it follows which ones.
//                          Without a seed dropout_p must be 0.
//   key_index              an index of key.transpose(1, 2) as a cache, from entmax_make_key_index below: a call of few
//                          queries need not read all keys then. It changes no bit, and calls that record gradients,
//                          with dropout or with alpha = 1 do without, as does entmax_attn_summary.
//   q_positions            (B,) int32 or int64: where each batch entry's first query stands, counted as its keys are:
//                          in place of N - M above. From -(2^29 - 1) to 2^29 - 1: before its keys or behind them, too.
//   dropout_origin         (B, 4) int32 or int64: what dropout counts each batch entry itself as, and its first head,
//                          query and key, so that parts of a call drop the weights of the whole; (b, 0, 0, 0) without.
ADASPLASH_API at::Tensor entmax_attn(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                     double alpha = 1.5, bool is_causal = false,
                                     std::optional<double> scale = std::nullopt,
                                     const std::optional<at::Tensor>& q_seqlens = std::nullopt,
                                     const std::optional<at::Tensor>& kv_seqlens = std::nullopt,
                                     c10::IntArrayRef window = {-1, -1},
                                     const std::optional<at::Tensor>& alibi_slopes = std::nullopt,
                                     const std::optional<at::Tensor>& kv_starts = std::nullopt, double dropout_p = 0,
                                     const std::optional<at::Tensor>& dropout_seed = std::nullopt,
                                     const std::optional<at::Tensor>& key_index = std::nullopt,
                                     const std::optional<at::Tensor>& q_positions = std::nullopt,
                                     const std::optional<at::Tensor>& dropout_origin = std::nullopt);

// The same with one alpha for each head, a tensor of shape (H,) or (), float32, float64 or of query's type. Values are
// 1 or from 1.01 to 2; differentiable in alpha too.
ADASPLASH_API at::Tensor entmax_attn(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                     const at::Tensor& alpha, bool is_causal = false,
                                     std::optional<double> scale = std::nullopt,
                                     const std::optional<at::Tensor>& q_seqlens = std::nullopt,
                                     const std::optional<at::Tensor>& kv_seqlens = std::nullopt,
                                     c10::IntArrayRef window = {-1, -1},
                                     const std::optional<at::Tensor>& alibi_slopes = std::nullopt,
                                     const std::optional<at::Tensor>& kv_starts = std::nullopt, double dropout_p = 0,
                                     const std::optional<at::Tensor>& dropout_seed = std::nullopt,
                                     const std::optional<at::Tensor>& key_index = std::nullopt,
                                     const std::optional<at::Tensor>& q_positions = std::nullopt,
                                     const std::optional<at::Tensor>& dropout_origin = std::nullopt);

// The same for sequences of different lengths, packed behind each other without padding:
//
//   query  (T_q, H, D)      key  (T_k, H_kv, D)      value  (T_k, H_kv, D_v)      result  (T_q, H, D_v)
//
// Sequence b has the queries cu_seqlens_q[b] ... cu_seqlens_q[b + 1] - 1, and keys by cu_seqlens_k likewise; both are
// (B + 1,), int32 or int64, and go from 0 to the number of tokens. max_seqlen_q and max_seqlen_k bound the lengths.
ADASPLASH_API at::Tensor entmax_attn_varlen(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                            const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                                            c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k, double alpha = 1.5,
                                            bool is_causal = false, std::optional<double> scale = std::nullopt,
                                            c10::IntArrayRef window = {-1, -1},
                                            const std::optional<at::Tensor>& alibi_slopes = std::nullopt,
                                            double dropout_p = 0,
                                            const std::optional<at::Tensor>& dropout_seed = std::nullopt,
                                            const std::optional<at::Tensor>& q_positions = std::nullopt,
                                            const std::optional<at::Tensor>& dropout_origin = std::nullopt);
ADASPLASH_API at::Tensor entmax_attn_varlen(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                            const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                                            c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k, const at::Tensor& alpha,
                                            bool is_causal = false, std::optional<double> scale = std::nullopt,
                                            c10::IntArrayRef window = {-1, -1},
                                            const std::optional<at::Tensor>& alibi_slopes = std::nullopt,
                                            double dropout_p = 0,
                                            const std::optional<at::Tensor>& dropout_seed = std::nullopt,
                                            const std::optional<at::Tensor>& q_positions = std::nullopt,
                                            const std::optional<at::Tensor>& dropout_origin = std::nullopt);

// The same, and what it attended to: the output, of the bits of the ops above and differentiable as theirs; and of each
// row, (B, H, M), packed (H, T_q), without a gradient:
//
//   support_size    int32: how many keys are above the threshold, where one whose weight rounds to 0 may count or not;
//                   for alpha = 1 how many are seen
//   largest_weight  float32, float64 for float64 tensors, as the two below: the largest weight
//   maximum         the largest (alpha - 1) * score; for alpha = 1 the largest score
//   gap             tau less maximum; for alpha = 1 the log of the sum of exp(score - maximum)
//   empty_tiles     (B, H) float64: the share of tiles of 64 x 64 without weight among those that are seen
//
// A row that sees no key has (0, 0, 0, infinity), one that is NaN (0, NaN, NaN, NaN). Dropout is of the output alone.
using AttentionSummary = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
ADASPLASH_API AttentionSummary entmax_attn_summary(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, double alpha = 1.5, bool is_causal = false,
    std::optional<double> scale = std::nullopt, const std::optional<at::Tensor>& q_seqlens = std::nullopt,
    const std::optional<at::Tensor>& kv_seqlens = std::nullopt, c10::IntArrayRef window = {-1, -1},
    const std::optional<at::Tensor>& alibi_slopes = std::nullopt,
    const std::optional<at::Tensor>& kv_starts = std::nullopt, double dropout_p = 0,
    const std::optional<at::Tensor>& dropout_seed = std::nullopt,
    const std::optional<at::Tensor>& key_index = std::nullopt,
    const std::optional<at::Tensor>& q_positions = std::nullopt,
    const std::optional<at::Tensor>& dropout_origin = std::nullopt);
ADASPLASH_API AttentionSummary entmax_attn_summary(const at::Tensor& query, const at::Tensor& key,
                                                   const at::Tensor& value, const at::Tensor& alpha,
                                                   bool is_causal = false, std::optional<double> scale = std::nullopt,
                                                   const std::optional<at::Tensor>& q_seqlens = std::nullopt,
                                                   const std::optional<at::Tensor>& kv_seqlens = std::nullopt,
                                                   c10::IntArrayRef window = {-1, -1},
                                                   const std::optional<at::Tensor>& alibi_slopes = std::nullopt,
                                                   const std::optional<at::Tensor>& kv_starts = std::nullopt,
                                                   double dropout_p = 0,
                                                   const std::optional<at::Tensor>& dropout_seed = std::nullopt,
                                                   const std::optional<at::Tensor>& key_index = std::nullopt,
                                                   const std::optional<at::Tensor>& q_positions = std::nullopt,
                                                   const std::optional<at::Tensor>& dropout_origin = std::nullopt);
ADASPLASH_API AttentionSummary entmax_attn_varlen_summary(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& cu_seqlens_q,
    const at::Tensor& cu_seqlens_k, c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k, double alpha = 1.5,
    bool is_causal = false, std::optional<double> scale = std::nullopt, c10::IntArrayRef window = {-1, -1},
    const std::optional<at::Tensor>& alibi_slopes = std::nullopt, double dropout_p = 0,
    const std::optional<at::Tensor>& dropout_seed = std::nullopt,
    const std::optional<at::Tensor>& q_positions = std::nullopt,
    const std::optional<at::Tensor>& dropout_origin = std::nullopt);
ADASPLASH_API AttentionSummary entmax_attn_varlen_summary(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& cu_seqlens_q,
    const at::Tensor& cu_seqlens_k, c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k, const at::Tensor& alpha,
    bool is_causal = false, std::optional<double> scale = std::nullopt, c10::IntArrayRef window = {-1, -1},
    const std::optional<at::Tensor>& alibi_slopes = std::nullopt, double dropout_p = 0,
    const std::optional<at::Tensor>& dropout_seed = std::nullopt,
    const std::optional<at::Tensor>& q_positions = std::nullopt,
    const std::optional<at::Tensor>& dropout_origin = std::nullopt);

// Attention on a paged cache of keys and values, as in serving; without a gradient.
//
//   query  (T, H, D)      key_cache  (blocks, page, H_kv, D)      value_cache  (blocks, page, H_kv, D_v)
//   block_table  (B, W)   kv_seqlens  (B,)                        result  (T, H, D_v)
//
// Sequence b has kv_seqlens[b] keys, of which key j is row j % page of page block_table[b, j / page]. Its queries are
// the last of its tokens, as a causal mask is aligned bottom right: max_seqlen_q of them, behind those of the sequences
// before it; or with cu_seqlens_q (B + 1,) those from cu_seqlens_q[b] to cu_seqlens_q[b + 1] - 1, which max_seqlen_q
// bounds. So chunks of a prompt and single tokens may be in one call. Tables and lengths are int32 or int64; those
// out of range are an error on the CPU and are clamped on a GPU. Caches may have any strides; on a GPU rows must be
// dense and start at multiples of 16 bytes. Tensors that require a gradient are an error while gradients are recorded.
ADASPLASH_API at::Tensor entmax_attn_paged(const at::Tensor& query, const at::Tensor& key_cache,
                                           const at::Tensor& value_cache, const at::Tensor& block_table,
                                           const at::Tensor& kv_seqlens, double alpha = 1.5, bool is_causal = true,
                                           const std::optional<at::Tensor>& cu_seqlens_q = std::nullopt,
                                           c10::SymInt max_seqlen_q = 1, std::optional<double> scale = std::nullopt,
                                           c10::IntArrayRef window = {-1, -1},
                                           const std::optional<at::Tensor>& alibi_slopes = std::nullopt,
                                           const std::optional<at::Tensor>& key_index = std::nullopt);
ADASPLASH_API at::Tensor entmax_attn_paged(const at::Tensor& query, const at::Tensor& key_cache,
                                           const at::Tensor& value_cache, const at::Tensor& block_table,
                                           const at::Tensor& kv_seqlens, const at::Tensor& alpha, bool is_causal = true,
                                           const std::optional<at::Tensor>& cu_seqlens_q = std::nullopt,
                                           c10::SymInt max_seqlen_q = 1, std::optional<double> scale = std::nullopt,
                                           c10::IntArrayRef window = {-1, -1},
                                           const std::optional<at::Tensor>& alibi_slopes = std::nullopt,
                                           const std::optional<at::Tensor>& key_index = std::nullopt);

// Writes the keys (T, H_kv, D) and values (T, H_kv, D_v) of tokens to a paged cache, in place. slots (T,) int32 or
// int64 are page number * page + row; a slot of -1 is skipped, another one out of range is an error on the CPU and
// skipped on a GPU. Of equal slots the last one's key and value stay. On a GPU rows of a cache must be dense. An index
// of the cache that is given is kept: the entries of these slots are made anew.
ADASPLASH_API void entmax_cache_append(const at::Tensor& key, const at::Tensor& value, const at::Tensor& key_cache,
                                       const at::Tensor& value_cache, const at::Tensor& slots,
                                       const std::optional<at::Tensor>& key_index = std::nullopt);

// An index of a cache's keys (blocks, page, H_kv, D): a code of a few bits of each key, in one uint8 tensor, by which
// attention of few queries need not read most keys. Results keep their bits. entmax_make_key_index gives an empty one
// for a cache of these sizes, this type and device, and entmax_key_index_update makes the entries of slots, (T,) as
// above, from what the cache holds. An index that was not told of a change of its keys gives wrong weights.
ADASPLASH_API at::Tensor entmax_make_key_index(const at::Tensor& key_cache);
ADASPLASH_API void entmax_key_index_update(const at::Tensor& key_cache, const at::Tensor& slots,
                                           const at::Tensor& key_index);

// The activation alone: entmax of the scores along one dimension of input, which may have any shape; as
// torch.softmax, with exact zeros. Fully masked rows (all -infinity) give zeros; a NaN or +infinity makes its row NaN.
// alpha is 1 (torch.softmax) or from 1.01 to 2. Differentiable once in input. The result is contiguous.
ADASPLASH_API at::Tensor entmax(const at::Tensor& input, double alpha = 1.5, int64_t dim = -1);

// The same with alpha for each row: of sizes that broadcast to those of input, with 1 at dim. Differentiable in alpha.
ADASPLASH_API at::Tensor entmax(const at::Tensor& input, const at::Tensor& alpha, int64_t dim = -1);

// The library's version, as "major.minor.patch".
ADASPLASH_API const char* version();

// The instruction set that the CPU kernels run with here: "default", "avx2" or "avx512". The environment variable
// ADASPLASH_CPU_CAPABILITY forces one of those that the machine has.
ADASPLASH_API std::string cpu_capability();

}  // namespace adasplash

// The same for Python's ctypes and other languages: null where the environment variable does not fit.
extern "C" ADASPLASH_API const char* adasplash_cpu_capability();
