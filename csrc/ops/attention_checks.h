// Argument checks, shared by all backends: by sizes, types and devices only, so that they hold for fake tensors too.
// `op` is the name that a message starts with, `name` the argument's.
#pragma once

#include "ops/attention.h"

namespace adasplash {

constexpr double kMinAlpha = 1.01;              // below, powers of 1 / (alpha - 1) leave nothing of float32
constexpr double kMinAlphaRounded = 1.0078125;  // as bfloat16 holds it (LEAST_ALPHA in triton_src)

// Throws unless the tensor is of one of the four types that the ops take.
void check_type(const char* op, const char* name, const at::Tensor& tensor);

// Throws unless the tensor is dense, of this type and on this device.
void check_type_and_device(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType type,
                           at::Device device);

// Throws unless the tensor is dense, on query's device and of so many dimensions; `shape` says in words what they are.
void check_dense(const char* op, const char* name, const at::Tensor& tensor, int64_t dim, const char* shape,
                 const at::Tensor& query);

// Throws unless a size, called `what`, is what `source` has.
void check_size(const char* op, const char* name, const char* what, const c10::SymInt& got, const char* source,
                const c10::SymInt& expected);

// Throws unless the tensor is a list of lengths, or of where sequences begin and end. Their values are the backend's to
// check.
void check_lengths(const char* op, const char* name, const char* shape, const at::Tensor& lengths,
                   const at::Tensor& query);

// Throws unless head sizes are in range and the numbers of heads go together.
void check_heads(const char* op, const AttentionShape& shape);

// Throws unless the options that all forms have fit: alpha, scale, window, ALiBi's slopes and dropout.
void check_options(const char* op, const AttentionShape& shape, const at::Tensor& query,
                   const AttentionOptions& options);

// Throws unless alpha is in its range. alpha = 1 passes only where the op computes softmax or knows who does.
void check_alpha(const char* op, double alpha, bool takes_softmax);

// Throws unless the arguments fit the contract. What lengths and an alpha tensor hold is not looked at.
void check_attention(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const AttentionOptions& options);

// Throws unless what a forward for these arguments saved has the shapes that it returned.
void check_saved(const char* op, const at::Tensor& query, const at::Tensor& key, const SavedForBackward& saved,
                 const AttentionOptions& options);

// Throws unless the saved tensors and grad_out are of the shapes that the forward returned.
void check_backward(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                    const SavedForBackward& saved, const AttentionOptions& options);

}  // namespace adasplash
