// KeyOps of bf16 tiles.

#ifndef KVKEEP_AMX_BF16_KEYS_H
#define KVKEEP_AMX_BF16_KEYS_H

#include <cstring>

#include "amx/operands.h"

namespace kvkeep {
namespace {

// A prepared query: a sum of `num_parts` vectors of bf16 numbers, which follow, with zeros up to whole
// steps.
struct alignas(64) QueryHeader {
  std::int32_t num_parts;
};

struct Keys {
  // A tile, its queries and where their scores go.
  struct Tile {
    const std::uint32_t *words;
    int block_size, k_dim;
    const std::uint8_t *queries;
    int num_queries;
    float *scores;
    std::ptrdiff_t stride, ahead;

    int last_step() const { return (k_dim - 1) / kStep; }

    // Of dims step * kStep and on, and tokens t and on.
    Words words_of(int step, int t) const {
      const std::ptrdiff_t row = step * (kStep / 2);
      return {words + row * block_size + t, block_size};
    }
  };

  // Queries i .. i + num_rows, tokens t and on.
  struct Piece {
    int i, num_rows, t;
  };

  static std::size_t part_bytes(int k_dim) {
    return (static_cast<std::size_t>(k_dim) + kStep - 1) / kStep * kRowBytes;
  }

  static std::size_t query_bytes(int k_dim) {
    return sizeof(QueryHeader) + kMostParts * part_bytes(k_dim);
  }

  static void prepare_query(const float *q, int k_dim, const float *, bool is_bf16,
                            void *prepared) {
    const QueryHeader header{is_bf16 ? 1 : kMostParts};
    std::memcpy(prepared, &header, sizeof(header));
    for (int d = 0; d < k_dim; d += kStep) {
      const __mmask32 mask = first_lanes(k_dim - d);
      __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), q + d);
      __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), q + d + 16);
      auto *to = static_cast<std::uint8_t *>(prepared) + sizeof(QueryHeader) + 2 * d;
      for (int part = 0; part < header.num_parts; ++part, to += part_bytes(k_dim)) {
        const __m512i numbers = narrow(low, high);
        _mm512_storeu_si512(to, numbers);
        low = _mm512_sub_ps(low, widen_low(numbers));
        high = _mm512_sub_ps(high, widen_high(numbers));
      }
    }
  }

  static void score(const std::uint8_t *tile, int block_size, int k_dim, const void *queries,
                    int num_queries, float *scores, int stride, std::ptrdiff_t ahead) {
    configure_for(num_queries);
    const Tile at{reinterpret_cast<const std::uint32_t *>(tile),
                  block_size,
                  k_dim,
                  static_cast<const std::uint8_t *>(queries),
                  num_queries,
                  scores,
                  stride,
                  ahead};
    int t = 0;
    for (; block_size - t > kColumns; t += 2 * kColumns) score_strips<2>(at, t);
    if (t < block_size) score_strips<1>(at, t);
  }

 private:
  template <int kStrips>
  static void score_strips(const Tile &at, int t) {
    CopiedWords copies[kStrips];
    Words last_words[kStrips];
    for (int strip = 0; strip < kStrips; ++strip) {
      last_words[strip] = last_words_of(at, t + strip * kColumns, copies[strip]);
    }
    for (int i = 0; i < at.num_queries; i += kRows) {
      const int rest = at.num_queries - i;
      if (rest >= kRows) {
        score_rows<Sixteen, kStrips>(at, {i, kRows, t}, last_words);
      } else {
        score_rows<Rest, kStrips>(at, {i, rest, t}, last_words);
      }
    }
  }

  // The words of the last step: a copy with zeros if a register, which is loaded whole, would reach out
  // of the tile. In the steps before, what a row has too many are words of the next row, whose sums go
  // nowhere.
  static Words last_words_of(const Tile &at, int t, CopiedWords &copy) {
    const Words words = at.words_of(at.last_step(), t);
    if (at.k_dim % kStep == 0 && t + kColumns <= at.block_size) return words;
    const int num_rows = at.k_dim / 2 - at.last_step() * (kStep / 2);
    const auto mask = static_cast<__mmask16>(first_lanes(at.block_size - t));
    for (int row = 0; row < kRows; ++row) {
      const std::uint32_t *from = words.first + row * words.stride;
      _mm512_store_si512(copy.rows[row], _mm512_maskz_loadu_epi32(row < num_rows ? mask : 0, from));
    }
    return copy.words();
  }

  template <class Registers, int kStrips>
  static void score_rows(const Tile &at, const Piece &piece, const Words (&last_words)[kStrips]) {
    const std::size_t bytes = query_bytes(at.k_dim);
    const std::uint8_t *queries = at.queries + piece.i * bytes;
    // All queries of a call come from tensors of one dtype.
    QueryHeader header;
    std::memcpy(&header, queries, sizeof(header));
    each_strip<kStrips>([](auto r) { tile_zero<Registers::kSums + decltype(r)::kStrip>(); });
    for (int step = 0; step <= at.last_step(); ++step) {
      each_strip<kStrips>([&](auto r) {
        constexpr int kStrip = decltype(r)::kStrip;
        const Words words = at.words_of(step, piece.t + kStrip * kColumns);
        const int num_rows = at.k_dim / 2 - step * (kStep / 2);
        if (piece.i == 0) prefetch(words, num_rows < kRows ? num_rows : kRows, at.ahead);
        load_words<kWords + kStrip>(step == at.last_step() ? last_words[kStrip] : words);
      });
      const std::uint8_t *factor = queries + sizeof(QueryHeader) + step * kRowBytes;
      for (int part = 0; part < header.num_parts; ++part, factor += part_bytes(at.k_dim)) {
        tile_load<Registers::kFactor>(factor, static_cast<std::ptrdiff_t>(bytes));
        each_strip<kStrips>([](auto r) {
          constexpr int kStrip = decltype(r)::kStrip;
          tile_dpbf16<Registers::kSums + kStrip, Registers::kFactor, kWords + kStrip>();
        });
      }
    }
    each_strip<kStrips>([&](auto r) {
      constexpr int kStrip = decltype(r)::kStrip;
      store_scores<Registers::kSums + kStrip>(
          at, {piece.i, piece.num_rows, piece.t + kStrip * kColumns});
    });
  }

  template <int kTile>
  static void store_scores(const Tile &at, const Piece &piece) {
    float *to = at.scores + piece.i * at.stride + piece.t;
    if (piece.t + kColumns <= at.block_size) {
      tile_store<kTile>(to, at.stride * 4);
      return;
    }
    alignas(64) float rows[kRows][kColumns];
    tile_store<kTile>(rows, kRowBytes);
    for (int row = 0; row < piece.num_rows; ++row) {
      std::memcpy(to + row * at.stride, rows[row], (at.block_size - piece.t) * sizeof(float));
    }
  }
};

}  // namespace
}  // namespace kvkeep

#endif
