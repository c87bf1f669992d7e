// What the registers are used for, and what they are loaded from.

#ifndef KVKEEP_AMX_OPERANDS_H
#define KVKEEP_AMX_OPERANDS_H

// GCC 12 warns of its own _mm512_undefined_epi32.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "amx/registers.h"
#include "generic/prefetch.h"

namespace kvkeep {
namespace {

struct Isa {};

// Numbers of a row of a factor, which one instruction sums up: the dims or tokens of a step.
constexpr int kStep = 32;
// Columns of sums: the tokens of a strip of keys, the dims of a strip of values.
constexpr int kColumns = 16;
constexpr int kMostParts = 3;

// Registers of sixteen queries, and of those that are left over: the sums of two strips, and the first
// factor. Having both saves configuring them in the middle of a tile.
struct Sixteen {
  static constexpr int kSums = 0, kFactor = 4;
};
struct Rest {
  static constexpr int kSums = 2, kFactor = 5;
};
// Registers of the words of two strips.
constexpr int kWords = 6;

// Rows of the registers of Rest; 0 where this thread has configured none.
thread_local int rest_rows = 0;

// Before registers are used for a tile. It sets them to zero, and takes as long as reading a kilobyte or
// two.
void configure_for(int num_queries) {
  const int rest = num_queries % kRows;
  if (rest_rows != 0 && (rest == 0 || rest == rest_rows)) return;
  rest_rows = rest == 0 ? kRows : rest;
  TileShapes shapes;
  for (int i = 0; i < kRegisters; ++i) {
    shapes.row_bytes[i] = kRowBytes;
    shapes.rows[i] = kRows;
  }
  for (const int i : {Rest::kSums, Rest::kSums + 1, Rest::kFactor}) {
    shapes.rows[i] = static_cast<std::uint8_t>(rest_rows);
  }
  configure(shapes);
}

// Threads go on to code that configures the registers its own way, and a processor that has to keep them
// sleeps less deeply.
void end_thread() {
  if (rest_rows == 0) return;
  rest_rows = 0;
  release();
}

template <int kStripOf>
struct Strip {
  static constexpr int kStrip = kStripOf;
};

template <int kStrips, class F>
void each_strip(F f) {
  f(Strip<0>{});
  if constexpr (kStrips > 1) f(Strip<1>{});
}

// Two vectors of floats as 32 bf16 numbers, and the lower and upper half of such as floats.
__m512i narrow(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

__m512 widen(__m256i numbers) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

__m512 widen_low(__m512i numbers) { return widen(_mm512_castsi512_si256(numbers)); }

__m512 widen_high(__m512i numbers) { return widen(_mm512_extracti64x4_epi64(numbers, 1)); }

// The first `count` of 32 lanes.
__mmask32 first_lanes(int count) {
  return count <= 0 ? 0 : count >= 32 ? 0xffffffffu : (1u << count) - 1;
}

// Sixteen rows of sixteen words: what a register is loaded from, in a tile or copied.
struct Words {
  const std::uint32_t *first;
  std::ptrdiff_t stride;
};

struct alignas(64) CopiedWords {
  std::uint32_t rows[kRows][kColumns];

  Words words() const { return {rows[0], kColumns}; }
};

template <int kTile>
void load_words(const Words &words) {
  tile_load<kTile>(words.first, words.stride * 4);
}

void prefetch(const Words &words, int num_rows, std::ptrdiff_t ahead) {
  if (ahead == 0) return;
  for (int row = 0; row < num_rows; ++row) {
    prefetch_ahead<Isa>(words.first + row * words.stride, ahead);
  }
}

}  // namespace
}  // namespace kvkeep

#endif
