// A TorchScript model for a server. The model calls α-entmax attention; this program includes nothing of it, being
// linked with AdaSplash::adasplash is enough.
#include <torch/script.h>

#include "server.h"

CachedModel LoadModel(const std::string& path) {
  auto module = torch::jit::load(path);
  module.eval();
  const auto fact = [&module](const char* name) { return module.attr(name).toInt(); };
  return {
      .step =
          [module](const Tensors& arguments, const Tensors& key_caches, const Tensors& value_caches) mutable {
            std::vector<c10::IValue> inputs(arguments.begin(), arguments.end());
            inputs.emplace_back(c10::List<at::Tensor>(key_caches));
            inputs.emplace_back(c10::List<at::Tensor>(value_caches));
            return module.forward(std::move(inputs)).toTensor();
          },
      .layers = fact("layers"),
      .heads = fact("heads"),
      .head_size = fact("head_size"),
      .device = (*module.parameters().begin()).device(),
  };
}
