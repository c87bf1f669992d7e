#include "fills.h"

namespace kvkeep {

void fill_avx512(Ops &ops) {
  fill_avx2(ops);
  fill_float_tiles_avx512(ops);
  fill_quantised_tiles_avx512(ops);
  fill_codecs_avx512(ops);
  fill_linear_avx512(ops);
}

}  // namespace kvkeep
