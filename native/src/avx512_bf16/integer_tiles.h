// KeyOps and ValueOps of int8 and int4 tiles in integers: four products a lane and instruction.
//
// Queries and weights become integers of about 15 bits, split into two bytes, so that their
// rounding is far below that of the codes. Sums of integers are exact: no order of them matters.

#ifndef KVKEEP_AVX512_BF16_INTEGER_TILES_H
#define KVKEEP_AVX512_BF16_INTEGER_TILES_H

#include "avx512_bf16/vectors.h"
#include "generic/rotation.h"
#include "kvkeep_native.h"
#include "ops.h"
#include "tiles.h"

namespace kvkeep {
namespace {

// Below it a query or weights count as zero: the reciprocal would overflow.
constexpr float kLeast = 1e-30f;

// A prepared query is round(q / scale) = 128 * high + low, both signed bytes; a word of high and
// one of low for each four dims follow.
struct alignas(64) IntegerQuery {
  float scale;
  float sum;  // of the numbers that the integers stand for
  // What the sums begin with: stored int8 codes are 128 too large.
  std::int32_t high_start;
  std::int32_t low_start;

  const std::int32_t *words() const { return reinterpret_cast<const std::int32_t *>(this + 1); }
};

template <int kFormat>
struct IntegerKeys {
  static constexpr float kMost = 127 * 128;

  static std::size_t query_bytes(int k_dim) {
    return sizeof(IntegerQuery) + (2 * static_cast<std::size_t>(k_dim) + 63) / 64 * 64;
  }

  static void prepare_query(const float *q, int k_dim, const float *signs, bool, void *prepared) {
    alignas(64) float x[kMaxDim];
    std::memcpy(x, q, static_cast<std::size_t>(k_dim) * sizeof(float));
    if constexpr (kFormat == KVKEEP_INT4) rotate<Isa>(x, k_dim, signs);
    __m512i most = _mm512_setzero_si512();
    for (int d = 0; d < k_dim; d += 16) most = _mm512_max_epi32(most, magnitude(load(x, d, k_dim)));
    const float largest = float_of(_mm512_reduce_max_epi32(most));
    const float factor = largest < kLeast ? 0 : kMost / largest;
    __m512i highs = _mm512_setzero_si512(), lows = highs;
    auto *words = static_cast<std::uint8_t *>(prepared) + sizeof(IntegerQuery);
    for (int d = 0; d < k_dim; d += 16) {
      const __m512i whole =
          _mm512_cvtps_epi32(_mm512_mul_ps(load(x, d, k_dim), _mm512_set1_ps(factor)));
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(64)), 7);
      const __m512i low = _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 7));
      highs = _mm512_add_epi32(highs, high);
      lows = _mm512_add_epi32(lows, low);
      const __m128i h = _mm512_cvtepi32_epi8(high), l = _mm512_cvtepi32_epi8(low);
      _mm_storeu_si128(reinterpret_cast<__m128i *>(words + 2 * d), _mm_unpacklo_epi32(h, l));
      if (d + 8 < k_dim) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(words + 2 * d + 16), _mm_unpackhi_epi32(h, l));
      }
    }
    const int high_sum = _mm512_reduce_add_epi32(highs), low_sum = _mm512_reduce_add_epi32(lows);
    IntegerQuery header;
    header.scale = largest < kLeast ? 0 : largest / kMost;
    header.sum =
        header.scale * (128.0f * static_cast<float>(high_sum) + static_cast<float>(low_sum));
    header.high_start = start(high_sum);
    header.low_start = start(low_sum);
    std::memcpy(prepared, &header, sizeof(header));
  }

  static void score(const std::uint8_t *tile, int block_size, int k_dim, const void *queries,
                    int num_queries, float *scores, int stride, std::ptrdiff_t ahead) {
    score_tile<IntegerKeys>({tile, block_size, k_dim, stride, ahead}, queries, query_bytes(k_dim),
                            num_queries, scores);
  }

  // Scores of 16 * kVectors tokens from t on, the last vector masked.
  template <int kQueries, int kVectors>
  static void score_tokens(const TileOfFloats &at, int t, __mmask16 mask,
                           const std::uint8_t *queries, std::size_t bytes, float *scores) {
    const IntegerQuery *query[kQueries];
    __m512i high[kQueries][kVectors], low[kQueries][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
      query[i] = reinterpret_cast<const IntegerQuery *>(queries + i * bytes);
#pragma GCC unroll 8
      for (int r = 0; r < kVectors; ++r) {
        high[i][r] = _mm512_set1_epi32(query[i]->high_start);
        low[i][r] = _mm512_set1_epi32(query[i]->low_start);
      }
    }
    const auto *words = reinterpret_cast<const std::uint32_t *>(at.tile) + t;
    constexpr int kDims = 32 / bits_of(kFormat);
    const std::ptrdiff_t stride = at.block_size, dim = at.dim;
    for (std::ptrdiff_t d = 0; d < dim; d += kDims, words += stride) {
      __m512i row[kVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kVectors; ++r) {
        prefetch_ahead<Isa>(words + 16 * r, at.ahead);
        row[r] = load_words(words + 16 * r, mask, r + 1 == kVectors);
      }
#pragma GCC unroll 8
      for (int part = 0; part < kDims / 4; ++part) {
        __m512i codes[kVectors];
#pragma GCC unroll 8
        for (int r = 0; r < kVectors; ++r) codes[r] = bytes_of<kFormat>(row[r], part);
#pragma GCC unroll 8
        for (int i = 0; i < kQueries; ++i) {
          const std::int32_t *q = query[i]->words() + d / 2 + 2 * part;
#pragma GCC unroll 8
          for (int r = 0; r < kVectors; ++r) {
            high[i][r] = _mm512_dpbusd_epi32(high[i][r], codes[r], _mm512_set1_epi32(q[0]));
            low[i][r] = _mm512_dpbusd_epi32(low[i][r], codes[r], _mm512_set1_epi32(q[1]));
          }
        }
      }
    }
    store<kQueries, kVectors>(at, t, mask, query, high, low, scores);
  }

 private:
  // Unsigned, since the integers of a query that is not finite are anything.
  static std::int32_t start(int sum) {
    return kFormat == KVKEEP_INT8 ? static_cast<std::int32_t>(-128u * static_cast<unsigned>(sum))
                                  : 0;
  }

  // From sums over codes to scores.
  template <int kQueries, int kVectors>
  static void store(const TileOfFloats &at, int t, __mmask16 mask,
                    const IntegerQuery *(&query)[kQueries],
                    const __m512i (&high)[kQueries][kVectors],
                    const __m512i (&low)[kQueries][kVectors], float *scores) {
    const std::uint32_t *metadata = at.metadata<kFormat>() + t;
#pragma GCC unroll 8
    for (int r = 0; r < kVectors; ++r) {
      const __mmask16 own = r + 1 == kVectors ? mask : 0xffff;
      const Metadata<kFormat> of(_mm512_maskz_loadu_epi32(own, metadata + 16 * r));
#pragma GCC unroll 8
      for (int i = 0; i < kQueries; ++i) {
        const __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[i][r]), _mm512_set1_ps(128.0f),
                                           _mm512_cvtepi32_ps(low[i][r]));
        __m512 x = _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(query[i]->scale)), of.scale);
        if constexpr (kFormat == KVKEEP_INT4) {
          x = _mm512_fmadd_ps(_mm512_set1_ps(query[i]->sum), of.minimum, x);
        }
        _mm512_mask_storeu_ps(scores + static_cast<std::ptrdiff_t>(i) * at.stride + 16 * r, own, x);
      }
    }
  }
};

