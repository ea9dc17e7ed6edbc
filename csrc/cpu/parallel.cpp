#include "cpu/parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <exception>

// Of the OpenMP runtime. What `#pragma omp parallel` is for GCC, and clang's runtime has too.
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num();
int omp_get_num_threads();
}

namespace adasplash::cpu {
namespace {

struct Loop {
  int64_t count, grain;
  c10::function_ref<void(int64_t, int64_t)> f;
  std::atomic_flag failed{};
  std::exception_ptr error{};  // the first

  void run(int64_t thread, int64_t begin, int64_t end) {
    const at::internal::ThreadIdGuard id(static_cast<int>(thread));
    const c10::ParallelGuard inside(true);
    f(begin, end);
  }

  // The share of the thread that calls it.
  void share() noexcept {
    const int64_t most = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t threads = grain > 0 ? std::min(most, (count + grain - 1) / grain) : most;
    const int64_t size = (count + threads - 1) / threads, begin = thread * size;
    if (begin >= count) return;
    try {
      run(thread, begin, std::min(count, begin + size));
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  }
};

}  // namespace

void parallel_for(int64_t count, int64_t grain, c10::function_ref<void(int64_t begin, int64_t end)> f) {
  if (count <= 0) return;
  at::internal::lazy_init_num_threads();
  Loop loop{.count = count, .grain = grain, .f = f};
  if (count <= grain || count == 1 || at::in_parallel_region() || at::get_num_threads() == 1) {
    loop.run(0, 0, count);
    return;
  }
  GOMP_parallel([](void* data) { static_cast<Loop*>(data)->share(); }, &loop, /*threads: torch's*/ 0, /*flags=*/0);
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace adasplash::cpu
