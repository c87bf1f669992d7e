// What the codes of a vector are. All arithmetic is in float32, rounded half to even; every
// instruction set and kvkeep's torch reference give the same codes, so none of this may be
// reordered or made faster by a reciprocal.
//
//     int8   scale = max|x| / 127
//            code = rint(clamp(x / scale, -127, 127)), stored + 128
//     fp8    scale = max|x| / 448
//            y = clamp(x / scale, -448, 448)
//            |y| <= 2^-7: 0;  |y| < 2^-6: 2^-6;  else e4m3fn(|y|), nearest even; with the sign of
//            y, of zeros too
//     int4   y = x rotated (rotation.h)
//            minimum = half(clamp(min y, -65504, 65504)), a zero stored as +0
//            scale = half(clamp((max y - minimum) / 15, 0, 65504))
//            code = rint(clamp((y - minimum) / scale, 0, 15))
//
// A scale of zero, be it by underflow, has the codes of zero: int8 128, fp8 0, int4 0. If x (int4:
// y) is not finite everywhere, the codes are those of zero and the metadata NaN: 0x7fc00000, or two
// halves 0x7e00.
//
// Decoding: scale * code; int4 minimum + scale * code, where the product is exact, then rotated
// back.

#ifndef KVKEEP_GENERIC_ENCODING_H
#define KVKEEP_GENERIC_ENCODING_H

#include <cstdint>
#include <cstring>

#include "generic/numbers.h"
#include "generic/rotation.h"
#include "kvkeep_native.h"

namespace kvkeep {

template <class Isa>
struct Encoding {
  using N = Numbers<Isa>;
  static constexpr std::uint32_t kNaN = 0x7fc00000;
  static constexpr std::uint32_t kTwoHalfNaNs = 0x7e007e00;
  static constexpr std::int32_t kInfinity = 0x7f800000;

  // Encode x, which may be changed, into one byte a number; returns the metadata.
  template <int kFormat>
  static std::uint32_t encode(float *x, int dim, const float *signs, std::uint8_t *codes) {
    if constexpr (kFormat == KVKEEP_INT8) return encode_int8(x, dim, codes);
    if constexpr (kFormat == KVKEEP_FP8) return encode_fp8(x, dim, codes);
    if constexpr (kFormat == KVKEEP_INT4) return encode_int4(x, dim, signs, codes);
  }

  template <int kFormat>
  static void decode(const std::uint8_t *codes, int dim, const float *signs, std::uint32_t metadata,
                     float *x) {
    if constexpr (kFormat == KVKEEP_INT8) {
      const float scale = N::of_bits(metadata);
      for (int d = 0; d < dim; ++d) x[d] = scale * static_cast<float>(codes[d] - 128);
    } else if constexpr (kFormat == KVKEEP_FP8) {
      const float scale = N::of_bits(metadata);
      for (int d = 0; d < dim; ++d) x[d] = scale * of_fp8(codes[d]);
    } else {
      const float scale = N::of_half(static_cast<std::uint16_t>(metadata));
      const float minimum = N::of_half(static_cast<std::uint16_t>(metadata >> 16));
      for (int d = 0; d < dim; ++d) x[d] = minimum + scale * static_cast<float>(codes[d]);
      rotate_back<Isa>(x, dim, signs);
    }
  }

 private:
  // rint of a number below 2^22: at 1.5 * 2^23 the distance of floats is 1.
  static std::int32_t rint(float y) {
    return static_cast<std::int32_t>(N::bits(y + 0x1.8p23f)) - 0x4b400000;
  }

  static float clamp(float y, float low, float high) {
    y = y < low ? low : y;
    return y > high ? high : y;
  }

  // The bits of max|x|, which are ordered as integers: NaN is more than infinity.
  static std::int32_t most_bits(const float *x, int dim) {
    std::int32_t most = 0;
    for (int d = 0; d < dim; ++d) {
      const auto b = static_cast<std::int32_t>(N::bits(x[d]) & 0x7fffffff);
      most = b > most ? b : most;
    }
    return most;
  }

