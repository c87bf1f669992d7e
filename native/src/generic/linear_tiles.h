// Linear layers for a few rows of x, written once for all instruction sets: each gives a type `Isa` with
//
//     kStep       bf16 numbers that one `Pack` holds
//     kOutputs    rows of the weight that are read side by side, a power of two
//     Pack        kStep neighbouring numbers of a row, ready to be multiplied
//     Sum         partial sums of one output
//     load, load_part, zero, add, totals
//
// A tile is kOutputs outputs of all rows of x. It is computed in chunks of inputs, and a chunk in passes of up
// to kRowsOfPass rows: the first pass has the weights fetched from memory, the others find them in the cache.
//
// An output is the total of one `Sum` that takes the packs of its row in order. Neither tiles nor chunks nor
// passes change anything in that, so a result depends on its own rows only, to the last bit.
//
// `Isa` must be of an anonymous namespace: then no two instruction sets share a function.

#ifndef KVKEEP_GENERIC_LINEAR_TILES_H
#define KVKEEP_GENERIC_LINEAR_TILES_H

#include <cstdint>
#include <cstring>

namespace kvkeep {

// As many as there are registers for sums of kOutputs outputs each.
constexpr int kRowsOfPass = 4;
// Inputs of a chunk for so many passes: with all rows of x they fill the first cache.
constexpr std::int64_t chunk_inputs(int num_passes) { return num_passes <= 4 ? 1024 : 512; }

// What Ops::linear is given, but for the range of outputs and the number of rows.
struct LinearArguments {
  const std::uint16_t *weight;
  const std::uint16_t *bias;
  const std::uint16_t *x;
  std::uint16_t *out;
  std::int64_t num_outputs;
  std::int64_t num_inputs;
};

// Inputs of a chunk, for some outputs and rows of x.
struct LinearChunk {
  const std::uint16_t *weight;
  const std::uint16_t *x;
  // Rows of the weight that are fetched meanwhile.
  const std::uint16_t *ahead;
  std::int64_t stride;
  std::int64_t count;
  bool is_first;
};

template <class Isa, int kRows, int kOutputs>
struct LinearSums {
  typename Isa::Sum sums[kRows][kOutputs];

  template <class Load>
  void add(const LinearChunk &c, std::int64_t k, Load load) {
    typename Isa::Pack packs[kOutputs];
#pragma GCC unroll 16
    for (int r = 0; r < kOutputs; ++r) packs[r] = load(c.weight + r * c.stride + k);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const typename Isa::Pack row = load(c.x + m * c.stride + k);
#pragma GCC unroll 16
      for (int r = 0; r < kOutputs; ++r) sums[m][r] = Isa::add(sums[m][r], packs[r], row);
    }
  }
};

// Adds a chunk to the sums of kRows rows, and fetches as much of kAhead rows of the weight.
template <class Isa, int kRows, int kOutputs, int kAhead>
void add_linear_chunk(const LinearChunk &c, typename Isa::Sum (*sums)[kOutputs]) {
  LinearSums<Isa, kRows, kOutputs> own;
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
    for (int r = 0; r < kOutputs; ++r) own.sums[m][r] = c.is_first ? Isa::zero() : sums[m][r];
  }
  std::int64_t k = 0;
  for (; k + Isa::kStep <= c.count; k += Isa::kStep) {
#pragma GCC unroll 16
    for (int r = 0; r < kAhead; ++r) __builtin_prefetch(c.ahead + r * c.stride + k);
    own.add(c, k, [](const std::uint16_t *p) { return Isa::load(p); });
  }
  if (k < c.count) {
    const int rest = static_cast<int>(c.count - k);
    own.add(c, k, [rest](const std::uint16_t *p) { return Isa::load_part(p, rest); });
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
    for (int r = 0; r < kOutputs; ++r) sums[m][r] = own.sums[m][r];
  }
}

