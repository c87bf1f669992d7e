// The functions of registers.h as instructions. GCC 12's intrinsics are macros that take no template
// parameter, and do not say that they read memory: what is to be loaded might be stored too late.

#ifndef KVKEEP_AMX_PROCESSOR_REGISTERS_H
#define KVKEEP_AMX_PROCESSOR_REGISTERS_H

#include "amx/registers.h"

namespace kvkeep {
namespace {

// NOLINTBEGIN(portability-no-assembler): there is no other way to name these registers by a parameter.

void configure(const TileShapes &shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(shapes)); }

void release() { __asm__ volatile("tilerelease"); }

template <int kTile>
void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

template <int kTile>
void tile_load(const void *from, std::ptrdiff_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                   :
                   : "r"(from), "r"(stride), "i"(kTile)
                   : "memory");
}

template <int kTile>
void tile_store(void *to, std::ptrdiff_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                   :
                   : "r"(to), "r"(stride), "i"(kTile)
                   : "memory");
}

template <int kSums, int kA, int kB>
void tile_dpbf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kA), "i"(kB));
}

// NOLINTEND(portability-no-assembler)

}  // namespace
}  // namespace kvkeep

#endif
