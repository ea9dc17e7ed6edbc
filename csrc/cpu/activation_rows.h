// The activation of one row, and its gradient. Only the scores that can have weight are looked at twice: the forward
// keeps the candidates of one scan, the backward skips where the output is zero.
#pragma once

#include "cpu/candidates.h"

namespace adasplash::cpu {
inline namespace CPU_CAPABILITY {

constexpr int64_t kChunk = 1024;  // scores converted together: they stay in the first cache, and so few add up in float

// A row with more candidates (half as many after a refinement) is done by passes over all its scores.
constexpr int64_t most_candidates(int64_t n) { return std::max<int64_t>(2048, n / 8); }

template <typename A, typename T>
inline void store_as(const Vec<A>& v, T* p, int64_t lanes) {
  if constexpr (std::is_same_v<A, T>) {
    store(v, p, lanes);
  } else {
    at::vec::convert_from_float<T>(v, v).store(p, static_cast<int>(lanes));
  }
}

// u = p^(2 - alpha) from the weight, where it is not zero.
template <typename A>
inline Vec<A> u_of(const Entmax15<A>&, const Vec<A>& p) {
  return p.sqrt();
}
template <typename A>
inline Vec<A> u_of(const Sparsemax<A>&, const Vec<A>& p) {
  return p / p;  // NaN stays NaN
}
template <typename A>
inline Vec<A> u_of(const EntmaxAny<A>& weights, const Vec<A>& p) {
  return (p.log() * Vec<A>(static_cast<A>(weights.rest))).exp();
}

template <typename A>
struct ForwardRowBuffers {
  ForwardRowBuffers(int64_t n, Arena& arena)
      : z(arena.take<A>(Candidates<A>::slots(most_candidates(n)))),
        key(arena.take<int32_t>(Candidates<A>::slots(most_candidates(n)))),
        chunk(arena.take<A>(kChunk + Candidates<A>::kStep)) {}

  A* z;  // the list of candidates
  int32_t* key;
  A* chunk;
};

template <typename T, typename A, typename Weights>
class ForwardRow {
 public:
  ForwardRow(const T* input, int64_t n, double alpha, const Weights& weights, const ForwardRowBuffers<A>& buffers,
             T* out)
      : input_(input),
        n_(n),
        scale_(static_cast<A>(alpha - 1)),
        weights_(weights),
        chunk_(buffers.chunk),
        list_{buffers.z, buffers.key, most_candidates(n)},
        out_(out) {}

  void run() {
    for_chunks(A(0), [&](A* z, int64_t first, int64_t count) { list_.scan(weights_, z, count, first); });
    if (list_.max == -kInfinity<A>) {
      std::fill_n(out_, n_, T(0));  // fully masked
    } else if (!std::isfinite(list_.max)) {
      std::fill_n(out_, n_, static_cast<T>(kNaN<A>));
    } else if (list_.overflowed) {
      finish_dense();
    } else {
      finish_list();
    }
  }

 private:
  // Calls f(z, first, count) for chunks of z = (alpha - 1) (score - shift), padded with -inf.
  template <typename F>
  void for_chunks(A shift, const F& f) {
    for (int64_t first = 0; first < n_; first += kChunk) {
      const int64_t count = std::min(kChunk, n_ - first);
      for_lanes<A>(count, [&](int64_t i, int64_t lanes) {
        store((load<A>(input_ + first + i, lanes) - Vec<A>(shift)) * Vec<A>(scale_), chunk_ + i, lanes);
      });
      pad_z(chunk_, count, Candidates<A>::kStep);
      f(chunk_, first, count);
    }
  }

  // From below; `chunks` calls its argument with z - max in chunks.
  template <typename Chunks>
  A find_gap(const Chunks& chunks) const {
    A gap = list_.gap_bound();
    for (int step = 0; step < kMaxSteps; ++step) {
      Sums sums;
      chunks([&](const A* z, int64_t count) { add_sums(weights_, z, count, A(0), gap, sums); });
      if (!step_on(weights_, sums, gap)) break;
    }
    return gap;
  }

  void finish_list() {
    A *const z = list_.z, max = -kInfinity<A>;
    for (int64_t i = 0; i < list_.count; ++i) {
      z[i] = static_cast<A>(input_[list_.key[i]]);
      max = std::max(max, z[i]);
    }
    // The difference of scores that matter is exact, that of their products with alpha - 1 is not.
    for (int64_t i = 0; i < list_.count; ++i) z[i] = (z[i] - max) * scale_;
    pad_z(z, list_.count, kLanes<A>);
    const auto chunks = [&](const auto& f) {
      for (int64_t i = 0; i < list_.count; i += kChunk) f(z + i, std::min(kChunk, list_.count - i));
    };
    const A gap = find_gap(chunks);
    double total = 0;
    chunks([&](A* part, int64_t count) { total += to_weights(weights_, part, count, A(0), gap); });
    const A normaliser = static_cast<A>(1 / total);
    std::fill_n(out_, n_, T(0));
    for (int64_t i = 0; i < list_.count; ++i) out_[list_.key[i]] = static_cast<T>(z[i] * normaliser);
  }

  void finish_dense() {
    Vec<A> lane_max(-kInfinity<A>);
    for_lanes<A>(n_, [&](int64_t i, int64_t lanes) {
      const Vec<A> v = load<A>(input_ + i, lanes);
      lane_max = at::vec::maximum(lane_max, lanes == kLanes<A> ? v : Vec<A>::set(Vec<A>(-kInfinity<A>), v, lanes));
    });
    const A max = max_lanes(lane_max);
    const A gap =
        find_gap([&](const auto& f) { for_chunks(max, [&](const A* z, int64_t, int64_t count) { f(z, count); }); });
    double total = 0;
    for_chunks(max, [&](A* z, int64_t, int64_t count) { total += to_weights(weights_, z, count, A(0), gap); });
    const Vec<A> normaliser(static_cast<A>(1 / total));
    for_chunks(max, [&](A* z, int64_t first, int64_t count) {
      to_weights(weights_, z, count, A(0), gap);
      for_lanes<A>(count, [&](int64_t i, int64_t lanes) {
        store_as(load<A>(z + i, lanes) * normaliser, out_ + first + i, lanes);
      });
    });
  }

  const T* const input_;
  const int64_t n_;
  const A scale_;
  const Weights& weights_;
  A* const chunk_;
  Candidates<A> list_;
  T* const out_;
};

template <typename A>
constexpr int64_t kActivationStep = 4 * kLanes<A>;  // entries that the backward skips or takes together
template <typename A>
constexpr int64_t activation_steps(int64_t n) {
  return (n + kActivationStep<A> - 1) / kActivationStep<A>;
}

// With u = p^(2 - alpha) on the support and delta = sum(u g) / sum(u), the gradient g of the weights leads to
//     u_j (g_j - delta)                                            of score j,
//     sum of u_j (g_j - delta) (e^L (1 - L) - 1) / (alpha - 1)^2   of alpha, where L = (alpha - 1) ln p_j.
// The latter is the usual closed form with p = u e^L and with sum(u (g - delta)) = 0 used twice: what cancels there as
// alpha goes to 1 has been taken out, and what rounds p, storage in a half type too, changes it no more than p itself.
template <typename T, typename A, typename Weights>
class BackwardRow {
 public:
  // `steps` has room for activation_steps(n).
  BackwardRow(const T* grad_out, const T* output, int64_t n, double alpha, const Weights& weights, int32_t* steps,
              T* grad_input)
      : grad_out_(grad_out),
        output_(output),
        n_(n),
        alpha_(alpha),
        weights_(weights),
        steps_(steps),
        grad_input_(grad_input) {}

  void run(A* grad_alpha) {
    list_steps();
    double ug = 0, total = 0;
    sum_steps(
        [&](const Vec<A>& u, const Vec<A>& g, const Vec<A>&, Vec<A>& a, Vec<A>& b) {
          a = a + u * g;
          b = b + u;
        },
        ug, total);
    const Vec<A> delta(count_ == 0 ? A(0) : static_cast<A>(ug / total));
    for (int64_t s = 0; s < count_; ++s) {
      in_step(steps_[s], [&](const Vec<A>& u, const Vec<A>& g, const Vec<A>&, int64_t at, int64_t lanes) {
        store_as(u * (g - delta), grad_input_ + at, lanes);
      });
    }
    if (grad_alpha == nullptr) return;
    double sum = 0, unused = 0;
    const Vec<A> rate(static_cast<A>(alpha_ - 1)), one(1);
    sum_steps(
        [&](const Vec<A>& u, const Vec<A>& g, const Vec<A>& p, Vec<A>& a, Vec<A>&) {
          const Vec<A> l = p.log() * rate;
          const Vec<A> change = u * (g - delta) * (l.expm1() * (one - l) - l);
          a = a + Vec<A>::blendv(change, Vec<A>(0), p == Vec<A>(0));
        },
        sum, unused);
    *grad_alpha = static_cast<A>(sum / ((alpha_ - 1) * (alpha_ - 1)));
  }

 private:
  static constexpr int64_t kStep = kActivationStep<A>;

  // Where the output is zero so is the gradient; the other steps are listed.
  void list_steps() {
    for (int64_t i = 0; i < n_; i += kStep) {
      bool any = false;
      const int64_t end = std::min(i + kStep, n_);
      for_lanes<A>(end - i, [&](int64_t k, int64_t lanes) {
        const Vec<A> p = load<A>(output_ + i + k, lanes);
        any |= (p == Vec<A>(0)).zero_mask() != 0;
      });
      if (any) {
        steps_[count_++] = static_cast<int32_t>(i / kStep);
      } else {
        std::fill(grad_input_ + i, grad_input_ + end, T(0));
      }
    }
  }

  // Calls f(u, g, p, place, lanes) for the vectors of a step; u and g are zero where p is, whatever is in grad_out.
  template <typename F>
  void in_step(int64_t step, const F& f) const {
    const int64_t first = step * kStep;
    for_lanes<A>(std::min(kStep, n_ - first), [&](int64_t k, int64_t lanes) {
      const Vec<A> p = load<A>(output_ + first + k, lanes), zero(0);
      const Vec<A> empty = p == zero;
      f(Vec<A>::blendv(u_of(weights_, p), zero, empty),
        Vec<A>::blendv(load<A>(grad_out_ + first + k, lanes), zero, empty), p, first + k, lanes);
    });
  }

  // Adds what f adds to two vectors over all listed steps; few of them add up in A.
  template <typename F>
  void sum_steps(const F& f, double& first, double& second) const {
    for (int64_t s = 0; s < count_;) {
      Vec<A> a(0), b(0);
      for (const int64_t end = std::min(s + kChunk / kStep, count_); s < end; ++s) {
        in_step(steps_[s],
                [&](const Vec<A>& u, const Vec<A>& g, const Vec<A>& p, int64_t, int64_t) { f(u, g, p, a, b); });
      }
      first += sum_lanes(a);
      second += sum_lanes(b);
    }
  }

  const T *const grad_out_, *const output_;
  const int64_t n_;
  const double alpha_;
  const Weights& weights_;
  int32_t* const steps_;
  T* const grad_input_;
  int64_t count_ = 0;
};

}  // namespace CPU_CAPABILITY
}  // namespace adasplash::cpu
