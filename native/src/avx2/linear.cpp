// Linear layers in vectors of eight floats.

#include "../fills.h"
#include "../generic/linear_lanes.h"
#include "../generic/linear_tiles.h"
#include "../ops.h"

namespace kvkeep {
namespace {

struct Tag;

struct Isa : LinearLanes<Tag, 8> {
  static constexpr int kOutputs = 2;
};

}  // namespace

void fill_linear_avx2(Ops &ops) { ops.linear = linear_outputs<Isa>; }

}  // namespace kvkeep
