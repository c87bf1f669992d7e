// Quantised tiles in vectors of sixteen floats.

#include "generic/quantised_tiles.h"

#include "fills.h"

namespace kvkeep {
namespace {

struct Isa {
  static constexpr int kLanes = 16;
};

}  // namespace

void fill_quantised_tiles_avx512(Ops &ops) { fill_quantised_tiles<Isa>(ops); }

}  // namespace kvkeep
