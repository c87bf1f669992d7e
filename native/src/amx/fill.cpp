#include "fills.h"

namespace kvkeep {

void fill_amx(Ops &ops) {
  fill_avx512_bf16(ops);
  fill_bf16_tiles_amx(ops);
}

}  // namespace kvkeep
