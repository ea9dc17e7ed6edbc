// The embedded kernels: which there are, which serves a call, and their launch.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <concepts>
#include <cstdint>
#include <span>

namespace adasplash::cuda {

// The names and their order are those of triton_src/variants.py, by way of the generated launchers.
enum class Kernel { kAttend, kMark, kGradQuery, kGradKeyValue, kActivate, kActivateGrad };
constexpr const char* kKernelNames[] = {"attend", "mark", "grad_query", "grad_key_value", "activate", "activate_grad"};
enum class Alpha { kAny, k15, k2 };

// How kernels take sequence lengths.
enum class Lengths : int32_t { kNone = 0, kPadded = 1, kPacked = 2 };

// Where kernels find alpha.
enum class AlphaFrom : int32_t { kNumber = 0, kShared = 1, kPerHead = 2 };

constexpr int32_t kUnlimited = 1 << 30;  // a window bound that never binds

struct Variant {
  const char *name, *symbol;
  Kernel kernel;
  at::ScalarType dtype;
  int pad;  // largest head size, or longest row of an activation
  Alpha alpha;
  bool marked;  // gathers what `mark` marked
  int arch;
  int block_m, block_n;  // rows of query (or of an activation), and keys, that a program works on
  int warps, shared_bytes;
  uint64_t offset, size, ptx_offset, ptx_size;  // in the embedded code; no PTX where ptx_size is 0
};

// What was built (generated; empty with ADASPLASH_ARCHS=none).
extern const std::span<const Variant> kVariants;
extern const std::span<const int> kBuiltArchs;
extern const int kPtxArch;  // 0 if there is no PTX

// An argument of exactly this type: no default, no conversion. A launcher's argument that is left out, swapped with one
// of another type or needs converting is a compile error.
template <typename T>
struct Exactly {
  template <std::same_as<T> U>
  Exactly(U v) : value(v) {}  // NOLINT(google-explicit-constructor)
  T value;
};

// Where a launch goes.
struct Place {
  int device;    // the CUDA ordinal
  void* stream;  // CUstream
};

// The current stream of a device of torch's. What finds it can be replaced, by tests: CPU tensors have no stream.
using PlaceOf = void (*)(int device, Place* place);
Place place_of(c10::Device device);
void replace_place_of(PlaceOf replacement);

// The best variant for a call on this device: the smallest head size that fits, then made for this alpha; of kernels
// that gather, the one for what is marked or not. Throws if the device's architecture was not built for.
const Variant& find_variant(Kernel kernel, at::ScalarType dtype, int64_t head_size, Alpha alpha, int device,
                            bool marked = false);

// The code that is best for alpha as a number.
inline Alpha alpha_kind(double alpha) { return alpha == 1.5 ? Alpha::k15 : alpha == 2 ? Alpha::k2 : Alpha::kAny; }

// Launches `programs` programs with packed arguments. Use the typed functions of launchers.h.
void launch(Kernel kernel, const Variant& variant, const Place& place, int64_t programs, const void* arguments,
            size_t size);

}  // namespace adasplash::cuda
