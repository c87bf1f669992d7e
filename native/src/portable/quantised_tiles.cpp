// Quantised tiles in vectors of four floats, which every processor has.

#include "generic/quantised_tiles.h"

#include "fills.h"

namespace kvkeep {
namespace {

struct Isa {
  static constexpr int kLanes = 4;
};

}  // namespace

void fill_quantised_tiles_portable(Ops &ops) { fill_quantised_tiles<Isa>(ops); }

}  // namespace kvkeep
