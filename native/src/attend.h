// How attention is cut into pieces of work. The context of each item is cut into chunks at fixed positions, so
// that what is computed for it depends on nothing else; a first block that lies apart is a chunk of its own. A unit
// is one chunk of one item, or of several items whose tables show the same blocks there: these are read once for
// all of them.

#ifndef KVKEEP_ATTEND_H
#define KVKEEP_ATTEND_H

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kvkeep_native.h"
#include "ops.h"

namespace kvkeep {

// An item's share in a unit. The parts of an item follow one another, chunk by chunk.
struct Part {
  int item;
  int unit;
  int first_query;  // counted from the unit's first one
  int next;         // part of the same unit, or -1
};

struct Unit {
  int begin;              // position where the chunk begins
  int first, last;        // positions to read: first <= position < last
  const int32_t *blocks;  // table of `first` and on
  int first_part, last_part;
  int num_queries;
  int64_t first_query;  // counted from the first one of all units
};

struct Plan {
  std::vector<Unit> units;
  std::vector<Part> parts;
  std::vector<int> item_parts;    // parts of item i: item_parts[i] .. item_parts[i + 1] - 1
  std::vector<int> item_queries;  // likewise of its queries, in the order of the items
  std::vector<int> query_rows;    // rows of these queries in q and out
  std::vector<int> buckets;       // units that may be shared, by their first block
  int64_t num_unit_queries;
  int most_unit_queries;
};

// Where items are cut: at multiples of `chunk` positions, itself a multiple of block_size, and behind a first block
// that lies apart.
struct Cuts {
  int block_size;
  int chunk;
  bool is_first_apart;
};

// Cuts items. A unit takes in items while it has at most `most_queries` queries.
void plan_units(const KvkeepItems &items, const Cuts &cuts, int most_queries, Plan &plan);

// A layer of an arena, whose blocks have ids from `first_id` on, and queries as its keys want them.
struct Tiles {
  const KvkeepArena *arena;
  std::int64_t first_id;
  std::int64_t layer_offset;  // of the layer in a block, bytes
  const KeyOps *keys;
  const ValueOps *values;
  std::size_t key_bytes;  // of a tile
  std::size_t value_bytes;
  const CodecOps *latent_codec;  // MLA
  const CodecOps *rotated_codec;
  std::uint8_t *queries;
  std::size_t query_bytes;
};

// MLA: what lies as keys are latents, read as keys and as values; what lies as values are the rotated dims, which
// go on where the dims of the latents end. Both are decoded to floats before they are used.
struct Latent {
  const KeyOps *rotated_keys;
  std::uint8_t *queries;  // the rotated dims of prepared queries
  std::size_t query_bytes;
};

// One call: what is read, and scratch memory. With G query heads for each of H kv heads, rows of scratch are
// [H][queries of all items][G] of `queries`, and for each unit [H][its queries][G] of the partial results.
struct Attention {
  const Ops *ops;
  const KvkeepArena *arena;
  const KvkeepItems *items;
  const KvkeepTerms *terms;
  const Plan *plan;
  bool is_first_apart;
  Tiles tiles[2];  // of all blocks, and of the first ones where they lie apart
  int group_size;  // G
  int chunk;
  int out_dim;  // of the values that are summed up
  bool is_bf16;
  bool is_latent;
  Latent latent;           // if so
  std::size_t num_scores;  // that a thread has room for

  float *acc;     // [out_dim] a row: sum of 2^(score - most) * value
  float *most;    // the largest score; scores are counted in powers of two from the softmax on
  float *totals;  // sum of 2^(score - most)

  const Tiles &tiles_of(const Unit &unit) const {
    return tiles[is_first_apart && unit.begin == 0 ? 1 : 0];
  }

  std::int64_t partial_row(const Unit &unit, int kv_head, int query) const {
    return (unit.first_query * arena->num_kv_heads +
            static_cast<std::int64_t>(kv_head) * unit.num_queries + query) *
           group_size;
  }
};

// Floats between two rows of scores: not a power of two, whose rows would compete for the same cache lines.
inline int score_stride(int chunk) { return chunk + 16; }

// One unit and kv head.
struct Task {
  const Unit *unit;
  int kv_head;
};

// Partial results of a task. Of a thread's memory the first `num_scores` floats are a row for each query and query
// head of the unit. What `next` reads first is prefetched.
void compute_task(const Attention &attention, const Task &task, const Task &next, float *memory);

}  // namespace kvkeep

#endif
