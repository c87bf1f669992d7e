// Codecs in vectors of eight floats.

#include "generic/codecs.h"

#include "fills.h"

namespace kvkeep {
namespace {

struct Isa {
  static constexpr int kLanes = 8;
  using Columns = PlainColumns<Isa>;
};

}  // namespace

void fill_codecs_avx2(Ops &ops) { fill_codecs<Isa>(ops); }

}  // namespace kvkeep
