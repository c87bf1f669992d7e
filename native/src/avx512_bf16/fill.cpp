#include "fills.h"

namespace kvkeep {

void fill_avx512_bf16(Ops &ops) {
  fill_avx512(ops);
  fill_quantised_tiles_avx512_bf16(ops);
}

}  // namespace kvkeep
