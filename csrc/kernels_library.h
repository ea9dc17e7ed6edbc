// What a wheel for several releases of torch has once, in libadasplash_kernels.so: the CPU kernels and the GPU's code,
// which hold nothing of torch's C++. Elsewhere both are inside libadasplash.so, and this changes nothing.
#pragma once

// Marks what one of the two libraries has and the other uses.
#define ADASPLASH_BETWEEN_LIBRARIES __attribute__((visibility("default")))
