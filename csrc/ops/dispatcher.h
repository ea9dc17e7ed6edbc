// Finding an op in torch's dispatcher: calls that go through it are seen by autograd, autocast, tracers and profilers.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace adasplash {

// The op of this name ("adasplash::…") and overload, with its C++ signature. The search takes a lock and a look-up of
// strings, so callers make it once: static const auto op = find_op<Signature>(…).
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

}  // namespace adasplash
