// The CPU kernels, compiled once for each instruction set and chosen when first used.
#pragma once

#include "head.h"

namespace adasplash::cpu {

template <typename T, typename A>
struct Kernels {
  // out and saved state of the query block that starts at `first_query`.
  void (*forward)(const ForwardHead<T, A>& head, int64_t first_query, char* scratch);
  int64_t (*forward_scratch)(int64_t head_dim, int64_t value_dim);
  // dq, row terms and alpha terms of one query block; false if the saved lists of keys are not what a forward can have
  // written.
  bool (*backward_query)(const BackwardHead<T, A>& head, int64_t first_query, char* scratch);
  // dk, dv of the key block that starts at `first_key`, summed over a group of query heads. Needs the row terms of all
  // of them.
  void (*backward_key)(const BackwardHead<T, A>* group, int64_t group_size, int64_t first_key, Rows<T> dk, Rows<T> dv,
                       char* scratch);
  int64_t (*backward_scratch)(int64_t head_dim, int64_t value_dim, int64_t capacity);
};

// The kernels of the best instruction set that the machine has.
template <typename T, typename A>
const Kernels<T, A>& kernels();

}  // namespace adasplash::cpu
