// A build without GPU kernels (ADASPLASH_ARCHS=none): what triton_src.compile would have written.
#include "cuda/embedded.h"

namespace adasplash::cuda {

extern "C" const unsigned char adasplash_cubins[] = {0};
const std::span<const Variant> kVariants;
const std::span<const int> kBuiltArchs;
const int kPtxArch = 0;

}  // namespace adasplash::cuda
