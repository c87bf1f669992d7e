// Linear layers for a few rows: outputs are shared out to threads, and the tiles do the rest.

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "kvkeep_native.h"
#include "ops.h"

namespace kvkeep {
namespace {

constexpr int kMostRows = 32;
// Outputs of a cache line: no two threads write to one.
constexpr std::int64_t kLineOutputs = 32;
// Below this a thread costs more than it brings.
constexpr std::int64_t kLeastWeightsOfThread = 1 << 15;

std::int64_t num_lines(std::int64_t num_outputs) {
  return (num_outputs + kLineOutputs - 1) / kLineOutputs;
}

int useful_threads(std::int64_t num_outputs, std::int64_t num_inputs, int num_threads) {
  const std::int64_t paying = num_outputs * num_inputs / kLeastWeightsOfThread;
  const std::int64_t most = std::min(num_lines(num_outputs), std::max<std::int64_t>(paying, 1));
  return static_cast<int>(std::min<std::int64_t>(num_threads, most));
}

}  // namespace
}  // namespace kvkeep

extern "C" std::int32_t kvkeep_linear(const std::uint16_t *weight, const std::uint16_t *bias,
                                      const std::uint16_t *x, std::uint16_t *out,
                                      std::int64_t num_outputs, std::int64_t num_inputs,
                                      std::int32_t num_rows, std::int32_t num_threads) {
  using namespace kvkeep;
  if (weight == nullptr || x == nullptr || out == nullptr || num_outputs < 1 || num_inputs < 1 ||
      num_rows < 1 || num_rows > kMostRows || num_threads < 1) {
    return KVKEEP_BAD_ARGUMENT;
  }
  const auto outputs_of = ops().linear;
  const int threads = useful_threads(num_outputs, num_inputs, num_threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    // The runtime may give fewer threads than asked for.
    const std::int64_t own = omp_get_thread_num(), all = omp_get_num_threads();
    const std::int64_t lines = num_lines(num_outputs);
    const std::int64_t first = lines * own / all * kLineOutputs;
    const std::int64_t last = std::min(lines * (own + 1) / all * kLineOutputs, num_outputs);
    if (first < last) {
      outputs_of(weight, bias, x, out, first, last, num_outputs, num_inputs, num_rows);
    }
  }
  return KVKEEP_OK;
}
