// The seam between the attention ops (attention.cpp) and the code that computes them on the GPU. Each way to compute
// attention is an Implementation in a folder of its own; implementation.cpp lists them in order of preference, and the
// first that serves a call computes it.
//
// What a forward saves is the same for all, as docs/contract.md says: row_state, tiles, the output, and in the places
// of support marks of keys, where it has any. So any implementation's backward takes what any implementation's forward
// left, and each direction is chosen for itself.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <optional>
#include <string>

#include "cuda/workspace.h"
#include "ops/attention.h"

namespace adasplash::cuda {

// What decides which implementation computes a call. No tensor is here, and of those in the options only whether they
// are given counts: a sequence must be computed by the same code, to the same bits, whatever else is in its batch.
struct CallKind {
  c10::Device device;  // whose card it is
  at::ScalarType dtype;
  int64_t head_dim, value_dim;
  const AttentionOptions& options;
};

// Where a part of a call stands in it: the numbers of its first batch entry and of its first query head.
struct FirstHead {
  int64_t entry = 0, head = 0;
};

// The inputs of an op, or those of a part of one (part.h). They refer to what lives as long as the call.
struct AttentionInputs {
  const char* op;  // for messages
  const at::Tensor &query, &key, &value;
  const AttentionOptions& options;
  FirstHead first = {};
};

// Where the forward writes: every row that a sequence has. Tokens of the packed form that no sequence has, and tile
// rows that no query has, are zero already, and all of support is kSupportOverflow. row_state, support and tiles are
// undefined in inference, where nobody wants them.
struct ForwardOutputs {
  const at::Tensor &out, &row_state, &support, &tiles;
};

// What the backward starts from, beside the inputs. row_state, support and tiles are contiguous, or parts of such.
struct BackwardInputs {
  const at::Tensor &grad_out, &row_state, &support, &tiles;
  const OptionalTensor& out;  // the forward's output, where it was kept
};

// Where the backward writes, as the forward does; gradients of keys before kv_starts are zero already, too. alpha_terms
// (of row_state's shape without its last dimension, empty unless the gradient of alpha is asked for) are what each row
// adds to the gradient of its alpha.
struct BackwardOutputs {
  const at::Tensor &grad_query, &grad_key, &grad_value, &alpha_terms;
};

// What a summary starts from, contiguous or parts of such, and where it writes: support_size and largest_weight as the
// forward writes its rows; to the two numbers of each sequence and head in tile_counts, a part of (B, H, 2), it adds.
struct SummaryInputs {
  const at::Tensor &row_state, &tiles;
};
struct SummaryOutputs {
  const at::Tensor &support_size, &largest_weight, &tile_counts;
};

class Implementation {
 public:
  // For ADASPLASH_CUDA_IMPL and messages.
  virtual const char* name() const = 0;

  // Why it does not serve calls of a kind, to follow a colon in a message; nothing if it serves them.
  virtual std::optional<std::string> refusal(const CallKind& kind) const = 0;

  // The scratch of a call, which says what parts it is cut into. Each part then allocates its own.
  virtual Scratch forward_scratch(const AttentionInputs& inputs, bool training) const = 0;
  virtual Scratch backward_scratch(const AttentionInputs& inputs) const = 0;
  virtual Scratch summary_scratch(const AttentionInputs& inputs) const = 0;

  // Launches the kernels of a part on the current stream of its device, which is the current device. There is
  // something to write: `out` is not empty, and there are heads.
  virtual void forward(const AttentionInputs& inputs, const ForwardOutputs& outputs) const = 0;
  virtual void backward(const AttentionInputs& inputs, const BackwardInputs& saved,
                        const BackwardOutputs& outputs) const = 0;
  virtual void summarize(const AttentionInputs& inputs, const SummaryInputs& saved,
                         const SummaryOutputs& outputs) const = 0;

 protected:
  ~Implementation() = default;  // they are constants of the library
};

// The implementation that computes calls of a kind: the forced one, or the first that serves them. Throws if none does,
// or if the forced one does not, and says why.
const Implementation& choose_implementation(const char* op, const CallKind& kind);
const Implementation& implementation_for(const AttentionInputs& inputs);

}  // namespace adasplash::cuda
