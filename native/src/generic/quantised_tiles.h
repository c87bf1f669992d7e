// KeyOps and ValueOps of fp8, int8 and int4 tiles: codes become floats in registers.
//
// Fp8 codes are read as floats whose exponent is 120 too small, zero stays zero; 2^64 of that is
// given to the queries and weights, so that no product is subnormal, and the rest to the sums.

#ifndef KVKEEP_GENERIC_QUANTISED_TILES_H
#define KVKEEP_GENERIC_QUANTISED_TILES_H

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "generic/numbers.h"
#include "generic/prefetch.h"
#include "generic/rotation.h"
#include "generic/vectors.h"
#include "generic/words.h"
#include "kvkeep_native.h"
#include "ops.h"
#include "tiles.h"

namespace kvkeep {

constexpr int kQueriesAtOnce = 4;

template <int kFormat>
struct Fp8Powers {
  static constexpr float kOfFactors = kFormat == KVKEEP_FP8 ? 0x1p64f : 1.0f;
  static constexpr float kOfSums = kFormat == KVKEEP_FP8 ? 0x1p56f : 1.0f;
};

// A vector of words, one a token or dim, and its elements as floats.
template <class Isa, int kFormat, int kLanes>
struct Elements {
  using V = Vectors<kLanes>;
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;
  using Words = typename V::Words;
  Words words;

  void load(const std::uint32_t *from) {
    std::memcpy(&words, from, sizeof(words));
    // Codes as they are, no longer + 128.
    if constexpr (kFormat == KVKEEP_INT8) words ^= 0x80808080u;
  }

  void get(int i, Floats &x) const {
    if constexpr (kFormat == KVKEEP_INT8) {
      x = __builtin_convertvector(reinterpret_cast<Ints>(words << (24 - 8 * i)) >> 24, Floats);
    } else {
      const Words code = (words >> Nibbles<Isa>::shift(i)) & 15u;
      x = __builtin_convertvector(reinterpret_cast<Ints>(code), Floats);
    }
  }
};

template <class Isa, int kLanes>
struct Elements<Isa, KVKEEP_FP8, kLanes> {
  using V = Vectors<kLanes>;
  using Floats = typename V::Floats;
  using Words = typename V::Words;
  using Shorts = typename V::Shorts;
  // The codes of even and odd number, shifted to where sign and exponent of a float are, or 16 bits
  // below.
  Words even, odd;

  void load(const std::uint32_t *from) {
    Shorts pairs;
    std::memcpy(&pairs, from, sizeof(pairs));
    even = reinterpret_cast<Words>((pairs << 8) >> 4);
    odd = reinterpret_cast<Words>(pairs >> 4);
  }

  void get(int i, Floats &x) const {
    const Words codes = i % 2 == 0 ? even : odd;
    x = reinterpret_cast<Floats>((i < 2 ? codes << 16 : codes) & 0x87f00000u);
  }
};

// A prepared query: its sum, and its numbers.
struct alignas(64) QueryHeader {
  float sum;
};

template <class Isa, int kFormat>
struct QuantisedKeys {
  using N = Numbers<Isa>;
  static constexpr int kWordDims = 32 / bits_of(kFormat);

  static std::size_t query_bytes(int k_dim) {
    return sizeof(QueryHeader) + (static_cast<std::size_t>(k_dim) * sizeof(float) + 63) / 64 * 64;
  }

  static void prepare_query(const float *q, int k_dim, const float *signs, bool, void *prepared) {
    auto *x = static_cast<float *>(prepared) + sizeof(QueryHeader) / sizeof(float);
    std::memcpy(x, q, static_cast<std::size_t>(k_dim) * sizeof(float));
    float sum = 0;
    if constexpr (kFormat == KVKEEP_INT4) {
      rotate<Isa>(x, k_dim, signs);
      for (int d = 0; d < k_dim; ++d) sum += x[d];
    }
    for (int d = 0; d < k_dim; ++d) x[d] *= Fp8Powers<kFormat>::kOfFactors;
    std::memcpy(prepared, &sum, sizeof(sum));
  }

  static void score(const std::uint8_t *tile, int block_size, int k_dim, const void *queries,
                    int num_queries, float *scores, int stride, std::ptrdiff_t ahead) {
    const std::size_t bytes = query_bytes(k_dim);
    const auto *query = static_cast<const std::uint8_t *>(queries);
    Tile at{reinterpret_cast<const std::uint32_t *>(tile),
            nullptr,
            bytes,
            block_size,
            k_dim,
            stride,
            ahead};
    for (int i = 0; i < num_queries; i += kQueriesAtOnce) {
      at.query = query + i * bytes;
      float *out = scores + static_cast<std::ptrdiff_t>(i) * stride;
      switch (num_queries - i) {
        case 1:
          score_queries<1>(at, out);
          break;
        case 2:
          score_queries<2>(at, out);
          break;
        case 3:
          score_queries<3>(at, out);
          break;
        default:
          score_queries<4>(at, out);
      }
    }
  }

