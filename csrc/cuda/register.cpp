// Registers the CUDA kernels, and lets tests run them on CPU tensors over a stand-in for the driver.
#include <torch/library.h>

#include <atomic>

#include "cuda/embedded.h"
#include "cuda/ops.h"

namespace adasplash::cuda {
namespace {

void implement(torch::Library& library) {
  library.impl("_entmax_attn_forward", forward_op<forward>);
  library.impl("_entmax_attn_indexed", indexed_op<forward>);
  library.impl("_entmax_attn_backward", backward_op<backward>);
  library.impl("_entmax_attn_summary", summary_op<summarize>);
  implement_paged<adasplash::attend_paged<attend_cache>>(library);
  library.impl("entmax_cache_append", append_to_cache);
  library.impl("entmax_key_index_update", update_key_index);
  library.impl("_entmax_forward", activation_op<activation>);
  library.impl("_entmax_backward", activation_backward_op<activation_backward>);
}

std::atomic<bool> emulated{false};

}  // namespace

bool serves(c10::Device device) { return device.is_cuda() || (device.is_cpu() && emulated); }

}  // namespace adasplash::cuda

TORCH_LIBRARY_IMPL(adasplash, CUDA, m) { adasplash::cuda::implement(m); }

// For tests: from now on the CUDA code serves CPU tensors too. `place` stands for torch's current device and stream.
extern "C" __attribute__((visibility("default"))) void adasplash_emulate_cuda(adasplash::cuda::PlaceOf place) {
  using namespace adasplash::cuda;
  replace_place_of(place);
  static torch::Library library(torch::Library::IMPL, "adasplash", c10::DispatchKey::CPU, __FILE__, __LINE__);
  if (!emulated.exchange(true)) implement(library);
}
