// From z to weights: p = excess^r with r = 1/(alpha-1) and excess = [z - tau]+ = [(z - max) - gap]+, and the gap = tau
// - max at which the weights of a row sum to one. All of it is written with u = excess^(r-1) = p^(2-alpha), which is
// also what the backward needs: p = excess u, and d(sum p)/d tau = -r sum u. Softmax, the limit alpha = 1, has an
// exponential for the power, p = exp(z - max - gap), whose gap = log sum exp(z - max) takes no steps; its u is p.
#pragma once

#include "cpu/vector.h"

namespace adasplash::cpu {
inline namespace CPU_CAPABILITY {

// alpha = 1.5, 2 and any other, as functors, so that the loops over scores are compiled for each. `smooth` says that p
// has no kink at excess = 0 (alpha <= 1.5), where Newton steps converge quadratically across the edge of the support.
template <typename A>
struct Entmax15 {
  static constexpr bool softmax = false;
  static constexpr bool smooth = true;
  Vec<A> u(const Vec<A>& excess) const { return excess; }
  double power_2_minus_alpha(double p) const { return std::sqrt(p); }
};

template <typename A>
struct Sparsemax {
  static constexpr bool softmax = false;
  static constexpr bool smooth = false;
  Vec<A> u(const Vec<A>& excess) const { return Vec<A>::blendv(Vec<A>(0), Vec<A>(1), excess > Vec<A>(0)); }
  double power_2_minus_alpha(double) const { return 1; }
};

template <typename A>
struct EntmaxAny {
  static constexpr bool softmax = false;
  explicit EntmaxAny(double alpha)
      : smooth(alpha <= 1.5), r_less_one(static_cast<A>(1 / (alpha - 1) - 1)), rest(2 - alpha) {}
  Vec<A> u(const Vec<A>& excess) const {
    return Vec<A>::blendv(Vec<A>(0), (excess.log() * Vec<A>(r_less_one)).exp(), excess > Vec<A>(0));
  }
  double power_2_minus_alpha(double p) const { return std::pow(p, rest); }

  bool smooth;
  A r_less_one;
  double rest;
};

template <typename A>
struct Softmax {
  static constexpr bool softmax = true;
};

template <typename A, typename F>
inline void with_weights(double alpha, const F& f) {
  if (alpha == 1.5) return f(Entmax15<A>());
  if (alpha == 2) return f(Sparsemax<A>());
  return f(EntmaxAny<A>(alpha));
}

// psi: what the gradient of alpha weights the support with. With `largest` the largest excess of the row, which is
// -gap, d = max - z and x = d / largest,
//   (alpha - 1)^2 dalpha = sum u psi (dp - delta),   psi = d ln largest - largest (x + (1 - x) ln(1 - x)).
// That is excess - excess ln excess of the key, up to a constant of the row, which adds nothing; both terms are
// negative and as small as the differences between scores, so nothing cancels, neither in flat rows nor for alpha
// near 1.
template <typename A>
struct AlphaFactor {
  AlphaFactor(A max, A gap) : max(max), largest(-gap), log_largest(std::log(-gap)) {}

  Vec<A> operator()(const Vec<A>& z) const {
    const Vec<A> zero(0), one(1), ratio = (Vec<A>(max) - z) / Vec<A>(largest);
    const Vec<A> x = at::vec::minimum(at::vec::maximum(ratio, zero), one), rest = one - x;
    const Vec<A> log = at::vec::maximum(rest, Vec<A>(std::numeric_limits<A>::min())).log();
    // x + (1 - x) ln(1 - x) = x^2 (1/2 + x/6 + ... + x^8/90 + ...) where it would cancel.
    Vec<A> series(A(1) / 90);
    for (int k = 8; k >= 1; --k) series = at::vec::fmadd(series, x, Vec<A>(A(1) / (k * (k + 1))));
    const Vec<A> few_terms(std::is_same_v<A, double> ? 0.02 : 0.25);
    const Vec<A> sum = Vec<A>::blendv(x + rest * log, x * x * series, x < few_terms);
    return x * Vec<A>(largest * log_largest) - Vec<A>(largest) * sum;
  }

  A max, largest, log_largest;
};

// The same for softmax, in the limit from above: dalpha = sum u psi (dp - delta), psi = -ln^2 p / 2 up to a constant of
// the row. As ln p = (z - max) - gap, a constant of gap^2 / 2 leaves a product that does not cancel in flat rows.
template <typename A>
struct SoftmaxAlphaFactor {
  SoftmaxAlphaFactor(A max, A gap) : max(max), gap(gap) {}

  Vec<A> operator()(const Vec<A>& z) const {
    const Vec<A> x = z - Vec<A>(max);
    return Vec<A>(A(-0.5)) * x * (x - Vec<A>(2 * gap));
  }

  A max, gap;
};

template <typename A, typename Weights>
using AlphaFactorOf = std::conditional_t<Weights::softmax, SoftmaxAlphaFactor<A>, AlphaFactor<A>>;

template <typename A>
inline Vec<A> excess_of(const Vec<A>& z, A max, A gap) {
  return at::vec::maximum((z - Vec<A>(max)) - Vec<A>(gap), Vec<A>(0));
}

// A key's weight, and u.
template <typename A>
struct Weighed {
  Vec<A> p, u;
};

template <typename A, typename Weights>
inline Weighed<A> weigh(const Weights& weights, const Vec<A>& z, A max, A gap) {
  if constexpr (Weights::softmax) {
    const Vec<A> p = ((z - Vec<A>(max)) - Vec<A>(gap)).exp();
    return {p, p};
  } else {
    const Vec<A> excess = excess_of(z, max, gap), u = weights.u(excess);
    return {excess * u, u};
  }
}

struct Sums {
  double p = 0, u = 0;
};

// Adds the sums over n keys; z must hold -inf from n to the next multiple of the vector length.
template <typename A, typename Weights>
inline void add_sums(const Weights& weights, const A* z, int64_t n, A max, A gap, Sums& sums) {
  Vec<A> p(0), u(0);
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    const Vec<A> excess = excess_of(Vec<A>::loadu(z + i), max, gap);
    const Vec<A> own_u = weights.u(excess);
    p = at::vec::fmadd(excess, own_u, p);
    u = u + own_u;
  }
  sums.p += sum_lanes(p);
  sums.u += sum_lanes(u);
}

// One Newton step on ||excess||_r - 1, where ||excess||_r^r = sum p. That norm is decreasing and convex in tau like sum
// p itself, so steps from the left stay left of the root, but nearly linear, so few are needed: a row with one key in
// the support takes one.
template <typename Weights>
inline double newton_step(const Weights& weights, const Sums& sums) {
  return (sums.p - weights.power_2_minus_alpha(sums.p)) / sums.u;
}

// Whether the step from here is the last one needed: what it leaves is the square of this distance where p is smooth.
template <typename A, typename Weights>
inline bool settled(const Weights& weights, const Sums& sums) {
  const double distance = std::abs(sums.p - 1);
  if constexpr (std::is_same_v<A, double>) return distance <= (weights.smooth ? 1e-7 : 1e-13);
  return distance <= (weights.smooth ? 1e-4 : 1e-6);
}
constexpr int kMaxSteps = 64;  // a guard, as the steps converge quadratically

// Takes the step from this gap; false once there is nothing to gain, or rounding leaves nothing more to be gained.
template <typename A, typename Weights>
inline bool step_on(const Weights& weights, const Sums& sums, A& gap) {
  const A before = gap;
  gap = std::max(gap + static_cast<A>(newton_step(weights, sums)), A(-1));
  return !settled<A>(weights, sums) && std::abs(gap - before) > 2 * std::numeric_limits<A>::epsilon() * std::abs(gap);
}

// Turns n padded z into weights, in place, and returns their sum. Where many weights of a row are far below its
// maximum, the gap's last bit alone moves that sum by more than the contract allows, so results are divided by it. Of
// softmax a gap of 0 gives weights before they are normalised.
template <typename A, typename Weights>
inline double to_weights(const Weights& weights, A* z, int64_t n, A max, A gap) {
  Vec<A> sum(0);
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    const Vec<A> p = weigh(weights, Vec<A>::loadu(z + i), max, gap).p;
    p.store(z + i);
    sum = sum + p;
  }
  return sum_lanes(sum);
}

template <typename A>
inline void pad_z(A* z, int64_t n, int64_t width) {
  for (int64_t i = n; i < n + width; ++i) z[i] = -kInfinity<A>;
}

// The gap of a list of z, from any start in [-1, 0). Pads the list.
template <typename A, typename Weights>
inline A solve(const Weights& weights, A* z, int64_t n, A max, A gap) {
  if (n == 1) return A(-1);
  pad_z(z, n, kLanes<A>);
  for (int step = 0; step < kMaxSteps; ++step) {
    Sums sums;
    add_sums(weights, z, n, max, gap, sums);
    if (!step_on(weights, sums, gap)) break;
  }
  return gap;
}

}  // namespace CPU_CAPABILITY
}  // namespace adasplash::cpu
