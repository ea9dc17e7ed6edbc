#include "ops/attention_checks.h"

#include <c10/core/SymBool.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <iomanip>

#include "ops/key_index.h"

namespace adasplash {
namespace {

constexpr int64_t kMaxHeadDim = 256;

void check_head_dim(const char* op, const char* what, const c10::SymInt& size) {
  TORCH_SYM_CHECK(size.sym_ge(1).sym_and(size.sym_le(kMaxHeadDim)), op, ": ", what, " must be from 1 to ", kMaxHeadDim,
                  ", got ", size);
}

void check_tensor(const char* op, const char* name, const char* padded_shape, const char* packed_shape,
                  const at::Tensor& tensor, const at::Tensor& query, const AttentionOptions& options) {
  check_dense(op, name, tensor, options.packed() ? 3 : 4, options.packed() ? packed_shape : padded_shape, query);
  TORCH_CHECK(tensor.scalar_type() == query.scalar_type(), op, ": ", name, " must have query's dtype ",
              query.scalar_type(), ", got ", tensor.scalar_type());
}

// Before AttentionShape: it takes the packed form's number of sequences from cu_seqlens_q.
void check_cu_seqlens(const char* op, const at::Tensor& query, const AttentionOptions& options) {
  if (!options.packed()) return;
  TORCH_CHECK(options.cu_seqlens_q && options.cu_seqlens_k, op, ": cu_seqlens_q and cu_seqlens_k go together");
  TORCH_CHECK(!options.q_seqlens && !options.kv_seqlens, op,
              ": q_seqlens and kv_seqlens are of the padded form; cu_seqlens_q and cu_seqlens_k say the lengths here");
  TORCH_CHECK(!options.kv_starts, op, ": kv_starts are of the padded form; cu_seqlens_k says where keys start here");
  check_lengths(op, "cu_seqlens_q", "(batch + 1,)", *options.cu_seqlens_q, query);
  check_lengths(op, "cu_seqlens_k", "(batch + 1,)", *options.cu_seqlens_k, query);
  const c10::SymInt size = options.cu_seqlens_q->sym_size(0);
  TORCH_SYM_CHECK(size.sym_ge(1), op, ": cu_seqlens_q must have at least one entry, got none");
  check_size(op, "cu_seqlens_k", "size", options.cu_seqlens_k->sym_size(0), "cu_seqlens_q's", size);
  for (const auto& [name, length] :
       {std::pair{"max_seqlen_q", options.max_seqlen_q}, std::pair{"max_seqlen_k", options.max_seqlen_k}}) {
    TORCH_SYM_CHECK(length.sym_ge(0), op, ": ", name, " must be 0 or more, got ", length);
  }
}

void check_integers(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.scalar_type() == at::kInt || tensor.scalar_type() == at::kLong, op, ": ", name,
              " must be int32 or int64, got ", tensor.scalar_type());
}

// What says how many sequences there are.
const char* entries_of(const AttentionOptions& options) {
  return options.paged() ? "block_table's" : options.packed() ? "cu_seqlens_q's" : "query's";
}

void check_seqlens(const char* op, const char* name, const OptionalTensor& lengths, const AttentionShape& shape,
                   const at::Tensor& query, const AttentionOptions& options) {
  if (!lengths) return;
  check_lengths(op, name, "(batch,)", *lengths, query);
  check_size(op, name, "batch size", lengths->sym_size(0), entries_of(options), shape.batch);
}

void check_attention_alpha(const char* op, const AttentionShape& shape, const at::Tensor& query,
                           const AttentionOptions& options) {
  if (!options.head_alpha) return check_alpha(op, options.alpha, /*takes_softmax=*/true);
  const at::Tensor& alpha = *options.head_alpha;
  TORCH_CHECK(alpha.defined(), op, ": alpha must be a number or a tensor, got none");
  check_dense(op, "alpha", alpha, alpha.dim() == 0 ? 0 : 1, "(heads,), or none", query);
  const auto type = alpha.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == query.scalar_type(), op,
              ": alpha as a tensor must be float32, float64 or of query's dtype ", query.scalar_type(), ", got ", type);
  if (alpha.dim() == 1) check_size(op, "alpha", "number of heads", alpha.sym_size(0), "query's", shape.heads);
}

