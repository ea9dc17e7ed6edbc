// run_model (torchscript | aoti) (grad | inference) MODEL INPUTS OUTPUTS
//
// Knows nothing of adasplash but that it is linked. INPUTS is a torch.save'd tuple of tensors, OUTPUTS the same of what
// the model returned for them.
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/serialization/import.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

namespace {

std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

bool python_in_this_process() {
  const auto maps = read("/proc/self/maps");
  return std::string(maps.begin(), maps.end()).find("libpython") != std::string::npos;
}

}  // namespace

int main(int, char** argv) {
  const std::string kind = argv[1], mode = argv[2], model = argv[3];
  std::vector<at::Tensor> inputs;
  const auto loaded = torch::jit::pickle_load(read(argv[4]));
  for (const auto& value : loaded.toTupleRef().elements()) {
    inputs.push_back(value.toTensor());
  }
  std::vector<at::Tensor> outputs;
  {
    std::optional<c10::InferenceMode> guard;
    if (mode == "inference") guard.emplace();
    if (kind == "aoti") {
      outputs = torch::inductor::AOTIModelPackageLoader(model).run(inputs);
    } else {
      auto module = torch::jit::load(model);
      outputs = {module.forward({inputs.begin(), inputs.end()}).toTensor()};
    }
    if (outputs[0].is_inference() != (mode == "inference")) std::cerr << "not in the mode asked for\n";
  }
  const auto bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(outputs.at(0)));
  std::ofstream(argv[5], std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  std::cout << (python_in_this_process() ? "python" : "no python") << "\n";
}
