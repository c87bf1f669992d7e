// Whether what a caller names exists: kernels follow block ids without looking.

#include <cstdint>

#include "arenas.h"
#include "items.h"
#include "kvkeep_native.h"

namespace kvkeep {
namespace {

bool is_arena(const KvkeepArena &arena) {
  return arena.num_blocks >= 0 && arena.block_size > 0 && arena.block_size % 8 == 0 &&
         (arena.first_blocks == nullptr || are_first_blocks(arena));
}

// Whether the block may be what a table has for its block `number`.
bool is_place(const KvkeepArena &arena, int number, std::int64_t block) {
  const bool is_apart = number == 0 && arena.first_blocks != nullptr;
  return is_apart ? block >= arena.num_blocks && block < end_of_blocks(arena)
                  : block >= 0 && block < arena.num_blocks;
}

// Whether the table covers what an item reads, with blocks of the arena.
bool is_table_valid(const KvkeepArena &arena, const KvkeepItems &items, int item) {
  const int first = first_read(items, items.starts[item]) / arena.block_size;
  const int last = (end_of_item(items, item) - 1) / arena.block_size;
  const int length = items.table_offsets[item + 1] - items.table_offsets[item];
  if (first < items.table_firsts[item] || last - items.table_firsts[item] >= length) return false;
  const int32_t *begin = table_entry(items, item, first * arena.block_size, arena.block_size);
  for (int i = 0; i <= last - first; ++i) {
    if (!is_place(arena, first + i, begin[i])) return false;
  }
  return true;
}

}  // namespace
}  // namespace kvkeep

extern "C" {

int32_t kvkeep_check_items(const KvkeepArena *arena, const KvkeepItems *items, int64_t num_rows) {
  const bool has_window = items->kind == KVKEEP_SLIDING || items->kind == KVKEEP_CHUNKED;
  if (!kvkeep::is_arena(*arena) || (!has_window && items->kind != KVKEEP_FULL) ||
      (has_window && items->window < 1)) {
    return KVKEEP_BAD_ARGUMENT;
  }
  for (int i = 0; i < items->num_items; ++i) {
    const int num_queries = items->num_queries[i];
    if (num_queries < 1 || num_queries > kvkeep::kMostQueries || items->starts[i] < 0 ||
        items->starts[i] > INT32_MAX - num_queries) {
      return KVKEEP_BAD_ARGUMENT;
    }
    const bool has_rows = items->rows[i] >= 0 && items->rows[i] <= num_rows - num_queries;
    if (!has_rows || !kvkeep::is_table_valid(*arena, *items, i)) return KVKEEP_OUT_OF_BOUNDS;
  }
  return KVKEEP_OK;
}

int32_t kvkeep_check_slots(const KvkeepArena *arena, const KvkeepSlots *slots) {
  if (!kvkeep::is_arena(*arena)) return KVKEEP_BAD_ARGUMENT;
  for (int64_t i = 0; i < slots->num_slots; ++i) {
    const bool is_inside = slots->blocks[i] >= 0 &&
                           slots->blocks[i] < kvkeep::end_of_blocks(*arena) &&
                           slots->offsets[i] >= 0 && slots->offsets[i] < arena->block_size;
    if (!is_inside) return KVKEEP_OUT_OF_BOUNDS;
  }
  return KVKEEP_OK;
}

}  // extern "C"
