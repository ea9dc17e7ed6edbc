#include "cpu/blas.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>

#include <cstdlib>
#include <cstring>

// Exported by the libtorch_cpu of some builds (MKL on x86), absent from others: then these are null.
extern "C" {
__attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*,
                                  const float*, const int*, const float*, const int*, const float*, float*, const int*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*,
                                  const double*, const int*, const double*, const int*, const double*, double*,
                                  const int*);
__attribute__((weak)) int MKL_Set_Num_Threads_Local(int);
}

namespace adasplash::cpu {
namespace {

// ADASPLASH_BLAS=aten takes the way of builds whose torch exports no BLAS, for tests.
const bool use_blas = [] {
  const char* choice = std::getenv("ADASPLASH_BLAS");
  return choice == nullptr || std::strcmp(choice, "aten") != 0;
}();

auto blas_gemm(float) { return use_blas ? &sgemm_ : nullptr; }
auto blas_gemm(double) { return use_blas ? &dgemm_ : nullptr; }

// C (m x n) = scale * op(A) op(B) + beta * C, row-major. BLAS is column-major and so computes C^T = op(B)^T op(A)^T.
template <typename A>
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, A scale, const A* a, int64_t lda,
          const A* b, int64_t ldb, A beta, A* c, int64_t ldc) {
  if (const auto blas = blas_gemm(A{})) {
    const int rows = static_cast<int>(m), columns = static_cast<int>(n), inner = static_cast<int>(k);
    const int stride_a = static_cast<int>(lda), stride_b = static_cast<int>(ldb), stride_c = static_cast<int>(ldc);
    blas(transpose_b ? "T" : "N", transpose_a ? "T" : "N", &columns, &rows, &inner, &scale, b, &stride_b, a, &stride_a,
         &beta, c, &stride_c);
    return;
  }
  const auto options = at::TensorOptions(c10::CppTypeToScalarType<A>::value);
  const auto matrix = [&](const A* data, int64_t rows, int64_t columns, int64_t stride, bool transpose) {
    return transpose ? at::from_blob(const_cast<A*>(data), {rows, columns}, {1, stride}, options)
                     : at::from_blob(const_cast<A*>(data), {rows, columns}, {stride, 1}, options);
  };
  at::Tensor out = matrix(c, m, n, ldc, false);
  at::addmm_out(out, out, matrix(a, m, k, lda, transpose_a), matrix(b, k, n, ldb, transpose_b), beta, scale);
}

}  // namespace

SingleThreadedBlas::SingleThreadedBlas() {
  if (MKL_Set_Num_Threads_Local != nullptr) before_ = MKL_Set_Num_Threads_Local(1);
}

SingleThreadedBlas::~SingleThreadedBlas() {
  if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(before_);
}

template <typename A>
void Gemm<A>::nt(int64_t m, int64_t n, int64_t k, A scale, const A* a, int64_t lda, const A* b, int64_t ldb, A beta,
                 A* c, int64_t ldc) {
  gemm(false, true, m, n, k, scale, a, lda, b, ldb, beta, c, ldc);
}

template <typename A>
void Gemm<A>::nn(int64_t m, int64_t n, int64_t k, A scale, const A* a, int64_t lda, const A* b, int64_t ldb, A beta,
                 A* c, int64_t ldc) {
  gemm(false, false, m, n, k, scale, a, lda, b, ldb, beta, c, ldc);
}

template <typename A>
void Gemm<A>::tn(int64_t m, int64_t n, int64_t k, A scale, const A* a, int64_t lda, const A* b, int64_t ldb, A beta,
                 A* c, int64_t ldc) {
  gemm(true, false, m, n, k, scale, a, lda, b, ldb, beta, c, ldc);
}

template struct Gemm<float>;
template struct Gemm<double>;

}  // namespace adasplash::cpu
