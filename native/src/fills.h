// The parts of each instruction set's table: its fill.cpp calls them all, in any order.

#ifndef KVKEEP_FILLS_H
#define KVKEEP_FILLS_H

#include "ops.h"

namespace kvkeep {

void fill_float_tiles_portable(Ops &ops);
void fill_float_tiles_avx2(Ops &ops);
void fill_float_tiles_avx512(Ops &ops);

void fill_linear_portable(Ops &ops);
void fill_linear_avx2(Ops &ops);
void fill_linear_avx512(Ops &ops);

void fill_codecs_portable(Ops &ops);
void fill_codecs_avx2(Ops &ops);
void fill_codecs_avx512(Ops &ops);

void fill_quantised_tiles_portable(Ops &ops);
void fill_quantised_tiles_avx2(Ops &ops);
void fill_quantised_tiles_avx512(Ops &ops);
void fill_quantised_tiles_avx512_bf16(Ops &ops);

void fill_bf16_tiles_amx(Ops &ops);

}  // namespace kvkeep

#endif
