// Blocks of latents (MLA) as floats, one at a time, in a thread's memory.

#ifndef KVKEEP_ATTEND_LATENT_H
#define KVKEEP_ATTEND_LATENT_H

#include <cstddef>
#include <cstdint>

#include "attend.h"

namespace kvkeep {

class LatentBlock {
 public:
  LatentBlock(const Attention &attention, const Tiles &tiles, float *memory);

  // Floats of memory for units of so many rows.
  static std::size_t num_floats(const Attention &attention, std::size_t num_rows);

  // Decodes the rotated dims of a block, as add_scores reads them.
  void read_rotated(const std::uint8_t *tile);

  // Adds their products with the queries of `row` and on.
  void add_scores(std::size_t row, int num_rows, float *scores, int stride);

  // Decodes the latents of a block: a tile of float values.
  const std::uint8_t *read_latents(const std::uint8_t *tile);

 private:
  const Attention &a_;
  const Tiles &tiles_;
  const int block_size_;
  float *const rows_;     // [block_size][dim], of latents or rotated dims
  float *const rotated_;  // [v_dim][block_size]
  float *const products_;
};

}  // namespace kvkeep

#endif
