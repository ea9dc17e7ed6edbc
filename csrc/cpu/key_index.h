// The entries of a key index, made on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/options.h"

namespace adasplash::cpu {

// Makes the entries of these places from what the cache holds there, for all key heads.
void index_keys(const at::Tensor& key_cache, const std::vector<Place>& places, const at::Tensor& key_index);

}  // namespace adasplash::cpu
