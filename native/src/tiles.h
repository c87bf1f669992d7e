// Where things lie in a tile (the K or V of one block, layer and kv head); see kvkeep_native.h.

#ifndef KVKEEP_TILES_H
#define KVKEEP_TILES_H

#include <cstddef>
#include <cstdint>

#include "kvkeep_native.h"

namespace kvkeep {

// Static: each file has its own, in its own instruction set.
static constexpr int bits_of(int format) {
  return format == KVKEEP_F32                            ? 32
         : format == KVKEEP_F16 || format == KVKEEP_BF16 ? 16
         : format == KVKEEP_FP8 || format == KVKEEP_INT8 ? 8
                                                         : 4;
}

static constexpr bool is_quantised(int format) { return format >= KVKEEP_FP8; }

// Words of codes; the metadata follow them.
static constexpr std::size_t code_words(int format, int dim, int block_size) {
  return static_cast<std::size_t>(dim) * block_size / (32 / bits_of(format));
}

static constexpr std::size_t tile_bytes(int format, int dim, int block_size) {
  return 4 * (code_words(format, dim, block_size) + (is_quantised(format) ? block_size : 0));
}

}  // namespace kvkeep

#endif
