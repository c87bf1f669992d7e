// Writes rows of K and V into slots, and reads them back: runs of slots are found and shared out to
// threads.

#include <omp.h>

#include <cstddef>
#include <cstdint>

#include "arenas.h"
#include "kvkeep_native.h"
#include "ops.h"
#include "tiles.h"

namespace kvkeep {
namespace {

// Below this a thread costs more than it brings.
constexpr std::int64_t kLeastNumbersOfThread = 1 << 14;
// Slots that a thread reads in one go.
constexpr std::int64_t kSlotsAtOnce = 256;

// The keys, or the values, of a layer.
struct Side {
  const CodecOps *codec;
  const float *signs;
  const KvkeepRows *rows;
  std::int64_t offset;  // of head 0 from a block's begin
  std::size_t tile_bytes;
  int dim;
};

// Those of an arena, whose blocks have ids from `begin` on.
struct Sides {
  const KvkeepArena *arena;
  std::int64_t begin;
  Side k;
  Side v;
};

Sides sides_of(const KvkeepArena &arena, std::int64_t begin_id, int layer, const KvkeepRows *k,
               const KvkeepRows *v) {
  const int k_format = arena.k_formats[layer], v_format = arena.v_formats[layer];
  const std::size_t k_bytes = tile_bytes(k_format, arena.k_dim, arena.block_size);
  const std::size_t v_bytes = tile_bytes(v_format, arena.v_dim, arena.block_size);
  const std::int64_t begin = arena.layer_offsets[layer];
  const auto all_keys = static_cast<std::int64_t>(k_bytes) * arena.num_kv_heads;
  return {
      &arena,
      begin_id,
      {&ops().key_codecs[k_format], arena.k_signs, k, begin, k_bytes, arena.k_dim},
      {&ops().value_codecs[v_format], arena.v_signs, v, begin + all_keys, v_bytes, arena.v_dim}};
}

// A layer of an arena, and of its first blocks where these lie apart.
struct Layer {
  Layer(const KvkeepArena &arena, int layer, const KvkeepRows *k, const KvkeepRows *v)
      : all(sides_of(arena, 0, layer, k, v)),
        first(arena.first_blocks == nullptr
                  ? all
                  : sides_of(*arena.first_blocks, arena.num_blocks, layer, k, v)) {}

  const Sides &of(std::int64_t block) const { return block < all.arena->num_blocks ? all : first; }

