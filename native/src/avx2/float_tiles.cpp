// Attention over unquantised tiles, and softmax, with AVX2 and FMA.

#include "generic/float_tiles.h"

#include <immintrin.h>

#include "fills.h"
#include "generic/rows.h"

namespace kvkeep {
namespace {

struct Isa {
  static constexpr int kLanes = 8;
  static constexpr int kTokenVectors = 2;
  static constexpr int kDimVectors = 2;
  using Floats = Lanes<Isa, 8>::Floats;
  using Words = Lanes<Isa, 8>::Words;

  static Floats widen_halves(Words half) {
    const auto words = reinterpret_cast<__m256i>(half);
    const __m128i halves =
        _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    return _mm256_cvtph_ps(halves);
  }
};

}  // namespace

void fill_float_tiles_avx2(Ops &ops) {
  fill_rows<Isa>(ops);
  fill_float_tiles<Isa>(ops);
}

}  // namespace kvkeep
