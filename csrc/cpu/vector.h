// Short vector helpers over at::vec, for rows of any length and any of the four types. Included only by files that are
// compiled once for each instruction set; CPU_CAPABILITY names the set and keeps their symbols apart.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/head.h"
#include "cpu/kernels.h"

namespace adasplash::cpu {
inline namespace CPU_CAPABILITY {

template <typename A>
using Vec = at::vec::Vectorized<A>;
template <typename A>
constexpr int64_t kLanes = Vec<A>::size();
template <typename A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <typename A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

// The lanes of a comparison's result that hold true, as bits.
template <typename A>
inline uint32_t true_lanes(const Vec<A>& comparison) {
  return ~static_cast<uint32_t>(comparison.zero_mask()) & static_cast<uint32_t>((uint64_t{1} << kLanes<A>)-1);
}

template <typename A>
inline A sum_lanes(const Vec<A>& v) {
  return at::vec::vec_reduce_all<A>([](const Vec<A>& x, const Vec<A>& y) { return x + y; }, v);
}

template <typename A>
inline A max_lanes(const Vec<A>& v) {  // NaN where any lane is
  return at::vec::vec_reduce_all<A>([](const Vec<A>& x, const Vec<A>& y) { return at::vec::maximum(x, y); }, v);
}

// The n <= kLanes elements at p in type A, zeros behind them.
template <typename A, typename T>
inline Vec<A> load(const T* p, int64_t n = kLanes<A>) {
  if constexpr (std::is_same_v<A, T>) {
    return n == kLanes<A> ? Vec<A>::loadu(p) : Vec<A>::loadu(p, n);
  } else {
    Vec<A> v;
    if (n == kLanes<A>) {
      at::vec::load_to_float(p, v);
    } else {
      T padded[kLanes<A>] = {};
      std::copy_n(p, std::min(n, kLanes<A>), padded);
      at::vec::load_to_float(padded, v);
    }
    return v;
  }
}

template <typename A>
inline void store(const Vec<A>& v, A* p, int64_t n = kLanes<A>) {
  v.store(p, static_cast<int>(n));
}

// Calls f(column, lanes) over a row of n elements.
template <typename A, typename F>
inline void for_lanes(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, kLanes<A>);
  if (i < n) f(i, n - i);
}

template <typename A, typename T>
inline A dot(const A* a, const T* b, int64_t n) {
  Vec<A> sum(0);
  for_lanes<A>(
      n, [&](int64_t i, int64_t lanes) { sum = at::vec::fmadd(load<A>(a + i, lanes), load<A>(b + i, lanes), sum); });
  return sum_lanes(sum);
}

// y += weight * x
template <typename A, typename T>
inline void add_scaled(A weight, const T* x, int64_t n, A* y) {
  const Vec<A> w(weight);
  for_lanes<A>(n, [&](int64_t i, int64_t lanes) {
    store(at::vec::fmadd(w, load<A>(x + i, lanes), load<A>(y + i, lanes)), y + i, lanes);
  });
}

// x *= factor
template <typename A>
inline void scale_by(A factor, int64_t n, A* x) {
  if (factor == 1) return;
  const Vec<A> f(factor);
  for_lanes<A>(n, [&](int64_t i, int64_t lanes) { store(load<A>(x + i, lanes) * f, x + i, lanes); });
}

// Whether n elements are all finite: what is not leaves NaN of itself less itself.
template <typename A>
inline bool all_finite(const A* x, int64_t n) {
  Vec<A> sum(0);
  for_lanes<A>(n, [&](int64_t i, int64_t lanes) {
    const Vec<A> v = load<A>(x + i, lanes);
    sum = sum + (v - v);
  });
  return sum_lanes(sum) == 0;
}

// y = sum of weights[i] * rows[index[i]], with the sums kept in registers.
template <typename A, typename T>
inline void weighted_sum(const A* weights, const int32_t* index, int64_t count, KeyRows<const T> rows, int64_t n,
                         A* y) {
  constexpr int64_t kWide = 4 * kLanes<A>;
  int64_t column = 0;
  for (; column + kWide <= n; column += kWide) {
    Vec<A> sum[4] = {Vec<A>(0), Vec<A>(0), Vec<A>(0), Vec<A>(0)};
    for (int64_t e = 0; e < count; ++e) {
      const T* row = rows[index[e]] + column;
      const Vec<A> w(weights[e]);
      for (int64_t k = 0; k < 4; ++k) sum[k] = at::vec::fmadd(w, load<A>(row + k * kLanes<A>), sum[k]);
    }
    for (int64_t k = 0; k < 4; ++k) store(sum[k], y + column + k * kLanes<A>);
  }
  for_lanes<A>(n - column, [&](int64_t i, int64_t lanes) {
    Vec<A> sum(0);
    for (int64_t e = 0; e < count; ++e) {
      sum = at::vec::fmadd(Vec<A>(weights[e]), load<A>(rows[index[e]] + column + i, lanes), sum);
    }
    store(sum, y + column + i, lanes);
  });
}

template <typename A, typename T>
inline void convert(const T* from, int64_t n, A* to) {
  for_lanes<A>(n, [&](int64_t i, int64_t lanes) { store(load<A>(from + i, lanes), to + i, lanes); });
}

template <typename A, typename T>
inline void convert_back(const A* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

// A row in type A: the row itself where it has that type, else a converted copy in `buffer`.
template <typename A, typename T>
inline const A* in_type(const T* row, int64_t n, A* buffer) {
  if constexpr (std::is_same_v<A, T>) {
    return row;
  } else {
    convert(row, n, buffer);
    return buffer;
  }
}

// Whether matrix products may use rows of n elements where they lie. BLAS bits depend on how rows are aligned, down to
// 16 bytes in MKL: rows that are not, or of a width at which dense rows could not be, go through scratch, which always
// has the same alignment.
template <typename A, typename T>
inline bool usable_in_place(Rows<T> rows, int64_t n) {
  constexpr uintptr_t kBytes = 16;
  if constexpr (!std::is_same_v<A, std::remove_const_t<T>>) return false;
  return (reinterpret_cast<uintptr_t>(rows.data) | rows.stride * sizeof(T) | n * sizeof(T)) % kBytes == 0;
}
template <typename A, typename T>
inline bool usable_in_place(KeyRows<const T> rows, int64_t n) {
  return usable_in_place<A>(Rows<const T>{rows.data, rows.stride | rows.page_stride}, n);
}

// The same for a block of rows, as the matrix products read them.
template <typename A, typename T>
inline Rows<const A> in_type(KeyRows<const T> rows, int64_t first, int64_t count, int64_t n, A* buffer) {
  if constexpr (std::is_same_v<A, T>) {
    if (rows.evenly_spaced(first, count) && usable_in_place<A>(rows, n)) return {rows[first], rows.stride};
  }
  for (int64_t r = 0; r < count; ++r) convert(rows[first + r], n, buffer + r * n);
  return {buffer, n};
}
template <typename A, typename T>
inline Rows<const A> in_type(Rows<const T> rows, int64_t first, int64_t count, int64_t n, A* buffer) {
  return in_type<A>(KeyRows<const T>{rows.data, rows.stride}, first, count, n, buffer);
}

// Hands out aligned pieces of a thread's scratch; with null scratch it only counts, to learn the size needed.
class Arena {
 public:
  explicit Arena(char* scratch) : data_(scratch) {}

  template <typename U>
  U* take(int64_t count) {
    U* piece = data_ == nullptr ? nullptr : reinterpret_cast<U*>(data_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(U)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* data_;
  int64_t used_ = 0;
};

}  // namespace CPU_CAPABILITY
}  // namespace adasplash::cpu
