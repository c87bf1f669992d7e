// Attention over unquantised tiles, and softmax, with AVX-512.

#include "generic/float_tiles.h"

#include <immintrin.h>

#include "fills.h"
#include "generic/rows.h"

namespace kvkeep {
namespace {

using Halves8 = std::uint16_t __attribute__((vector_size(16)));
using Halves16 = std::uint16_t __attribute__((vector_size(32)));

struct Isa {
  static constexpr int kLanes = 16;
  static constexpr int kTokenVectors = 2;
  static constexpr int kDimVectors = 4;

  static auto widen_halves(Lanes<Isa, 8>::Words half) {
    const auto halves = __builtin_convertvector(half, Halves8);
    return static_cast<Lanes<Isa, 8>::Floats>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(halves)));
  }

  static auto widen_halves(Lanes<Isa, 16>::Words half) {
    const auto halves = __builtin_convertvector(half, Halves16);
    return static_cast<Lanes<Isa, 16>::Floats>(
        _mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(halves)));
  }
};

}  // namespace

void fill_float_tiles_avx512(Ops &ops) {
  fill_rows<Isa>(ops);
  fill_float_tiles<Isa>(ops);
}

}  // namespace kvkeep