// Weights times scales of at most kTokensAtOnce tokens: factor * (256 * high + low), both unsigned
// bytes.
template <int kFormat, int kQueries>
struct IntegerWeights {
  alignas(64) std::uint8_t high[kQueries][kTokensAtOnce];
  alignas(64) std::uint8_t low[kQueries][kTokensAtOnce];
  float factor[kQueries];
  float minimum[kQueries];  // sum of weights times minimums

  IntegerWeights(const TileOfFloats &at, const TokenRange &range, const float *weights) {
    alignas(64) float products[kQueries][kTokensAtOnce];
    __m512i most[kQueries] = {};
    multiply(at, range, weights, products, most);
    __m512 inverses[kQueries];
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
      // NaN has the largest bits, so that it comes through.
      const float largest = float_of(_mm512_reduce_max_epi32(most[i]));
      inverses[i] = _mm512_set1_ps(largest < kLeast ? 0 : 65535.0f / largest);
      factor[i] = largest < kLeast ? 0 : largest / 65535.0f;
    }
    for (int t = 0; t < range.hi - range.begin; t += 16) {
#pragma GCC unroll 8
      for (int i = 0; i < kQueries; ++i) {
        const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(products[i] + t), inverses[i]);
        const __m512i whole = _mm512_cvtps_epi32(scaled);
        store_bytes(high[i] + t, _mm512_srli_epi32(whole, 8));
        store_bytes(low[i] + t, whole);
      }
    }
  }

  // Of four tokens from `token` on.
  __m512i high_of(int i, std::ptrdiff_t token) const { return broadcast(high[i] + token); }
  __m512i low_of(int i, std::ptrdiff_t token) const { return broadcast(low[i] + token); }

 private:
  static __m512i broadcast(const std::uint8_t *from) {
    int x;
    std::memcpy(&x, from, sizeof(x));
    return _mm512_set1_epi32(x);
  }

  static void store_bytes(std::uint8_t *to, __m512i x) {
    _mm_store_si128(reinterpret_cast<__m128i *>(to), _mm512_cvtepi32_epi8(x));
  }

  // Zeros outside of the range.
  void multiply(const TileOfFloats &at, const TokenRange &range, const float *weights,
                float (*products)[kTokensAtOnce], __m512i (&most)[kQueries]) {
    const std::uint32_t *metadata = at.metadata<kFormat>();
    __m512 minimums[kQueries] = {};
    for (int t = range.begin; t < range.hi; t += 16) {
      const __mmask16 own = range.mask(t);
      const Metadata<kFormat> of(_mm512_maskz_loadu_epi32(own, metadata + t));
#pragma GCC unroll 8
      for (int i = 0; i < kQueries; ++i) {
        const float *from = weights + static_cast<std::ptrdiff_t>(i) * at.stride + t;
        const __m512 weight = _mm512_maskz_loadu_ps(own, from);
        const __m512 product = _mm512_mul_ps(weight, of.scale);
        most[i] = _mm512_max_epi32(most[i], magnitude(product));
        if constexpr (kFormat == KVKEEP_INT4)
          minimums[i] = _mm512_fmadd_ps(weight, of.minimum, minimums[i]);
        _mm512_store_ps(products[i] + t - range.begin, product);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
      minimum[i] = kFormat == KVKEEP_INT4 ? _mm512_reduce_add_ps(minimums[i]) : 0;
    }
  }
};

