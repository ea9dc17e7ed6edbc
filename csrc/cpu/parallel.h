// Loops over all of torch's threads.
#pragma once

#include <c10/util/FunctionRef.h>

#include <cstdint>

namespace adasplash::cpu {

// at::parallel_for from 0 on: calls f(begin, end) for ranges that together are [0, count), none shorter than `grain`
// but the last, on threads of the runtime that torch has loaded. That one is a template, which is parallel only where
// the compiler's own OpenMP fits that runtime: GCC's does, clang's does not.
void parallel_for(int64_t count, int64_t grain, c10::function_ref<void(int64_t begin, int64_t end)> f);

}  // namespace adasplash::cpu