  const Sides all;
  const Sides first;
};

bool is_dim(int dim) { return dim > 0 && dim % 8 == 0 && dim <= kMaxDim; }

bool is_known(int format, int num_formats) { return format >= 0 && format < num_formats; }

bool are_rows(const KvkeepRows *rows, std::int64_t num_rows) {
  return rows != nullptr && (rows->data != nullptr || num_rows == 0) &&
         is_known(rows->dtype, KVKEEP_BF16 + 1);
}

bool has_formats(const KvkeepArena &arena, int layer) {
  return is_known(arena.k_formats[layer], kNumFormats) &&
         is_known(arena.v_formats[layer], kNumFormats);
}

bool are_arguments(const KvkeepArena *arena, int layer, const KvkeepSlots *slots,
                   const KvkeepRows *k, const KvkeepRows *v, int num_threads) {
  return arena != nullptr && slots != nullptr && are_rows(k, slots->num_slots) &&
         are_rows(v, slots->num_slots) && num_threads > 0 && layer >= 0 &&
         layer < arena->num_layers && slots->num_slots >= 0 && arena->num_kv_heads > 0 &&
         arena->block_size > 0 && arena->block_size % 8 == 0 && is_dim(arena->k_dim) &&
         is_dim(arena->v_dim) && has_formats(*arena, layer) &&
         (arena->first_blocks == nullptr ||
          (are_first_blocks(*arena) && has_formats(*arena->first_blocks, layer)));
}

// How many slots from i on, and before `end`, are neighbours in one block.
int run_length(const KvkeepSlots &slots, std::int64_t i, std::int64_t end) {
  std::int64_t j = i + 1;
  while (j < end && slots.blocks[j] == slots.blocks[i] &&
         slots.offsets[j] == slots.offsets[i] + (j - i)) {
    ++j;
  }
  return static_cast<int>(j - i);
}

RowRun rows_of(const Side &side, std::int64_t row, int head, int count) {
  const std::int64_t bytes = side.rows->dtype == KVKEEP_F32 ? 4 : 2;
  const std::int64_t first = row * side.rows->row_stride + head * side.rows->head_stride;
  auto *data = static_cast<std::uint8_t *>(side.rows->data) + first * bytes;
  return {data, side.rows->row_stride, side.rows->dtype, count, side.dim};
}

SlotRun slots_of(const Sides &sides, const Side &side, const KvkeepSlots &slots, std::int64_t i,
                 int head) {
  const KvkeepArena &arena = *sides.arena;
  std::uint8_t *block = arena.base + (slots.blocks[i] - sides.begin) * arena.block_bytes;
  std::uint8_t *tile = block + side.offset + head * static_cast<std::int64_t>(side.tile_bytes);
  return {tile, arena.block_size, static_cast<int>(slots.offsets[i])};
}

// Tiles first .. last of each block, which are the keys and the values of a head in turn.
void write_tiles(const Layer &layer, const KvkeepSlots &slots, int first, int last) {
  for (std::int64_t i = 0; i < slots.num_slots;) {
    const int count = run_length(slots, i, slots.num_slots);
    const Sides &sides = layer.of(slots.blocks[i]);
    for (int tile = first; tile < last; ++tile) {
      const Side &side = tile % 2 == 0 ? sides.k : sides.v;
      side.codec->encode(rows_of(side, i, tile / 2, count), side.signs,
                         slots_of(sides, side, slots, i, tile / 2));
    }
    i += count;
  }
}

void read_side(const Sides &sides, const Side &side, const KvkeepSlots &slots, std::int64_t i,
               int count) {
  for (int head = 0; head < sides.arena->num_kv_heads; ++head) {
    side.codec->decode(slots_of(sides, side, slots, i, head), side.signs,
                       rows_of(side, i, head, count));
  }
}

void read_slots(const Layer &layer, const KvkeepSlots &slots, std::int64_t begin,
                std::int64_t end) {
  for (std::int64_t i = begin; i < end;) {
    const int count = run_length(slots, i, end);
    const Sides &sides = layer.of(slots.blocks[i]);
    read_side(sides, sides.k, slots, i, count);
    read_side(sides, sides.v, slots, i, count);
    i += count;
  }
}

int useful_threads(const KvkeepArena &arena, std::int64_t num_slots, int num_threads) {
  const std::int64_t numbers = num_slots * arena.num_kv_heads * (arena.k_dim + arena.v_dim);
  const std::int64_t paying = numbers / kLeastNumbersOfThread;
  return paying < 2 ? 1 : paying < num_threads ? static_cast<int>(paying) : num_threads;
}

}  // namespace
}  // namespace kvkeep

extern "C" std::int32_t kvkeep_write(const KvkeepArena *arena, std::int32_t layer,
                                     const KvkeepSlots *slots, const KvkeepRows *k,
                                     const KvkeepRows *v, std::int32_t num_threads) {
  using namespace kvkeep;
  if (!are_arguments(arena, layer, slots, k, v, num_threads)) return KVKEEP_BAD_ARGUMENT;
  const Layer own(*arena, layer, k, v);
  const int threads = useful_threads(*arena, slots->num_slots, num_threads);
  // Tokens share words of values, so that a tile belongs to one thread.
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int thread = omp_get_thread_num(), all = omp_get_num_threads();
    const int num_tiles = 2 * arena->num_kv_heads;
    write_tiles(own, *slots, num_tiles * thread / all, num_tiles * (thread + 1) / all);
  }
  return KVKEEP_OK;
}

extern "C" std::int32_t kvkeep_read(const KvkeepArena *arena, std::int32_t layer,
                                    const KvkeepSlots *slots, const KvkeepRows *k,
                                    const KvkeepRows *v, std::int32_t num_threads) {
  using namespace kvkeep;
  if (!are_arguments(arena, layer, slots, k, v, num_threads)) return KVKEEP_BAD_ARGUMENT;
  const Layer own(*arena, layer, k, v);
  const int threads = useful_threads(*arena, slots->num_slots, num_threads);
  const std::int64_t num_chunks = (slots->num_slots + kSlotsAtOnce - 1) / kSlotsAtOnce;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (std::int64_t i = 0; i < num_chunks; ++i) {
    const std::int64_t begin = i * kSlotsAtOnce;
    const std::int64_t end = begin + kSlotsAtOnce;
    read_slots(own, *slots, begin, end < slots->num_slots ? end : slots->num_slots);
  }
  return KVKEEP_OK;
}