 private:
  struct Tile {
    const std::uint32_t *words;
    const std::uint8_t *query;
    std::size_t query_bytes;
    int block_size, k_dim, stride;
    std::ptrdiff_t ahead;
  };

  template <int kQueries>
  static void score_queries(const Tile &at, float *scores) {
    constexpr int kLanes = Isa::kLanes, kNarrow = kLanes < 8 ? kLanes : 8;
    int t = 0;
    for (; t + 2 * kLanes <= at.block_size; t += 2 * kLanes) {
      score_tokens<kQueries, kLanes, 2>(at, t, scores + t);
    }
    for (; t + kLanes <= at.block_size; t += kLanes)
      score_tokens<kQueries, kLanes, 1>(at, t, scores + t);
    for (; t < at.block_size; t += kNarrow) score_tokens<kQueries, kNarrow, 1>(at, t, scores + t);
  }

  // Scores of kVectors * kLanes tokens from t on.
  template <int kQueries, int kLanes, int kVectors>
  static void score_tokens(const Tile &at, int t, float *scores) {
    using E = Elements<Isa, kFormat, kLanes>;
    typename E::Floats sums[kQueries][kVectors] = {};
    const float *q[kQueries];
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
      q[i] = reinterpret_cast<const float *>(at.query + i * at.query_bytes + sizeof(QueryHeader));
    }
    const std::uint32_t *words = at.words + t;
    for (int d = 0; d < at.k_dim; d += kWordDims, words += at.block_size) {
      E elements[kVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kVectors; ++r) {
        prefetch_ahead<Isa>(words + r * kLanes, at.ahead);
        elements[r].load(words + r * kLanes);
      }
#pragma GCC unroll 8
      for (int j = 0; j < kWordDims; ++j) {
#pragma GCC unroll 8
        for (int r = 0; r < kVectors; ++r) {
          typename E::Floats x;
          elements[r].get(j, x);
#pragma GCC unroll 8
          for (int i = 0; i < kQueries; ++i) sums[i][r] += x * q[i][d + j];
        }
      }
    }
    finish<kQueries, kVectors * kLanes>(at, t, reinterpret_cast<const float *>(sums), scores);
  }

  // From sums over codes to scores.
  template <int kQueries, int kTokens>
  static void finish(const Tile &at, int t, const float *sums, float *scores) {
    const std::uint32_t *metadata = at.words + code_words(kFormat, at.k_dim, at.block_size) + t;
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
      float sum;
      std::memcpy(&sum, at.query + i * at.query_bytes, sizeof(sum));
      for (int j = 0; j < kTokens; ++j) {
        const float x = sums[i * kTokens + j];
        float &score = scores[static_cast<std::ptrdiff_t>(i) * at.stride + j];
        if constexpr (kFormat == KVKEEP_INT4) {
          const float scale = N::of_half(static_cast<std::uint16_t>(metadata[j]));
          const float minimum = N::of_half(static_cast<std::uint16_t>(metadata[j] >> 16));
          score = N::fused(x, scale, minimum * sum);
        } else {
          score = x * Fp8Powers<kFormat>::kOfSums * N::of_bits(metadata[j]);
        }
      }
    }
  }
};

template <class Isa, int kFormat>
struct QuantisedValues {
  using N = Numbers<Isa>;
  static constexpr int kWordTokens = 32 / bits_of(kFormat);
  static constexpr int kTokensAtOnce = 64;

  static void accumulate(const std::uint8_t *tile, int block_size, int v_dim, const float *weights,
                         int stride, int num_queries, int lo, int hi, bool, float *acc,
                         std::ptrdiff_t ahead) {
    Tile at{reinterpret_cast<const std::uint32_t *>(tile), block_size, v_dim, stride, 0, 0, ahead};
    for (int i = 0; i < num_queries; i += kQueriesAtOnce) {
      const float *w = weights + static_cast<std::ptrdiff_t>(i) * stride;
      float *out = acc + static_cast<std::ptrdiff_t>(i) * v_dim;
      for (int t = lo; t < hi; t = at.hi) {
        const int end = (t / kTokensAtOnce + 1) * kTokensAtOnce;
        at.lo = t;
        at.hi = end < hi ? end : hi;
        switch (num_queries - i) {
          case 1:
            add_tokens<1>(at, w, out);
            break;
          case 2:
            add_tokens<2>(at, w, out);
            break;
          case 3:
            add_tokens<3>(at, w, out);
            break;
          default:
            add_tokens<4>(at, w, out);
        }
      }
    }
  }

