// The options that are tensors, as the CPU reads them: lengths, slots, alpha and slopes. Here what they hold is
// checked; sizes and types have been before.
#pragma once

#include <ATen/core/Tensor.h>

#include <compare>
#include <cstdint>
#include <vector>

#include "cpu/dropout.h"
#include "ops/attention.h"

namespace adasplash::cpu {

// The numbers of a tensor of any type and strides, negated views among them.
template <typename T>
std::vector<T> values_of(const at::Tensor& t) {
  const at::Tensor dense = t.to(c10::CppTypeToScalarType<T>::value).resolve_neg().contiguous();
  const T* data = dense.const_data_ptr<T>();
  return {data, data + dense.numel()};
}

// One sequence of a call: its own lengths, and where its rows are in tensors of the shape (entries, heads, rows,
// width), as `by_head` gives them.
struct Sequence {
  int64_t entry = 0;
  int64_t first_query = 0, queries = 0;
  int64_t first_key = 0, keys = 0;
  int64_t first_tile_row = 0;
  int64_t first_place = 0;  // of the first query, counted from the first key
};

// Query, key, value or what is shaped like them, as (entries, heads, rows, width). The packed form is one entry, whose
// sequences stand behind each other.
at::Tensor by_head(const at::Tensor& t, bool packed);

// Throws where lengths contradict each other or the tensors.
std::vector<Sequence> sequences_of(const at::Tensor& query, const at::Tensor& key, const AttentionOptions& options);

// The block table, row by row; empty where keys are in no pages. Throws where a page that holds keys of a sequence is
// not in the cache; entries behind these may be anything.
std::vector<int64_t> pages_of(const std::vector<Sequence>& sequences, const at::Tensor& key,
                              const AttentionOptions& options);

// Where a key is in a cache; -1 as page for a slot that is skipped.
struct Place {
  int64_t page, row;

  auto operator<=>(const Place&) const = default;
};

// Where slots of a cache (blocks, page, H_kv, D) are. Throws where one is neither in it nor -1.
std::vector<Place> places_of(const char* op, const at::Tensor& slots, const at::Tensor& cache);

// One a head. Throws where a value of the tensor is not in range.
std::vector<double> alphas_of(int64_t heads, const AttentionOptions& options);

// Dropout but for the head and the sequence. Reads the seed.
Dropout dropout_of(const AttentionOptions& options);

// What dropout counts each sequence from, four numbers each: its own, its first head, query and key.
std::vector<int64_t> dropout_origins_of(int64_t sequences, const AttentionOptions& options);

// One a sequence and head, sequence by sequence; empty without ALiBi.
std::vector<double> slopes_of(int64_t sequences, int64_t heads, const AttentionOptions& options);

}  // namespace adasplash::cpu
