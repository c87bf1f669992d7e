#include <cstring>

#include "attend.h"
#include "items.h"

namespace kvkeep {
namespace {

class Planner {
 public:
  Planner(const KvkeepItems &items, const Cuts &cuts, int most_queries, Plan &plan)
      : items_(items), cuts_(cuts), most_queries_(most_queries), plan_(plan) {}

  void run() {
    clear();
    for (int item = 0; item < items_.num_items; ++item) add_item(item);
    plan_.num_unit_queries = 0;
    plan_.most_unit_queries = 0;
    for (Unit &unit : plan_.units) {
      unit.first_query = plan_.num_unit_queries;
      plan_.num_unit_queries += unit.num_queries;
      plan_.most_unit_queries = std::max(plan_.most_unit_queries, unit.num_queries);
    }
  }

 private:
  void clear() {
    plan_.units.clear();
    plan_.parts.clear();
    plan_.item_parts.assign(1, 0);
    plan_.item_queries.assign(1, 0);
    plan_.query_rows.clear();
    if (items_.num_items < 2) return;
    std::size_t most_units = 0;
    for (int item = 0; item < items_.num_items; ++item) {
      most_units += end_of_item(items_, item) / cuts_.chunk + 2;
    }
    std::size_t size = 16;
    while (size < 2 * most_units) size *= 2;
    plan_.buckets.assign(size, -1);
  }

  void add_item(int item) {
    const int num_queries = items_.num_queries[item];
    for (int i = 0; i < num_queries; ++i) plan_.query_rows.push_back(items_.rows[item] + i);
    plan_.item_queries.push_back(plan_.item_queries.back() + num_queries);
    const int first = first_read(items_, items_.starts[item]);
    const int end = end_of_item(items_, item);
    for (int begin = begin_of_chunk(first); begin < end;) {
      const int next = end_of_chunk(begin);
      add_part(item, begin, next, std::max(first, begin), std::min(end, next));
      begin = next;
    }
    plan_.item_parts.push_back(static_cast<int>(plan_.parts.size()));
  }

  // The chunk of a position.
  int begin_of_chunk(int position) const {
    const int begin = position / cuts_.chunk * cuts_.chunk;
    const bool is_behind_first = cuts_.is_first_apart && begin == 0 && position >= cuts_.block_size;
    return is_behind_first ? cuts_.block_size : begin;
  }

  int end_of_chunk(int begin) const {
    if (cuts_.is_first_apart && begin == 0) return cuts_.block_size;
    return begin / cuts_.chunk * cuts_.chunk + cuts_.chunk;
  }

  // Positions first .. last of an item in the chunk begin .. end.
  void add_part(int item, int begin, int end, int first, int last) {
    const int32_t *blocks = table_entry(items_, item, first, cuts_.block_size);
    const int part = static_cast<int>(plan_.parts.size());
    // All queries of the item read the whole chunk: no mask tells them from those of other items.
    const bool is_whole = end <= items_.starts[item] + 1 &&
                          first_read(items_, end_of_item(items_, item) - 1) <= begin;
    int *bucket =
        is_whole && items_.num_items > 1 ? find_bucket(item, begin, end, blocks) : nullptr;
    if (bucket == nullptr || *bucket < 0) {
      const int unit = static_cast<int>(plan_.units.size());
      plan_.units.push_back({begin, first, last, blocks, part, part, items_.num_queries[item], 0});
      plan_.parts.push_back({item, unit, 0, -1});
      if (bucket != nullptr) *bucket = unit;
      return;
    }
    Unit &unit = plan_.units[*bucket];
    plan_.parts.push_back({item, *bucket, unit.num_queries, -1});
    plan_.parts[unit.last_part].next = part;
    unit.last_part = part;
    unit.num_queries += items_.num_queries[item];
  }

  // The bucket of a unit that has the same blocks and room for the item, or an empty one.
  int *find_bucket(int item, int begin, int end, const int32_t *blocks) {
    const std::size_t num_bytes = (end - begin) / cuts_.block_size * sizeof(*blocks);
    const std::size_t mask = plan_.buckets.size() - 1;
    std::size_t i = static_cast<std::uint32_t>(*blocks) * 0x9e3779b97f4a7c15u >> 32;
    for (;; ++i) {
      int &bucket = plan_.buckets[i & mask];
      if (bucket < 0) return &bucket;
      const Unit &unit = plan_.units[bucket];
      if (unit.begin == begin && *unit.blocks == *blocks &&
          unit.num_queries + items_.num_queries[item] <= most_queries_ &&
          std::memcmp(unit.blocks, blocks, num_bytes) == 0) {
        return &bucket;
      }
    }
  }

  const KvkeepItems &items_;
  const Cuts cuts_;
  const int most_queries_;
  Plan &plan_;
};

}  // namespace

void plan_units(const KvkeepItems &items, const Cuts &cuts, int most_queries, Plan &plan) {
  Planner(items, cuts, most_queries, plan).run();
}

}  // namespace kvkeep
