// Vectors that the compiler lowers to what the instruction set has.

#ifndef KVKEEP_GENERIC_VECTORS_H
#define KVKEEP_GENERIC_VECTORS_H

#include <cstdint>

namespace kvkeep {

template <int kLanes>
struct Vectors;

// The compiler takes no size that depends on a template parameter.
template <>
struct Vectors<4> {
  using Floats = float __attribute__((vector_size(16)));
  using Ints = std::int32_t __attribute__((vector_size(16)));
  using Words = std::uint32_t __attribute__((vector_size(16)));
  using Shorts = std::int16_t __attribute__((vector_size(16)));
};

template <>
struct Vectors<8> {
  using Floats = float __attribute__((vector_size(32)));
  using Ints = std::int32_t __attribute__((vector_size(32)));
  using Words = std::uint32_t __attribute__((vector_size(32)));
  using Shorts = std::int16_t __attribute__((vector_size(32)));
};

template <>
struct Vectors<16> {
  using Floats = float __attribute__((vector_size(64)));
  using Ints = std::int32_t __attribute__((vector_size(64)));
  using Words = std::uint32_t __attribute__((vector_size(64)));
  using Shorts = std::int16_t __attribute__((vector_size(64)));
};

}  // namespace kvkeep

#endif
