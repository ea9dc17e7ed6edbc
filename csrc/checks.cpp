#include "checks.h"

#include <c10/core/SymBool.h>
#include <c10/util/Exception.h>

#include <cmath>

namespace adasplash {
namespace {

constexpr int64_t kMaxHeadDim = 256;

void check_tensor(const char* op, const char* name, const char* shape, const at::Tensor& tensor,
                  const at::Tensor& query) {
  TORCH_CHECK(tensor.defined(), op, ": ", name, " must be a tensor, got none");
  TORCH_CHECK(tensor.layout() == at::kStrided, op, ": ", name, " must be a dense (strided) tensor, got layout ",
              tensor.layout());
  TORCH_CHECK(tensor.dim() == 4, op, ": ", name, " must have 4 dimensions ", shape, ", got ", tensor.dim(),
              " with sizes ", tensor.sym_sizes());
  TORCH_CHECK(tensor.scalar_type() == query.scalar_type(), op, ": ", name, " must have query's dtype ",
              query.scalar_type(), ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.device() == query.device(), op, ": ", name, " must be on query's device ", query.device(),
              ", got ", tensor.device());
}

void check_head_dim(const char* op, const char* what, const c10::SymInt& size) {
  TORCH_SYM_CHECK(size.sym_ge(1).sym_and(size.sym_le(kMaxHeadDim)), op, ": ", what, " must be from 1 to ", kMaxHeadDim,
                  ", got ", size);
}

// The options of the contract that no backend has yet.
void check_available(const char* op, const AttentionOptions& options) {
  const auto refuse_if = [op](bool given, const char* name) {
    TORCH_CHECK_NOT_IMPLEMENTED(!given, op, ": ", name, " is not available yet; leave it at its default");
  };
  refuse_if(options.head_alpha.has_value(), "alpha as a tensor");
  refuse_if(options.q_seqlens.has_value(), "q_seqlens");
  refuse_if(options.kv_seqlens.has_value(), "kv_seqlens");
  refuse_if(options.cu_seqlens_q.has_value() || options.cu_seqlens_k.has_value(), "cu_seqlens_q and cu_seqlens_k");
  refuse_if(options.window[0] != -1 || options.window[1] != -1, "window");
  refuse_if(options.alibi_slopes.has_value(), "alibi_slopes");
}

void check_like(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType type,
                c10::SymIntArrayRef sizes, const at::Tensor& query) {
  TORCH_CHECK(tensor.layout() == at::kStrided && tensor.device() == query.device() && tensor.scalar_type() == type, op,
              ": ", name, " must be a dense ", type, " tensor on ", query.device(), ", got a ", tensor.layout(), " ",
              tensor.scalar_type(), " tensor on ", tensor.device());
  TORCH_CHECK(tensor.sym_sizes() == sizes, op, ": ", name, " must have sizes ", sizes, ", got ", tensor.sym_sizes());
}

}  // namespace

void check_alpha(const char* op, double alpha, bool softmax_elsewhere) {
  TORCH_CHECK((alpha == 1 && softmax_elsewhere) || (alpha >= 1.01 && alpha <= 2), op, ": alpha must be ",
              softmax_elsewhere ? "1 or " : "", "from 1.01 to 2, got ", alpha);
}

void check_attention(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const AttentionOptions& options, bool softmax_elsewhere) {
  TORCH_CHECK(query.defined(), op, ": query must be a tensor, got none");
  const auto type = query.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kHalf || type == at::kBFloat16 || type == at::kDouble, op,
              ": query must be float32, float16, bfloat16 or float64, got ", type);
  check_tensor(op, "query", "(batch, heads, queries, head_dim)", query, query);
  check_tensor(op, "key", "(batch, kv_heads, keys, head_dim)", key, query);
  check_tensor(op, "value", "(batch, kv_heads, keys, value_dim)", value, query);

  const auto same_size = [op](const char* name, const char* what, const c10::SymInt& got, const char* other,
                              const c10::SymInt& expected) {
    TORCH_SYM_CHECK(got.sym_eq(expected), op, ": ", name, " must have ", other, "'s ", what, " ", expected, ", got ",
                    got);
  };
  const auto shape = AttentionShape::of(query, key, value);
  same_size("key", "batch size", key.sym_size(0), "query", shape.batch);
  same_size("value", "batch size", value.sym_size(0), "query", shape.batch);
  same_size("value", "number of heads", value.sym_size(1), "key", shape.kv_heads);
  same_size("value", "number of keys", value.sym_size(2), "key", shape.keys);
  same_size("key", "head_dim", key.sym_size(3), "query", shape.head_dim);
  check_head_dim(op, "head_dim of query and key", shape.head_dim);
  check_head_dim(op, "head_dim of value", shape.value_dim);
  TORCH_CHECK(shape.kv_heads == 0 ? shape.heads == 0 : shape.heads % shape.kv_heads == 0, op,
              ": query's number of heads must be a multiple of key's and value's, got ", shape.heads, " and ",
              shape.kv_heads);

  if (!options.head_alpha) check_alpha(op, options.alpha, softmax_elsewhere);
  if (options.scale) {
    const double scale = type == at::kDouble ? *options.scale : static_cast<float>(*options.scale);
    TORCH_CHECK(std::isfinite(scale), op, ": scale must be finite in ", row_state_type(query), ", got ",
                *options.scale);
  }
  check_available(op, options);
}

void check_backward(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                    const SavedForBackward& saved, const AttentionOptions& options) {
  constexpr const char* op = "_entmax_attn_backward";
  check_attention(op, query, key, value, options);
  TORCH_CHECK(saved.support.dim() == 4, op,
              ": support must have 4 dimensions (batch, heads, queries, capacity), got sizes ",
              saved.support.sym_sizes(), "; a forward for inference saves nothing to go back from");
  check_like(op, "grad_out", grad_out, query.scalar_type(), out_sizes(query, value), query);
  const SavedSizes sizes = saved_sizes(query, key, saved.support.sym_size(3));
  check_like(op, "row_state", saved.row_state, row_state_type(query), sizes.row_state, query);
  check_like(op, "support", saved.support, at::kInt, sizes.support, query);
  check_like(op, "tiles", saved.tiles, at::kInt, sizes.tiles, query);
}

}  // namespace adasplash
