// Continues a text with a model that AOTInductor compiled ahead of time (a .pt2 package), a function of tokens alone
// that keeps nothing between calls. The model calls α-entmax attention; this program includes nothing of it, being
// linked with AdaSplash::adasplash is enough.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <functional>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

namespace {

// Tokens (1, n) int64 -> logits (1, n, 256).
using Model = std::function<at::Tensor(const at::Tensor& tokens)>;

// The `count` bytes that follow the prompt, each the likeliest after the last `context` bytes before it.
std::string ContinueGreedily(const Model& model, const std::string& prompt, int64_t count, int64_t context) {
  // A model exported with a dynamic length takes 2 tokens or more: a length of 1 is a case of its own to torch.export.
  TORCH_CHECK(prompt.size() >= 2, "the prompt must hold at least 2 bytes, got ", prompt.size());
  std::vector<int64_t> bytes;
  for (unsigned char byte : prompt) bytes.push_back(byte);
  for (int64_t i = 0; i < count; ++i) {
    const size_t visible = std::min<size_t>(bytes.size(), context);
    const auto tokens = at::tensor(at::ArrayRef<int64_t>(bytes).slice(bytes.size() - visible)).unsqueeze(0);
    bytes.push_back(model(tokens).select(1, -1).argmax().item().toLong());
  }
  return {bytes.end() - count, bytes.end()};
}

void Generate(const std::string& path, int64_t count) {
  const c10::InferenceMode inference;
  const std::string prompt{std::istreambuf_iterator<char>(std::cin), {}};
  torch::inductor::AOTIModelPackageLoader loader(path);
  const auto metadata = loader.get_metadata();  // what Python wrote into the package, and the device
  const at::Device device(metadata.at("AOTI_DEVICE_KEY"));
  const Model model = [&](const at::Tensor& tokens) { return loader.run({tokens.to(device)})[0]; };
  std::cout << ContinueGreedily(model, prompt, count, std::stoll(metadata.at("context")));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "Usage: " << argv[0] << " MODEL COUNT < prompt > continuation\n"
              << "Continues the bytes on standard input by COUNT bytes, each the likeliest one.\n";
    return argc == 2 && std::string(argv[1]) == "--help" ? 0 : 2;
  }
  try {
    const int64_t count = std::atoll(argv[2]);
    TORCH_CHECK(count > 0, "COUNT must be a whole number above zero, got ", argv[2]);
    Generate(argv[1], count);
  } catch (const c10::Error& error) {
    std::cerr << "error: " << error.what_without_backtrace() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
