// The decoder of LZMA, the format that the library keeps the GPU's code in.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace adasplash::cuda {

// The first `length` bytes of what a raw LZMA stream holds. A stream that ends or breaks before then gives fewer. It
// was encoded with lc 0, lp 0 and pb 4 (triton_src/kept.py): chances of steps follow the place within 16 bytes, the
// size of an instruction, and those of a byte's bits not the byte before.
std::string lzma_decode(std::span<const unsigned char> stream, size_t length);

}  // namespace adasplash::cuda
