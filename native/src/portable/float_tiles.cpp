// Attention over unquantised tiles, and softmax, in the vectors of four floats that every processor has.

#include "generic/float_tiles.h"

#include "fills.h"
#include "generic/rows.h"

namespace kvkeep {
namespace {

struct Isa {
  static constexpr int kLanes = 4;
  static constexpr int kTokenVectors = 2;
  static constexpr int kDimVectors = 2;

  template <class Words>
  static auto widen_halves(Words half) {
    return widen_halves_by_bits<Isa, sizeof(Words) / 4>(half);
  }
};

}  // namespace

void fill_float_tiles_portable(Ops &ops) {
  fill_rows<Isa>(ops);
  fill_float_tiles<Isa>(ops);
}

}  // namespace kvkeep
