// The embedded kernels: which there are, which serves a call, and their launch.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <concepts>
#include <cstdint>
#include <iterator>
#include <span>

#include "kernels_library.h"

namespace adasplash::cuda {

// KERNELS of triton_src/variants.py. The functions of launchers.h and the table of variants, both generated from there,
// say Kernel::kName, so a kernel that is missing here does not compile. kKernelNames, for messages, is in this order.
enum class Kernel {
  kAttend,
  kMark,
  kGradQuery,
  kGradKeyValue,
  kCountSupport,
  kScoreFew,
  kSolveFew,
  kWeighFew,
  kJoinFew,
  kAttendPaged,
  kScoreFewPaged,
  kSolveFewPaged,
  kWeighFewPaged,
  kScoreFewEven,
  kWeighFewEven,
  kTurnQueries,
  kScanIndex,
  kScanIndexEven,
  kScoreFound,
  kScoreFoundEven,
  kAppend,
  kIndexKeys,
  kActivate,
  kActivateGrad
};
constexpr const char* kKernelNames[] = {"attend",          "mark",
                                        "grad_query",      "grad_key_value",
                                        "count_support",   "score_few",
                                        "solve_few",       "weigh_few",
                                        "join_few",        "attend_paged",
                                        "score_few_paged", "solve_few_paged",
                                        "weigh_few_paged", "score_few_even",
                                        "weigh_few_even",  "turn_queries",
                                        "scan_index",      "scan_index_even",
                                        "score_found",     "score_found_even",
                                        "append",          "index_keys",
                                        "activate",        "activate_grad"};
static_assert(std::size(kKernelNames) == static_cast<size_t>(Kernel::kActivateGrad) + 1);

// The alphas that kernels have code of their own for (ALPHAS of triton_src/variants.py; the generated table of variants
// says AlphaCode::kName); kAny is the code that takes alpha at run time.
enum class AlphaCode { kAny, k15, k2 };

// How kernels are given the lengths of sequences: not at all, one length a sequence, the packed form's offsets, or
// where each sequence of a padded batch starts and ends. The numbers are those of LENGTHS_* in
// triton_src/lib/visibility.py.
enum class LengthsKind : int32_t { kNone = 0, kPadded = 1, kPacked = 2, kBounds = 3 };

// Where kernels find alpha: a number among their arguments, or in memory, one for all heads or one for each. The
// numbers are those of ALPHA_NUMBER, ALPHA_SHARED and ALPHA_PER_HEAD in triton_src/lib/entmax.py.
enum class AlphaSource : int32_t { kNumber = 0, kShared = 1, kPerHead = 2 };

// A window bound that never binds: UNLIMITED in triton_src/lib/visibility.py. Positions are 32 bits wide there, so it
// is smaller than the CPU's (cpu/head.h).
constexpr int32_t kUnlimited = 1 << 30;

// Where some code of a variant is: in `size` bytes of the embedded code from `offset` on, which decoded (cuda/lzma.h)
// have `length` bytes of it `at` this place. Zeros where there is none.
struct Packed {
  uint64_t offset, size, at, length;
};

// One kernel, compiled for one choice of types, sizes and architecture.
struct Variant {
  const char *name, *symbol;
  Kernel kernel;
  at::ScalarType dtype;
  int block_d;  // largest head size that it serves, or longest row of an activation
  AlphaCode alpha;
  bool gather;  // visits the keys or rows that are marked, instead of walking whole tiles
  int arch;
  int block_m, block_n;  // rows of query (or of an activation), and keys, that a program works on
  int warps, shared_bytes;
  bool follows;  // waits for the launch before to end, so that it may be launched before that has
  Packed cubin, ptx;
};

// What was built (generated; empty with ADASPLASH_ARCHS=none): cubins.bin, by way of the assembler, and what is in it.
extern "C" ADASPLASH_BETWEEN_LIBRARIES const unsigned char adasplash_cubins[];
ADASPLASH_BETWEEN_LIBRARIES extern const std::span<const Variant> kVariants;
ADASPLASH_BETWEEN_LIBRARIES extern const std::span<const int> kBuiltArchs;
ADASPLASH_BETWEEN_LIBRARIES extern const int kPtxArch;  // 0 if there is no PTX

// An argument of exactly this type: no default, no conversion. So it is a compile error to leave out a kernel's
// argument, to swap it with one of another type, or to give it a value that would have to be converted.
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

// The best variant for a call on this device: of those whose block_d the head size (or the activation's row) fits, the
// smallest; of these the one made for this alpha, if there is one. Some kernels have code that gathers and code that
// does not: `gather` says which. Throws if the device's architecture was not built for.
const Variant& find_variant(Kernel kernel, at::ScalarType dtype, int64_t head_size, AlphaCode alpha, int device,
                            bool gather = false);

// The code that is best for alpha as a number.
inline AlphaCode alpha_code(double alpha) {
  return alpha == 1.5 ? AlphaCode::k15 : alpha == 2 ? AlphaCode::k2 : AlphaCode::kAny;
}

// Launches `programs` programs with packed arguments. Use the typed functions of launchers.h.
void launch(Kernel kernel, const Variant& variant, const Place& place, int64_t programs, const void* arguments,
            size_t size);

}  // namespace adasplash::cuda
