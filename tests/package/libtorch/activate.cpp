// activate INPUTS OUTPUTS: the activation of (x, alpha) along dimension 1, alpha as a number (1.25) and as it is given,
// and the gradients of x and alpha for a gradient of x.
#include <ATen/ATen.h>
#include <adasplash/adasplash.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iterator>
#include <vector>

int main(int, char** argv) {
  std::ifstream file(argv[1], std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto loaded = torch::jit::pickle_load(bytes);
  const auto x = loaded.toTupleRef().elements()[0].toTensor().set_requires_grad(true);
  const auto alpha = loaded.toTupleRef().elements()[1].toTensor().set_requires_grad(true);
  const auto fixed = adasplash::entmax(x, 1.25, 1), learned = adasplash::entmax(x, alpha, 1);
  learned.backward(x.detach());
  const auto saved =
      torch::jit::pickle_save(c10::ivalue::Tuple::create(fixed.detach(), learned.detach(), x.grad(), alpha.grad()));
  std::ofstream(argv[2], std::ios::binary).write(saved.data(), static_cast<std::streamsize>(saved.size()));
}
