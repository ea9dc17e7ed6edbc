// The forward of the sequences of a call that have few queries: their heads to tasks, tasks to threads.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/call.h"
#include "cpu/kernels.h"
#include "cpu/tasks.h"

namespace adasplash::cpu {

inline bool has_few_queries(const Sequence& s, int64_t group) {
  return s.queries <= kMostFewQueries && s.queries * group <= kMostFewRows;
}

template <typename T>
class FewQueries {
 public:
  FewQueries(const Call<T>& call, const at::Tensor& out_by_head) : call_(call), out_(out_by_head) {}

  // In turns, of as many key heads of sequences as there is room for.
  void run() const {
    if (call_.heads == 0) return;
    std::vector<Unit> turn;
    int64_t bytes = 0;
    for (size_t sequence = 0; sequence < call_.sequences.size(); ++sequence) {
      const Sequence& s = call_.sequences[sequence];
      if (s.queries == 0 || !has_few_queries(s, call_.group)) continue;
      for (int64_t kv_head = 0; kv_head < call_.kv_heads; ++kv_head) {
        Unit unit = unit_of(sequence, kv_head);
        const int64_t own = unit.rows.bytes(s.queries * call_.group);
        if (!turn.empty() && bytes + own > kMostBytes) {
          run(turn, bytes);
          turn.clear();
          bytes = 0;
        }
        bytes += own;
        turn.push_back(std::move(unit));
      }
    }
    run(turn, bytes);
  }

 private:
  using A = Accumulate<T>;

  // Of one turn, unless it is of one unit. What malloc keeps from call to call is at most 32 MiB; fresh pages cost a
  // tenth of the time.
  static constexpr int64_t kMostBytes = int64_t{24} << 20;

  // The query heads of one sequence that share a key head.
  struct Unit {
    std::vector<ForwardHead<T, A>> heads;
    FewRows<A> rows;
  };

  Unit unit_of(size_t sequence, int64_t kv_head) const {
    const Sequence& s = call_.sequences[sequence];
    Unit unit{std::vector<ForwardHead<T, A>>(call_.group), {}};
    for (int64_t g = 0; g < call_.group; ++g) {
      const int64_t h = kv_head * call_.group + g;
      call_.describe(sequence, h, unit.heads[g]);
      unit.heads[g].out = rows_of<T>(out_, s.entry, h, s.first_query);
    }
    const auto& head = unit.heads[0];
    const Interval keys = head.visible(0, head.queries - 1);
    unit.rows = {keys.empty() ? Interval{0, 0} : keys, head.value_dim};
    return unit;
  }

  void run(std::vector<Unit>& turn, int64_t bytes) const {
    if (turn.empty()) return;
    const auto& kernel = kernels<T, A>();
    const int64_t group = call_.group, head_dim = call_.query.size(3), value_dim = call_.value.size(3);
    const at::DataPtr memory = c10::GetCPUAllocator()->allocate(bytes);
    char* free = static_cast<char*>(memory.get());
    std::vector<int64_t> ends;  // of the units' pieces
    for (Unit& unit : turn) {
      free += unit.rows.place(unit.heads[0].queries * group, free);
      ends.push_back((ends.empty() ? 0 : ends.back()) + unit.rows.pieces());
    }
    const auto for_pieces = [&](const auto& step) {
      run_tasks(ends.back(), kernel.few_scratch(head_dim, value_dim), [&](int64_t index, char* scratch) {
        const size_t u = std::upper_bound(ends.begin(), ends.end(), index) - ends.begin();
        step(turn[u].heads.data(), group, turn[u].rows, index - (u == 0 ? 0 : ends[u - 1]), scratch);
      });
    };
    const auto for_heads = [&](const auto& step) {
      run_tasks(static_cast<int64_t>(turn.size()) * group, kernel.forward_scratch(head_dim, value_dim),
                [&](int64_t index, char* scratch) {
                  const Unit& unit = turn[index / group];
                  const auto& head = unit.heads[index % group];
                  step(head, unit.rows.behind(index % group * head.queries), scratch);
                });
    };
    std::atomic<bool> values_missing{false};
    for_pieces(kernel.few_scores);
    for_heads([&](const auto& head, const FewRows<A>& rows, char* scratch) {
      if (kernel.few_weigh(head, rows, scratch)) values_missing = true;
    });
    if (!values_missing) return;
    for_pieces(kernel.few_values);
    for_heads(kernel.few_join);
  }

  const Call<T>& call_;
  const at::Tensor& out_;
};

}  // namespace adasplash::cpu
