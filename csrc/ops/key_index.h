// The index of a cache's keys: a code of 8 bits a channel for each key, from which attention of few queries bounds
// scores, so that it need not read most keys. Results have the same bits as without it.
//
// An index of a cache (blocks, page, H_kv, D) is one uint8 tensor (1 + blocks, width). Row 0 is the header. Row 1 + b
// is page b: for each key head a chunk, with the codes of the page's keys (page, R), then their scales (page,) and
// then their errors (page,), both float32. So a page's row may be copied with the page.
//
// The code of a key k is of k' = H k / sqrt(R), where H is the Hadamard matrix H[i][j] = (-1)^popcount(i & j) and k has
// zeros behind its D elements: turned so, one large channel is spread over all. Its R bytes n are from -128 to 127 and
// stand for (n + 1/2) * scale.
// For every query q, with q' = H q / sqrt(R),
//
//     |q.k - sum over j of q'[j] * (n[j] + 1/2) * scale| <= ||q|| * (error - kKeyIndexRoom * ||k||)
//
// in real arithmetic; ||k|| * kKeyIndexRoom is room for all roundings: of the turns, of products on tensor cores and of
// the bound itself. An error of infinity says nothing of its key, which is always read: of a key that is not finite, or
// too large, or of an entry that was never written.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

namespace adasplash {

constexpr float kKeyIndexRoom = 0x1p-11f;
// From this norm on a key has no code, so that squares of what is computed stay in float32's range; a key whose largest
// turned element is smaller than that has the code of zeros.
constexpr float kLargestIndexedNorm = 0x1p60f, kSmallestIndexed = 0x1p-60f;
constexpr int64_t kMaxIndexedDim = 256;

// Where things are in an index, in bytes: of numbers, or of symbols that a tracer knows.
template <typename Int>
struct BasicKeyIndexLayout {
  Int blocks, page, kv_heads, head_dim;
  int64_t turned;  // R: the least power of two from 64 on that is not less than D

  // Of a cache whose head_dim is from 1 to kMaxIndexedDim.
  static BasicKeyIndexLayout of(const at::Tensor& key_cache) {
    const auto size = [&](int64_t dim) -> Int {
      if constexpr (std::is_same_v<Int, int64_t>) {
        return key_cache.size(dim);
      } else {
        return key_cache.sym_size(dim);
      }
    };
    return {size(0), size(1), size(2), size(3), size(3) > 128 ? 256 : size(3) > 64 ? 128 : 64};
  }

  int64_t code_bytes() const { return turned; }
  // Within a chunk; the codes stand in front.
  Int scales() const { return page * code_bytes(); }
  Int errors() const { return scales() + page * 4; }
  // From a key head to the next within a row, and from a page to the next.
  Int chunk() const { return (errors() + page * 4 + 15) / 16 * 16; }
  Int width() const {
    using std::max;
    return max(Int(64), kv_heads * chunk());
  }
  // Where page b's chunk of a key head is in the whole index.
  Int chunk_of(Int block, Int kv_head) const { return (block + 1) * width() + kv_head * chunk(); }
  std::array<Int, 2> sizes() const { return {blocks + 1, width()}; }
};
using KeyIndexLayout = BasicKeyIndexLayout<int64_t>;
using SymKeyIndexLayout = BasicKeyIndexLayout<c10::SymInt>;

// The header's words, little-endian int32; zeros are behind them.
constexpr int64_t kHeaderWords = 7;
std::array<int32_t, kHeaderWords> key_index_header(const at::Tensor& key_cache);

// An empty index for a cache of these sizes, this type and device: no entry says anything.
at::Tensor make_key_index(const at::Tensor& key_cache);
// The same without its values, for Meta.
at::Tensor allocate_key_index(const at::Tensor& key_cache);

// Throws unless the index is of the sizes and on the device that one of this cache has. What it holds is not looked at.
void check_key_index(const char* op, const at::Tensor& key_cache, const at::Tensor& key_index);

// Throws unless the header is that of an index for this cache. Reads it, so the index is on the CPU.
void check_key_index_header(const char* op, const at::Tensor& key_cache, const at::Tensor& key_index);

// Throws unless the arguments of entmax_key_index_update fit. What slots and index hold is not looked at.
void check_key_index_update(const at::Tensor& key_cache, const at::Tensor& slots, const at::Tensor& key_index);

}  // namespace adasplash
