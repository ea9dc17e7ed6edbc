// The decoder of LZMA, the format that the library keeps the GPU's code in.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace adasplash::cuda {

// The first `length` bytes of what a raw LZMA stream holds. A stream that ends or breaks before then gives fewer. It
// was encoded with lc 0, lp 0 and pb 4 (triton_src/kept.py): which kind of step comes next is told by its place within
// 16 bytes, the size of an instruction, and nothing of a byte by the one before.
std::string lzma_decode(std::span<const unsigned char> stream, size_t length);

}  // namespace adasplash::cuda
