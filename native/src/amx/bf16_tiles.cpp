// Attention over bf16 tiles with AMX. A word of a tile is a pair of neighbouring dims (keys) or tokens
// (values), and so is a word of the second factor of `tdpbf16ps`. The first factor are queries or
// weights, one a row.
//
// Every product with a bf16 tile is made by that instruction, for one query as well. How many queries
// read a tile together depends on other requests, and a result must not: there is no number of queries
// from which on it could be another instruction. A row of sums depends on its own row of the first factor
// only, and for few queries the instruction takes less time than the tile takes to come from memory.
//
// What is no bf16 number is split into a sum of them. Weights into two: an error of 2^-17 of a weight is
// left, where one would leave 2^-9, as much as rounding the result. Queries that are not bf16 into three,
// which is exact, so that there is one arithmetic for all.

#include "amx/bf16_keys.h"
#include "amx/bf16_values.h"
#include "fills.h"
#include "kvkeep_native.h"

namespace kvkeep {

void fill_bf16_tiles_amx(Ops &ops) {
  ops.keys[KVKEEP_BF16] = {Keys::query_bytes, Keys::prepare_query, Keys::score};
  ops.values[KVKEEP_BF16] = {Values::accumulate, Values::finish};
  ops.end_thread = end_thread;
}

}  // namespace kvkeep
