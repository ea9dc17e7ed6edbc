// Continues a text with a TorchScript model. The model calls α-entmax attention; this program includes nothing of it,
// being linked with AdaSplash::adasplash is enough.
#include <c10/core/InferenceMode.h>
#include <torch/script.h>

#include "generate.h"

int main(int argc, char** argv) {
  const c10::InferenceMode inference;
  return GenerateMain(argc, argv, [](const std::string& path, int64_t& context) -> Model {
    auto module = torch::jit::load(path);
    module.eval();
    context = module.attr("context").toInt();
    const auto device = (*module.parameters().begin()).device();
    return
        [module, device](const at::Tensor& tokens) mutable { return module.forward({tokens.to(device)}).toTensor(); };
  });
}
