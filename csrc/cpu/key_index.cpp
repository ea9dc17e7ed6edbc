// The code of a key (ops/key_index.h), and entmax_key_index_update on the CPU.
#include "cpu/key_index.h"

#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/types.h"
#include "ops/key_index.h"

namespace adasplash {
namespace cpu {
namespace {

// x = H x / sqrt(n), in n log n steps.
template <typename A>
void turn(A* x, int64_t n) {
  for (int64_t half = 1; half < n; half *= 2) {
    for (int64_t first = 0; first < n; first += 2 * half) {
      for (int64_t i = first; i < first + half; ++i) {
        const A one = x[i], other = x[i + half];
        x[i] = one + other;
        x[i + half] = one - other;
      }
    }
  }
  const A factor = 1 / std::sqrt(static_cast<A>(n));
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

float rounded_up(double x) {
  const float nearest = static_cast<float>(x);
  return nearest < x ? std::nextafter(nearest, std::numeric_limits<float>::infinity()) : nearest;
}

struct Entry {
  int8_t code[kMaxIndexedDim];
  float scale, error;
};

// Of a key of `size` elements, each a `step` from the next. Sums are in double, so that only turning rounds in A.
template <typename T>
Entry entry_of(const T* key, int64_t size, int64_t step, int64_t turned) {
  using A = Accumulate<T>;
  A x[kMaxIndexedDim] = {};
  double squares = 0;
  for (int64_t c = 0; c < size; ++c) {
    x[c] = static_cast<A>(key[c * step]);
    squares += static_cast<double>(x[c]) * x[c];
  }
  const double norm = std::sqrt(squares), room = kKeyIndexRoom * norm;
  Entry entry;
  std::fill_n(entry.code, turned, int8_t{0});
  entry.scale = 0;
  if (!(norm < kLargestIndexedNorm)) {  // NaN too
    entry.error = std::numeric_limits<float>::infinity();
    return entry;
  }
  turn(x, turned);
  A largest = 0;
  for (int64_t i = 0; i < turned; ++i) largest = std::max(largest, std::abs(x[i]));
  if (largest < kSmallestIndexed) {
    entry.error = rounded_up(std::sqrt(static_cast<double>(turned)) * largest + room);
    return entry;
  }
  entry.scale = static_cast<float>(largest / 128);
  double error = 0;
  for (int64_t i = 0; i < turned; ++i) {
    const A steps = x[i] / entry.scale;
    // From -128 to 128 but for roundings, which the ends take.
    const int number = std::clamp(static_cast<int>(std::floor(steps)), -128, 127);
    const double left = steps - (number + A(0.5));
    entry.code[i] = static_cast<int8_t>(number);
    error += left * left;
  }
  entry.error = rounded_up(entry.scale * std::sqrt(error) + room);
  return entry;
}

void store(const Entry& entry, const KeyIndexLayout& layout, int64_t row, uint8_t* chunk) {
  std::memcpy(chunk + row * layout.code_bytes(), entry.code, layout.code_bytes());
  std::memcpy(chunk + layout.scales() + row * sizeof(float), &entry.scale, sizeof(float));
  std::memcpy(chunk + layout.errors() + row * sizeof(float), &entry.error, sizeof(float));
}

}  // namespace

void index_keys(const at::Tensor& key_cache, const std::vector<Place>& places, const at::Tensor& key_index) {
  constexpr int64_t kEntries = 32;  // of a thread; fewer cost less than it does
  const auto layout = KeyIndexLayout::of(key_cache);
  std::vector<Place> own;  // each once, so that no two threads make one entry
  std::copy_if(places.begin(), places.end(), std::back_inserter(own), [](const Place& p) { return p.page >= 0; });
  std::sort(own.begin(), own.end());
  own.erase(std::unique(own.begin(), own.end()), own.end());
  uint8_t* const index = key_index.mutable_data_ptr<uint8_t>();
  ADASPLASH_DISPATCH(key_cache.scalar_type(), "adasplash key index", [&] {
    const scalar_t* const keys = key_cache.const_data_ptr<scalar_t>();
    const int64_t heads = layout.kv_heads, count = static_cast<int64_t>(own.size()) * heads;
    parallel_for(count, kEntries, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto [page, row] = own[i / heads];
        const scalar_t* const key =
            keys + page * key_cache.stride(0) + row * key_cache.stride(1) + i % heads * key_cache.stride(2);
        store(entry_of(key, layout.head_dim, key_cache.stride(3), layout.turned), layout, row,
              index + layout.chunk_of(page, i % heads));
      }
    });
  });
}

}  // namespace cpu

namespace {

void update(const at::Tensor& key_cache, const at::Tensor& slots, const at::Tensor& key_index) {
  constexpr const char* op = "entmax_key_index_update";
  check_key_index_update(key_cache, slots, key_index);
  check_key_index_header(op, key_cache, key_index);
  cpu::index_keys(key_cache.resolve_neg(), cpu::places_of(op, slots, key_cache), key_index);
}

}  // namespace
}  // namespace adasplash

TORCH_LIBRARY_IMPL(adasplash, CPU, m) { m.impl("entmax_key_index_update", adasplash::update); }
