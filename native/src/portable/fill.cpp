#include "fills.h"

namespace kvkeep {

void fill_portable(Ops &ops) {
  ops = Ops{};
  ops.end_thread = [] {};
  fill_float_tiles_portable(ops);
  fill_quantised_tiles_portable(ops);
  fill_codecs_portable(ops);
  fill_linear_portable(ops);
}

}  // namespace kvkeep
