// Linear layers in vectors of sixteen floats.

#include "../fills.h"
#include "../generic/linear_lanes.h"
#include "../generic/linear_tiles.h"
#include "../ops.h"

namespace kvkeep {
namespace {

struct Tag;

struct Isa : LinearLanes<Tag, 16> {
  static constexpr int kOutputs = 4;
};

}  // namespace

void fill_linear_avx512(Ops &ops) { ops.linear = linear_outputs<Isa>; }

}  // namespace kvkeep
