// Moves codes between rows (one a token) and the words of a tile; no arithmetic, only places.
//
// A row of codes is 4, 2 or 1 bytes a number, 1 byte for 4-bit codes too. A row of words is what a
// token's words of keys are one after the other: the same bytes, but for 4-bit codes, which are
// packed.

#ifndef KVKEEP_GENERIC_WORDS_H
#define KVKEEP_GENERIC_WORDS_H

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "ops.h"

namespace kvkeep {

template <int kBits>
struct CodeOf {
  using Type = std::uint8_t;
};
template <>
struct CodeOf<16> {
  using Type = std::uint16_t;
};
template <>
struct CodeOf<32> {
  using Type = std::uint32_t;
};

// Columns of a matrix of words against rows, word by word: what an instruction set does at least.
template <class Isa>
struct PlainColumns {
  static void load(const std::uint32_t *columns, int block_size, int num_words, int count,
                   std::uint8_t *rows, std::ptrdiff_t row_bytes) {
    for (int i = 0; i < count; ++i) {
      for (int w = 0; w < num_words; ++w) {
        std::memcpy(rows + i * row_bytes + 4 * w,
                    columns + static_cast<std::ptrdiff_t>(w) * block_size + i, 4);
      }
    }
  }

  static void store(std::uint32_t *columns, int block_size, int num_words, int count,
                    const std::uint8_t *rows, std::ptrdiff_t row_bytes) {
    for (int i = 0; i < count; ++i) {
      for (int w = 0; w < num_words; ++w) {
        std::memcpy(columns + static_cast<std::ptrdiff_t>(w) * block_size + i,
                    rows + i * row_bytes + 4 * w, 4);
      }
    }
  }
};

// 4-bit codes of eight numbers are a word: byte i holds number i low and number 4 + i high.
template <class Isa>
struct Nibbles {
  // May be in place.
  static void pack(const std::uint8_t *codes, int dim, std::uint8_t *words) {
    for (int w = 0; w < dim / 8; ++w) {
      std::uint32_t low, high;
      std::memcpy(&low, codes + 8 * w, 4);
      std::memcpy(&high, codes + 8 * w + 4, 4);
      const std::uint32_t word = low | (high << 4);
      std::memcpy(words + 4 * w, &word, 4);
    }
  }

  static void unpack(const std::uint8_t *words, int dim, std::uint8_t *codes) {
    for (int w = 0; w < dim / 8; ++w) {
      std::uint32_t word;
      std::memcpy(&word, words + 4 * w, 4);
      const std::uint32_t low = word & 0x0f0f0f0f, high = (word >> 4) & 0x0f0f0f0f;
      std::memcpy(codes + 8 * w, &low, 4);
      std::memcpy(codes + 8 * w + 4, &high, 4);
    }
  }

  // Where code i of a word begins.
  static int shift(int i) { return i < 4 ? 8 * i : 8 * (i - 4) + 4; }
};

// Values: tokens offset .. offset + count of the words of a tile. Tokens share words, so that a
// store reads the word and puts its own bits in.
template <class Isa, int kBits>
struct ValueWords {
  using Code = typename CodeOf<kBits>::Type;
  static constexpr int kTokens = 32 / kBits;
  static constexpr std::uint32_t kMask = kBits == 32 ? 0xffffffffu : (1u << (kBits & 31)) - 1;

  static int shift(int token) {
    return kBits == 4 ? Nibbles<Isa>::shift(token % kTokens) : token % kTokens * kBits;
  }

  static void load(const std::uint8_t *tile, int dim, int offset, int count, std::uint8_t *rows,
                   std::ptrdiff_t row_bytes) {
    const auto *all = reinterpret_cast<const std::uint32_t *>(tile);
    for (int i = 0; i < count; ++i) {
      const std::uint32_t *words = all + static_cast<std::ptrdiff_t>((offset + i) / kTokens) * dim;
      auto *codes = reinterpret_cast<Code *>(rows + i * row_bytes);
      const int begin = shift(offset + i);
      for (int d = 0; d < dim; ++d) codes[d] = static_cast<Code>((words[d] >> begin) & kMask);
    }
  }

  static void store(std::uint8_t *tile, int dim, int offset, int count, const std::uint8_t *rows,
                    std::ptrdiff_t row_bytes) {
    auto *all = reinterpret_cast<std::uint32_t *>(tile);
    for (int i = 0; i < count; ++i) {
      std::uint32_t *words = all + static_cast<std::ptrdiff_t>((offset + i) / kTokens) * dim;
      const auto *codes = reinterpret_cast<const Code *>(rows + i * row_bytes);
      const int begin = shift(offset + i);
      const std::uint32_t others = ~(kMask << begin);
      for (int d = 0; d < dim; ++d) {
        words[d] = (words[d] & others) | (static_cast<std::uint32_t>(codes[d]) << begin);
      }
    }
  }
};

}  // namespace kvkeep

#endif
