// Greedy continuation of a text, byte by byte: what the programs that load a model have in common.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <functional>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

// Tokens (1, n) int64 -> logits (1, n, 256).
using Model = std::function<at::Tensor(const at::Tensor& tokens)>;

// The `count` bytes that follow the prompt, each the likeliest after the last `context` bytes before it.
inline std::string ContinueGreedily(const Model& model, const std::string& prompt, int64_t count, int64_t context) {
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

// Loads a model from a path, and sets its second argument to the model's context.
using Load = std::function<Model(const std::string& path, int64_t& context)>;

// Reads what the command line and standard input say and writes the continuation to standard output.
inline int GenerateMain(int argc, char** argv, const Load& load) {
  if (argc != 3) {
    std::cerr << "Usage: " << argv[0] << " MODEL COUNT < prompt > continuation\n"
              << "Continues the bytes on standard input by COUNT bytes, each the likeliest one.\n";
    return argc == 2 && std::string(argv[1]) == "--help" ? 0 : 2;
  }
  try {
    const int64_t count = std::atoll(argv[2]);
    TORCH_CHECK(count > 0, "COUNT must be a whole number above zero, got ", argv[2]);
    const std::string prompt{std::istreambuf_iterator<char>(std::cin), {}};
    int64_t context = 0;
    const Model model = load(argv[1], context);
    std::cout << ContinueGreedily(model, prompt, count, context);
  } catch (const c10::Error& error) {
    std::cerr << "error: " << error.what_without_backtrace() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
