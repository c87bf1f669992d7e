// Vectors of floats that the compiler maps to whatever registers the flags of a file allow.
//
// Everything here depends on `Isa`, a type of an anonymous namespace with
//
//     kLanes          floats of a vector
//     widen_halves    Floats of the half numbers in the low 16 bits of each word
//
// so that no two instruction sets share a function.

#ifndef KVKEEP_GENERIC_LANES_H
#define KVKEEP_GENERIC_LANES_H

#include <cstdint>
#include <cstring>

namespace kvkeep {

// Spelled out: GCC takes no vector size that depends on a parameter.
template <int kLanes>
struct Vectors;

template <>
struct Vectors<4> {
  using Floats = float __attribute__((vector_size(16)));
  using Words = std::uint32_t __attribute__((vector_size(16)));
};

template <>
struct Vectors<8> {
  using Floats = float __attribute__((vector_size(32)));
  using Words = std::uint32_t __attribute__((vector_size(32)));
};

template <>
struct Vectors<16> {
  using Floats = float __attribute__((vector_size(64)));
  using Words = std::uint32_t __attribute__((vector_size(64)));
};

template <class Isa, int kLanes>
struct Lanes {
  using Floats = typename Vectors<kLanes>::Floats;
  using Words = typename Vectors<kLanes>::Words;

  static Floats load(const void *p) {
    Floats x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }

  static Words load_words(const void *p) {
    Words x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }

  static void store(void *p, Floats x) { std::memcpy(p, &x, sizeof(x)); }

  static Floats all(float x) { return Floats{} + x; }

  static float sum(Floats x) {
    float part[kLanes];
    std::memcpy(part, &x, sizeof(x));
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) part[i] += part[i + width];
    }
    return part[0];
  }

  static float max(Floats x) {
    float most = x[0];
    for (int i = 1; i < kLanes; ++i) most = most > x[i] ? most : x[i];
    return most;
  }

  // 2 ^ x, within 3 ulp; below the smallest normal number 0, NaN stays NaN. x < 127.
  static Floats exp2(Floats x) {
    // Adding it leaves no digits behind the point, and the integer in the lowest bits.
    const Floats round = all(0x1.8p23f);
    const Floats shifted = x + round;
    const Floats r = x - (shifted - round);
    Floats y = all(1.535336188e-4f);
    y = y * r + 1.339887440e-3f;
    y = y * r + 9.618437357e-3f;
    y = y * r + 5.550332471e-2f;
    y = y * r + 2.402264791e-1f;
    y = y * r + 6.931472028e-1f;
    y = y * r + 1.0f;
    const Words scaled = reinterpret_cast<Words>(y) + (reinterpret_cast<Words>(shifted) << 23);
    return x < -126.0f ? Floats{} : reinterpret_cast<Floats>(scaled);
  }
};

// For instruction sets without a conversion of their own.
template <class Isa, int kLanes>
typename Lanes<Isa, kLanes>::Floats widen_halves_by_bits(typename Lanes<Isa, kLanes>::Words half) {
  using L = Lanes<Isa, kLanes>;
  const typename L::Words magnitude = (half & 0x7fffu) << 13;
  // The product puts the exponent right, and makes subnormal numbers normal.
  const auto finite = reinterpret_cast<typename L::Words>(
      reinterpret_cast<typename L::Floats>(magnitude) * 0x1p112f);
  const typename L::Words special = magnitude | 0x7f800000u;
  const typename L::Words bits = magnitude >= (0x7c00u << 13) ? special : finite;
  return reinterpret_cast<typename L::Floats>(bits | ((half & 0x8000u) << 16));
}

// Lanes, and how many vectors of them lie side by side.
template <int kLanesOf, int kVectorsOf>
struct Strip {
  static constexpr int kLanes = kLanesOf;
  static constexpr int kVectors = kVectorsOf;
};

// Cuts n columns, a multiple of 8, into strips: f(strip, first column).
template <class Isa, int kVectors, class F>
void for_strips(int n, F f) {
  constexpr int kWide = Isa::kLanes * kVectors;
  int i = 0;
  for (; i + kWide <= n; i += kWide) f(Strip<Isa::kLanes, kVectors>{}, i);
  for (; i + Isa::kLanes <= n; i += Isa::kLanes) f(Strip<Isa::kLanes, 1>{}, i);
  if constexpr (Isa::kLanes > 8) {
    if (i < n) f(Strip<8, 1>{}, i);
  }
}

template <int kQueriesOf>
struct Group {
  static constexpr int kQueries = kQueriesOf;
};

// Cuts n queries into groups that share a load of keys or values: f(group, first query). Eight only where there
// are registers for them.
template <class Isa, class F>
void for_groups(int n, F f) {
  int i = 0;
  if constexpr (Isa::kLanes == 16) {
    for (; i + 8 <= n; i += 8) f(Group<8>{}, i);
  }
  for (; i + 4 <= n; i += 4) f(Group<4>{}, i);
  if (i + 2 <= n) {
    f(Group<2>{}, i);
    i += 2;
  }
  if (i < n) f(Group<1>{}, i);
}

}  // namespace kvkeep

#endif