// One pass: num_rows is 1 to kRowsOfPass.
template <class Isa, int kOutputs, int kAhead>
void add_linear_rows(const LinearChunk &c, int num_rows, typename Isa::Sum (*sums)[kOutputs]) {
  switch (num_rows) {
    case 1:
      return add_linear_chunk<Isa, 1, kOutputs, kAhead>(c, sums);
    case 2:
      return add_linear_chunk<Isa, 2, kOutputs, kAhead>(c, sums);
    case 3:
      return add_linear_chunk<Isa, 3, kOutputs, kAhead>(c, sums);
    default:
      return add_linear_chunk<Isa, 4, kOutputs, kAhead>(c, sums);
  }
}

template <class Isa>
float widen_bf16(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

// To the nearest, ties to even; NaN stays NaN.
template <class Isa>
std::uint16_t round_to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class Isa, int kOutputs>
void write_outputs(const LinearArguments &a, std::int64_t n, int row,
                   const typename Isa::Sum *sums) {
  float totals[kOutputs];
  Isa::template totals<kOutputs>(sums, totals);
  std::uint16_t *out = a.out + row * a.num_outputs + n;
  for (int r = 0; r < kOutputs; ++r) {
    if (a.bias != nullptr) totals[r] += widen_bf16<Isa>(a.bias[n + r]);
    out[r] = round_to_bf16<Isa>(totals[r]);
  }
}

// Outputs n .. n + kOutputs of all rows.
template <class Isa, int kOutputs, int kPasses>
void linear_tile(const LinearArguments &a, std::int64_t n, int num_rows) {
  constexpr int kAhead = (kOutputs + kPasses - 1) / kPasses;
  constexpr std::int64_t kChunk = chunk_inputs(kPasses);
  typename Isa::Sum sums[kPasses * kRowsOfPass][kOutputs];
  const std::int64_t stride = a.num_inputs;
  const std::uint16_t *weight = a.weight + n * stride;
  for (std::int64_t k = 0; k < stride; k += kChunk) {
    const std::int64_t count = stride - k < kChunk ? stride - k : kChunk;
    // Behind the last chunk of a tile comes the first one of the next tile.
    const std::int64_t next = k + kChunk < stride ? k + kChunk : kOutputs * stride;
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = num_rows * pass / kPasses;
      const int end_row = num_rows * (pass + 1) / kPasses;
      const std::uint16_t *ahead = weight + pass * kOutputs / kPasses * stride + next;
      const LinearChunk chunk{weight + k, a.x + row * stride + k, ahead, stride, count, k == 0};
      add_linear_rows<Isa, kOutputs, kAhead>(chunk, end_row - row, sums + row);
    }
  }
  for (int m = 0; m < num_rows; ++m) write_outputs<Isa, kOutputs>(a, n, m, sums[m]);
}

template <class Isa, int kPasses>
void linear_tiles(const LinearArguments &a, std::int64_t first, std::int64_t last, int num_rows) {
  std::int64_t n = first;
  for (; n + Isa::kOutputs <= last; n += Isa::kOutputs) {
    linear_tile<Isa, Isa::kOutputs, kPasses>(a, n, num_rows);
  }
  for (; n < last; ++n) linear_tile<Isa, 1, kPasses>(a, n, num_rows);
}

// Ops::linear.
template <class Isa>
void linear_outputs(const std::uint16_t *weight, const std::uint16_t *bias, const std::uint16_t *x,
                    std::uint16_t *out, std::int64_t first_output, std::int64_t last_output,
                    std::int64_t num_outputs, std::int64_t num_inputs, int num_rows) {
  const LinearArguments a{weight, bias, x, out, num_outputs, num_inputs};
  switch ((num_rows + kRowsOfPass - 1) / kRowsOfPass) {
    case 1:
      return linear_tiles<Isa, 1>(a, first_output, last_output, num_rows);
    case 2:
      return linear_tiles<Isa, 2>(a, first_output, last_output, num_rows);
    case 3:
      return linear_tiles<Isa, 3>(a, first_output, last_output, num_rows);
    case 4:
      return linear_tiles<Isa, 4>(a, first_output, last_output, num_rows);
    case 5:
    case 6:
      return linear_tiles<Isa, 6>(a, first_output, last_output, num_rows);
    default:
      return linear_tiles<Isa, 8>(a, first_output, last_output, num_rows);
  }
}

}  // namespace kvkeep

#endif
