// What the steps of a sequence of few queries (few_block.h) leave for each other.
#pragma once

#include "cpu/head.h"

namespace adasplash::cpu {

// A sequence goes this way if it has at most so many queries, and so many with those of all query heads that share a
// key head: the GPU's rule (cuda/few.cpp). Its own lengths decide, so that no bit depends on what else is in the batch.
constexpr int64_t kMostFewQueries = 16, kMostFewRows = 64;

// Blocks of keys in a piece, which is a task; few enough that threads have work where keys are some thousands.
constexpr int64_t kPieceBlocks = 2;

// Of some query heads, row by row: queries of the first head, queries of the next one.
template <typename A>
struct FewRows {
  struct Row {
    double total;  // of its weights
    bool dense;    // weights stand in the place of its z, and its values are not summed yet
  };

  // From row to row of a block of z: rows a power of two apart would share few sets of the cache.
  static constexpr int64_t kStride = kKeyBlock + 64;

  FewRows() = default;
  ADASPLASH_INLINE FewRows(Interval keys, int64_t value_dim)
      : keys(keys), blocks((keys.size() + kKeyBlock - 1) / kKeyBlock), value_dim(value_dim) {}

  // What `count` rows take, for which `memory` then has room; 64-byte aligned.
  ADASPLASH_INLINE int64_t bytes(int64_t count) const { return FewRows(*this).place(count, nullptr); }
  ADASPLASH_INLINE int64_t place(int64_t count, char* memory) {
    int64_t used = 0;
    const auto take = [&]<typename U>(U*& piece, int64_t size) {
      if (memory != nullptr) piece = reinterpret_cast<U*>(memory + used);
      used += (size * static_cast<int64_t>(sizeof(U)) + 63) / 64 * 64;
    };
    count_ = count;
    take(z_, blocks * count * kStride);
    take(block_max_, count * blocks);
    take(values_, count * pieces() * value_dim);
    take(rows_, count);
    return used;
  }
  // These but for the first `count` rows.
  ADASPLASH_INLINE FewRows behind(int64_t count) const {
    FewRows rest = *this;
    rest.z_ += count * kStride;
    rest.block_max_ += count * blocks;
    rest.values_ += count * pieces() * value_dim;
    rest.rows_ += count;
    return rest;
  }

  ADASPLASH_INLINE Interval keys_of(int64_t block) const {
    return keys.clip(keys.begin + block * kKeyBlock, keys.begin + (block + 1) * kKeyBlock);
  }
  ADASPLASH_INLINE int64_t pieces() const { return (blocks + kPieceBlocks - 1) / kPieceBlocks; }
  ADASPLASH_INLINE int64_t first_block(int64_t piece) const { return std::min(piece * kPieceBlocks, blocks); }

  // kKeyBlock numbers, -inf where the row does not see the key, or none is there.
  ADASPLASH_INLINE A* z(int64_t r, int64_t block) const { return z_ + (block * count_ + r) * kStride; }
  ADASPLASH_INLINE A& block_max(int64_t r, int64_t block) const { return block_max_[r * blocks + block]; }
  // The weighted values of a piece's keys.
  ADASPLASH_INLINE A* values(int64_t r, int64_t piece) const { return values_ + (r * pieces() + piece) * value_dim; }
  ADASPLASH_INLINE Row& row(int64_t r) const { return rows_[r]; }

  Interval keys{0, 0};  // that any of the rows sees
  int64_t blocks = 0, value_dim = 0;

 private:
  int64_t count_ = 0;  // of all rows
  A *z_ = nullptr, *block_max_ = nullptr, *values_ = nullptr;
  Row* rows_ = nullptr;
};

}  // namespace adasplash::cpu
