// The options of attention: the struct that C++ passes around, and the lists from which everything flat follows, that
// is the schemas (schema.cpp), the C++ signatures behind them and what autograd saves (attention_autograd.cpp).
// To add an option: CONTRIBUTING.md, which starts here. A place in C++ that is forgotten does not compile.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

namespace adasplash {

using OptionalTensor = std::optional<at::Tensor>;

// Everything of the contract besides query, key and value. Exactly one of alpha and head_alpha counts: head_alpha,
// of shape (H,) or (), where it is given.
struct AttentionOptions {
  OptionalTensor head_alpha;
  double alpha = 1.5;
  bool is_causal = false;
  std::optional<double> scale;
  OptionalTensor q_seqlens, kv_seqlens;       // (B,), padded form
  OptionalTensor cu_seqlens_q, cu_seqlens_k;  // (B + 1,), packed form
  c10::SymInt max_seqlen_q = 0, max_seqlen_k = 0;
  std::array<int64_t, 2> window = {-1, -1};  // (left, right), inclusive; -1 is unlimited
  OptionalTensor alibi_slopes;               // (H,) or (B, H) float32
  OptionalTensor kv_starts;                  // (B,), padded form: the first key of each entry
  double dropout_p = 0;                      // the share of weights that become zero
  OptionalTensor dropout_seed;               // one int64, from which it follows which ones
  OptionalTensor block_table;                // (B, W): the pages of a cache that hold each sequence's keys (cache.h)
  OptionalTensor key_index;                  // codes of the keys, by which few queries need not read all (key_index.h)
  OptionalTensor q_positions;                // (B,): the place of each sequence's first query among its keys
  OptionalTensor dropout_origin;             // (B, 4): what dropout counts from: sequence, head, query, key

  // Whether queries are packed: their sequences stand behind each other in one dimension of tokens. So do keys then,
  // unless they are in a paged cache.
  bool packed() const { return cu_seqlens_q.has_value() || cu_seqlens_k.has_value(); }
  bool packed_keys() const { return packed() && !paged(); }
  // Whether keys and values are in a paged cache, whatever form queries have.
  bool paged() const { return block_table.has_value(); }
  // How many keys behind its place a query sees; -1 is unlimited.
  int64_t window_right() const { return is_causal ? 0 : window[1]; }
  // Of 2^32 random numbers, how many drop a weight.
  uint32_t dropout_threshold() const {
    return static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 0x1p32), 0x1p32 - 1));
  }
  // Whether this is softmax in all heads. Heads of head_alpha may be, which only the backend sees.
  bool softmax() const { return !head_alpha && alpha == 1; }
};

// What a type of member is in a schema, and as an argument of a C++ function behind that schema.
template <typename T>
struct OptionType;
template <>
struct OptionType<OptionalTensor> {
  static constexpr const char* schema = "Tensor?";
  using Argument = const OptionalTensor&;
};
template <>
struct OptionType<double> {
  static constexpr const char* schema = "float";
  using Argument = double;
};
template <>
struct OptionType<std::optional<double>> {
  static constexpr const char* schema = "float?";
  using Argument = std::optional<double>;
};
template <>
struct OptionType<bool> {
  static constexpr const char* schema = "bool";
  using Argument = bool;
};
template <>
struct OptionType<c10::SymInt> {
  static constexpr const char* schema = "SymInt";
  using Argument = c10::SymInt;
};
template <>
struct OptionType<std::array<int64_t, 2>> {
  static constexpr const char* schema = "int[2]";
  using Argument = c10::IntArrayRef;
};
template <typename T>
using OptionArgument = typename OptionType<T>::Argument;

// One option: its name in schemas, the member that holds it, and its default as a schema writes it, if it has one.
template <typename T>
struct Option {
  constexpr Option(const char* name, T AttentionOptions::* member, const char* default_value = nullptr)
      : name(name), member(member), default_value(default_value) {}

  const char* name;
  T AttentionOptions::* member;
  const char* default_value;
};

inline constexpr Option kHeadAlpha("head_alpha", &AttentionOptions::head_alpha);
inline constexpr Option kAlpha("alpha", &AttentionOptions::alpha);
inline constexpr Option kIsCausal("is_causal", &AttentionOptions::is_causal, "False");
inline constexpr Option kScale("scale", &AttentionOptions::scale, "None");
inline constexpr Option kQSeqlens("q_seqlens", &AttentionOptions::q_seqlens, "None");
inline constexpr Option kKvSeqlens("kv_seqlens", &AttentionOptions::kv_seqlens, "None");
inline constexpr Option kCuSeqlensQ("cu_seqlens_q", &AttentionOptions::cu_seqlens_q);
inline constexpr Option kCuSeqlensK("cu_seqlens_k", &AttentionOptions::cu_seqlens_k);
inline constexpr Option kMaxSeqlenQ("max_seqlen_q", &AttentionOptions::max_seqlen_q);
inline constexpr Option kMaxSeqlenK("max_seqlen_k", &AttentionOptions::max_seqlen_k);
inline constexpr Option kWindow("window", &AttentionOptions::window, "[-1, -1]");
inline constexpr Option kAlibiSlopes("alibi_slopes", &AttentionOptions::alibi_slopes, "None");
inline constexpr Option kKvStarts("kv_starts", &AttentionOptions::kv_starts, "None");
inline constexpr Option kDropoutP("dropout_p", &AttentionOptions::dropout_p, "0.");
inline constexpr Option kDropoutSeed("dropout_seed", &AttentionOptions::dropout_seed, "None");
inline constexpr Option kKeyIndex("key_index", &AttentionOptions::key_index, "None");
inline constexpr Option kQPositions("q_positions", &AttentionOptions::q_positions, "None");
inline constexpr Option kDropoutOrigin("dropout_origin", &AttentionOptions::dropout_origin, "None");

