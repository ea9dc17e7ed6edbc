// entmax_attn_paged and entmax_cache_append on the CPU.
#include "ops/cache.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/attention.h"
#include "cpu/head.h"
#include "cpu/key_index.h"
#include "cpu/tasks.h"
#include "cpu/types.h"
#include "ops/key_index.h"

namespace adasplash {
namespace {

using namespace cpu;

void attend_cache(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const AttentionOptions& options, const at::Tensor& out) {
  // An index is of no use here: the code for few queries is bound by its products, which an index does not save.
  if (options.key_index) check_key_index_header("entmax_attn_paged", key.transpose(1, 2), *options.key_index);
  const at::Tensor nothing = at::empty({0}, query.options());
  attend(query, key, value, options, {nothing, nothing, nothing, /*out=*/{}}, out);
}

// Columns [begin, end) of one head of all tokens, in their order, so that of equal places the last one's stays.
template <typename T>
void write_columns(const at::Tensor& tokens, const at::Tensor& cache, const std::vector<Place>& places, int64_t h,
                   int64_t begin, int64_t end) {
  const T* const from = tokens.const_data_ptr<T>() + h * tokens.stride(1);
  T* const to = cache.mutable_data_ptr<T>() + h * cache.stride(2);
  const int64_t from_step = tokens.stride(2), to_step = cache.stride(3);
  const bool dense = from_step == 1 && to_step == 1;
  for (size_t t = 0; t < places.size(); ++t) {
    if (places[t].page < 0) continue;
    const T* const source = from + static_cast<int64_t>(t) * tokens.stride(0);
    T* const target = to + places[t].page * cache.stride(0) + places[t].row * cache.stride(1);
    if (dense) {
      std::memcpy(target + begin, source + begin, (end - begin) * sizeof(T));
    } else {
      for (int64_t c = begin; c < end; ++c) target[c * to_step] = source[c * from_step];
    }
  }
}

// Threads share the columns of all heads: none waits for another where two tokens have one place.
template <typename T>
void write(const at::Tensor& tokens, const at::Tensor& cache, const std::vector<Place>& places) {
  constexpr int64_t kLeastBytes = 1 << 15;  // below which a thread more costs more than it takes over
  const int64_t width = tokens.size(2), columns = tokens.size(1) * width;
  const int64_t column_bytes = static_cast<int64_t>(places.size() * sizeof(T)) + 1;
  parallel_for(columns, (kLeastBytes + column_bytes - 1) / column_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin / width; h * width < end; ++h) {
      const Interval own = Interval{begin - h * width, end - h * width}.clip(0, width);
      write_columns<T>(tokens, cache, places, h, own.begin, own.end);
    }
  });
}

void append(const at::Tensor& key, const at::Tensor& value, const at::Tensor& key_cache, const at::Tensor& value_cache,
            const at::Tensor& slots, const OptionalTensor& key_index) {
  constexpr const char* op = "entmax_cache_append";
  check_append(key, value, key_cache, value_cache, slots, key_index);
  if (key_index) check_key_index_header(op, key_cache, *key_index);
  const auto places = places_of(op, slots, key_cache);
  const at::Tensor keys = apart_from(key, key_cache, value_cache), values = apart_from(value, key_cache, value_cache);
  ADASPLASH_DISPATCH(key.scalar_type(), op, [&] {
    write<scalar_t>(keys, key_cache, places);
    write<scalar_t>(values, value_cache, places);
  });
  if (key_index) index_keys(key_cache, places, *key_index);
}

}  // namespace
}  // namespace adasplash

TORCH_LIBRARY_IMPL(adasplash, CPU, m) {
  adasplash::implement_paged<adasplash::attend_paged<adasplash::attend_cache>>(m);
  m.impl("entmax_cache_append", adasplash::append);
}
