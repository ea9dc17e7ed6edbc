// A call's tensors and options in the terms of the portable kernels, which the forward and the backward share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "cuda/few.h"
#include "cuda/implementation.h"
#include "cuda/launchers.h"

namespace adasplash::cuda::portable {

Matrix matrix_of(const at::Tensor& t);
MutableMatrix mutable_matrix_of(const at::Tensor& t);

// The tensor itself if its rows are dense and start where the kernels need them to, else a copy. Rows of a copy may be
// longer, with zeros at their ends.
at::Tensor with_aligned_rows(const at::Tensor& t);

// Where a kernel writes a result: the result itself, or rows like those above, from which `finish` copies it.
class AlignedResult {
 public:
  explicit AlignedResult(const at::Tensor& result);
  void finish() const;
  const at::Tensor rows;

 private:
  const at::Tensor result_;
};

// The options that are tensors, as the kernels take them: dense, of int32 and float32. Undefined where not given.
struct OptionTensors {
  at::Tensor query_lengths, key_lengths, block_table, alphas, slopes, q_positions, dropout_origins;
};

// The kernels that read keys or values, by the type of matrix that these are.
template <typename KeyMatrix>
struct KeyKernels;
template <>
struct KeyKernels<Matrix> {
  static constexpr bool kReadsIndex = true;
  static constexpr Kernel kAttend = Kernel::kAttend, kScoreFew = Kernel::kScoreFew, kSolveFew = Kernel::kSolveFew,
                          kWeighFew = Kernel::kWeighFew, kScanIndex = Kernel::kScanIndex,
                          kScoreFound = Kernel::kScoreFound;
  static constexpr auto& attend = cuda::attend;
  static constexpr auto& score_few = cuda::score_few;
  static constexpr auto& solve_few = cuda::solve_few;
  static constexpr auto& weigh_few = cuda::weigh_few;
  static constexpr auto& scan_index = cuda::scan_index;
  static constexpr auto& score_found = cuda::score_found;
};
template <>
struct KeyKernels<PagedMatrix> {
  static constexpr bool kReadsIndex = false;
  static constexpr Kernel kAttend = Kernel::kAttendPaged, kScoreFew = Kernel::kScoreFewPaged,
                          kSolveFew = Kernel::kSolveFewPaged, kWeighFew = Kernel::kWeighFewPaged;
  static constexpr auto& attend = cuda::attend_paged;
  static constexpr auto& score_few = cuda::score_few_paged;
  static constexpr auto& solve_few = cuda::solve_few_paged;
  static constexpr auto& weigh_few = cuda::weigh_few_paged;
};
template <>
struct KeyKernels<EvenPagedMatrix> {
  static constexpr bool kReadsIndex = true;
  static constexpr Kernel kScoreFew = Kernel::kScoreFewEven, kWeighFew = Kernel::kWeighFewEven,
                          kScanIndex = Kernel::kScanIndexEven, kScoreFound = Kernel::kScoreFoundEven;
  static constexpr auto& score_few = cuda::score_few_even;
  static constexpr auto& weigh_few = cuda::weigh_few_even;
  static constexpr auto& scan_index = cuda::scan_index_even;
  static constexpr auto& score_found = cuda::score_found_even;
};

// Holds whatever the kernels are given pointers to.
class PreparedCall {
 public:
  explicit PreparedCall(const AttentionInputs& inputs);

  // The code for this call's type, head sizes and alpha.
  const Variant& variant(Kernel kernel, bool gather = false) const;
  // The code of kernels that work with turned rows, which are as long as keys and queries alone ask for.
  const Variant& variant_of_turns(Kernel kernel) const;

  // How many programs a kernel is launched with: one for each block of queries of a query head, or of keys of a key
  // head.
  int64_t query_programs(const Variant& v) const {
    return (arguments.queries.max_seqlen.value + v.block_m - 1) / v.block_m * heads;
  }
  int64_t key_programs(const Variant& v) const {
    return (arguments.keys.max_seqlen.value + v.block_n - 1) / v.block_n * kv_heads;
  }

  Extents extents() const;

  // The index by which the keys of sequences of few queries are found; none where all are read.
  std::optional<KeyIndex> key_index() const;

  // Calls `launch` with key and value as the matrices that they are, Matrix or PagedMatrix.
  template <typename Launch>
  void over_keys(const Launch& launch) const {
    if (tensors_.block_table.defined()) {
      launch(paged_matrix_of(key), paged_matrix_of(value));
    } else {
      launch(matrix_of(key), matrix_of(value));
    }
  }

  // The same, but an EvenPagedMatrix where there is code for it: that of the kernels that take all keys of few queries.
  template <typename Launch>
  void over_keys_of_few(const Launch& launch) const {
    if (has_even_pages(inputs_)) {
      launch(even_paged_matrix_of(key), even_paged_matrix_of(value));
    } else {
      over_keys(launch);
    }
  }

 private:
  PagedMatrix paged_matrix_of(const at::Tensor& cache) const;
  EvenPagedMatrix even_paged_matrix_of(const at::Tensor& cache) const;

  const AttentionInputs inputs_;
  const OptionTensors tensors_;

 public:
  const bool packed;                   // queries are
  const at::Tensor query, key, value;  // query negated for a negative scale, so that q.k orders keys as scores do
  const Place place;
  const int64_t heads, kv_heads;  // of all sequences
  const int64_t stored_kv_heads;  // that have room of their own for keys: the sequences of packed keys share theirs
  const Call arguments;
};

}  // namespace adasplash::cuda::portable
