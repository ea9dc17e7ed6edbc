#include "cpu/options.h"

#include <ATen/ops/scalar_tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "cpu/head.h"
#include "ops/attention_checks.h"

namespace adasplash::cpu {
namespace {

// A row for each entry of a padded batch, where its sequence starts or ends: `otherwise` each where none are given.
std::vector<int64_t> rows_of_entries(const char* op, const char* name, const OptionalTensor& given, int64_t entries,
                                     const char* dimension, int64_t longest, int64_t otherwise) {
  if (!given) return std::vector<int64_t>(entries, otherwise);
  const auto rows = values_of<int64_t>(*given);
  for (size_t b = 0; b < rows.size(); ++b) {
    TORCH_CHECK(rows[b] >= 0 && rows[b] <= longest, op, ": ", name, " must be from 0 to ", dimension, " ", longest,
                ", got ", rows[b], " at [", b, "]");
  }
  return rows;
}

// Where the sequences of a packed tensor begin, and where the last one ends.
std::vector<int64_t> packed_bounds(const char* op, const char* name, const at::Tensor& cu_seqlens, const char* tensor,
                                   int64_t tokens, const char* max_name, const c10::SymInt& max_seqlen) {
  const auto bounds = values_of<int64_t>(cu_seqlens);
  TORCH_CHECK(bounds.front() == 0, op, ": ", name, " must start at 0, got ", bounds.front());
  const int64_t longest = max_seqlen.expect_int();
  for (size_t b = 1; b < bounds.size(); ++b) {
    TORCH_CHECK(bounds[b] >= bounds[b - 1], op, ": ", name, " must not decrease, got ", bounds[b], " after ",
                bounds[b - 1], " at [", b, "]");
    TORCH_CHECK(bounds[b] - bounds[b - 1] <= longest, op, ": ", max_name, " must be the longest sequence's length or ",
                "more, got ", longest, " for a sequence of ", bounds[b] - bounds[b - 1], " at [", b - 1, "]");
  }
  TORCH_CHECK(bounds.back() == tokens, op, ": ", name, " must end at ", tensor, "'s number of tokens ", tokens,
              ", got ", bounds.back());
  return bounds;
}

}  // namespace

at::Tensor by_head(const at::Tensor& t, bool packed) { return packed ? t.transpose(0, 1).unsqueeze(0) : t; }

std::vector<Sequence> sequences_of(const at::Tensor& query, const at::Tensor& key, const AttentionOptions& o) {
  const char* op = public_name(o);
  std::vector<Sequence> sequences;
  std::vector<int64_t> q;
  if (o.packed()) {
    q = packed_bounds(op, "cu_seqlens_q", *o.cu_seqlens_q, "query", query.size(0), "max_seqlen_q", o.max_seqlen_q);
  }
  if (o.paged()) {
    const int64_t batch = o.block_table->size(0), room = o.block_table->size(1) * key.size(2);
    const auto keys =
        rows_of_entries(op, "kv_seqlens", o.kv_seqlens, batch, "the room in a row of block_table,", room, room);
    for (int64_t b = 0; b < batch; ++b) {
      sequences.push_back(o.packed() ? Sequence{.first_query = q[b], .queries = q[b + 1] - q[b], .keys = keys[b]}
                                     : Sequence{.entry = b, .queries = query.size(2), .keys = keys[b]});
    }
  } else if (o.packed()) {
    const auto k =
        packed_bounds(op, "cu_seqlens_k", *o.cu_seqlens_k, "key", key.size(0), "max_seqlen_k", o.max_seqlen_k);
    for (size_t b = 0; b + 1 < q.size(); ++b) {
      sequences.push_back({.first_query = q[b],
                           .queries = q[b + 1] - q[b],
                           .first_key = k[b],
                           .keys = k[b + 1] - k[b],
                           .first_tile_row = packed_tile_row<int64_t>(b, q[b])});
    }
  } else {
    const int64_t entries = query.size(0), queries = query.size(2), keys = key.size(2);
    q = rows_of_entries(op, "q_seqlens", o.q_seqlens, entries, "query's length", queries, queries);
    const auto start = rows_of_entries(op, "kv_starts", o.kv_starts, entries, "key's length", keys, 0);
    const auto end = rows_of_entries(op, "kv_seqlens", o.kv_seqlens, entries, "key's length", keys, keys);
    for (int64_t b = 0; b < entries; ++b) {
      sequences.push_back(
          {.entry = b, .queries = q[b], .first_key = start[b], .keys = std::max<int64_t>(end[b] - start[b], 0)});
    }
  }
  for (Sequence& s : sequences) {  // keys are counted in int32
    TORCH_CHECK(s.keys <= INT32_MAX, op, ": key must hold at most ", INT32_MAX, " keys, got ", s.keys);
    s.first_place = s.keys - s.queries;  // the last query stands beside the last key
  }
  if (o.q_positions) {
    const auto positions = values_of<int64_t>(*o.q_positions);
    for (size_t b = 0; b < sequences.size(); ++b) {
      TORCH_CHECK(positions[b] >= -kFarthestPosition && positions[b] <= kFarthestPosition, op,
                  ": q_positions must be from ", -kFarthestPosition, " to ", kFarthestPosition, ", got ", positions[b],
                  " at [", b, "]");
      sequences[b].first_place = positions[b];
    }
  }
  return sequences;
}

std::vector<int64_t> pages_of(const std::vector<Sequence>& sequences, const at::Tensor& key,
                              const AttentionOptions& options) {
  if (!options.paged()) return {};
  auto pages = values_of<int64_t>(*options.block_table);
  const int64_t in_cache = key.size(0), page = key.size(2), per_sequence = options.block_table->size(1);
  for (size_t b = 0; b < sequences.size(); ++b) {
    const Sequence& s = sequences[b];
    if (s.queries == 0) continue;
    // Pages behind a window may have been given away: no query sees a key before the first one's first.
    const int64_t left = std::min(options.window[0], kUnlimited),
                  first = left < 0 ? 0 : std::max<int64_t>(s.first_place - left, 0);
    for (int64_t w = page == 0 ? 0 : first / page; w * page < s.keys; ++w) {
      const int64_t number = pages[b * per_sequence + w];
      TORCH_CHECK(number >= 0 && number < in_cache, public_name(options), ": block_table must name pages from 0 to ",
                  in_cache - 1, " where keys of a sequence are, got ", number, " at [", b, ", ", w, "]");
    }
  }
  return pages;
}

std::vector<Place> places_of(const char* op, const at::Tensor& slots, const at::Tensor& cache) {
  const int64_t page = cache.size(1), count = cache.size(0) * page;
  const auto numbers = values_of<int64_t>(slots);
  std::vector<Place> places(numbers.size(), {-1, 0});
  for (size_t t = 0; t < numbers.size(); ++t) {
    TORCH_CHECK(numbers[t] >= -1 && numbers[t] < count, op, ": slots must be -1 or from 0 to ", count - 1, ", got ",
                numbers[t], " at [", t, "]");
    if (numbers[t] >= 0) places[t] = {numbers[t] / page, numbers[t] % page};
  }
  return places;
}

std::vector<double> alphas_of(int64_t heads, const AttentionOptions& options) {
  if (!options.head_alpha) return std::vector<double>(heads, options.alpha);
  auto alphas = values_of<double>(*options.head_alpha);
  // The least alpha as float32 or a shorter type holds it.
  const double least = at::scalar_tensor(kMinAlpha, at::kFloat).to(options.head_alpha->scalar_type()).item<double>();
  for (size_t h = 0; h < alphas.size(); ++h) {
    TORCH_CHECK(alphas[h] == 1 || (alphas[h] >= least && alphas[h] <= 2), public_name(options),
                ": alpha as a tensor must be 1 or from ", kMinAlpha, " to 2, got ", alphas[h], " at [", h, "]");
  }
  if (options.head_alpha->dim() == 0) alphas.resize(heads, alphas[0]);
  return alphas;
}

Dropout dropout_of(const AttentionOptions& options) {
  if (options.dropout_p == 0) return {};
  return {.seed = static_cast<uint64_t>(options.dropout_seed->item<int64_t>()),
          .threshold = options.dropout_threshold(),
          .kept = 1 / (1 - options.dropout_p)};
}

std::vector<int64_t> dropout_origins_of(int64_t sequences, const AttentionOptions& options) {
  if (options.dropout_origin) return values_of<int64_t>(*options.dropout_origin);
  std::vector<int64_t> origins(sequences * 4, 0);
  for (int64_t b = 0; b < sequences; ++b) origins[b * 4] = b;
  return origins;
}

std::vector<double> slopes_of(int64_t sequences, int64_t heads, const AttentionOptions& options) {
  if (!options.alibi_slopes) return {};
  return values_of<double>(options.alibi_slopes->expand({sequences, heads}));
}

}  // namespace adasplash::cpu
