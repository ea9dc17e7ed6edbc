// What the private attention ops share: the shapes of their arguments and results, their calls through the dispatcher,
// and the adapters from a schema's flat arguments to a backend's kernel.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/DimVector.h>

#include <optional>
#include <tuple>

#include "ops/options.h"

namespace adasplash {

// Extents of one call. Padded: query (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v). Packed: query
// (M, H, D), key (N, H_kv, D), value (N, H_kv, D_v), where M and N count the tokens of all B sequences. In a paged
// cache, whichever form query has: key (blocks, H_kv, page, D), value (blocks, H_kv, page, D_v), and N is the number of
// keys that a row of the block table has room for.
struct AttentionShape {
  c10::SymInt batch, heads, kv_heads, queries, keys, head_dim, value_dim;

  static AttentionShape of(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const AttentionOptions& options) {
    const c10::SymInt keys = key.sym_size(options.packed_keys() ? 0 : 2);
    return {options.packed() ? options.cu_seqlens_q->sym_size(0) - 1 : query.sym_size(0),
            query.sym_size(1),
            key.sym_size(1),
            query.sym_size(options.packed() ? 0 : 2),
            options.paged() ? options.block_table->sym_size(1) * keys : keys,
            query.sym_size(-1),
            value.sym_size(-1)};
  }
};

// What the forward leaves for the backward, beside its inputs. Inference (kInference) leaves all of it empty. The
// packed form has no dimension B. Keys and tiles are counted from the start of their sequence.
struct SavedForBackward {
  at::Tensor row_state;  // (B, H, M, 2): a row's max and gap = tau - max, in units of z = (alpha - 1) * score
  at::Tensor support;    // (B, H, M, capacity) int32: ascending keys, kEndOfSupport after the last; or kSupportOverflow
  at::Tensor tiles;      // (B, H, tile rows, words) int32: bit t % 32 of word t / 32 is tile t; see saved_sizes
  OptionalTensor out;    // the output: dO.out shifts what the CUDA kernels sum, to round less; others do without
};
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

constexpr int64_t kInference = -1;     // support_capacity of a call that needs no backward
constexpr int32_t kEndOfSupport = -1;  // the row's support ends here
// In the first place: the row's support did not fit, rebuild it. Places behind it are the backend's own: the CPU has
// the number of keys in the second, the GPU marks of keys (kept_marks in triton_src/lib/marks.py).
constexpr int32_t kSupportOverflow = -2;
// How far q_positions may be from 0 either way: the CUDA kernels add them to a row and a window, in 32 bits.
constexpr int64_t kFarthestPosition = (int64_t{1} << 29) - 1;
// Edge of the tiles that the tile bits speak of: TILE in triton_src/lib/visibility.py, _TILE in adasplash/inspect.py.
constexpr int64_t kTile = 64;

constexpr int64_t count_tiles(int64_t rows) { return (rows + kTile - 1) / kTile; }

// The most rows that one sequence has, of all `rows`. The bound that is given for the packed form may be any number.
inline c10::SymInt longest_sequence(const AttentionOptions& options, const c10::SymInt& max_seqlen,
                                    const c10::SymInt& rows) {
  return options.packed() ? max_seqlen.min(rows) : rows;
}

// Where the tile rows of a packed sequence start, for the index of the sequence and that of its first row; those of one
// sequence end before those of the next begin.
template <typename Int>
constexpr Int packed_tile_row(const Int& sequence, const Int& first_row) {
  return first_row / kTile + sequence;
}

// How many tile rows a head has whose `batch` sequences have so many rows, queries or keys: each if padded, all of them
// if packed.
c10::SymInt tile_row_count(const c10::SymInt& rows, const c10::SymInt& batch, bool packed);

// Sizes of what every backend returns. They follow from shapes alone, as a C++ meta kernel knows nothing else.
c10::SymDimVector out_sizes(const at::Tensor& query, const at::Tensor& value);
struct SavedSizes {
  c10::SymDimVector row_state, support, tiles;
};
SavedSizes saved_sizes(const at::Tensor& query, const at::Tensor& key, const AttentionOptions& options,
                       const c10::SymInt& support_capacity);
at::ScalarType row_state_type(const at::Tensor& query);  // float32, and float64 for float64

ForwardResult allocate_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const AttentionOptions& options, const c10::SymInt& support_capacity);
BackwardResult allocate_backward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                 const AttentionOptions& options);