void check_alibi_slopes(const char* op, const AttentionShape& shape, const at::Tensor& query,
                        const AttentionOptions& options) {
  if (!options.alibi_slopes) return;
  const at::Tensor& slopes = *options.alibi_slopes;
  const bool per_batch = slopes.dim() == 2;
  check_dense(op, "alibi_slopes", slopes, per_batch ? 2 : 1, "(heads,), or two, (batch, heads)", query);
  TORCH_CHECK(slopes.scalar_type() == at::kFloat, op, ": alibi_slopes must be float32, got ", slopes.scalar_type());
  check_size(op, "alibi_slopes", "number of heads", slopes.sym_size(-1), "query's", shape.heads);
  if (per_batch) {
    check_size(op, "alibi_slopes", "batch size", slopes.sym_size(0), entries_of(options), shape.batch);
  }
}

void check_dropout(const char* op, const AttentionShape& shape, const at::Tensor& query,
                   const AttentionOptions& options) {
  TORCH_CHECK(options.dropout_p >= 0 && options.dropout_p < 1, op,
              ": dropout_p must be 0 or more and less than 1, got ", options.dropout_p);
  TORCH_CHECK(options.dropout_p == 0 || options.dropout_seed, op,
              ": dropout_p above 0 needs dropout_seed, one int64 on query's device, got none");
  if (options.dropout_origin) {
    const at::Tensor& origin = *options.dropout_origin;
    check_dense(op, "dropout_origin", origin, 2, "(batch, 4)", query);
    check_integers(op, "dropout_origin", origin);
    check_size(op, "dropout_origin", "batch size", origin.sym_size(0), entries_of(options), shape.batch);
    check_size(op, "dropout_origin", "width", origin.sym_size(1), "four numbers'", 4);
  }
  if (!options.dropout_seed) return;
  const at::Tensor& seed = *options.dropout_seed;
  check_dense(op, "dropout_seed", seed, seed.dim() == 0 ? 0 : 1, "of one number, or none", query);
  check_size(op, "dropout_seed", "size", seed.sym_numel(), "one number's", 1);
  TORCH_CHECK(seed.scalar_type() == at::kLong, op, ": dropout_seed must be int64, got ", seed.scalar_type());
}

void check_like(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType type,
                c10::SymIntArrayRef sizes, const at::Tensor& query) {
  check_type_and_device(op, name, tensor, type, query.device());
  TORCH_CHECK(tensor.sym_sizes() == sizes, op, ": ", name, " must have sizes ", sizes, ", got ", tensor.sym_sizes());
}

}  // namespace

void check_dense(const char* op, const char* name, const at::Tensor& tensor, int64_t dim, const char* shape,
                 const at::Tensor& query) {
  TORCH_CHECK(tensor.defined(), op, ": ", name, " must be a tensor, got none");
  TORCH_CHECK(tensor.layout() == at::kStrided, op, ": ", name, " must be a dense (strided) tensor, got layout ",
              tensor.layout());
  TORCH_CHECK(tensor.dim() == dim, op, ": ", name, " must have ", dim, " dimension", dim == 1 ? " " : "s ", shape,
              ", got ", tensor.dim(), " with sizes ", tensor.sym_sizes());
  TORCH_CHECK(tensor.device() == query.device(), op, ": ", name, " must be on query's device ", query.device(),
              ", got ", tensor.device());
}

void check_size(const char* op, const char* name, const char* what, const c10::SymInt& got, const char* source,
                const c10::SymInt& expected) {
  TORCH_SYM_CHECK(got.sym_eq(expected), op, ": ", name, " must have ", source, " ", what, " ", expected, ", got ", got);
}

void check_lengths(const char* op, const char* name, const char* shape, const at::Tensor& lengths,
                   const at::Tensor& query) {
  check_dense(op, name, lengths, 1, shape, query);
  check_integers(op, name, lengths);
}

void check_heads(const char* op, const AttentionShape& shape) {
  check_head_dim(op, "head_dim of query and key", shape.head_dim);
  check_head_dim(op, "head_dim of value", shape.value_dim);
  TORCH_CHECK(shape.kv_heads == 0 ? shape.heads == 0 : shape.heads % shape.kv_heads == 0, op,
              ": query's number of heads must be a multiple of key's and value's, got ", shape.heads, " and ",
              shape.kv_heads);
}

void check_options(const char* op, const AttentionShape& shape, const at::Tensor& query,
                   const AttentionOptions& options) {
  check_attention_alpha(op, shape, query, options);
  if (options.scale) {
    const double scale = query.scalar_type() == at::kDouble ? *options.scale : static_cast<float>(*options.scale);
    TORCH_CHECK(std::isfinite(scale), op, ": scale must be finite in ", row_state_type(query), ", got ",
                *options.scale);
  }
  TORCH_CHECK(options.window[0] >= -1 && options.window[1] >= -1, op,
              ": window (left, right) must be 0 or more each, or -1 for no limit, got (", options.window[0], ", ",
              options.window[1], ")");
  check_alibi_slopes(op, shape, query, options);
  check_dropout(op, shape, query, options);
}

