// Ops whose schema is settled but which no backend has yet: each says so by name.
#include <torch/library.h>

namespace {

void refuse(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.operator_name(), " is not available yet");
}

}  // namespace

TORCH_LIBRARY_IMPL(adasplash, CompositeImplicitAutograd, m) {
  for (const char* name : {"entmax", "entmax.tensor_alpha"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<refuse>());
  }
}
