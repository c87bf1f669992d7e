#include "fills.h"

namespace kvkeep {

void fill_avx2(Ops &ops) {
  fill_portable(ops);
  fill_float_tiles_avx2(ops);
  fill_quantised_tiles_avx2(ops);
  fill_codecs_avx2(ops);
  fill_linear_avx2(ops);
}

}  // namespace kvkeep
