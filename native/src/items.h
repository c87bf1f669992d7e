// Which positions items read.

#ifndef KVKEEP_ITEMS_H
#define KVKEEP_ITEMS_H

#include <algorithm>

#include "kvkeep_native.h"

namespace kvkeep {

constexpr int kMostQueries = 16;  // of an item

// The first position that a query at `position` reads; the last one is its own.
inline int first_read(const KvkeepItems &items, int position) {
  if (items.kind == KVKEEP_SLIDING) return std::max(0, position - items.window + 1);
  if (items.kind == KVKEEP_CHUNKED) return position - position % items.window;
  return 0;
}

// The end of what the queries of an item read; its begin is first_read of the first one.
inline int end_of_item(const KvkeepItems &items, int item) {
  return items.starts[item] + items.num_queries[item];
}

// The entry of an item's table that holds a position.
inline const int32_t *table_entry(const KvkeepItems &items, int item, int position,
                                  int block_size) {
  return items.table + items.table_offsets[item] + position / block_size - items.table_firsts[item];
}

}  // namespace kvkeep

#endif
