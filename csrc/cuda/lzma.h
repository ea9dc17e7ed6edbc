// The decoder of LZMA, the format that the library's PTX is kept in.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace adasplash::cuda {

// The first `length` bytes of what a raw LZMA stream holds, encoded with the usual parameters: lc 3, lp 0, pb 2. A
// stream that ends or breaks before then gives fewer.
std::string lzma_decode(std::span<const unsigned char> stream, size_t length);

}  // namespace adasplash::cuda
