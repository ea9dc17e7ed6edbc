// Finding an op in torch's dispatcher: calls that go through it are seen by autograd, autocast, tracers and profilers.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <tuple>

namespace adasplash {

// The op of this name ("adasplash::…") and overload, with its C++ signature. The search takes a lock and a look-up of
// strings, so callers make it once: static const auto op = find_op<Signature>(…).
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

// Calls an op with what several tuples hold, one behind the other.
template <typename Op, typename... Tuples>
auto call_with(const Op& op, const Tuples&... arguments) {
  return std::apply([&](const auto&... argument) { return op.call(argument...); }, std::tuple_cat(arguments...));
}

}  // namespace adasplash
