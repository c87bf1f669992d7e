// Conversions between float and the dtypes of tensors, bit for bit the same in every instruction
// set.
//
// `Isa` is a type of an anonymous namespace in all of generic/: then no two instruction sets share
// a function.

#ifndef KVKEEP_GENERIC_NUMBERS_H
#define KVKEEP_GENERIC_NUMBERS_H

#include <cstdint>
#include <cstring>

#include "kvkeep_native.h"

namespace kvkeep {

template <class Isa>
struct Numbers {
  static std::uint32_t bits(float x) {
    std::uint32_t b;
    std::memcpy(&b, &x, sizeof(b));
    return b;
  }

  static float of_bits(std::uint32_t b) {
    float x;
    std::memcpy(&x, &b, sizeof(x));
    return x;
  }

  // a * b + c where the compiler could else choose which of two products it fuses.
  static float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
  }

  static float of_bf16(std::uint16_t b) { return of_bits(static_cast<std::uint32_t>(b) << 16); }

  static std::uint16_t to_bf16(float x) {
    const std::uint32_t b = bits(x);
    const std::uint32_t rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    const std::uint32_t nan = (b >> 16) | 0x40;
    return static_cast<std::uint16_t>((b & 0x7fffffff) > 0x7f800000 ? nan : rounded);
  }

  // The product with 2^112 moves the exponent and is exact, subnormals included.
  static float of_half(std::uint16_t h) {
    const std::uint32_t magnitude = h & 0x7fffu;
    const std::uint32_t finite = bits(of_bits(magnitude << 13) * 0x1p112f);
    const std::uint32_t wide = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : finite;
    return of_bits(wide | (static_cast<std::uint32_t>(h & 0x8000u) << 16));
  }

  // Added to 0.5, a number below 2^-14 is rounded to the distance of subnormal halves.
  static std::uint16_t to_half(float x) {
    const std::uint32_t b = bits(x) & 0x7fffffff;
    const std::uint32_t small = bits(of_bits(b) + 0.5f) - 0x3f000000;
    const std::uint32_t normal = (b + 0xfff + ((b >> 13) & 1) - 0x38000000) >> 13;
    std::uint32_t h = b < 0x38800000 ? small : normal;
    h = b >= 0x477ff000 ? 0x7c00 : h;
    h = b > 0x7f800000 ? 0x7e00 : h;
    return static_cast<std::uint16_t>(h | ((bits(x) >> 16) & 0x8000));
  }

  // A row of a tensor as floats.
  static void load(const void *row, int dtype, int dim, float *x) {
    const auto *halves = static_cast<const std::uint16_t *>(row);
    if (dtype == KVKEEP_F32) {
      std::memcpy(x, row, static_cast<std::size_t>(dim) * sizeof(float));
    } else if (dtype == KVKEEP_F16) {
      for (int d = 0; d < dim; ++d) x[d] = of_half(halves[d]);
    } else {
      for (int d = 0; d < dim; ++d) x[d] = of_bf16(halves[d]);
    }
  }

  static void store(const float *x, int dtype, int dim, void *row) {
    auto *halves = static_cast<std::uint16_t *>(row);
    if (dtype == KVKEEP_F32) {
      std::memcpy(row, x, static_cast<std::size_t>(dim) * sizeof(float));
    } else if (dtype == KVKEEP_F16) {
      for (int d = 0; d < dim; ++d) halves[d] = to_half(x[d]);
    } else {
      for (int d = 0; d < dim; ++d) halves[d] = to_bf16(x[d]);
    }
  }
};

}  // namespace kvkeep

#endif
