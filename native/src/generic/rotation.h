// The rotation of int4 vectors: H(signs * x) / sqrt(m) in runs of m dims; see kvkeep_native.h.

#ifndef KVKEEP_GENERIC_ROTATION_H
#define KVKEEP_GENERIC_ROTATION_H

#include <cmath>
#include <cstdint>
#include <cstring>

#include "generic/vectors.h"

namespace kvkeep {

// Strides h = 1 << stage within a vector: lane i gets x[i] + x[i ^ h], or x[i ^ h] - x[i] where i
// has the bit h. A table, or the compiler would build these vectors number by number at run time.
struct Butterflies {
  std::int32_t partner[4][16] = {};
  std::int32_t negate[4][16] = {};

  constexpr Butterflies() {
    for (int stage = 0; stage < 4; ++stage) {
      for (int i = 0; i < 16; ++i) {
        const bool has_bit = (i >> stage) % 2 == 1;
        partner[stage][i] = i ^ (1 << stage);
        negate[stage][i] = has_bit ? INT32_MIN : 0;
      }
    }
  }
};

static constexpr Butterflies kButterflies;

// H in natural order, butterflies over strides 1, 2, 4, ..., and the factor 1 / sqrt(m) last. Sums
// and differences of two numbers only, so every instruction set gets the same bits. `Isa::kLanes`
// is 4, 8 or 16.
template <class Isa, int kLanes>
struct Hadamard {
  using Floats = typename Vectors<kLanes>::Floats;
  using Ints = typename Vectors<kLanes>::Ints;

  static Floats inner(Floats v, int stage) {
    Ints partner, negate;
    std::memcpy(&partner, kButterflies.partner[stage], sizeof(partner));
    std::memcpy(&negate, kButterflies.negate[stage], sizeof(negate));
    return __builtin_shuffle(v, partner) +
           reinterpret_cast<Floats>(reinterpret_cast<Ints>(v) ^ negate);
  }

  static void outer(float *x, int m, int h) {
    for (int i = 0; i < m; i += 2 * h) {
      for (int j = i; j < i + h; j += kLanes) {
        Floats a, b;
        std::memcpy(&a, x + j, sizeof(a));
        std::memcpy(&b, x + j + h, sizeof(b));
        const Floats sum = a + b, difference = a - b;
        std::memcpy(x + j, &sum, sizeof(sum));
        std::memcpy(x + j + h, &difference, sizeof(difference));
      }
    }
  }

  static void run(float *x, int m) {
    for (int i = 0; i < m; i += kLanes) {
      Floats v;
      std::memcpy(&v, x + i, sizeof(v));
#pragma GCC unroll 4
      for (int stage = 0; 1 << stage < kLanes; ++stage) v = inner(v, stage);
      std::memcpy(x + i, &v, sizeof(v));
    }
    for (int h = kLanes; h < m; h *= 2) outer(x, m, h);
    const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(m)));
    for (int i = 0; i < m; ++i) x[i] *= factor;
  }
};

// Never inlined, or the factor would be fused with what the caller subtracts next.
template <class Isa>
__attribute__((noinline)) void hadamard(float *x, int dim) {
  const int m = dim & -dim;
  constexpr int kNarrow = Isa::kLanes < 8 ? Isa::kLanes : 8;
  for (int i = 0; i < dim; i += m) {
    if (m % Isa::kLanes == 0) {
      Hadamard<Isa, Isa::kLanes>::run(x + i, m);
    } else {
      Hadamard<Isa, kNarrow>::run(x + i, m);
    }
  }
}

template <class Isa>
void rotate(float *x, int dim, const float *signs) {
  for (int d = 0; d < dim; ++d) x[d] *= signs[d];
  hadamard<Isa>(x, dim);
}

template <class Isa>
void rotate_back(float *x, int dim, const float *signs) {
  hadamard<Isa>(x, dim);
  for (int d = 0; d < dim; ++d) x[d] *= signs[d];
}

}  // namespace kvkeep

#endif
