// Work for all threads: ranges of rows, tasks, and the blocks of an attention call that are its tasks.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/blas.h"
#include "cpu/options.h"
#include "cpu/parallel.h"

namespace adasplash::cpu {

// Calls f(begin, end, scratch) for ranges that together are [0, count), none shorter than `grain` but the last, on all
// threads; scratch is memory of the thread's own.
template <typename F>
void run_ranges(int64_t count, int64_t grain, int64_t scratch_bytes, const F& f) {
  parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = c10::GetCPUAllocator()->allocate(scratch_bytes);
    f(begin, end, static_cast<char*>(scratch.get()));
  });
}

// Runs task(index, scratch) for every index, on all threads. Threads take the next task when they are done with one, as
// causal blocks differ in length; which thread runs a task changes nothing in its result.
template <typename F>
void run_tasks(int64_t count, int64_t scratch_bytes, const F& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  run_ranges(threads, 1, scratch_bytes, [&](int64_t begin, int64_t end, char* scratch) {
    const SingleThreadedBlas alone;
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(index, scratch);
    }
  });
}

// The blocks of rows that all heads of all sequences consist of, each a task.
class Blocks {
 public:
  struct Block {
    size_t sequence;
    int64_t head, first;  // the block's first row
  };

  Blocks(const std::vector<Sequence>& sequences, int64_t Sequence::* length, int64_t heads, int64_t block_rows,
         bool last_first)
      : block_rows_(block_rows), last_first_(last_first) {
    for (const Sequence& s : sequences) {
      per_head_.push_back((s.*length + block_rows - 1) / block_rows);
      ends_.push_back(count() + heads * per_head_.back());
    }
  }

  int64_t count() const { return ends_.empty() ? 0 : ends_.back(); }

  Block operator[](int64_t index) const {
    const size_t sequence = std::upper_bound(ends_.begin(), ends_.end(), index) - ends_.begin();
    const int64_t per_head = per_head_[sequence], within = index - (sequence == 0 ? 0 : ends_[sequence - 1]);
    const int64_t nth = within % per_head;
    return {sequence, within / per_head, (last_first_ ? per_head - 1 - nth : nth) * block_rows_};
  }

 private:
  const int64_t block_rows_;
  const bool last_first_;
  std::vector<int64_t> per_head_, ends_;  // for each sequence: blocks of a head; blocks up to its end
};

}  // namespace adasplash::cpu