template <int kFormat>
struct IntegerValues {
  static void accumulate(const std::uint8_t *tile, int block_size, int v_dim, const float *weights,
                         int stride, int num_queries, int lo, int hi, bool, float *acc,
                         std::ptrdiff_t ahead) {
    accumulate_tile<IntegerValues>({tile, block_size, v_dim, stride, ahead}, weights, num_queries,
                                   lo, hi, acc);
  }

  static void finish(float *acc, int v_dim, const float *signs) {
    if constexpr (kFormat == KVKEEP_INT4) rotate_back<Isa>(acc, v_dim, signs);
  }

  template <int kQueries>
  using Weights = IntegerWeights<kFormat, kQueries>;

  // 16 * kVectors dims from d on, the last vector masked.
  template <int kQueries, int kVectors>
  static void add_dims(const TileOfFloats &at, const TokenRange &range,
                       const Weights<kQueries> &weights, int d, __mmask16 mask, float *acc) {
    __m512i high[kQueries][kVectors] = {}, low[kQueries][kVectors] = {};
    constexpr int kTokens = 32 / bits_of(kFormat);
    const int lo = range.lo / kTokens * kTokens;
    const std::ptrdiff_t stride = at.dim, end = range.hi - range.begin;
    const auto *words =
        reinterpret_cast<const std::uint32_t *>(at.tile) + lo / kTokens * stride + d;
    for (std::ptrdiff_t t = lo - range.begin; t < end; t += kTokens, words += stride) {
      __m512i row[kVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kVectors; ++r) {
        prefetch_ahead<Isa>(words + 16 * r, at.ahead);
        row[r] = load_words(words + 16 * r, mask, r + 1 == kVectors);
        // Codes are the signed factor here.
        if (kFormat == KVKEEP_INT8) row[r] = _mm512_xor_si512(row[r], _mm512_set1_epi8(-128));
      }
#pragma GCC unroll 8
      for (int part = 0; part < kTokens / 4; ++part) {
        __m512i codes[kVectors];
#pragma GCC unroll 8
        for (int r = 0; r < kVectors; ++r) codes[r] = bytes_of<kFormat>(row[r], part);
#pragma GCC unroll 8
        for (int i = 0; i < kQueries; ++i) {
          const __m512i h = weights.high_of(i, t + 4 * part), l = weights.low_of(i, t + 4 * part);
#pragma GCC unroll 8
          for (int r = 0; r < kVectors; ++r) {
            high[i][r] = _mm512_dpbusd_epi32(high[i][r], h, codes[r]);
            low[i][r] = _mm512_dpbusd_epi32(low[i][r], l, codes[r]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
#pragma GCC unroll 8
      for (int r = 0; r < kVectors; ++r) {
        const __mmask16 own = r + 1 == kVectors ? mask : 0xffff;
        float *out = acc + static_cast<std::ptrdiff_t>(i) * at.dim + d + 16 * r;
        // At most 2^16 * 2^7 * 64, which fits.
        const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[i][r], 8), low[i][r]);
        __m512 old = _mm512_maskz_loadu_ps(own, out);
        if (kFormat == KVKEEP_INT4) old = _mm512_add_ps(old, _mm512_set1_ps(weights.minimum[i]));
        const __m512 factor = _mm512_set1_ps(weights.factor[i]);
        _mm512_mask_storeu_ps(out, own, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, old));
      }
    }
  }
};

}  // namespace
}  // namespace kvkeep

#endif
