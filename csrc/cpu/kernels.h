// The CPU kernels, compiled once for each instruction set and chosen when first used.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <tuple>

#include "cpu/few_rows.h"
#include "cpu/head.h"

namespace adasplash::cpu {

// alpha of the rows of an activation: one number, or one for each row.
template <typename A>
struct RowAlpha {
  double number;
  const A* per_row = nullptr;

  ADASPLASH_INLINE double operator[](int64_t row) const { return per_row == nullptr ? number : per_row[row]; }
};

template <typename T, typename A>
struct Kernels {
  // out and saved state of the query block that starts at `first_query`.
  void (*forward)(const ForwardHead<T, A>& head, int64_t first_query, char* scratch);
  int64_t (*forward_scratch)(int64_t head_dim, int64_t value_dim);
  // The same of a sequence of few queries, step by step (few_block.h), for the query heads that share a key head and a
  // piece of its keys, or for one query head. few_weigh says whether few_values and few_join have anything to do; it
  // and few_join need the scratch of `forward`.
  void (*few_scores)(const ForwardHead<T, A>* heads, int64_t group, const FewRows<A>& few, int64_t piece,
                     char* scratch);
  bool (*few_weigh)(const ForwardHead<T, A>& head, const FewRows<A>& few, char* scratch);
  void (*few_values)(const ForwardHead<T, A>* heads, int64_t group, const FewRows<A>& few, int64_t piece,
                     char* scratch);
  void (*few_join)(const ForwardHead<T, A>& head, const FewRows<A>& few, char* scratch);
  int64_t (*few_scratch)(int64_t head_dim, int64_t value_dim);
  // dq, row terms and alpha terms of one query block; false if the saved lists of keys are not what a forward can have
  // written.
  bool (*backward_query)(const BackwardHead<T, A>& head, int64_t first_query, char* scratch);
  // dk, dv of the key block that starts at `first_key`, summed over the query heads of a key head, `group` of them.
  // Needs the row terms of all of them.
  void (*backward_key)(const BackwardHead<T, A>* heads, int64_t group, int64_t first_key, Rows<T> dk, Rows<T> dv,
                       char* scratch);
  int64_t (*backward_scratch)(int64_t head_dim, int64_t value_dim, int64_t capacity);

  // What the rows of the query block that starts at `first_query` attended to, from what the forward saved.
  TileCounts (*summarize)(const SummaryHead<T, A>& head, int64_t first_query, char* scratch);
  int64_t (*summarize_scratch)(int64_t head_dim);

  // The activation of rows [begin, end) of n > 0 scores each, which lie one after the other.
  void (*activate)(const T* input, int64_t n, RowAlpha<A> alpha, int64_t begin, int64_t end, T* out, char* scratch);
  int64_t (*activate_scratch)(int64_t n);
  // Its gradients from those of its output; grad_alpha, one number a row, may be null.
  void (*activate_backward)(const T* grad_out, const T* output, int64_t n, RowAlpha<A> alpha, int64_t begin,
                            int64_t end, T* grad_input, A* grad_alpha, char* scratch);
  int64_t (*activate_backward_scratch)(int64_t n);
};

// The kernels of one instruction set, for each type.
using KernelSet = std::tuple<const Kernels<double, double>*, const Kernels<float, float>*,
                             const Kernels<c10::BFloat16, float>*, const Kernels<c10::Half, float>*>;

// The kernels of the best instruction set that the machine has.
template <typename T, typename A>
const Kernels<T, A>& kernels();

}  // namespace adasplash::cpu
