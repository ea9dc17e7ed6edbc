#include "cuda/embedded.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <array>
#include <atomic>
#include <limits>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <tuple>

#include "cuda/driver.h"
#include "cuda/lzma.h"

namespace adasplash::cuda {
namespace {

// What an error is about.
std::string on_device(const char* kernel, int device) {
  return std::string(kernel) + " on device " + std::to_string(device);
}

int device_attribute(const char* kernel, int device, int attribute) {
  int handle = 0, value = 0;
  const std::string about = on_device(kernel, device);
  check(driver().cuDeviceGet(&handle, device), "cuDeviceGet", about);
  check(driver().cuDeviceGetAttribute(&value, attribute, handle), "cuDeviceGetAttribute", about);
  return value;
}

std::string built_archs() {
  std::ostringstream text;
  for (int arch : kBuiltArchs) text << (text.tellp() > 0 ? ", " : "") << "sm_" << arch;
  return kBuiltArchs.empty() ? "none" : text.str();
}

// Which code runs on a device.
struct Code {
  int arch = 0;
  bool ptx = false;
};

// Code for sm_90 and above runs on exactly that architecture; below, on the same major with an equal or higher minor.
// PTX of an architecture under 90 serves every later one, translated by the driver.
Code choose_code(const char* kernel, int device) {
  const int found = 10 * device_attribute(kernel, device, kComputeCapabilityMajor) +
                    device_attribute(kernel, device, kComputeCapabilityMinor);
  int best = 0;
  for (int arch : kBuiltArchs) {
    if (arch == found || (arch < 90 && arch / 10 == found / 10 && arch < found && arch > best)) best = arch;
    if (best == found) break;
  }
  if (best) return {best, false};
  TORCH_CHECK(kPtxArch && kPtxArch <= found, "adasplash: this build has no GPU kernels for the architecture of device ",
              device, ", sm_", found, "; it was built for: ", built_archs(), ". Build with -DADASPLASH_ARCHS=", found,
              " (several are separated by ;)");
  return {kPtxArch, true};
}

Code code_for(const char* kernel, int device) {
  constexpr int kRemembered = 64;
  static std::array<std::atomic<int>, kRemembered> memory{};  // 0: not known; else 2 * arch + ptx
  if (device < 0 || device >= kRemembered) return choose_code(kernel, device);
  int known = memory[device].load(std::memory_order_relaxed);
  if (!known) {
    const Code code = choose_code(kernel, device);
    known = 2 * code.arch + code.ptx;
    memory[device].store(known, std::memory_order_relaxed);
  }
  return {known / 2, known % 2 == 1};
}

std::string unpacked(const Variant& variant, const Packed& packed) {
  const auto [offset, size, at, length] = packed;
  std::string text = lzma_decode({adasplash_cubins + offset, size}, at + length);
  TORCH_INTERNAL_ASSERT(text.size() == at + length, variant.name, ": its code does not decode");
  text.erase(0, at);
  return text;
}

// A variant's code in the driver: decoded and loaded by the first launch, for all devices and threads.
class Loaded {
 public:
  Function function(const Variant& variant, bool ptx, int device) {
    std::call_once(once_, [&] {
      // The driver keeps a copy of its own. PTX it reads up to the zero that a string has behind it.
      const std::string code = unpacked(variant, ptx ? variant.ptx : variant.cubin);
      Library library = nullptr;
      check(driver().cuLibraryLoadData(&library, code.c_str(), nullptr, nullptr, 0, nullptr, nullptr, 0),
            "cuLibraryLoadData", variant.name);
      check(driver().cuLibraryGetKernel(&function_, library, variant.symbol), "cuLibraryGetKernel", variant.name);
    });
    if (variant.shared_bytes > kSharedBytesByDefault) allow_shared(variant, device);
    return function_;
  }

 private:
  void allow_shared(const Variant& variant, int device) {
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (allowed_.load(std::memory_order_acquire) & bit) return;
    int handle = 0;
    check(driver().cuDeviceGet(&handle, device), "cuDeviceGet", variant.name);
    check(driver().cuKernelSetAttribute(kMaxDynamicSharedBytes, variant.shared_bytes, function_, handle),
          "cuKernelSetAttribute", variant.name);
    allowed_.fetch_or(bit, std::memory_order_release);
  }

