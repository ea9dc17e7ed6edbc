// A TorchScript model for a server. Being linked with AdaSplash::adasplash is enough for it to find α-entmax attention.
#include <torch/script.h>

#include "server.h"

CachedModel LoadModel(const std::string& path) {
  auto module = torch::jit::load(path);
  module.eval();
  const auto fact = [&module](const char* name) { return module.attr(name); };
  return {
      .step =
          [module](const Tensors& arguments, const Caches& caches) mutable {
            std::vector<c10::IValue> inputs(arguments.begin(), arguments.end());
            for (const Tensors& each : caches) inputs.emplace_back(c10::List<at::Tensor>(each));
            return module.forward(std::move(inputs)).toTensor();
          },
      .layers = fact("layers").toInt(),
      .heads = fact("heads").toInt(),
      .head_size = fact("head_size").toInt(),
      .indexed = fact("indexed").toBool(),
      .device = (*module.parameters().begin()).device(),
  };
}
