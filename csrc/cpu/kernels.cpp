// All CPU kernels for one instruction set: CMake compiles this file once for each, with CPU_CAPABILITY naming it.
#if defined(CPU_CAPABILITY_AVX512) && defined(__GNUC__) && !defined(__clang__)
// GCC up to 12 takes a register of AVX-512 that is undefined on purpose for one that was forgotten. The mute is that of
// the compiler's own header: our code keeps both warnings.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "cpu/activation_rows.h"
#include "cpu/backward_block.h"
#include "cpu/few_block.h"
#include "cpu/forward_block.h"
#include "cpu/softmax_block.h"
#include "cpu/summary_block.h"
#include "kernels_library.h"

namespace adasplash::cpu {
inline namespace CPU_CAPABILITY {
namespace {

template <typename T, typename A>
void forward(const ForwardHead<T, A>& head, int64_t first_query, char* scratch) {
  Arena arena(scratch);
  if (head.alpha == 1) return SoftmaxBlock<T, A>(head, first_query, arena).run();
  with_weights<A>(head.alpha, [&](const auto& weights) { ForwardBlock(head, first_query, weights, arena).run(); });
}

template <typename A, typename F>
void with_softmax_or_weights(double alpha, const F& f) {
  alpha == 1 ? f(Softmax<A>()) : with_weights<A>(alpha, f);
}

template <typename A>
int64_t forward_scratch(int64_t head_dim, int64_t value_dim) {
  Arena counting(nullptr);
  ForwardBuffers<A>(head_dim, value_dim, counting);
  return counting.used();
}

template <typename T, typename A>
void few_scores(const ForwardHead<T, A>* heads, int64_t group, const FewRows<A>& few, int64_t piece, char* scratch) {
  Arena arena(scratch);
  FewScores<T, A>(heads, group, few, arena).run(piece);
}

template <typename T, typename A>
bool few_weigh(const ForwardHead<T, A>& head, const FewRows<A>& few, char* scratch) {
  Arena arena(scratch);
  bool values_missing = false;
  with_softmax_or_weights<A>(
      head.alpha, [&](const auto& weights) { values_missing = FewHead<T, A>(head, few, arena).weigh(weights); });
  return values_missing;
}

template <typename T, typename A>
void few_values(const ForwardHead<T, A>* heads, int64_t group, const FewRows<A>& few, int64_t piece, char* scratch) {
  Arena arena(scratch);
  FewBuffers<A> buffers(heads->head_dim, heads->value_dim, arena);
  add_few_values(*heads, group * heads->queries, few, piece, buffers);
}

template <typename T, typename A>
void few_join(const ForwardHead<T, A>& head, const FewRows<A>& few, char* scratch) {
  Arena arena(scratch);
  FewHead<T, A>(head, few, arena).join();
}

template <typename A>
int64_t few_scratch(int64_t head_dim, int64_t value_dim) {
  Arena counting(nullptr);
  FewBuffers<A>(head_dim, value_dim, counting);
  return counting.used();
}

template <typename T, typename A>
bool backward_query(const BackwardHead<T, A>& head, int64_t first_query, char* scratch) {
  if (!read_lists(head, first_query, std::min(kQueryBlock, head.queries - first_query))) return false;
  with_softmax_or_weights<A>(head.alpha, [&](const auto& weights) {
    Arena arena(scratch);
    BackwardBuffers<A> buffers(head.head_dim, head.value_dim, head.capacity, arena);
    BackwardBlock(head, first_query, weights, buffers).query_pass();
  });
  return true;
}

template <typename T, typename A>
void backward_key(const BackwardHead<T, A>* heads, int64_t group, int64_t first_key, Rows<T> dk, Rows<T> dv,
                  char* scratch) {
  const int64_t head_dim = heads->head_dim, value_dim = heads->value_dim;
  Arena arena(scratch);
  BackwardBuffers<A> buffers(head_dim, value_dim, heads->capacity, arena);
  const Interval keys = Interval{first_key, first_key + kKeyBlock}.clip(0, heads->keys);
  const bool in_place = usable_in_place<A>(dk, head_dim) && usable_in_place<A>(dv, value_dim);
  if constexpr (std::is_same_v<T, A>) {
    if (in_place) {
      buffers.dk = {dk[first_key], dk.stride};
      buffers.dv = {dv[first_key], dv.stride};
    }
  }
  for (int64_t k = 0; k < keys.size(); ++k) {
    std::fill_n(buffers.dk[k], head_dim, A(0));
    std::fill_n(buffers.dv[k], value_dim, A(0));
  }
  for (int64_t g = 0; g < group; ++g) {
    const auto& head = heads[g];
    with_softmax_or_weights<A>(head.alpha, [&](const auto& weights) {
      const Interval queries = head.watchers(keys);
      for (int64_t first = queries.begin / kQueryBlock * kQueryBlock; first < queries.end; first += kQueryBlock) {
        BackwardBlock(head, first, weights, buffers).key_pass(keys);
      }
    });
  }
  if (!in_place) {
    for (int64_t k = 0; k < keys.size(); ++k) {
      convert_back(buffers.dk[k], head_dim, dk[first_key + k]);
      convert_back(buffers.dv[k], value_dim, dv[first_key + k]);
    }
  }
}

template <typename A>
int64_t backward_scratch(int64_t head_dim, int64_t value_dim, int64_t capacity) {
  Arena counting(nullptr);
  BackwardBuffers<A>(head_dim, value_dim, capacity, counting);
  return counting.used();
}

template <typename T, typename A>
TileCounts summarize(const SummaryHead<T, A>& head, int64_t first_query, char* scratch) {
  Arena arena(scratch);
  return SummaryBlock<T, A>(head, first_query, arena).run();
}

template <typename A>
int64_t summarize_scratch(int64_t head_dim) {
  Arena counting(nullptr);
  SummaryBuffers<A>(head_dim, counting);
  return counting.used();
}

template <typename T, typename A>
void activate(const T* input, int64_t n, RowAlpha<A> alpha, int64_t begin, int64_t end, T* out, char* scratch) {
  Arena arena(scratch);
  const ForwardRowBuffers<A> buffers(n, arena);
  for (int64_t row = begin; row < end; ++row) {
    with_weights<A>(alpha[row], [&](const auto& weights) {
      ForwardRow<T, A, std::decay_t<decltype(weights)>>(input + row * n, n, alpha[row], weights, buffers, out + row * n)
          .run();
    });
  }
}

template <typename A>
int64_t activate_scratch(int64_t n) {
  Arena counting(nullptr);
  ForwardRowBuffers<A>(n, counting);
  return counting.used();
}

template <typename T, typename A>
void activate_backward(const T* grad_out, const T* output, int64_t n, RowAlpha<A> alpha, int64_t begin, int64_t end,
                       T* grad_input, A* grad_alpha, char* scratch) {
  for (int64_t row = begin; row < end; ++row) {
    with_weights<A>(alpha[row], [&](const auto& weights) {
      BackwardRow<T, A, std::decay_t<decltype(weights)>>(grad_out + row * n, output + row * n, n, alpha[row], weights,
                                                         reinterpret_cast<int32_t*>(scratch), grad_input + row * n)
          .run(grad_alpha == nullptr ? nullptr : grad_alpha + row);
    });
  }
}

template <typename A>
int64_t activate_backward_scratch(int64_t n) {
  return activation_steps<A>(n) * static_cast<int64_t>(sizeof(int32_t));
}

template <typename T, typename A>
constexpr Kernels<T, A> kKernels = {
    forward<T, A>,      forward_scratch<A>,  few_scores<T, A>,        few_weigh<T, A>,
    few_values<T, A>,   few_join<T, A>,      few_scratch<A>,          backward_query<T, A>,
    backward_key<T, A>, backward_scratch<A>, summarize<T, A>,         summarize_scratch<A>,
    activate<T, A>,     activate_scratch<A>, activate_backward<T, A>, activate_backward_scratch<A>};

}  // namespace

ADASPLASH_BETWEEN_LIBRARIES const KernelSet& kernel_set() {
  static constexpr KernelSet set = {&kKernels<double, double>, &kKernels<float, float>, &kKernels<at::BFloat16, float>,
                                    &kKernels<at::Half, float>};
  return set;
}

}  // namespace CPU_CAPABILITY
}  // namespace adasplash::cpu