// The public ops: what follows alpha, of which all but the first are taken by name only. The packed form has its
// lengths, which have no defaults, before alpha.
inline constexpr std::tuple kPaddedOptions(kIsCausal, kScale, kQSeqlens, kKvSeqlens, kWindow, kAlibiSlopes, kKvStarts,
                                           kDropoutP, kDropoutSeed, kKeyIndex, kQPositions, kDropoutOrigin);
inline constexpr std::tuple kPackedOptions(kIsCausal, kScale, kWindow, kAlibiSlopes, kDropoutP, kDropoutSeed,
                                           kQPositions, kDropoutOrigin);

// The op on a paged cache, which has its own defaults.
inline constexpr std::tuple kPagedOptions(Option("is_causal", &AttentionOptions::is_causal, "True"),
                                          Option("cu_seqlens_q", &AttentionOptions::cu_seqlens_q, "None"),
                                          Option("max_seqlen_q", &AttentionOptions::max_seqlen_q, "1"), kScale, kWindow,
                                          kAlibiSlopes, kKeyIndex);

// The private pair, which serves the padded and the packed form, alpha as a number (head_alpha absent) and per head.
// Files saved by users look options up by place and by name, so the first list never changes; it has no defaults here.
// Options that came later stand in the second one, as kLaterOptions(kOne, kAnother), and in both ops behind all other
// arguments, with their defaults: files from before them leave them out.
inline constexpr std::tuple kFirstOptions(kHeadAlpha, kAlpha, kIsCausal, kScale, kQSeqlens, kKvSeqlens, kCuSeqlensQ,
                                          kCuSeqlensK, kMaxSeqlenQ, kMaxSeqlenK, kWindow, kAlibiSlopes);
inline constexpr std::tuple kLaterOptions(kKvStarts, kDropoutP, kDropoutSeed, kQPositions, kDropoutOrigin);
inline constexpr std::tuple kAllOptions = std::tuple_cat(kFirstOptions, kLaterOptions);

// Whether the private ops hand on every option of a list; one that they do not would be lost on the way. The pair has
// no key_index: calls that leave something for a backward read every key. For the others it is an argument of its own,
// of _entmax_attn_indexed.
template <typename List>
constexpr bool handed_on(const List& list) {
  const auto is_handed_on = [](std::string_view name) {
    return std::apply([&](const auto&... option) { return ((name == option.name) || ...); },
                      std::tuple_cat(kAllOptions, std::tuple(kKeyIndex)));
  };
  return std::apply([&](const auto&... option) { return (is_handed_on(option.name) && ...); }, list);
}
static_assert(handed_on(kPaddedOptions) && handed_on(kPackedOptions),
              "an option of a public op is missing in kLaterOptions");
static_assert(std::apply([](const auto&... option) { return ((option.default_value != nullptr) && ...); },
                         kLaterOptions),
              "an option in kLaterOptions needs a default");

// From an argument to the member that holds it. A schema's int[2] is a list of any length to those who call through
// torch.ops.
template <typename T>
T as_member(T argument) {
  return argument;
}
inline std::array<int64_t, 2> as_member(c10::IntArrayRef window) {
  TORCH_CHECK(window.size() == 2, "adasplash: window must be two numbers (left, right), got ", window);
  return {window[0], window[1]};
}

inline void set_alpha(AttentionOptions& options, double alpha) { options.alpha = alpha; }
inline void set_alpha(AttentionOptions& options, const at::Tensor& alpha) { options.head_alpha = alpha; }

// Sets the options of a list to arguments in its order.
template <typename... T>
void set_options(AttentionOptions& options, const std::tuple<Option<T>...>& list, OptionArgument<T>... arguments) {
  std::apply([&](const Option<T>&... option) { ((options.*option.member = as_member(std::move(arguments))), ...); },
             list);
}

// The options of a list, in its order. They live as long as `options`.
template <typename... T>
std::tuple<const T&...> get_options(const AttentionOptions& options, const std::tuple<Option<T>...>& list) {
  return std::apply([&](const Option<T>&... option) { return std::tie(options.*option.member...); }, list);
}

// The C++ signatures of the public ops. Alpha is double, or PerHead.
using PerHead = const at::Tensor&;
template <typename List>
struct SignatureWith;
template <typename... T>
struct SignatureWith<const std::tuple<Option<T>...>> {
  template <typename Result, typename... Before>
  using Behind = Result(Before..., OptionArgument<T>...);
};
template <typename Alpha, typename Result = at::Tensor>
using PaddedSignature = SignatureWith<decltype(kPaddedOptions)>::Behind<Result, const at::Tensor&, const at::Tensor&,
                                                                        const at::Tensor&, Alpha>;
template <typename Alpha, typename Result = at::Tensor>
using PackedSignature =
    SignatureWith<decltype(kPackedOptions)>::Behind<Result, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                    const at::Tensor&, const at::Tensor&, c10::SymInt, c10::SymInt,
                                                    Alpha>;
template <typename Alpha>
using PagedSignature =
    SignatureWith<decltype(kPagedOptions)>::Behind<at::Tensor, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                   const at::Tensor&, const at::Tensor&, Alpha>;

}  // namespace adasplash
