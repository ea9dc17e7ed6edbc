#include "cuda/lzma.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

namespace adasplash::cuda {
namespace {

// How probable a bit of 0 is, in units of 2^-11; it follows the bits that are read.
struct Chance {
  uint16_t of_zero = 1024;
};

class Bits {
 public:
  explicit Bits(std::span<const unsigned char> stream) : stream_(stream) {
    for (int i = 0; i < 5; ++i) code_ = code_ << 8 | next();  // the first byte is 0
  }

  bool ended() const { return at_ > stream_.size(); }

  unsigned bit(Chance& chance) {
    const uint32_t zero = (range_ >> 11) * chance.of_zero;
    const bool one = code_ >= zero;
    if (one) {
      range_ -= zero;
      code_ -= zero;
      chance.of_zero -= chance.of_zero >> 5;
    } else {
      range_ = zero;
      chance.of_zero += (2048 - chance.of_zero) >> 5;
    }
    refill();
    return one;
  }

  // Of equal chances, the highest first.
  uint32_t even(int count) {
    uint32_t value = 0;
    while (count--) {
      range_ >>= 1;
      const bool one = code_ >= range_;
      if (one) code_ -= range_;
      value = value << 1 | one;
      refill();
    }
    return value;
  }

  // A number of `count` bits, the highest first, each with the chance that those before it choose.
  uint32_t number(Chance* chances, int count) {
    uint32_t node = 1;
    for (int i = 0; i < count; ++i) node = node << 1 | bit(chances[node]);
    return node - (1u << count);
  }

  // The same, the lowest bit first.
  uint32_t reversed(Chance* chances, int count) {
    uint32_t node = 1, value = 0;
    for (int i = 0; i < count; ++i) {
      const uint32_t one = bit(chances[node]);
      node = node << 1 | one;
      value |= one << i;
    }
    return value;
  }

 private:
  unsigned next() { return at_++ < stream_.size() ? stream_[at_ - 1] : 0; }

  void refill() {
    if (range_ >= 1u << 24) return;
    range_ <<= 8;
    code_ = code_ << 8 | next();
  }

  std::span<const unsigned char> stream_;
  size_t at_ = 0;
  uint32_t range_ = ~0u, code_ = 0;
};

// How many bytes are repeated, less 2.
struct Length {
  Chance more, most, low[16][8], middle[16][8], high[256];

  uint32_t read(Bits& bits, size_t place) {
    if (!bits.bit(more)) return bits.number(low[place], 3);
    if (!bits.bit(most)) return 8 + bits.number(middle[place], 3);
    return 16 + bits.number(high, 8);
  }
};

// What the decoder knows: chances, by what was read before (`state`: the last few kinds of step) and where (`place`:
// the lowest four bits of the position), and how far back the last four repeated stretches lay, less 1.
class Decoder {
 public:
  Decoder(std::span<const unsigned char> stream, size_t length) : bits_(stream), length_(length) {
    text_.reserve(length);
  }

  std::string decode() {
    while (text_.size() < length_ && !bits_.ended() && step()) {
    }
    return std::move(text_);
  }

 private:
  // False at the end of the stream.
  bool step() {
    const size_t place = text_.size() & 15;
    if (!bits_.bit(repeats_[state_][place])) {
      literal();
      return true;
    }
    uint32_t count = 0;
    if (bits_.bit(known_[state_])) {
      if (!bits_.bit(not_last_[state_])) {
        if (!bits_.bit(longer_[state_][place])) {
          state_ = state_ < 7 ? 9 : 11;
          return repeat(1);
        }
      } else {
        const int which = !bits_.bit(not_second_[state_]) ? 1 : !bits_.bit(not_third_[state_]) ? 2 : 3;
        std::rotate(back_.begin(), back_.begin() + which, back_.begin() + which + 1);
      }
      count = known_length_.read(bits_, place);
      state_ = state_ < 7 ? 8 : 11;
    } else {
      count = length_of_new_.read(bits_, place);
      state_ = state_ < 7 ? 7 : 10;
      std::rotate(back_.begin(), back_.begin() + 3, back_.end());
      back_[0] = distance(count);
    }
    return repeat(count + 2);
  }

  void literal() {
    unsigned node = 1;
    if (state_ >= 7 && back_[0] < text_.size()) {  // after a repetition: the byte that would have gone on with it helps
      unsigned expected = static_cast<unsigned char>(text_[text_.size() - back_[0] - 1]);
      while (node < 0x100) {
        const unsigned hint = expected >> 7 & 1, one = bits_.bit(literals_[(1 + hint) * 0x100 + node]);
        expected <<= 1;
        node = node << 1 | one;
        if (hint != one) break;
      }
    }
    while (node < 0x100) node = node << 1 | bits_.bit(literals_[node]);
    text_ += static_cast<char>(node);
    state_ = state_ < 4 ? 0 : state_ < 10 ? state_ - 3 : state_ - 6;
  }

  uint32_t distance(uint32_t count) {
    const uint32_t slot = bits_.number(slots_[std::min(count, 3u)], 6);
    if (slot < 4) return slot;
    const int below = static_cast<int>(slot >> 1) - 1;
    const uint32_t high = (2 | (slot & 1)) << below;
    if (slot < 14) return high + bits_.reversed(near_ + high - slot, below);
    const uint32_t middle = bits_.even(below - 4) << 4;
    return high + middle + bits_.reversed(lowest_, 4);
  }

  bool repeat(uint32_t count) {
    if (back_[0] >= text_.size()) return false;  // the mark of the end, or not LZMA
    while (count-- && text_.size() < length_) text_ += text_[text_.size() - back_[0] - 1];
    return true;
  }

  Bits bits_;
  size_t length_;
  std::string text_;
  int state_ = 0;
  std::array<uint32_t, 4> back_{};
  Chance repeats_[12][16], known_[12], not_last_[12], not_second_[12], not_third_[12], longer_[12][16];
  Chance literals_[0x300], slots_[4][64], near_[115], lowest_[16];
  Length known_length_, length_of_new_;
};

}  // namespace

std::string lzma_decode(std::span<const unsigned char> stream, size_t length) {
  return Decoder(stream, length).decode();
}

}  // namespace adasplash::cuda
