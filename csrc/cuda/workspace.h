// Memory that an implementation needs only while it runs. It is declared once, as a list of named pieces. From that
// list follow both the size that calls are cut into parts by (part.h) and, of one allocation, a typed pointer to each
// piece.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>

#include "ops/attention.h"

namespace adasplash::cuda {

// How many there are, in a call or a part of one, of the things that scratch is needed for.
struct Extents {
  // Pairs of a query tile and a key tile, of all heads: laid out by query tiles, each of which has room for a pair with
  // any key tile; and laid out so or by key tiles, whichever are more.
  int64_t query_tile_pairs = 0, tile_pairs = 0;
  int64_t query_tile_rows = 0, tile_rows = 0;  // of all heads: of queries; of queries or of keys, whichever are more
  int64_t state_rows = 0;                      // rows of row_state
  int64_t kv_heads = 0;

  // Of the sequences of few queries that there may be (portable/few.h), with rows of key heads as attention/few.py
  // counts them: rows; numbers for each row and tile of keys; for each row and split of its keys; and block_d numbers
  // for each of these; and numbers for each block of rows and each of its keys.
  int64_t few_rows = 0, few_tiles = 0, few_splits = 0, few_values = 0, few_found = 0;

  // Of the queries, or of the keys, of all heads: how many tile rows they have, and the most rows of one sequence.
  struct Side {
    int64_t tile_rows, max_seqlen;
  };
  // Only what follows from the tiles.
  static Extents of_tiles(const Side& queries, const Side& keys) {
    const int64_t query_tile_pairs = queries.tile_rows * count_tiles(keys.max_seqlen),
                  key_tile_pairs = keys.tile_rows * count_tiles(queries.max_seqlen);
    return {
        .query_tile_pairs = query_tile_pairs,
        .tile_pairs = std::max(query_tile_pairs, key_tile_pairs),
        .query_tile_rows = queries.tile_rows,
        .tile_rows = std::max(queries.tile_rows, keys.tile_rows),
    };
  }
};

// `count` elements of type T for each of one of the extents.
template <typename T>
struct Piece {
  const char* name;
  int64_t count;
  int64_t Extents::* per;
};

// The pieces that are needed at the same time, in the order in which they lie in memory.
class Scratch {
 public:
  template <typename... T>
  constexpr Scratch(const Piece<T>&... pieces)
      : entries_{Entry{pieces.name, static_cast<int64_t>(sizeof(T)) * pieces.count, pieces.per}...} {}

  // With the pieces of another one behind its own.
  Scratch& operator+=(const Scratch& other) {
    auto* const end = std::find_if(entries_.begin(), entries_.end(), [](const Entry& entry) { return !entry.per; });
    const auto count =
        std::find_if(other.entries_.begin(), other.entries_.end(), [](auto& entry) { return !entry.per; }) -
        other.entries_.begin();
    TORCH_INTERNAL_ASSERT(count <= entries_.end() - end);
    std::copy_n(other.entries_.begin(), count, end);
    return *this;
  }

  // Its size in words of 32 bits. Every piece starts at a multiple of kAlignedWords.
  int64_t words(const Extents& extents) const {
    int64_t sum = 0;
    for (const Entry& entry : entries_) sum += entry.words(extents);
    return sum;
  }

  // Where a piece is: its first word, and how many it has; none for a piece that is not among these.
  struct Range {
    int64_t first = 0, words = 0;
  };
  Range find(std::string_view name, const Extents& extents) const {
    int64_t first = 0;
    for (const Entry& entry : entries_) {
      const int64_t words = entry.words(extents);
      if (entry.name == name) return {first, words};
      first += words;
    }
    return {};
  }

 private:
  struct Entry {
    std::string_view name;
    int64_t bytes_each = 0;
    int64_t Extents::* per = nullptr;  // null for entries after the last piece

    int64_t words(const Extents& extents) const {
      constexpr int64_t kBytes = 4 * kAlignedWords;
      return per ? (bytes_each * extents.*per + kBytes - 1) / kBytes * kAlignedWords : 0;
    }
  };

  static constexpr size_t kMostPieces = 24;
  static constexpr int64_t kAlignedWords = 4;  // ALIGNMENT of triton_src/spec.py
  std::array<Entry, kMostPieces> entries_;
};

// The memory itself. One allocation: allocating is much of what the host does for a small call.
class Workspace {
 public:
  // On the device of `like`.
  Workspace(const Scratch& scratch, const Extents& extents, const at::Tensor& like)
      : scratch_(scratch),
        extents_(extents),
        memory_(at::empty({scratch.words(extents)}, like.options().dtype(at::kInt))),
        words_(memory_.mutable_data_ptr<int32_t>()) {}

  // A piece for a kernel that writes it, and for one that only reads what another wrote. Null for a piece that the
  // scratch does not have, which the kernels then do not touch.
  template <typename T>
  T* write(const Piece<T>& piece) const {
    const auto [first, words] = scratch_.find(piece.name, extents_);
    return words ? reinterpret_cast<T*>(words_ + first) : nullptr;
  }
  template <typename T>
  const T* read(const Piece<T>& piece) const {
    return write(piece);
  }

  template <typename T>
  void zero(const Piece<T>& piece) const {
    const auto [first, words] = scratch_.find(piece.name, extents_);
    memory_.narrow(0, first, words).zero_();
  }

 private:
  const Scratch scratch_;
  const Extents extents_;
  const at::Tensor memory_;
  int32_t* const words_;
};

}  // namespace adasplash::cuda