  static std::uint32_t encode_int8(const float *x, int dim, std::uint8_t *codes) {
    const std::int32_t most = most_bits(x, dim);
    const float scale = N::of_bits(static_cast<std::uint32_t>(most)) / 127.0f;
    if (most >= kInfinity || scale == 0) {
      std::memset(codes, 128, static_cast<std::size_t>(dim));
      return most >= kInfinity ? kNaN : 0;
    }
    for (int d = 0; d < dim; ++d) {
      codes[d] = static_cast<std::uint8_t>(rint(clamp(x[d] / scale, -127.0f, 127.0f)) + 128);
    }
    return N::bits(scale);
  }

  static std::uint32_t encode_fp8(const float *x, int dim, std::uint8_t *codes) {
    const std::int32_t most = most_bits(x, dim);
    const float scale = N::of_bits(static_cast<std::uint32_t>(most)) / 448.0f;
    if (most >= kInfinity || scale == 0) {
      std::memset(codes, 0, static_cast<std::size_t>(dim));
      return most >= kInfinity ? kNaN : 0;
    }
    for (int d = 0; d < dim; ++d) codes[d] = to_fp8(clamp(x[d] / scale, -448.0f, 448.0f));
    return N::bits(scale);
  }

  static std::uint8_t to_fp8(float y) {
    const std::uint32_t b = N::bits(y) & 0x7fffffff;
    const std::uint32_t normal = ((b + 0x7ffff + ((b >> 20) & 1)) >> 20) - (120u << 3);
    const std::uint32_t small = b > 0x3c000000 ? 0x08 : 0;  // 2^-7
    const std::uint32_t magnitude = b < 0x3c800000 ? small : normal;
    return static_cast<std::uint8_t>(magnitude | ((N::bits(y) >> 24) & 0x80));
  }

  // Without subnormals, a product with 2^120 moves the exponent; a zero stays one.
  static float of_fp8(std::uint8_t code) {
    const std::uint32_t magnitude = code & 0x7fu, sign = code & 0x80u;
    return N::of_bits((sign << 24) | (magnitude << 20)) * 0x1p120f;
  }

  // Integers in the order of the floats, -0 before +0 and NaN at both ends.
  static std::int32_t order(std::int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

  static std::uint32_t encode_int4(float *x, int dim, const float *signs, std::uint8_t *codes) {
    rotate<Isa>(x, dim, signs);
    std::int32_t low = INT32_MAX, high = INT32_MIN;
    for (int d = 0; d < dim; ++d) {
      const std::int32_t place = order(static_cast<std::int32_t>(N::bits(x[d])));
      low = place < low ? place : low;
      high = place > high ? place : high;
    }
    const float least = N::of_bits(static_cast<std::uint32_t>(order(low)));
    const float most = N::of_bits(static_cast<std::uint32_t>(order(high)));
    const bool is_finite = high < kInfinity && low > order(INT32_MIN | kInfinity);
    const std::uint16_t half = N::to_half(clamp(least, -65504.0f, 65504.0f));
    const std::uint32_t minimum_bits = half == 0x8000 ? 0 : half;
    const float minimum = N::of_half(static_cast<std::uint16_t>(minimum_bits));
    const std::uint16_t scale_bits = N::to_half(clamp((most - minimum) / 15.0f, 0.0f, 65504.0f));
    if (!is_finite || scale_bits == 0) {
      std::memset(codes, 0, static_cast<std::size_t>(dim));
      return is_finite ? minimum_bits << 16 : kTwoHalfNaNs;
    }
    const float scale = N::of_half(scale_bits);
    for (int d = 0; d < dim; ++d) {
      codes[d] = static_cast<std::uint8_t>(rint(clamp((x[d] - minimum) / scale, 0.0f, 15.0f)));
    }
    return scale_bits | (minimum_bits << 16);
  }
};

}  // namespace kvkeep

#endif
