// The CUDA driver, found at run time: no CUDA header, no CUDA library to link. What stands here is the part of the
// driver's ABI that the launches need.
#pragma once

#include <cstddef>
#include <string>

namespace adasplash::cuda {

using Result = int;      // CUresult
using Context = void*;   // CUcontext
using Library = void*;   // CUlibrary: code loaded once, valid on every device
using Function = void*;  // CUkernel, which launches as a CUfunction

// CUlaunchAttribute: an id, and a value of 64 bytes.
struct alignas(8) LaunchAttribute {
  int id, unused = 0;
  union {
    int allowed;
    char room[64];
  } value;
};
static_assert(sizeof(LaunchAttribute) == 72);
constexpr int kProgrammaticStreamSerialization = 6;  // CUlaunchAttributeID: may begin while the launch before runs

// CUlaunchConfig
struct LaunchConfig {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  const LaunchAttribute* attributes = nullptr;
  unsigned attribute_count = 0;
};

constexpr int kComputeCapabilityMajor = 75, kComputeCapabilityMinor = 76;  // CUdevice_attribute
constexpr int kMaxDynamicSharedBytes = 8;                                  // CUfunction_attribute
constexpr int kSharedBytesByDefault = 48 * 1024;  // more is to be asked for, kernel by kernel and device by device

// From this version on (CUDA 12.3) captured graphs know launches that may begin early.
constexpr int kOverlapsSince = 12030;

// The functions, by the names that the driver exports. cuLibraryLoadData is the youngest: CUDA 12.0, driver 525.
struct Driver {
  int version = 0;  // of CUDA, 1000 * major + 10 * minor
  Result (*cuInit)(unsigned flags);
  Result (*cuDriverGetVersion)(int* version);
  Result (*cuGetErrorName)(Result, const char** name);
  Result (*cuGetErrorString)(Result, const char** text);
  Result (*cuDeviceGet)(int* device, int ordinal);
  Result (*cuDeviceGetAttribute)(int* value, int attribute, int device);
  Result (*cuCtxGetCurrent)(Context*);
  Result (*cuCtxSetCurrent)(Context);
  Result (*cuDevicePrimaryCtxRetain)(Context*, int device);
  Result (*cuLibraryLoadData)(Library*, const void* code, void* jit_options, void* jit_values, unsigned jit_count,
                              void* options, void* values, unsigned count);
  Result (*cuLibraryGetKernel)(Function*, Library, const char* name);
  Result (*cuKernelSetAttribute)(int attribute, int value, Function, int device);
  Result (*cuLaunchKernelEx)(const LaunchConfig*, Function, void** parameters, void** extra);
};

// Loads libcuda on the first call, ADASPLASH_LIBCUDA in the environment or libcuda.so.1; throws where there is none, or
// one that is too old. A failed attempt is made again by the next call.
const Driver& driver();

// Throws unless the call succeeded; names it, what it was about, and what the driver says.
void check(Result result, const char* call, const std::string& about);

}  // namespace adasplash::cuda
