#include "cuda/driver.h"

#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <cstdlib>

namespace adasplash::cuda {
namespace {

constexpr int kOldestDriver = 12000;  // CUDA 12.0

const char* libcuda_path() {
  const char* path = std::getenv("ADASPLASH_LIBCUDA");
  return path ? path : "libcuda.so.1";
}

std::string error_text(const Driver& driver, Result result) {
  const char *name = nullptr, *text = nullptr;
  driver.cuGetErrorName(result, &name);
  driver.cuGetErrorString(result, &text);
  return std::string(name ? name : "an error") + " (" + std::to_string(result) + (text ? "), " : ")") +
         (text ? text : "");
}

Driver load() {
  void* library = dlopen(libcuda_path(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library, "adasplash: no CUDA driver: ", dlerror(),
              ". The GPU kernels need NVIDIA's driver (libcuda.so.1) on this machine");

  Driver driver;
  const char* missing = nullptr;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
    if (!function && !missing) missing = name;
  };
#define ADASPLASH_FIND(NAME) find(driver.NAME, #NAME)
  ADASPLASH_FIND(cuInit);
  ADASPLASH_FIND(cuDriverGetVersion);
  ADASPLASH_FIND(cuGetErrorName);
  ADASPLASH_FIND(cuGetErrorString);
  ADASPLASH_FIND(cuDeviceGet);
  ADASPLASH_FIND(cuDeviceGetAttribute);
  ADASPLASH_FIND(cuCtxGetCurrent);
  ADASPLASH_FIND(cuCtxSetCurrent);
  ADASPLASH_FIND(cuDevicePrimaryCtxRetain);
  ADASPLASH_FIND(cuLibraryLoadData);
  ADASPLASH_FIND(cuLibraryGetKernel);
  ADASPLASH_FIND(cuKernelSetAttribute);
  ADASPLASH_FIND(cuLaunchKernelEx);
#undef ADASPLASH_FIND

  int& version = driver.version;
  const Result told = driver.cuDriverGetVersion ? driver.cuDriverGetVersion(&version) : 0;
  TORCH_CHECK(told == 0, "adasplash: cuDriverGetVersion failed: ", missing ? "" : error_text(driver, told));
  TORCH_CHECK(!missing && version >= kOldestDriver, "adasplash: the CUDA driver is too old: it serves CUDA ",
              version / 1000, ".", version % 1000 / 10, missing ? " and has no " : "", missing ? missing : "",
              ". The GPU kernels need CUDA 12.0, that is driver 525 or newer");
  const Result result = driver.cuInit(0);
  TORCH_CHECK(result == 0, "adasplash: cuInit failed: ", error_text(driver, result));
  return driver;
}

}  // namespace

const Driver& driver() {
  static const Driver instance = load();  // tried again if it throws
  return instance;
}

void check(Result result, const char* call, const std::string& about) {
  TORCH_CHECK(result == 0, "adasplash: ", call, " failed for ", about, ": ", error_text(driver(), result));
}

}  // namespace adasplash::cuda
