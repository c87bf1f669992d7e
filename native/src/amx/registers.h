// AMX has eight registers of 16 rows of 64 bytes, which Intel calls tiles, and an instruction that
// multiplies two of them. The kernels use these functions and nothing else of it:
//
//     configure(shapes)           give the registers their shapes, and zeros
//     release()                   give them back
//     tile_zero<r>()
//     tile_load<r>(from, stride)  rows lie `stride` bytes apart
//     tile_store<r>(to, stride)
//     tile_dpbf16<sums, a, b>()   sums[m][n] += a[m][2k] * b[k][2n] + a[m][2k + 1] * b[k][2n + 1] over all k,
//                                 a and b in bf16, sums in float
//
// With KVKEEP_EMULATE_AMX they are computed in C++: tests need no processor that has AMX, and sanitizers
// see what is loaded and stored.

#ifndef KVKEEP_AMX_REGISTERS_H
#define KVKEEP_AMX_REGISTERS_H

#include <cstddef>
#include <cstdint>

namespace kvkeep {
namespace {

constexpr int kRegisters = 8;
constexpr int kRows = 16;      // of a register
constexpr int kRowBytes = 64;  // of a row

// What the instruction `ldtilecfg` reads.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

}  // namespace
}  // namespace kvkeep

#ifdef KVKEEP_EMULATE_AMX
#include "amx/emulated_registers.h"
#else
#include "amx/processor_registers.h"
#endif

#endif
