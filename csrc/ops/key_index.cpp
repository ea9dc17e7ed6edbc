#include "ops/key_index.h"

#include <ATen/ops/empty.h>
#include <c10/core/SymBool.h>
#include <torch/library.h>

#include <cstring>
#include <limits>
#include <string_view>

#include "ops/attention_checks.h"

namespace adasplash {
namespace {

// What each word of the header says, after the magic number, in which no other tensor is likely to start.
constexpr int32_t kMagic = 0x494B6441, kVersion = 2;
constexpr std::array<const char*, kHeaderWords> kWords = {"",
                                                          "version",
                                                          "the keys' number of pages",
                                                          "the keys' page size",
                                                          "the keys' number of heads",
                                                          "the keys' head_dim"};

void check_head_dim(const char* op, const at::Tensor& key_cache) {
  const c10::SymInt size = key_cache.sym_size(3);
  TORCH_SYM_CHECK(size.sym_ge(1).sym_and(size.sym_le(kMaxIndexedDim)), op,
                  ": keys that have an index must have a head_dim from 1 to ", kMaxIndexedDim, ", got ", size);
}

void check_indexed_cache(const char* op, const at::Tensor& key_cache) {
  TORCH_CHECK(key_cache.defined(), op, ": key_cache must be a tensor, got none");
  check_type(op, "key_cache", key_cache);
  check_dense(op, "key_cache", key_cache, 4, "(blocks, page, kv_heads, head_dim)", key_cache);
  check_head_dim(op, key_cache);
}

}  // namespace

std::array<int32_t, kHeaderWords> key_index_header(const at::Tensor& key_cache) {
  const auto layout = KeyIndexLayout::of(key_cache);
  const auto word = [](int64_t number) { return static_cast<int32_t>(number); };
  return {kMagic,
          kVersion,
          word(layout.blocks),
          word(layout.page),
          word(layout.kv_heads),
          word(layout.head_dim),
          static_cast<int32_t>(key_cache.scalar_type())};
}

at::Tensor allocate_key_index(const at::Tensor& key_cache) {
  check_indexed_cache("entmax_make_key_index", key_cache);
  return at::empty_symint(SymKeyIndexLayout::of(key_cache).sizes(), key_cache.options().dtype(at::kByte));
}

at::Tensor make_key_index(const at::Tensor& key_cache) {
  at::Tensor index = allocate_key_index(key_cache).zero_();
  const auto layout = KeyIndexLayout::of(key_cache);
  const auto header = key_index_header(key_cache);
  const at::Tensor words = index.select(0, 0).view(at::kInt);
  for (int64_t i = 0; i < kHeaderWords; ++i) words.select(0, i).fill_(header[i]);
  index.view(at::kFloat)
      .narrow(0, 1, layout.blocks)
      .narrow(1, 0, layout.kv_heads * layout.chunk() / 4)
      .unflatten(1, {layout.kv_heads, layout.chunk() / 4})
      .narrow(2, layout.errors() / 4, layout.page)
      .fill_(std::numeric_limits<float>::infinity());
  return index;
}

void check_key_index(const char* op, const at::Tensor& key_cache, const at::Tensor& key_index) {
  check_head_dim(op, key_cache);
  TORCH_CHECK(key_index.defined(), op, ": key_index must be a tensor, got none");
  TORCH_CHECK(key_index.layout() == at::kStrided && key_index.scalar_type() == at::kByte && key_index.dim() == 2, op,
              ": key_index must be a dense uint8 tensor of two dimensions, as make_key_index gives it, got a ",
              key_index.layout(), " ", key_index.scalar_type(), " tensor of ", key_index.dim());
  TORCH_CHECK(key_index.device() == key_cache.device(), op, ": key_index must be on the keys' device ",
              key_cache.device(), ", got ", key_index.device());
  const auto sizes = SymKeyIndexLayout::of(key_cache).sizes();
  TORCH_SYM_CHECK(key_index.sym_size(0).sym_eq(sizes[0]).sym_and(key_index.sym_size(1).sym_eq(sizes[1])), op,
                  ": key_index must have sizes [", sizes[0], ", ", sizes[1], "], as make_key_index gives it for these ",
                  "keys, got ", key_index.sym_sizes());
  TORCH_CHECK(key_index.is_contiguous(), op, ": key_index must be contiguous, got strides ", key_index.sym_strides());
  TORCH_SYM_CHECK((key_index.sym_storage_offset() % 16).sym_eq(0), op,
                  ": key_index must start at a multiple of 16 bytes of its storage, got ",
                  key_index.sym_storage_offset());
  TORCH_CHECK(!key_index.is_neg(), op, ": key_index must not be a negated view of another tensor");
}

void check_key_index_header(const char* op, const at::Tensor& key_cache, const at::Tensor& key_index) {
  const auto expected = key_index_header(key_cache);
  std::array<int32_t, kHeaderWords> got;
  std::memcpy(got.data(), key_index.const_data_ptr<uint8_t>(), sizeof(got));
  TORCH_CHECK(got[0] == expected[0], op,
              ": key_index must be what make_key_index gave, got a tensor of something else");
  for (int64_t i = 1; i + 1 < kHeaderWords; ++i) {
    TORCH_CHECK(got[i] == expected[i], op, ": key_index must have ", kWords[i], " ", expected[i], ", got ", got[i]);
  }
  TORCH_CHECK(got.back() == expected.back(), op, ": key_index must be of keys of dtype ", key_cache.scalar_type(),
              ", got one of another");
}

void check_key_index_update(const at::Tensor& key_cache, const at::Tensor& slots, const at::Tensor& key_index) {
  constexpr const char* op = "entmax_key_index_update";
  check_indexed_cache(op, key_cache);
  check_lengths(op, "slots", "(tokens,)", slots, key_cache);
  check_key_index(op, key_cache, key_index);
}

}  // namespace adasplash

TORCH_LIBRARY_IMPL(adasplash, CompositeExplicitAutograd, m) {
  m.impl("entmax_make_key_index", adasplash::make_key_index);
}