void check_type(const char* op, const char* name, const at::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kHalf || type == at::kBFloat16 || type == at::kDouble, op, ": ", name,
              " must be float32, float16, bfloat16 or float64, got ", type);
}

void check_type_and_device(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType type,
                           at::Device device) {
  TORCH_CHECK(tensor.layout() == at::kStrided && tensor.scalar_type() == type && tensor.device() == device, op, ": ",
              name, " must be a dense ", type, " tensor on ", device, ", got a ", tensor.layout(), " ",
              tensor.scalar_type(), " tensor on ", tensor.device());
}

void check_alpha(const char* op, double alpha, bool takes_softmax) {
  TORCH_CHECK((alpha == 1 && takes_softmax) || (alpha >= kMinAlpha && alpha <= 2), op, ": alpha must be ",
              takes_softmax ? "1 or " : "", "from ", kMinAlpha, " to 2, got ", std::setprecision(12), alpha);
}

void check_attention(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const AttentionOptions& options) {
  TORCH_CHECK(query.defined(), op, ": query must be a tensor, got none");
  check_type(op, "query", query);
  check_tensor(op, "query", "(batch, heads, queries, head_dim)", "(tokens, heads, head_dim)", query, query, options);
  check_tensor(op, "key", "(batch, kv_heads, keys, head_dim)", "(tokens, kv_heads, head_dim)", key, query, options);
  check_tensor(op, "value", "(batch, kv_heads, keys, value_dim)", "(tokens, kv_heads, value_dim)", value, query,
               options);
  check_cu_seqlens(op, query, options);

  const auto shape = AttentionShape::of(query, key, value, options);
  if (!options.packed()) {
    check_size(op, "key", "batch size", key.sym_size(0), "query's", shape.batch);
    check_size(op, "value", "batch size", value.sym_size(0), "query's", shape.batch);
  }
  check_size(op, "value", "number of heads", value.sym_size(1), "key's", shape.kv_heads);
  check_size(op, "value", "number of keys", value.sym_size(options.packed() ? 0 : 2), "key's", shape.keys);
  check_size(op, "key", "head_dim", key.sym_size(-1), "query's", shape.head_dim);
  check_heads(op, shape);
  check_seqlens(op, "q_seqlens", options.q_seqlens, shape, query, options);
  check_seqlens(op, "kv_seqlens", options.kv_seqlens, shape, query, options);
  check_seqlens(op, "kv_starts", options.kv_starts, shape, query, options);
  check_seqlens(op, "q_positions", options.q_positions, shape, query, options);
  check_options(op, shape, query, options);
  if (options.key_index) {
    TORCH_CHECK(!options.packed_keys(), op, ": key_index goes with padded keys or a paged cache, got packed keys");
    check_key_index(op, key.transpose(1, 2), *options.key_index);
  }
}

void check_saved(const char* op, const at::Tensor& query, const at::Tensor& key, const SavedForBackward& saved,
                 const AttentionOptions& options) {
  TORCH_CHECK(saved.support.dim() == query.dim(), op, ": support must have ", query.dim(), " dimensions ",
              options.packed() ? "(heads, queries, capacity)" : "(batch, heads, queries, capacity)", ", got sizes ",
              saved.support.sym_sizes(), "; a forward for inference saves nothing to go back from");
  const SavedSizes sizes = saved_sizes(query, key, options, saved.support.sym_size(-1));
  check_like(op, "row_state", saved.row_state, row_state_type(query), sizes.row_state, query);
  check_like(op, "support", saved.support, at::kInt, sizes.support, query);
  check_like(op, "tiles", saved.tiles, at::kInt, sizes.tiles, query);
}

void check_backward(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                    const SavedForBackward& saved, const AttentionOptions& options) {
  constexpr const char* op = "_entmax_attn_backward";
  check_attention(op, query, key, value, options);
  check_saved(op, query, key, saved, options);
  check_like(op, "grad_out", grad_out, query.scalar_type(), out_sizes(query, value), query);
  if (saved.out) check_like(op, "out", *saved.out, query.scalar_type(), out_sizes(query, value), query);
}

}  // namespace adasplash
