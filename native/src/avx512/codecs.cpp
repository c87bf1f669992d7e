// Codecs in vectors of sixteen floats; the words of keys are transposed 16 x 16 at a time.

// GCC 12 warns of its own _mm512_undefined_epi32.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include "generic/codecs.h"

#include <immintrin.h>

#include "fills.h"

namespace kvkeep {
namespace {

// In place: word j of row i goes to word i of row j.
void transpose_words(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  // Of rows 4k .. 4k + 3, r[4k + j] has the words j, 4 + j, 8 + j and 12 + j, a lane each.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x44);
    const __m512i high = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xee);
    const __m512i low2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x44);
    const __m512i high2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xee);
    t[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(high, high2, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

__mmask16 first(int count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1);
}

// out[j][i] = in[i][j] for i < height and j < width; `in` and `out` are strides of rows in bytes.
void transpose(const std::uint8_t *from, std::ptrdiff_t in, int height, int width, std::uint8_t *to,
               std::ptrdiff_t out) {
  for (int i = 0; i < height; i += 16) {
    for (int j = 0; j < width; j += 16) {
      const int rows = height - i < 16 ? height - i : 16, columns = width - j < 16 ? width - j : 16;
      __m512i r[16];
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) {
        r[k] = _mm512_maskz_loadu_epi32(k < rows ? first(columns) : 0, from + (i + k) * in + 4 * j);
      }
      transpose_words(r);
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) {
        _mm512_mask_storeu_epi32(to + (j + k) * out + 4 * i, k < columns ? first(rows) : 0, r[k]);
      }
    }
  }
}

struct Isa {
  static constexpr int kLanes = 16;

  struct Columns {
    static constexpr int kLeastCount = 4;  // fewer are faster word by word

    static void load(const std::uint32_t *columns, int block_size, int num_words, int count,
                     std::uint8_t *rows, std::ptrdiff_t row_bytes) {
      if (count < kLeastCount) {
        PlainColumns<Isa>::load(columns, block_size, num_words, count, rows, row_bytes);
      } else {
        const auto *from = reinterpret_cast<const std::uint8_t *>(columns);
        transpose(from, 4 * block_size, num_words, count, rows, row_bytes);
      }
    }

    static void store(std::uint32_t *columns, int block_size, int num_words, int count,
                      const std::uint8_t *rows, std::ptrdiff_t row_bytes) {
      if (count < kLeastCount) {
        PlainColumns<Isa>::store(columns, block_size, num_words, count, rows, row_bytes);
      } else {
        auto *to = reinterpret_cast<std::uint8_t *>(columns);
        transpose(rows, row_bytes, count, num_words, to, 4 * block_size);
      }
    }
  };
};

}  // namespace

void fill_codecs_avx512(Ops &ops) { fill_codecs<Isa>(ops); }

}  // namespace kvkeep
