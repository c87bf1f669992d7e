#include "attend_latent.h"

#include <algorithm>

namespace kvkeep {
namespace {

std::size_t row_floats(const Attention &a) {
  return static_cast<std::size_t>(a.arena->block_size) * std::max(a.arena->k_dim, a.arena->v_dim);
}

std::size_t rotated_floats(const Attention &a) {
  return static_cast<std::size_t>(a.arena->block_size) * a.arena->v_dim;
}

void decode(const CodecOps &codec, const std::uint8_t *tile, int block_size, int dim,
            const float *signs, float *rows) {
  // Decoding only reads it.
  const SlotRun slots{const_cast<std::uint8_t *>(tile), block_size, 0};
  codec.decode(slots, signs, {rows, dim, KVKEEP_F32, block_size, dim});
}

}  // namespace

LatentBlock::LatentBlock(const Attention &attention, const Tiles &tiles, float *memory)
    : a_(attention),
      tiles_(tiles),
      block_size_(attention.arena->block_size),
      rows_(memory),
      rotated_(rows_ + row_floats(attention)),
      products_(rotated_ + rotated_floats(attention)) {}

std::size_t LatentBlock::num_floats(const Attention &attention, std::size_t num_rows) {
  return row_floats(attention) + rotated_floats(attention) + num_rows * attention.arena->block_size;
}

void LatentBlock::read_rotated(const std::uint8_t *tile) {
  const int dim = a_.arena->v_dim;
  decode(*tiles_.rotated_codec, tile, block_size_, dim, tiles_.arena->v_signs, rows_);
  for (int t = 0; t < block_size_; ++t) {
    for (int d = 0; d < dim; ++d) rotated_[d * block_size_ + t] = rows_[t * dim + d];
  }
}

void LatentBlock::add_scores(std::size_t row, int num_rows, float *scores, int stride) {
  a_.latent.rotated_keys->score(reinterpret_cast<const std::uint8_t *>(rotated_), block_size_,
                                a_.arena->v_dim, a_.latent.queries + row * a_.latent.query_bytes,
                                num_rows, products_, block_size_, 0);
  for (int i = 0; i < num_rows; ++i) {
    float *to = scores + static_cast<std::ptrdiff_t>(i) * stride;
    const float *from = products_ + static_cast<std::ptrdiff_t>(i) * block_size_;
    for (int t = 0; t < block_size_; ++t) to[t] += from[t];
  }
}

const std::uint8_t *LatentBlock::read_latents(const std::uint8_t *tile) {
  decode(*tiles_.latent_codec, tile, block_size_, a_.arena->k_dim, tiles_.arena->k_signs, rows_);
  return reinterpret_cast<const std::uint8_t *>(rows_);
}

}  // namespace kvkeep
