// Sequences of unequal lengths that are continued together, byte by byte, over one paged cache of keys and values. The
// cache lives here, and the index of its keys if the model takes one; the model, saved by ../gpt/export.py, writes to
// both in place.
//
// A step takes a token of every sequence that is being continued, and beside them a chunk of the prompts that are still
// to be read: the steps of ../gpt/engine.py, so that both compute the same bits.
#pragma once

#include <ATen/ATen.h>
#include <adasplash/adasplash.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

using Tensors = std::vector<at::Tensor>;

// Keys, values, and the keys' indexes, of all layers each. There are no indexes where a model takes none.
using Caches = std::array<Tensors, 3>;

// What a saved model is to a server. `step` takes what CachedGPT.forward in ../gpt/cached.py does, whose last three
// arguments are the caches, and gives logits.
struct CachedModel {
  std::function<at::Tensor(const Tensors& arguments, const Caches& caches)> step;
  int64_t layers = 0, heads = 0, head_size = 0;
  bool indexed = false;
  at::Device device = at::kCPU;
};

// Defined by load_torchscript.cpp and load_aoti.cpp, one of which a program is linked with.
CachedModel LoadModel(const std::string& path);

constexpr int64_t kPage = 16;   // keys of a page
constexpr int64_t kChunk = 64;  // tokens of a prompt that are read in one step

class Server {
 public:
  // A request on its way: of `text`, the prompt and what came so far, `held` bytes are in the cache.
  struct Sequence {
    int64_t number;
    std::vector<int64_t> text;
    int64_t left;  // bytes that are still to be written
    int64_t held = 0;
    std::vector<int64_t> pages = {};
  };
  // Told of every byte as it comes.
  using Listener = std::function<void(int64_t number, uint8_t byte)>;

  static int64_t PagesFor(int64_t tokens) { return (tokens + kPage - 1) / kPage; }

  // At most so many sequences are on their way at once; a request waits until there are enough pages for all of it.
  Server(CachedModel model, int64_t pages, int64_t sequences)
      : model_(std::move(model)), most_(sequences), width_(pages), free_(pages) {
    TORCH_CHECK(pages > 0 && sequences > 0, "a server needs pages and sequences, got ", pages, " and ", sequences);
    auto& [keys, values, indexes] = caches_;
    for (int64_t layer = 0; layer < model_.layers; ++layer) {
      keys.push_back(at::zeros({pages, kPage, model_.heads, model_.head_size}, model_.device));
      values.push_back(at::zeros_like(keys.back()));
      if (model_.indexed) indexes.push_back(adasplash::entmax_make_key_index(keys.back()));
    }
    std::iota(free_.begin(), free_.end(), 0);
  }

  // A request: `count` bytes after the prompt.
  void Add(int64_t number, const std::string& prompt, int64_t count) {
    TORCH_CHECK(!prompt.empty() && count > 0, "a request needs a prompt and a count above zero");
    const auto length = static_cast<int64_t>(prompt.size());
    TORCH_CHECK(PagesFor(length + count) <= width_, "request ", number, " needs more pages than the cache has, ",
                width_);
    Sequence sequence{.number = number, .text = {}, .left = count};
    for (unsigned char byte : prompt) sequence.text.push_back(byte);
    waiting_.push_back(std::move(sequence));
  }

  void Run(const Listener& listener) {
    while (!waiting_.empty() || !running_.empty()) Advance(listener);
  }

 private:
  // Starts the requests that there is room for, in their order.
  void Admit() {
    while (!waiting_.empty() && static_cast<int64_t>(running_.size()) < most_) {
      Sequence& next = waiting_.front();
      const int64_t needed = PagesFor(next.text.size() + next.left);
      if (needed > static_cast<int64_t>(free_.size())) return;
      for (int64_t i = 0; i < needed; ++i) {
        next.pages.push_back(free_.back());
        free_.pop_back();
      }
      running_.push_back(std::move(next));
      waiting_.pop_front();
    }
  }

  void Advance(const Listener& listener) {
    Admit();
    // Exported code takes two sequences or more, and two tokens: an empty sequence with one token, kept nowhere.
    std::vector<int64_t> tokens = {0}, positions = {0}, slots = {-1}, last;
    std::vector<int32_t> ends = {0, 1}, lengths = {0};
    std::vector<int32_t> table((running_.size() + 1) * width_, 0);
    for (size_t row = 0; row < running_.size(); ++row) {
      Sequence& sequence = running_[row];
      const int64_t end = std::min<int64_t>(sequence.text.size(), sequence.held + kChunk);
      for (int64_t place = sequence.held; place < end; ++place) {
        tokens.push_back(sequence.text[place]);
        positions.push_back(place);
        slots.push_back(sequence.pages[place / kPage] * kPage + place % kPage);
      }
      sequence.held = end;
      ends.push_back(static_cast<int32_t>(tokens.size()));
      last.push_back(static_cast<int64_t>(tokens.size()) - 1);
      lengths.push_back(static_cast<int32_t>(end));
      std::copy(sequence.pages.begin(), sequence.pages.end(), table.begin() + (row + 1) * width_);
    }
    const Tensors arguments = {Send(tokens), Send(positions), Send(slots), Send(ends), Send(table).view({-1, width_}),
                               Send(lengths)};
    const at::Tensor logits = model_.step(arguments, caches_);
    const at::Tensor likeliest = logits.index_select(0, Send(last)).argmax(-1).cpu();
    const int64_t* const bytes = likeliest.const_data_ptr<int64_t>();
    for (size_t row = 0; row < running_.size(); ++row) {
      Sequence& sequence = running_[row];
      if (sequence.held < static_cast<int64_t>(sequence.text.size())) continue;  // more of the prompt is to come
      sequence.text.push_back(bytes[row]);
      --sequence.left;
      listener(sequence.number, static_cast<uint8_t>(bytes[row]));
    }
    for (const Sequence& sequence : running_) {
      if (sequence.left == 0) free_.insert(free_.end(), sequence.pages.begin(), sequence.pages.end());
    }
    std::erase_if(running_, [](const Sequence& sequence) { return sequence.left == 0; });
  }

  // A copy of numbers where the model is.
  template <typename T>
  at::Tensor Send(const std::vector<T>& numbers) const {
    return at::tensor(at::ArrayRef<T>(numbers)).to(model_.device);
  }

  const CachedModel model_;
  const int64_t most_, width_;
  Caches caches_;
  std::vector<int64_t> free_;
  std::deque<Sequence> waiting_;
  std::vector<Sequence> running_;
};
