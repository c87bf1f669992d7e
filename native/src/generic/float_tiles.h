// Attention over unquantised tiles with products of floats, written once for all instruction sets: see lanes.h.
// `Isa` also says how many vectors of tokens and of dims fit into registers for four queries: kTokenVectors,
// kDimVectors.

#ifndef KVKEEP_GENERIC_FLOAT_TILES_H
#define KVKEEP_GENERIC_FLOAT_TILES_H

#include "generic/lanes.h"
#include "generic/prefetch.h"
#include "kvkeep_native.h"
#include "ops.h"

namespace kvkeep {

template <class Isa, int kFormat>
struct FloatTiles {
  static constexpr int kPerWord = kFormat == KVKEEP_F32 ? 1 : 2;

  // The elements of a vector of words, each in a vector of its own.
  template <int kLanes>
  static void split(typename Lanes<Isa, kLanes>::Words words,
                    typename Lanes<Isa, kLanes>::Floats *elements) {
    using Floats = typename Lanes<Isa, kLanes>::Floats;
    if constexpr (kFormat == KVKEEP_F32) {
      elements[0] = reinterpret_cast<Floats>(words);
    } else if constexpr (kFormat == KVKEEP_BF16) {
      elements[0] = reinterpret_cast<Floats>(words << 16);
      elements[1] = reinterpret_cast<Floats>(words & 0xffff0000u);
    } else {
      elements[0] = Isa::widen_halves(words & 0xffffu);
      elements[1] = Isa::widen_halves(words >> 16);
    }
  }

  static std::size_t query_bytes(int k_dim) {
    return (static_cast<std::size_t>(k_dim) * sizeof(float) + 63) / 64 * 64;
  }

  static void prepare_query(const float *q, int k_dim, const float *, bool, void *prepared) {
    std::memcpy(prepared, q, static_cast<std::size_t>(k_dim) * sizeof(float));
  }

  template <class S, int kQueries>
  static void score_strip(const std::uint32_t *words, int block_size, int k_dim,
                          const float *queries, std::size_t query_stride, float *scores, int stride,
                          std::ptrdiff_t ahead) {
    using L = Lanes<Isa, S::kLanes>;
    typename L::Floats sums[kQueries][S::kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < S::kVectors; ++v) sums[i][v] = typename L::Floats{};
    }
    for (int d = 0; d < k_dim; d += kPerWord, words += block_size) {
      typename L::Floats keys[S::kVectors][kPerWord];
#pragma GCC unroll 8
      for (int v = 0; v < S::kVectors; ++v) {
        prefetch_ahead<Isa>(words + v * S::kLanes, ahead);
        split<S::kLanes>(L::load_words(words + v * S::kLanes), keys[v]);
      }
#pragma GCC unroll 8
      for (int e = 0; e < kPerWord; ++e) {
#pragma GCC unroll 8
        for (int i = 0; i < kQueries; ++i) {
          const float q = queries[i * query_stride + d + e];
#pragma GCC unroll 8
          for (int v = 0; v < S::kVectors; ++v) sums[i][v] += keys[v][e] * q;
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < S::kVectors; ++v) {
        L::store(scores + i * stride + v * S::kLanes, sums[i][v]);
      }
    }
  }

  static void score(const std::uint8_t *tile, int block_size, int k_dim, const void *queries,
                    int num_queries, float *scores, int stride, std::ptrdiff_t ahead) {
    const auto *words = reinterpret_cast<const std::uint32_t *>(tile);
    const auto *rows = static_cast<const float *>(queries);
    const std::size_t query_stride = query_bytes(k_dim) / sizeof(float);
    for_groups<Isa>(num_queries, [&](auto group, int i) {
      for_strips<Isa, Isa::kTokenVectors>(block_size, [&](auto strip, int t) {
        score_strip<decltype(strip), decltype(group)::kQueries>(
            words + t, block_size, k_dim, rows + i * query_stride, query_stride,
            scores + i * stride + t, stride, i == 0 ? ahead : 0);
      });
    });
  }

  // Adds tokens first .. last of kQueries queries to the dims of a strip; `words` begins at the first token's word.
  template <class S, int kQueries>
  static void add_strip(const std::uint32_t *words, int v_dim, const float *weights, int stride,
                        int first, int last, float *acc, std::ptrdiff_t ahead) {
    using L = Lanes<Isa, S::kLanes>;
    typename L::Floats sums[kQueries][S::kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < S::kVectors; ++v) sums[i][v] = L::load(acc + i * v_dim + v * S::kLanes);
    }
    const auto add_word = [&](int t, int begin, int end) __attribute__((always_inline)) {
      typename L::Floats values[S::kVectors][kPerWord];
#pragma GCC unroll 8
      for (int v = 0; v < S::kVectors; ++v) {
        prefetch_ahead<Isa>(words + v * S::kLanes, ahead);
        split<S::kLanes>(L::load_words(words + v * S::kLanes), values[v]);
      }
#pragma GCC unroll 8
      for (int e = begin; e < end; ++e) {
#pragma GCC unroll 8
        for (int i = 0; i < kQueries; ++i) {
          const float weight = weights[i * stride + t + e];
#pragma GCC unroll 8
          for (int v = 0; v < S::kVectors; ++v) sums[i][v] += values[v][e] * weight;
        }
      }
      words += v_dim;
    };
    // A word at an end may hold a token that must not be touched: 0 * NaN is no 0.
    int t = first / kPerWord * kPerWord;
    if (t < first) {
      add_word(t, 1, kPerWord);
      t += kPerWord;
    }
    for (; t + kPerWord <= last; t += kPerWord) add_word(t, 0, kPerWord);
    if (t < last) add_word(t, 0, 1);
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < S::kVectors; ++v) L::store(acc + i * v_dim + v * S::kLanes, sums[i][v]);
    }
  }

  static void accumulate(const std::uint8_t *tile, int, int v_dim, const float *weights, int stride,
                         int num_queries, int lo, int hi, bool, float *acc, std::ptrdiff_t ahead) {
    const auto *words =
        reinterpret_cast<const std::uint32_t *>(tile) + static_cast<long>(lo / kPerWord) * v_dim;
    for_groups<Isa>(num_queries, [&](auto group, int i) {
      constexpr int kQueries = decltype(group)::kQueries;
      constexpr int kVectors = kQueries > 4 ? Isa::kDimVectors / 2 : Isa::kDimVectors;
      for_strips<Isa, kVectors>(v_dim, [&](auto strip, int d) {
        add_strip<decltype(strip), kQueries>(words + d, v_dim, weights + i * stride, stride, lo, hi,
                                             acc + i * v_dim + d, i == 0 ? ahead : 0);
      });
    });
  }

  static void finish(float *, int, const float *) {}

  static void fill(Ops &ops) {
    ops.keys[kFormat] = {query_bytes, prepare_query, score};
    ops.values[kFormat] = {accumulate, finish};
  }
};

template <class Isa>
void fill_float_tiles(Ops &ops) {
  FloatTiles<Isa, KVKEEP_F32>::fill(ops);
  FloatTiles<Isa, KVKEEP_F16>::fill(ops);
  FloatTiles<Isa, KVKEEP_BF16>::fill(ops);
}

}  // namespace kvkeep

#endif