  static void finish(float *acc, int v_dim, const float *signs) {
    if constexpr (kFormat == KVKEEP_INT4) rotate_back<Isa>(acc, v_dim, signs);
  }

 private:
  struct Tile {
    const std::uint32_t *words;
    int block_size, v_dim, stride, lo, hi;
    std::ptrdiff_t ahead;
  };

  // Weights times scales of the words that hold tokens lo .. hi; the other tokens of these words
  // get zeros.
  template <int kQueries>
  struct Factors {
    float of_codes[kQueries][kTokensAtOnce] = {};
    float minimum[kQueries] = {};

    Factors(const Tile &at, const float *weights, int begin) {
      const std::uint32_t *metadata = at.words + code_words(kFormat, at.v_dim, at.block_size);
      for (int t = at.lo; t < at.hi; ++t) {
#pragma GCC unroll 8
        for (int i = 0; i < kQueries; ++i) {
          const float weight = weights[static_cast<std::ptrdiff_t>(i) * at.stride + t];
          if constexpr (kFormat == KVKEEP_INT4) {
            of_codes[i][t - begin] = weight * N::of_half(static_cast<std::uint16_t>(metadata[t]));
            minimum[i] += weight * N::of_half(static_cast<std::uint16_t>(metadata[t] >> 16));
          } else {
            of_codes[i][t - begin] =
                weight * N::of_bits(metadata[t]) * Fp8Powers<kFormat>::kOfFactors;
          }
        }
      }
    }
  };

  // Tokens lo .. hi, at most kTokensAtOnce.
  template <int kQueries>
  static void add_tokens(const Tile &at, const float *weights, float *acc) {
    constexpr int kLanes = Isa::kLanes, kNarrow = kLanes < 8 ? kLanes : 8;
    const Factors<kQueries> factors(at, weights, at.lo / kWordTokens * kWordTokens);
    int d = 0;
    for (; d + 2 * kLanes <= at.v_dim; d += 2 * kLanes)
      add_dims<kQueries, kLanes, 2>(at, factors, d, acc);
    for (; d + kLanes <= at.v_dim; d += kLanes) add_dims<kQueries, kLanes, 1>(at, factors, d, acc);
    for (; d < at.v_dim; d += kNarrow) add_dims<kQueries, kNarrow, 1>(at, factors, d, acc);
  }

  template <int kQueries, int kLanes, int kVectors>
  static void add_dims(const Tile &at, const Factors<kQueries> &factors, int d, float *acc) {
    using E = Elements<Isa, kFormat, kLanes>;
    typename E::Floats sums[kQueries][kVectors] = {};
    const int first = at.lo / kWordTokens, last = (at.hi + kWordTokens - 1) / kWordTokens;
    for (int g = first; g < last; ++g) {
      const std::uint32_t *words = at.words + static_cast<std::ptrdiff_t>(g) * at.v_dim + d;
      E elements[kVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kVectors; ++r) {
        prefetch_ahead<Isa>(words + r * kLanes, at.ahead);
        elements[r].load(words + r * kLanes);
      }
#pragma GCC unroll 8
      for (int j = 0; j < kWordTokens; ++j) {
        const int t = (g - first) * kWordTokens + j;
#pragma GCC unroll 8
        for (int r = 0; r < kVectors; ++r) {
          typename E::Floats x;
          elements[r].get(j, x);
#pragma GCC unroll 8
          for (int i = 0; i < kQueries; ++i) sums[i][r] += x * factors.of_codes[i][t];
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
      const float minimum = factors.minimum[i];
      float *out = acc + static_cast<std::ptrdiff_t>(i) * at.v_dim + d;
#pragma GCC unroll 8
      for (int r = 0; r < kVectors; ++r) {
        typename E::Floats old;
        std::memcpy(&old, out + r * kLanes, sizeof(old));
        old += sums[i][r] * Fp8Powers<kFormat>::kOfSums + minimum;
        std::memcpy(out + r * kLanes, &old, sizeof(old));
      }
    }
  }
};

template <class Isa, int kFormat>
void fill_quantised_tile(Ops &ops) {
  using Keys = QuantisedKeys<Isa, kFormat>;
  using Values = QuantisedValues<Isa, kFormat>;
  ops.keys[kFormat] = {Keys::query_bytes, Keys::prepare_query, Keys::score};
  ops.values[kFormat] = {Values::accumulate, Values::finish};
}

template <class Isa>
void fill_quantised_tiles(Ops &ops) {
  fill_quantised_tile<Isa, KVKEEP_FP8>(ops);
  fill_quantised_tile<Isa, KVKEEP_INT8>(ops);
  fill_quantised_tile<Isa, KVKEEP_INT4>(ops);
}

}  // namespace kvkeep

#endif
