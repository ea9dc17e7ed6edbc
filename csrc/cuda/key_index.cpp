#include "cuda/key_index.h"

#include <c10/util/Exception.h>

#include <algorithm>

#include "ops/key_index.h"

namespace adasplash::cuda {
namespace {

constexpr int64_t kAlignment = 16;  // bytes that an index starts at a multiple of, as rows of pages then do

// `Byte` and those like it are const where the kernel only reads. The layout is that of the whole index.
template <typename Index, typename Byte, typename Float, typename Word>
Index argument(const char* op, Byte* data, const KeyIndexLayout& layout, at::ScalarType element, int64_t first_page,
               int64_t first_head) {
  TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % kAlignment == 0, op,
              ": on the GPU key_index must start at a multiple of ", kAlignment, " bytes");
  Byte* const codes = data + layout.chunk_of(first_page, first_head);
  return {
      .codes = codes,
      .norms = reinterpret_cast<Float*>(codes + layout.scales()),
      .header = reinterpret_cast<Word*>(data),
      .page_stride = layout.width(),
      .head_stride = layout.chunk(),
      .blocks = static_cast<int32_t>(layout.blocks),
      .page_size = static_cast<int32_t>(layout.page),
      .kv_heads = static_cast<int32_t>(layout.kv_heads),
      .head_dim = static_cast<int32_t>(layout.head_dim),
      .element = static_cast<int32_t>(element),
  };
}

}  // namespace

MutableKeyIndex mutable_key_index(const char* op, const at::Tensor& key_index, const at::Tensor& key_cache) {
  return argument<MutableKeyIndex, uint8_t, float, int32_t>(
      op, key_index.mutable_data_ptr<uint8_t>(), KeyIndexLayout::of(key_cache), key_cache.scalar_type(), 0, 0);
}

KeyIndex key_index_of(const AttentionInputs& inputs) {
  const at::Tensor& index = *inputs.options.key_index;
  // Of the part's keys; the index is whole, and how wide it is says how many heads there are.
  auto layout = KeyIndexLayout::of(inputs.key.transpose(1, 2));
  const int64_t group = inputs.query.size(1) / inputs.key.size(1);
  layout.blocks = index.size(0) - 1;
  layout.kv_heads = std::max<int64_t>(index.size(1) / layout.chunk(), 1);
  return argument<KeyIndex, const uint8_t, const float, const int32_t>(
      inputs.op, index.const_data_ptr<uint8_t>(), layout, inputs.key.scalar_type(),
      inputs.options.paged() ? 0 : inputs.first.entry, inputs.first.head / group);
}

}  // namespace adasplash::cuda
