// call_op ALPHA INPUTS OUTPUTS: the op from C++, causal with scale 0.3, and its gradients for a gradient of ones; then
// the same packed, with alpha as a tensor; then with every option and a summary.
#include <ATen/ATen.h>
#include <adasplash/adasplash.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

int main(int, char** argv) {
  std::ifstream file(argv[2], std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<at::Tensor> inputs;
  const auto loaded = torch::jit::pickle_load(bytes);
  for (const auto& value : loaded.toTupleRef().elements()) {
    inputs.push_back(value.toTensor().set_requires_grad(true));
  }
  try {
    auto out = adasplash::entmax_attn(inputs[0], inputs[1], inputs[2], std::stod(argv[1]), true, 0.3);
    out.backward(at::ones_like(out));
    const auto pack = [](const at::Tensor& x) { return x.detach().transpose(1, 2).flatten(0, 1); };
    const auto ends = [](const at::Tensor& x) {
      return at::arange(0, x.size(0) * x.size(2) + 1, x.size(2), x.options().dtype(at::kInt));
    };
    const at::Tensor &query = inputs[0], &key = inputs[1], &value = inputs[2];
    const auto packed = adasplash::entmax_attn_varlen(
        pack(query), pack(key), pack(value), ends(query), ends(key), query.size(2), key.size(2),
        at::full({query.size(1)}, std::stod(argv[1]), query.options().requires_grad(false)), true, 0.3);
    const auto rows = query.options().requires_grad(false).dtype(at::kLong);
    const auto told =
        adasplash::entmax_attn_summary(query.detach(), key.detach(), value.detach(), std::stod(argv[1]), true, 0.3,
                                       at::full({query.size(0)}, 30, rows), at::full({query.size(0)}, 35, rows),
                                       {20, -1}, at::full({query.size(1)}, 0.1, rows.dtype(at::kFloat)),
                                       at::full({query.size(0)}, 3, rows), 0.25, at::full({}, 7, rows));
    const at::Tensor cache = key.detach().transpose(1, 2), index = adasplash::entmax_make_key_index(cache);
    adasplash::entmax_key_index_update(cache, at::arange(cache.size(0) * cache.size(1), rows), index);
    const at::Tensor indexed = adasplash::entmax_attn(query.detach(), key.detach(), value.detach(), std::stod(argv[1]),
                                                      true, 0.3, {}, {}, {-1, -1}, {}, {}, 0, {}, index);
    TORCH_CHECK(indexed.equal(out), "a key index changes what attention gives");
    const auto saved = torch::jit::pickle_save(c10::ivalue::Tuple::create(std::vector<c10::IValue>{
        out.detach(), query.grad(), key.grad(), value.grad(), packed, std::get<0>(told), std::get<1>(told)}));
    std::ofstream(argv[3], std::ios::binary).write(saved.data(), static_cast<std::streamsize>(saved.size()));
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << "\n";
    return 3;
  }
  std::cout << adasplash::version() << " " << adasplash::cpu_capability() << "\n";
}
