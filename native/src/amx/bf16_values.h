// ValueOps of bf16 tiles.

#ifndef KVKEEP_AMX_BF16_VALUES_H
#define KVKEEP_AMX_BF16_VALUES_H

#include <cstring>

#include "amx/operands.h"

namespace kvkeep {
namespace {

struct Values {
  // A tile, and the sums of up to sixteen queries.
  struct Tile {
    const std::uint32_t *words;
    int v_dim, lo, hi;
    float *acc;
    int num_rows;
    std::ptrdiff_t ahead;
  };

  // Weights of the tokens of a step, as sums of two bf16 numbers.
  struct Weights {
    alignas(64) std::uint16_t high[kRows][kStep];
    alignas(64) std::uint16_t low[kRows][kStep];

    Weights(const float *weights, std::ptrdiff_t stride, int num_rows, __mmask32 mask) {
      for (int row = 0; row < num_rows; ++row, weights += stride) {
        const __m512 a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), weights);
        const __m512 b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), weights + 16);
        const __m512i numbers = narrow(a, b);
        const __m512i rests =
            narrow(_mm512_sub_ps(a, widen_low(numbers)), _mm512_sub_ps(b, widen_high(numbers)));
        _mm512_store_si512(high[row], numbers);
        _mm512_store_si512(low[row], rests);
      }
    }
  };

  static void accumulate(const std::uint8_t *tile, int, int v_dim, const float *weights, int stride,
                         int num_queries, int lo, int hi, bool, float *acc, std::ptrdiff_t ahead) {
    configure_for(num_queries);
    const auto *words = reinterpret_cast<const std::uint32_t *>(tile);
    for (int i = 0; i < num_queries; i += kRows) {
      const int rest = num_queries - i, num_rows = rest < kRows ? rest : kRows;
      const Tile at{words,
                    v_dim,
                    lo,
                    hi,
                    acc + static_cast<std::ptrdiff_t>(i) * v_dim,
                    num_rows,
                    i == 0 ? ahead : 0};
      const float *own = weights + static_cast<std::ptrdiff_t>(i) * stride;
      for (int t = lo / kStep * kStep; t < hi; t += kStep) {
        const __mmask32 mask = first_lanes(hi - t) & ~first_lanes(lo - t);
        const Weights step(own + t, stride, num_rows, mask);
        if (num_rows == kRows) {
          add_tokens<Sixteen>(at, step, t, mask);
        } else {
          add_tokens<Rest>(at, step, t, mask);
        }
      }
    }
  }

  static void finish(float *, int, const float *) {}

 private:
  template <class Registers>
  static void add_tokens(const Tile &at, const Weights &weights, int t, __mmask32 mask) {
    int d = 0;
    for (; at.v_dim - d > kColumns; d += 2 * kColumns) {
      add_dims<Registers, 2>(at, weights, t, mask, d);
    }
    if (d < at.v_dim) add_dims<Registers, 1>(at, weights, t, mask, d);
  }

  template <class Registers, int kStrips>
  static void add_dims(const Tile &at, const Weights &weights, int t, __mmask32 mask, int first) {
    CopiedWords copies[kStrips];
    alignas(64) float rows[kRows][kColumns];
    each_strip<kStrips>([&](auto r) {
      constexpr int kStrip = decltype(r)::kStrip;
      const int d = first + kStrip * kColumns;
      load_sums<Registers::kSums + kStrip>(at, d, rows);
      load_words<kWords + kStrip>(words_of(at, t, mask, d, copies[kStrip]));
    });
    for (const auto *factor : {weights.high, weights.low}) {
      tile_load<Registers::kFactor>(factor, kRowBytes);
      each_strip<kStrips>([](auto r) {
        constexpr int kStrip = decltype(r)::kStrip;
        tile_dpbf16<Registers::kSums + kStrip, Registers::kFactor, kWords + kStrip>();
      });
    }
    each_strip<kStrips>([&](auto r) {
      constexpr int kStrip = decltype(r)::kStrip;
      store_sums<Registers::kSums + kStrip>(at, first + kStrip * kColumns, rows);
    });
  }

  // Words of the 32 tokens from t on, of which the mask names those that may be read. Others may hold
  // NaN, and 0 * NaN is no 0: a copy with zeros if there are such, or if a register would reach out of
  // the tile.
  static Words words_of(const Tile &at, int t, __mmask32 mask, int d, CopiedWords &copy) {
    const std::ptrdiff_t stride = at.v_dim;
    const Words words{at.words + t / 2 * stride + d, stride};
    prefetch(words, (at.hi - t + 1) / 2 < kRows ? (at.hi - t + 1) / 2 : kRows, at.ahead);
    if (mask == 0xffffffffu && d + kColumns <= at.v_dim) return words;
    const auto columns = static_cast<__mmask16>(first_lanes(at.v_dim - d));
    for (int row = 0; row < kRows; ++row, mask >>= 2) {
      const unsigned halves = (mask & 1 ? 0xffffu : 0) | (mask & 2 ? 0xffff0000u : 0);
      const __m512i own =
          _mm512_maskz_loadu_epi32(halves == 0 ? 0 : columns, words.first + row * stride);
      _mm512_store_si512(copy.rows[row],
                         _mm512_and_si512(own, _mm512_set1_epi32(static_cast<int>(halves))));
    }
    return copy.words();
  }

  // Sums of a last strip of 8 dims go by way of `rows`.
  template <int kTile>
  static void load_sums(const Tile &at, int d, float (&rows)[kRows][kColumns]) {
    const std::ptrdiff_t stride = at.v_dim;
    if (d + kColumns <= at.v_dim) {
      tile_load<kTile>(at.acc + d, stride * 4);
      return;
    }
    const auto columns = static_cast<__mmask16>(first_lanes(at.v_dim - d));
    for (int row = 0; row < at.num_rows; ++row) {
      _mm512_store_ps(rows[row], _mm512_maskz_loadu_ps(columns, at.acc + row * stride + d));
    }
    tile_load<kTile>(rows, kRowBytes);
  }

  template <int kTile>
  static void store_sums(const Tile &at, int d, float (&rows)[kRows][kColumns]) {
    const std::ptrdiff_t stride = at.v_dim;
    if (d + kColumns <= at.v_dim) {
      tile_store<kTile>(at.acc + d, stride * 4);
      return;
    }
    tile_store<kTile>(rows, kRowBytes);
    for (int row = 0; row < at.num_rows; ++row) {
      std::memcpy(at.acc + row * stride + d, rows[row], (at.v_dim - d) * sizeof(float));
    }
  }
};

}  // namespace
}  // namespace kvkeep

#endif
