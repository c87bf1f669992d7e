// Softmax over rows of scores, written once for all instruction sets: see lanes.h.

#ifndef KVKEEP_GENERIC_ROWS_H
#define KVKEEP_GENERIC_ROWS_H

#include <cmath>

#include "generic/lanes.h"
#include "ops.h"

namespace kvkeep {

template <class Isa>
float row_exp2_sum(float *x, int n, float scale, float max) {
  typename Lanes<Isa, Isa::kLanes>::Floats sums{};
  float rest = 0;
  for_strips<Isa, 1>(n, [&](auto strip, int i) {
    using L = Lanes<Isa, decltype(strip)::kLanes>;
    const auto y = L::exp2(L::load(x + i) * scale - max);
    L::store(x + i, y);
    if constexpr (decltype(strip)::kLanes == Isa::kLanes) {
      sums += y;
    } else {
      rest = L::sum(y);
    }
  });
  return Lanes<Isa, Isa::kLanes>::sum(sums) + rest;
}

template <class Isa>
float row_max(const float *x, int n) {
  using Wide = Lanes<Isa, Isa::kLanes>;
  // Two registers, since each comparison waits for the one before it.
  typename Wide::Floats most[2] = {Wide::all(-INFINITY), Wide::all(-INFINITY)};
  float rest = -INFINITY;
  for_strips<Isa, 2>(n, [&](auto strip, int i) {
    using S = decltype(strip);
    using L = Lanes<Isa, S::kLanes>;
    if constexpr (S::kLanes == Isa::kLanes) {
      for (int v = 0; v < S::kVectors; ++v) {
        const auto y = L::load(x + i + v * S::kLanes);
        most[v] = most[v] > y ? most[v] : y;
      }
    } else {
      rest = L::max(L::load(x + i));
    }
  });
  const float wide = Wide::max(most[0] > most[1] ? most[0] : most[1]);
  return wide > rest ? wide : rest;
}

template <class Isa>
void row_softcap(float *x, int n, float scale, float cap) {
  for_strips<Isa, 1>(n, [&](auto strip, int i) {
    using L = Lanes<Isa, decltype(strip)::kLanes>;
    const auto y = L::load(x + i) * (scale / cap);
    const auto size = y < 0.0f ? -y : y;
    const auto e = L::exp2(size * -2.885390082f);  // exp(-2 * size)
    const auto tanh = (1.0f - e) / (1.0f + e) * cap;
    L::store(x + i, y < 0.0f ? -tanh : tanh);
  });
}

template <class Isa>
void fill_rows(Ops &ops) {
  ops.exp2_sum = row_exp2_sum<Isa>;
  ops.max = row_max<Isa>;
  ops.softcap = row_softcap<Isa>;
}

}  // namespace kvkeep

#endif
