// CodecOps of all formats. Between a tensor and a tile numbers are rows of codes, a few tokens at a
// time.

#ifndef KVKEEP_GENERIC_CODECS_H
#define KVKEEP_GENERIC_CODECS_H

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "generic/encoding.h"
#include "generic/numbers.h"
#include "generic/words.h"
#include "kvkeep_native.h"
#include "ops.h"
#include "tiles.h"

namespace kvkeep {

// `Isa::Columns` has the functions of PlainColumns.
template <class Isa, int kFormat, bool kIsKeys>
struct Codec {
  static constexpr int kBits = bits_of(kFormat);
  static constexpr int kCodeBytes = kBits < 8 ? 1 : kBits / 8;
  static constexpr int kTokensAtOnce = 16;
  using N = Numbers<Isa>;
  using Values = ValueWords<Isa, kBits>;

  static void encode(const RowRun &rows, const float *signs, const SlotRun &slots) {
    if (rows.dtype == kFormat) {
      store(slots, rows.dim, 0, rows.count, static_cast<std::uint8_t *>(rows.data),
            rows.stride * kCodeBytes);
      return;
    }
    alignas(64) std::uint8_t codes[kTokensAtOnce * kMaxDim * kCodeBytes];
    const int row_bytes = rows.dim * kCodeBytes;
    for (int first = 0; first < rows.count; first += kTokensAtOnce) {
      const int rest = rows.count - first;
      const int count = rest < kTokensAtOnce ? rest : kTokensAtOnce;
      for (int i = 0; i < count; ++i) {
        encode_row(rows, first + i, signs, slots, codes + i * row_bytes);
      }
      store(slots, rows.dim, first, count, codes, row_bytes);
    }
  }

  static void decode(const SlotRun &slots, const float *signs, const RowRun &rows) {
    if (rows.dtype == kFormat) {
      load(slots, rows.dim, 0, rows.count, static_cast<std::uint8_t *>(rows.data),
           rows.stride * kCodeBytes);
      return;
    }
    alignas(64) std::uint8_t codes[kTokensAtOnce * kMaxDim * kCodeBytes];
    const int row_bytes = rows.dim * kCodeBytes;
    for (int first = 0; first < rows.count; first += kTokensAtOnce) {
      const int rest = rows.count - first;
      const int count = rest < kTokensAtOnce ? rest : kTokensAtOnce;
      load(slots, rows.dim, first, count, codes, row_bytes);
      for (int i = 0; i < count; ++i) {
        decode_row(rows, first + i, signs, slots, codes + i * row_bytes);
      }
    }
  }

 private:
  static void *row(const RowRun &rows, int i) {
    const std::ptrdiff_t number_bytes = rows.dtype == KVKEEP_F32 ? 4 : 2;
    return static_cast<std::uint8_t *>(rows.data) + i * rows.stride * number_bytes;
  }

  static std::uint8_t *metadata(const SlotRun &slots, int dim, int i) {
    return slots.tile + 4 * (code_words(kFormat, dim, slots.block_size) + slots.offset + i);
  }

  static void encode_row(const RowRun &rows, int i, const float *signs, const SlotRun &slots,
                         std::uint8_t *codes) {
    alignas(64) float x[kMaxDim];
    N::load(row(rows, i), rows.dtype, rows.dim, x);
    if constexpr (is_quantised(kFormat)) {
      const std::uint32_t word = Encoding<Isa>::template encode<kFormat>(x, rows.dim, signs, codes);
      std::memcpy(metadata(slots, rows.dim, i), &word, sizeof(word));
      if constexpr (kIsKeys && kBits == 4) Nibbles<Isa>::pack(codes, rows.dim, codes);
    } else {
      N::store(x, kFormat, rows.dim, codes);
    }
  }

  static void decode_row(const RowRun &rows, int i, const float *signs, const SlotRun &slots,
                         const std::uint8_t *codes) {
    alignas(64) float x[kMaxDim];
    if constexpr (is_quantised(kFormat)) {
      alignas(64) std::uint8_t unpacked[kIsKeys && kBits == 4 ? kMaxDim : 1];
      if constexpr (kIsKeys && kBits == 4) {
        Nibbles<Isa>::unpack(codes, rows.dim, unpacked);
        codes = unpacked;
      }
      std::uint32_t word;
      std::memcpy(&word, metadata(slots, rows.dim, i), sizeof(word));
      Encoding<Isa>::template decode<kFormat>(codes, rows.dim, signs, word, x);
    } else {
      N::load(codes, kFormat, rows.dim, x);
    }
    N::store(x, rows.dtype, rows.dim, row(rows, i));
  }

  // Rows of codes (of packed words for keys) into slots first .. first + count of the run.
  static void store(const SlotRun &slots, int dim, int first, int count, const std::uint8_t *codes,
                    std::ptrdiff_t row_bytes) {
    if constexpr (kIsKeys) {
      auto *columns = reinterpret_cast<std::uint32_t *>(slots.tile) + slots.offset + first;
      Isa::Columns::store(columns, slots.block_size, dim * kBits / 32, count, codes, row_bytes);
    } else {
      Values::store(slots.tile, dim, slots.offset + first, count, codes, row_bytes);
    }
  }

  static void load(const SlotRun &slots, int dim, int first, int count, std::uint8_t *codes,
                   std::ptrdiff_t row_bytes) {
    if constexpr (kIsKeys) {
      const auto *columns =
          reinterpret_cast<const std::uint32_t *>(slots.tile) + slots.offset + first;
      Isa::Columns::load(columns, slots.block_size, dim * kBits / 32, count, codes, row_bytes);
    } else {
      Values::load(slots.tile, dim, slots.offset + first, count, codes, row_bytes);
    }
  }
};

template <class Isa, int kFormat>
void fill_codec(Ops &ops) {
  ops.key_codecs[kFormat] = {Codec<Isa, kFormat, true>::encode, Codec<Isa, kFormat, true>::decode};
  ops.value_codecs[kFormat] = {Codec<Isa, kFormat, false>::encode,
                               Codec<Isa, kFormat, false>::decode};
}

template <class Isa>
void fill_codecs(Ops &ops) {
  fill_codec<Isa, KVKEEP_F32>(ops);
  fill_codec<Isa, KVKEEP_F16>(ops);
  fill_codec<Isa, KVKEEP_BF16>(ops);
  fill_codec<Isa, KVKEEP_FP8>(ops);
  fill_codec<Isa, KVKEEP_INT8>(ops);
  fill_codec<Isa, KVKEEP_INT4>(ops);
}

}  // namespace kvkeep

#endif
