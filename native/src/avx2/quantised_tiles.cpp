// Quantised tiles in vectors of eight floats.

#include "generic/quantised_tiles.h"

#include "fills.h"

namespace kvkeep {
namespace {

struct Isa {
  static constexpr int kLanes = 8;
};

}  // namespace

void fill_quantised_tiles_avx2(Ops &ops) { fill_quantised_tiles<Isa>(ops); }

}  // namespace kvkeep
