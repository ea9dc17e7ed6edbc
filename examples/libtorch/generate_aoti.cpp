// Continues a text with a model that AOTInductor compiled ahead of time (a .pt2 package). The model calls α-entmax
// attention; this program includes nothing of it, being linked with AdaSplash::adasplash is enough.
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <memory>

#include "generate.h"

int main(int argc, char** argv) {
  const c10::InferenceMode inference;
  return GenerateMain(argc, argv, [](const std::string& path, int64_t& context) -> Model {
    const auto loader = std::make_shared<torch::inductor::AOTIModelPackageLoader>(path);
    const auto metadata = loader->get_metadata();  // what Python wrote into the package, and the device
    context = std::stoll(metadata.at("context"));
    const at::Device device(metadata.at("AOTI_DEVICE_KEY"));
    return [loader, device](const at::Tensor& tokens) { return loader->run({tokens.to(device)})[0]; };
  });
}
