// A model that AOTInductor compiled ahead of time (a .pt2 package), for a server. It is nothing but kernels: no
// TorchScript and no Python. Being linked with AdaSplash::adasplash is enough for it to find α-entmax attention.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <memory>

#include "server.h"

CachedModel LoadModel(const std::string& path) {
  const auto loader = std::make_shared<torch::inductor::AOTIModelPackageLoader>(path);
  const auto metadata = loader->get_metadata();  // what Python wrote into the package, and the device
  const auto fact = [&metadata](const char* name) { return std::stoll(metadata.at(name)); };
  return {
      .step =
          [loader](const Tensors& arguments, const Caches& caches) {
            Tensors inputs = arguments;  // lists are taken apart in a package
            for (const Tensors& each : caches) inputs.insert(inputs.end(), each.begin(), each.end());
            return loader->run(inputs)[0];
          },
      .layers = fact("layers"),
      .heads = fact("heads"),
      .head_size = fact("head_size"),
      .indexed = fact("indexed") != 0,
      .device = at::Device(metadata.at("AOTI_DEVICE_KEY")),
  };
}
