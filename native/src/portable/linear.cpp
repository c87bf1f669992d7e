// Linear layers in vectors of four floats, which the compilers offer on every processor.

#include "../fills.h"
#include "../generic/linear_lanes.h"
#include "../generic/linear_tiles.h"
#include "../ops.h"

namespace kvkeep {
namespace {

struct Tag;

struct Isa : LinearLanes<Tag, 4> {
  static constexpr int kOutputs = 2;
};

}  // namespace

void fill_linear_portable(Ops &ops) { ops.linear = linear_outputs<Isa>; }

}  // namespace kvkeep
