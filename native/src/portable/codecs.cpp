// Codecs in vectors of four floats, which every processor has.

#include "generic/codecs.h"

#include "fills.h"

namespace kvkeep {
namespace {

struct Isa {
  static constexpr int kLanes = 4;
  using Columns = PlainColumns<Isa>;
};

}  // namespace

void fill_codecs_portable(Ops &ops) { fill_codecs<Isa>(ops); }

}  // namespace kvkeep
