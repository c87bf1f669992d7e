// Int8 and int4 tiles in dot products of bytes. Fp8 tiles stay those of avx512: products of bf16
// pairs were slower than of floats, by a fifth with four queries, and would round the weights.

#include "avx512_bf16/integer_tiles.h"
#include "fills.h"

namespace kvkeep {
namespace {

template <int kFormat>
void fill_integer(Ops &ops) {
  using Keys = IntegerKeys<kFormat>;
  using Values = IntegerValues<kFormat>;
  ops.keys[kFormat] = {Keys::query_bytes, Keys::prepare_query, Keys::score};
  ops.values[kFormat] = {Values::accumulate, Values::finish};
}

}  // namespace

void fill_quantised_tiles_avx512_bf16(Ops &ops) {
  fill_integer<KVKEEP_INT8>(ops);
  fill_integer<KVKEEP_INT4>(ops);
}

}  // namespace kvkeep
