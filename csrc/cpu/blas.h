// Row-major matrix products on small blocks: torch's own BLAS where its library exports it, at::addmm where not.
#pragma once

#include <cstdint>

#include "kernels_library.h"

namespace adasplash::cpu {

// While it lives, products on this thread run on this thread alone: parallelism is ours, and MKL's bits depend on the
// number of threads that it thinks it has, even where it may use only one.
class SingleThreadedBlas {
 public:
  SingleThreadedBlas();
  ~SingleThreadedBlas();
  SingleThreadedBlas(const SingleThreadedBlas&) = delete;
  SingleThreadedBlas& operator=(const SingleThreadedBlas&) = delete;

 private:
  int before_ = 0;
};

// C (m x n) = scale * op(A) op(B) + beta * C; ld* are the distances between rows.
template <typename A>
struct ADASPLASH_BETWEEN_LIBRARIES Gemm {
  // B is (n x k): C = scale * A B^T + beta * C
  static void nt(int64_t m, int64_t n, int64_t k, A scale, const A* a, int64_t lda, const A* b, int64_t ldb, A beta,
                 A* c, int64_t ldc);
  // B is (k x n): C = scale * A B + beta * C
  static void nn(int64_t m, int64_t n, int64_t k, A scale, const A* a, int64_t lda, const A* b, int64_t ldb, A beta,
                 A* c, int64_t ldc);
  // A is (k x m), B is (k x n): C = scale * A^T B + beta * C
  static void tn(int64_t m, int64_t n, int64_t k, A scale, const A* a, int64_t lda, const A* b, int64_t ldb, A beta,
                 A* c, int64_t ldc);
};

}  // namespace adasplash::cpu
