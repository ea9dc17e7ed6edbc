// Attention by the Triton kernels of triton_src/attention: every card, type, head size and option that the GPU serves.
#pragma once

#include "cuda/implementation.h"

namespace adasplash::cuda::portable {

class Portable final : public Implementation {
 public:
  const char* name() const override { return "portable"; }
  std::optional<std::string> refusal(const CallKind& kind) const override;

  Scratch forward_scratch(const AttentionInputs& inputs, bool training) const override;
  void forward(const AttentionInputs& inputs, const ForwardOutputs& outputs) const override;

  Scratch backward_scratch(const AttentionInputs& inputs) const override;
  void backward(const AttentionInputs& inputs, const BackwardInputs& saved,
                const BackwardOutputs& outputs) const override;

  Scratch summary_scratch(const AttentionInputs& inputs) const override;
  void summarize(const AttentionInputs& inputs, const SummaryInputs& saved,
                 const SummaryOutputs& outputs) const override;
};

extern const Portable kPortable;

}  // namespace adasplash::cuda::portable
