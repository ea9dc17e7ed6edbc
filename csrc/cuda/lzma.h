// The decoder of LZMA, the format that the library keeps the GPU's code in.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace adasplash::cuda {

// The first `length` bytes of what a raw LZMA stream holds, encoded with lc 0, lp 0 and pb 4: what is expected of a byte
// depends on its place in 16, the size of an instruction, and not on the byte before. A stream that ends or breaks before
// then gives fewer.
std::string lzma_decode(std::span<const unsigned char> stream, size_t length);

}  // namespace adasplash::cuda
