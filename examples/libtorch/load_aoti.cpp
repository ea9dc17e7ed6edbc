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
          [loader](const Tensors& arguments, const Tensors& key_caches, const Tensors& value_caches) {
            Tensors inputs = arguments;  // lists are taken apart in a package
            inputs.insert(inputs.end(), key_caches.begin(), key_caches.end());
            inputs.insert(inputs.end(), value_caches.begin(), value_caches.end());
            return loader->run(inputs)[0];
          },
      .layers = fact("layers"),
      .heads = fact("heads"),
      .head_size = fact("head_size"),
      .device = at::Device(metadata.at("AOTI_DEVICE_KEY")),
  };
}
