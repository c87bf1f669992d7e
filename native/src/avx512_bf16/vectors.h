// What the quantised tiles of this instruction set share: how a tile is cut into vectors and
// queries.

#ifndef KVKEEP_AVX512_BF16_VECTORS_H
#define KVKEEP_AVX512_BF16_VECTORS_H

// GCC 12 warns of its own _mm512_undefined_epi32.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "generic/prefetch.h"
#include "kvkeep_native.h"
#include "ops.h"
#include "tiles.h"

namespace kvkeep {
namespace {

struct Isa {
  static constexpr int kLanes = 16;
};

constexpr int kQueriesAtOnce = 4;
// Tokens of a tile whose weights are prepared together; block sizes above are taken in parts.
constexpr int kTokensAtOnce = 64;

__m512 load(const float *x, int d, int dim) {
  return d + 16 <= dim ? _mm512_loadu_ps(x + d) : _mm512_maskz_loadu_ps(0xff, x + d);
}

__m512i load_words(const std::uint32_t *words, __mmask16 mask, bool is_masked) {
  return is_masked ? _mm512_maskz_loadu_epi32(mask, words) : _mm512_loadu_si512(words);
}

// The bits of |x|, which are ordered as integers; NaN is the largest.
__m512i magnitude(__m512 x) {
  return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

float float_of(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Four codes of each word, a byte each.
template <int kFormat>
__m512i bytes_of(__m512i words, int part) {
  if (kFormat != KVKEEP_INT4) return words;
  const __m512i shifted = part == 0 ? words : _mm512_srli_epi32(words, 4);
  return _mm512_and_si512(shifted, _mm512_set1_epi8(15));
}

template <int kFormat>
struct Metadata {
  __m512 scale;
  __m512 minimum;

  explicit Metadata(__m512i words) {
    if (kFormat == KVKEEP_INT4) {
      scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words));
      minimum = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)));
    } else {
      scale = _mm512_castsi512_ps(words);
      minimum = _mm512_setzero_ps();
    }
  }
};

// A tile, and the stride of the scores or weights of its queries.
struct TileOfFloats {
  const std::uint8_t *tile;
  int block_size, dim, stride;
  std::ptrdiff_t ahead;

  template <int kFormat>
  const std::uint32_t *metadata() const {
    return reinterpret_cast<const std::uint32_t *>(tile) + code_words(kFormat, dim, block_size);
  }
};

// Tokens lo .. hi, which lie in the kTokensAtOnce from `begin` on.
struct TokenRange {
  int begin, lo, hi;

  // Which of the 16 tokens from t on are in the range.
  __mmask16 mask(int t) const {
    const int first = lo > t ? lo - t : 0, last = hi - t < 16 ? hi - t : 16;
    return last <= first ? 0
                         : static_cast<__mmask16>((0xffffu >> (16 - last)) & (0xffffu << first));
  }
};

// The mask of what is left of `total` after `done`, at most a vector.
__mmask16 rest(int total, int done) {
  return static_cast<__mmask16>(total - done >= 16 ? 0xffff : (1 << (total - done)) - 1);
}

template <class Keys, int kQueries>
void score_queries(const TileOfFloats &at, const std::uint8_t *queries, std::size_t bytes,
                   float *scores) {
  int t = 0;
  for (; at.block_size - t > 16; t += 32) {
    Keys::template score_tokens<kQueries, 2>(at, t, rest(at.block_size, t + 16), queries, bytes,
                                             scores + t);
  }
  if (t < at.block_size) {
    Keys::template score_tokens<kQueries, 1>(at, t, rest(at.block_size, t), queries, bytes,
                                             scores + t);
  }
}

template <class Keys>
void score_tile(const TileOfFloats &at, const void *queries, std::size_t bytes, int num_queries,
                float *scores) {
  for (int i = 0; i < num_queries; i += kQueriesAtOnce) {
    const auto *query = static_cast<const std::uint8_t *>(queries) + i * bytes;
    float *out = scores + static_cast<std::ptrdiff_t>(i) * at.stride;
    switch (num_queries - i) {
      case 1:
        score_queries<Keys, 1>(at, query, bytes, out);
        break;
      case 2:
        score_queries<Keys, 2>(at, query, bytes, out);
        break;
      case 3:
        score_queries<Keys, 3>(at, query, bytes, out);
        break;
      default:
        score_queries<Keys, 4>(at, query, bytes, out);
    }
  }
}

template <class Values, int kQueries>
void accumulate_queries(const TileOfFloats &at, const TokenRange &range, const float *weights,
                        float *acc) {
  const typename Values::template Weights<kQueries> prepared(at, range, weights);
  int d = 0;
  for (; at.dim - d > 16; d += 32) {
    Values::template add_dims<kQueries, 2>(at, range, prepared, d, rest(at.dim, d + 16), acc);
  }
  if (d < at.dim)
    Values::template add_dims<kQueries, 1>(at, range, prepared, d, rest(at.dim, d), acc);
}

template <class Values>
void accumulate_tile(const TileOfFloats &at, const float *weights, int num_queries, int lo, int hi,
                     float *acc) {
  for (int i = 0; i < num_queries; i += kQueriesAtOnce) {
    const float *w = weights + static_cast<std::ptrdiff_t>(i) * at.stride;
    float *out = acc + static_cast<std::ptrdiff_t>(i) * at.dim;
    for (int begin = lo / kTokensAtOnce * kTokensAtOnce; begin < hi; begin += kTokensAtOnce) {
      const int end = begin + kTokensAtOnce;
      const TokenRange range{begin, lo > begin ? lo : begin, hi < end ? hi : end};
      switch (num_queries - i) {
        case 1:
          accumulate_queries<Values, 1>(at, range, w, out);
          break;
        case 2:
          accumulate_queries<Values, 2>(at, range, w, out);
          break;
        case 3:
          accumulate_queries<Values, 3>(at, range, w, out);
          break;
        default:
          accumulate_queries<Values, 4>(at, range, w, out);
      }
    }
  }
}

}  // namespace
}  // namespace kvkeep

#endif
