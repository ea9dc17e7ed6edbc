// The candidates of a row: the few keys that can still get weight, found in one pass over all z.
//
// Only keys with z above max - 1 can have weight. The threshold of the keys seen so far is never above that of all
// keys, so it rules out more: a few Newton steps on the short list raise the bound, and the list stays short.
#pragma once

#include "cpu/threshold.h"

namespace adasplash::cpu {
inline namespace CPU_CAPABILITY {

constexpr int64_t kMaxCandidates = 512;  // an attention row with more is done by passes over all its scores
constexpr int64_t kFirstRefinement = 32;

template <typename A>
struct Candidates {
  static constexpr int64_t kStep = 4 * kLanes<A>;                                    // looked at together
  static constexpr int64_t slots(int64_t most) { return most + kStep + kLanes<A>; }  // a step and padding
  static constexpr int64_t kSlots = slots(kMaxCandidates);

  A* z;  // slots(most) scores, ascending in key
  int32_t* key;
  int64_t most = kMaxCandidates;
  int64_t count = 0, refine_at = kFirstRefinement;
  A max = -kInfinity<A>;    // of all z seen; NaN if one was
  A bound = -kInfinity<A>;  // no key with z up to here can get weight
  bool overflowed = false;  // the list is not kept any more, only max

  // Where the largest of all z is known beforehand, a list starts from it.
  void start_from(A largest) {
    max = largest;
    bound = max - 1 - slack();
  }

  A gap_bound() const { return std::max(bound - max, A(-1)); }  // from below

  // Takes the z of keys first_key, first_key + 1, ...; z_row must hold -inf from n to the next multiple of kStep.
  template <typename Weights>
  void scan(const Weights& weights, const A* z_row, int64_t n, int64_t first_key) {
    if (std::isnan(max)) return;
    for (int64_t i = 0; i < n; i += kStep) {
      Vec<A> v[4];
      for (int64_t k = 0; k < 4; ++k) v[k] = Vec<A>::loadu(z_row + i + k * kLanes<A>);
      const Vec<A> top = at::vec::maximum(at::vec::maximum(v[0], v[1]), at::vec::maximum(v[2], v[3]));
      if (all_at_most(top, overflowed ? max : bound)) continue;

      if (!all_at_most(top, max)) {
        max = max_lanes(top);
        if (std::isnan(max)) return;
        bound = std::max(bound, max - 1 - slack());
      }
      if (overflowed) continue;
      int64_t end = count;  // in a register: stores to the lists could change a member
      for (int64_t k = 0; k < 4; ++k) {
        for (uint32_t lanes = true_lanes(v[k] > Vec<A>(bound)); lanes != 0; lanes &= lanes - 1) {
          const int64_t at = i + k * kLanes<A> + __builtin_ctz(lanes);
          z[end] = z_row[at];
          key[end++] = static_cast<int32_t>(first_key + at);
        }
      }
      count = end;
      if (count >= refine_at) refine(weights);
    }
  }

 private:
  // What rounding can have added to a bound, which must not be above what it bounds; max - 1 alone is max itself where
  // scores are large.
  A slack() const { return 4 * std::numeric_limits<A>::epsilon() * (std::abs(max) + 1); }

  static bool all_at_most(const Vec<A>& v, A limit) { return (v <= Vec<A>(limit)).zero_mask() == 0; }  // false for NaN

  template <typename Weights>
  void refine(const Weights& weights) {
    A gap = gap_bound();
    pad_z(z, count, kLanes<A>);
    for (int step = 0; step < 2; ++step) {
      Sums sums;
      add_sums(weights, z, count, max, gap, sums);
      gap += static_cast<A>(newton_step(weights, sums));
    }
    bound = std::max(bound, max + gap - slack());
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      z[kept] = z[i];
      key[kept] = key[i];
      kept += z[i] > bound;
    }
    count = kept;
    overflowed = count > most / 2;
    refine_at = std::min(std::max(2 * count, kFirstRefinement), most);
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace adasplash::cpu