  std::once_flag once_;
  Function function_ = nullptr;
  std::atomic<uint64_t> allowed_{0};  // devices on which the shared memory was asked for, one bit each
};

Loaded& loaded(const Variant& variant, bool ptx) {
  static const auto all = std::make_unique<Loaded[]>(2 * kVariants.size());
  return all[2 * (&variant - kVariants.data()) + ptx];
}

void place_of_cuda(int device, Place* place) {
  const c10::Device torch_device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
  const c10::Stream stream = c10::impl::VirtualGuardImpl(torch_device.type()).getStream(torch_device);
  *place = {device, stream.native_handle()};
}

std::atomic<PlaceOf> replaceable_place_of{place_of_cuda};

// Torch sets the context together with the device; a thread that never met its runtime has none yet.
void ensure_context(const char* kernel, int device) {
  Context context = nullptr;
  const Result told = driver().cuCtxGetCurrent(&context);
  if (told == 0 && context) return;
  const std::string about = on_device(kernel, device);
  check(told, "cuCtxGetCurrent", about);
  int handle = 0;
  check(driver().cuDeviceGet(&handle, device), "cuDeviceGet", about);
  check(driver().cuDevicePrimaryCtxRetain(&context, handle), "cuDevicePrimaryCtxRetain", about);
  check(driver().cuCtxSetCurrent(context), "cuCtxSetCurrent", about);
}

}  // namespace

Place place_of(c10::Device device) {
  Place place{};
  replaceable_place_of.load()(device.index(), &place);
  return place;
}

void replace_place_of(PlaceOf replacement) { replaceable_place_of = replacement; }

const Variant& find_variant(Kernel kernel, at::ScalarType dtype, int64_t head_size, AlphaCode alpha, int device,
                            bool gather) {
  const Code code = code_for(kKernelNames[static_cast<size_t>(kernel)], device);
  const Variant* best = nullptr;
  const auto rank = [alpha](const Variant& v) { return std::tuple(v.block_d, v.alpha != alpha); };
  for (const Variant& v : kVariants) {
    const bool fits = v.kernel == kernel && v.dtype == dtype && v.arch == code.arch && v.block_d >= head_size &&
                      v.gather == gather && (v.alpha == alpha || v.alpha == AlphaCode::kAny);
    if (fits && (!best || rank(v) < rank(*best))) best = &v;
  }
  TORCH_CHECK(best, "adasplash: no GPU kernel was built for ", dtype, " with head size ", head_size);
  return *best;
}

void launch(Kernel kernel, const Variant& variant, const Place& place, int64_t programs, const void* arguments,
            size_t size) {
  TORCH_INTERNAL_ASSERT(variant.kernel == kernel, variant.name);
  TORCH_CHECK(programs <= std::numeric_limits<int32_t>::max(), "adasplash: ", variant.name, " would need ", programs,
              " programs, more than a launch takes; split the batch");
  if (programs == 0) return;  // which lengths of zero ask for; the driver refuses it
  ensure_context(variant.name, place.device);
  const bool ptx = code_for(variant.name, place.device).ptx;
  const Function function = loaded(variant, ptx).function(variant, ptx, place.device);
  const LaunchAttribute overlap{.id = kProgrammaticStreamSerialization, .value = {.allowed = 1}};
  const LaunchConfig config{{static_cast<unsigned>(programs), 1, 1},
                            {static_cast<unsigned>(variant.warps) * 32, 1, 1},
                            static_cast<unsigned>(variant.shared_bytes),
                            place.stream,
                            &overlap,
                            variant.follows && driver().version >= kOverlapsSince ? 1U : 0U};
  // CU_LAUNCH_PARAM_BUFFER_POINTER, CU_LAUNCH_PARAM_BUFFER_SIZE and CU_LAUNCH_PARAM_END
  void* extra[] = {reinterpret_cast<void*>(1), const_cast<void*>(arguments), reinterpret_cast<void*>(2), &size,
                   nullptr};
  check(driver().cuLaunchKernelEx(&config, function, nullptr, extra), "cuLaunchKernelEx", variant.name);
}

}  // namespace adasplash::cuda
