// An arena and its first blocks, which may lie apart in other formats; see kvkeep_native.h.

#ifndef KVKEEP_ARENAS_H
#define KVKEEP_ARENAS_H

#include <cstdint>

#include "kvkeep_native.h"

namespace kvkeep {

// Ids of blocks are below.
inline std::int64_t end_of_blocks(const KvkeepArena &arena) {
  return arena.num_blocks + (arena.first_blocks == nullptr ? 0 : arena.first_blocks->num_blocks);
}

// Whether the first blocks, which there are, are of the same sizes as the others.
inline bool are_first_blocks(const KvkeepArena &arena) {
  const KvkeepArena &first = *arena.first_blocks;
  return first.first_blocks == nullptr && first.num_blocks >= 0 &&
         first.block_size == arena.block_size && first.num_layers == arena.num_layers &&
         first.num_kv_heads == arena.num_kv_heads && first.k_dim == arena.k_dim &&
         first.v_dim == arena.v_dim;
}

}  // namespace kvkeep

#endif
