// The functions of registers.h in C++, as Intel defines the instructions (Software Developer's Manual,
// volume 2: LDTILECFG, TILELOADD, TILESTORED, TDPBF16PS). A vector is a row of sums, a lane one column.

#ifndef KVKEEP_AMX_EMULATED_REGISTERS_H
#define KVKEEP_AMX_EMULATED_REGISTERS_H

#include <immintrin.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "amx/registers.h"

namespace kvkeep {
namespace {

struct Emulated {
  TileShapes shapes;
  bool is_configured;
  alignas(64) std::uint8_t bytes[kRegisters][kRows][kRowBytes];
};

thread_local Emulated emulated{};

// Stops where a processor raises an exception.
void require(bool holds) {
  if (holds) return;
  std::fputs("emulated AMX: an instruction that does not fit the configuration\n", stderr);
  std::abort();
}

void configure(const TileShapes &shapes) {
  require(shapes.palette == 1 && shapes.start_row == 0);
  for (int i = 0; i < kRegisters; ++i) {
    require(shapes.rows[i] <= kRows && shapes.row_bytes[i] <= kRowBytes &&
            shapes.row_bytes[i] % 4 == 0 && (shapes.rows[i] == 0) == (shapes.row_bytes[i] == 0));
  }
  emulated = Emulated{};
  emulated.shapes = shapes;
  emulated.is_configured = true;
}

void release() { emulated = Emulated{}; }

template <int kTile>
void tile_zero() {
  require(emulated.is_configured && emulated.shapes.rows[kTile] > 0);
  std::memset(emulated.bytes[kTile], 0, sizeof(emulated.bytes[kTile]));
}

template <int kTile>
void tile_load(const void *from, std::ptrdiff_t stride) {
  tile_zero<kTile>();
  for (int i = 0; i < emulated.shapes.rows[kTile]; ++i) {
    std::memcpy(emulated.bytes[kTile][i], static_cast<const std::uint8_t *>(from) + i * stride,
                emulated.shapes.row_bytes[kTile]);
  }
}

template <int kTile>
void tile_store(void *to, std::ptrdiff_t stride) {
  require(emulated.is_configured && emulated.shapes.rows[kTile] > 0);
  for (int i = 0; i < emulated.shapes.rows[kTile]; ++i) {
    std::memcpy(static_cast<std::uint8_t *>(to) + i * stride, emulated.bytes[kTile][i],
                emulated.shapes.row_bytes[kTile]);
  }
}

// Subnormal numbers count as zero wherever the instruction reads or makes one.
__m512 flush(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __mmask16 is_small = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
  const __m512i sign = _mm512_set1_epi32(INT32_MIN);
  return _mm512_castsi512_ps(_mm512_mask_and_epi32(bits, is_small, bits, sign));
}

// a * b + c, rounded once; `a` and `b` as the bits of bf16 numbers in the upper half of a word.
__m512 multiply_add(__m512i a, __m512i b, __m512 c) {
  return flush(
      _mm512_fmadd_ps(flush(_mm512_castsi512_ps(a)), flush(_mm512_castsi512_ps(b)), flush(c)));
}

template <int kSums, int kA, int kB>
void tile_dpbf16() {
  const TileShapes &shapes = emulated.shapes;
  require(emulated.is_configured && shapes.rows[kSums] > 0 && shapes.rows[kB] > 0 &&
          shapes.rows[kSums] == shapes.rows[kA] && shapes.row_bytes[kA] == 4 * shapes.rows[kB] &&
          shapes.row_bytes[kSums] == shapes.row_bytes[kB]);
  const __mmask16 columns = static_cast<__mmask16>((1u << (shapes.row_bytes[kSums] / 4)) - 1);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int m = 0; m < shapes.rows[kSums]; ++m) {
    // Products of the first numbers of pairs are summed up by themselves, and so are those of the second
    // ones.
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int k = 0; k < shapes.rows[kB]; ++k) {
      int pair;
      std::memcpy(&pair, emulated.bytes[kA][m] + 4 * k, sizeof(pair));
      const __m512i a = _mm512_set1_epi32(pair), b = _mm512_load_si512(emulated.bytes[kB][k]);
      even = multiply_add(_mm512_slli_epi32(a, 16), _mm512_slli_epi32(b, 16), even);
      odd = multiply_add(_mm512_and_si512(a, upper), _mm512_and_si512(b, upper), odd);
    }
    const __m512 sum = flush(_mm512_add_ps(even, odd));
    const __m512 before = flush(_mm512_load_ps(emulated.bytes[kSums][m]));
    _mm512_store_ps(emulated.bytes[kSums][m],
                    _mm512_maskz_mov_ps(columns, flush(_mm512_add_ps(before, sum))));
  }
}

}  // namespace
}  // namespace kvkeep

#endif
