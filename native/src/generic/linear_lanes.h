// What linear_tiles.h asks of an instruction set, from vectors of floats: of the two bf16 numbers in a word one
// becomes a float by a shift, the other by a mask.
//
// `Tag` is a type of an anonymous namespace, so that no two instruction sets share a function.

#ifndef KVKEEP_GENERIC_LINEAR_LANES_H
#define KVKEEP_GENERIC_LINEAR_LANES_H

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kvkeep {

// One by one, because GCC forgets in templates of functions a size that depends on a parameter.
template <int kLanes>
struct VectorTypes;
template <>
struct VectorTypes<4> {
  using Floats = float __attribute__((vector_size(16)));
  using Words = std::uint32_t __attribute__((vector_size(16)));
};
template <>
struct VectorTypes<8> {
  using Floats = float __attribute__((vector_size(32)));
  using Words = std::uint32_t __attribute__((vector_size(32)));
};
template <>
struct VectorTypes<16> {
  using Floats = float __attribute__((vector_size(64)));
  using Words = std::uint32_t __attribute__((vector_size(64)));
};

template <class Tag, int kLanes>
struct LinearLanes {
  static constexpr int kStep = 2 * kLanes;
  using Sum = typename VectorTypes<kLanes>::Floats;
  using Words = typename VectorTypes<kLanes>::Words;
  struct Pack {
    Sum even;
    Sum odd;
  };

  static Pack load(const std::uint16_t *p) {
    Words pairs;
    std::memcpy(&pairs, p, sizeof(pairs));
    return {reinterpret_cast<Sum>(pairs << 16), reinterpret_cast<Sum>(pairs & 0xffff0000u)};
  }

  static Pack load_part(const std::uint16_t *p, int count) {
    std::uint16_t padded[kStep] = {};
    std::memcpy(padded, p, static_cast<std::size_t>(count) * sizeof(*p));
    return load(padded);
  }

  static Sum zero() { return Sum{}; }

  // A product of two bf16 numbers is exact in a float: whether the compiler fuses it changes nothing.
  static Sum add(const Sum &sum, const Pack &a, const Pack &b) {
    return (sum + a.even * b.even) + a.odd * b.odd;
  }

  // totals[i] is the sum of the lanes of sums[i]: lane j with lane j + kLanes / 2, then of what is left again
  // the lower half with the upper one, whatever kCount is.
  template <int kCount>
  static void totals(const Sum *sums, float *totals) {
    const Sum folded = fold_all<kCount, kLanes>(sums);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) totals[i] = folded[i];
  }

 private:
  // The groups of kWidth lanes of a, then those of b, each folded to half of its width.
  template <int kWidth>
  static Sum fold(const Sum &a, const Sum &b) {
    Words low, high;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const int begin = i / (kWidth / 2) * kWidth + i % (kWidth / 2);
      low[i] = begin;
      high[i] = begin + kWidth / 2;
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  }

  template <int kCount, int kWidth>
  static Sum fold_all(const Sum *sums) {
    if constexpr (kCount > 1) {
      Sum pairs[kCount / 2];
#pragma GCC unroll 16
      for (int i = 0; i < kCount / 2; ++i) pairs[i] = fold<kWidth>(sums[2 * i], sums[2 * i + 1]);
      return fold_all<kCount / 2, kWidth / 2>(pairs);
    } else if constexpr (kWidth > 1) {
      const Sum folded = fold<kWidth>(sums[0], sums[0]);
      return fold_all<1, kWidth / 2>(&folded);
    } else {
      return sums[0];
    }
  }
};

}  // namespace kvkeep

#endif
