// adasplash._C: facts about the build. It links neither torch nor libadasplash, so that Python can read it, and compare
// versions, before it loads a library whose symbols might not fit. No op lives here.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

namespace {

pybind11::tuple split(const std::string& names) {
  pybind11::list out;
  std::istringstream stream(names);
  for (std::string name; std::getline(stream, name, ',');) out.append(pybind11::str(name).attr("lower")());
  return pybind11::tuple(out);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about this build of torch-adasplash.";
  m.attr("version") = ADASPLASH_VERSION;
  m.attr("torch_version") = ADASPLASH_TORCH_VERSION;  // built against
#ifdef _GLIBCXX_USE_CXX11_ABI
  m.attr("cxx11_abi") = static_cast<bool>(_GLIBCXX_USE_CXX11_ABI);
#else
  m.attr("cxx11_abi") = true;  // another standard library, which has one ABI only
#endif
  m.attr("compiler") = ADASPLASH_COMPILER;
  m.attr("cpu_capabilities") = split(ADASPLASH_CPU_CAPABILITIES);  // instruction sets the CPU kernels were compiled for
  // Architectures with embedded kernels, as ("80", "90").
  m.attr("cuda_architectures") =
      std::string(ADASPLASH_CUDA_ARCHITECTURES) == "none" ? pybind11::tuple() : split(ADASPLASH_CUDA_ARCHITECTURES);
}