// The op that a user called, for messages.
inline const char* public_name(const AttentionOptions& options) {
  return options.paged() ? "entmax_attn_paged" : options.packed() ? "entmax_attn_varlen" : "entmax_attn";
}

// Through the dispatcher, so that tracers and profilers see the two ops.
ForwardResult call_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const AttentionOptions& options, const c10::SymInt& support_capacity);
BackwardResult call_backward(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
                             const at::Tensor& value, const SavedForBackward& saved, const AttentionOptions& options);

// entmax_attn through the dispatcher, by alpha's kind.
at::Tensor call_padded(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                       const AttentionOptions& options);

// The output of a forward for inference whose options have a key_index.
at::Tensor call_indexed(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const AttentionOptions& options);

// What a backend implements. Options have a key_index in inference alone, if at all.
using ForwardKernel = ForwardResult (*)(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                        const AttentionOptions& options, const c10::SymInt& support_capacity);
using BackwardKernel = BackwardResult (*)(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
                                          const at::Tensor& value, const SavedForBackward& saved,
                                          const AttentionOptions& options);

// A kernel as its op calls it: First and Later are the options of the private pair (options.h), one by one.
template <typename FirstOptions, typename LaterOptions>
struct Flat;
template <typename... First, typename... Later>
struct Flat<const std::tuple<Option<First>...>, const std::tuple<Option<Later>...>> {
  template <ForwardKernel kernel>
  static ForwardResult forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               OptionArgument<First>... first, c10::SymInt support_capacity,
                               OptionArgument<Later>... later) {
    AttentionOptions options;
    set_options(options, kAllOptions, std::move(first)..., std::move(later)...);
    return kernel(query, key, value, options, support_capacity);
  }

  template <ForwardKernel kernel>
  static at::Tensor indexed(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            OptionArgument<First>... first, const at::Tensor& key_index,
                            OptionArgument<Later>... later) {
    AttentionOptions options;
    set_options(options, kAllOptions, std::move(first)..., std::move(later)...);
    options.key_index = key_index.contiguous();  // a compiler need not keep the strides
    return std::get<0>(kernel(query, key, value, options, kInference));
  }

  template <BackwardKernel kernel>
  static BackwardResult backward(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
                                 const at::Tensor& value, const at::Tensor& row_state, const at::Tensor& support,
                                 const at::Tensor& tiles, OptionArgument<First>... first, const OptionalTensor& out,
                                 OptionArgument<Later>... later) {
    AttentionOptions options;
    set_options(options, kAllOptions, std::move(first)..., std::move(later)...);
    const SavedForBackward saved{.row_state = row_state, .support = support, .tiles = tiles, .out = out};
    return kernel(grad_out, query, key, value, saved, options);
  }
};
using FlatKernels = Flat<decltype(kFirstOptions), decltype(kLaterOptions)>;

// What is registered for _entmax_attn_forward, _entmax_attn_indexed and _entmax_attn_backward.
template <ForwardKernel kernel>
constexpr auto* forward_op = &FlatKernels::forward<kernel>;
template <ForwardKernel kernel>
constexpr auto* indexed_op = &FlatKernels::indexed<kernel>;
template <BackwardKernel kernel>
constexpr auto* backward_op = &FlatKernels::backward<kernel>;

// A public op over a kernel, a function of query, key, value and the options: what is registered has the signature that
// options.h makes for it.
template <auto kernel, typename Signature>
struct PaddedOp;
template <auto kernel, typename Result, typename Alpha, typename... Options>
struct PaddedOp<kernel, Result(const at::Tensor&, const at::Tensor&, const at::Tensor&, Alpha, Options...)> {
  static Result call(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, Alpha alpha,
                     Options... options) {
    AttentionOptions o;
    set_alpha(o, alpha);
    set_options(o, kPaddedOptions, std::move(options)...);
    return kernel(query, key, value, o);
  }
};

}  // namespace adasplash
