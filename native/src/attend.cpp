// Attention over the arena: prepare queries, compute units, merge their partial results.

#include "attend.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>

#include "arenas.h"
#include "attend_latent.h"
#include "generic/numbers.h"
#include "items.h"
#include "tiles.h"

namespace kvkeep {
namespace {

struct Isa {};  // the one of this file

constexpr int kChunk = 256;
// Query heads of a unit: their scores and partial results stay in the cache.
constexpr int kMostRows = 256;

// Memory that only grows, since freeing and mapping it anew in every call costs more than the attention of a
// short context.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  ~Scratch() { std::free(begin_); }

  // Nullptr if there is not so much.
  std::uint8_t *reserve(std::size_t num_bytes) {
    if (num_bytes <= num_bytes_) return begin_;
    std::free(begin_);
    num_bytes_ = 0;
    const std::size_t rounded = (num_bytes + num_bytes / 4 + 4095) / 4096 * 4096;
    begin_ = static_cast<std::uint8_t *>(std::aligned_alloc(4096, rounded));
    if (begin_ != nullptr) num_bytes_ = rounded;
    return begin_;
  }

 private:
  std::uint8_t *begin_ = nullptr;
  std::size_t num_bytes_ = 0;
};

// What a calling thread keeps from call to call.
struct Kept {
  Plan plan;
  Scratch scratch;
};

std::size_t lines(std::size_t num_bytes) { return (num_bytes + 63) / 64 * 64; }

const std::uint8_t *row_begin(const KvkeepRows &rows, std::int64_t row, std::int64_t head,
                              std::int64_t dim = 0) {
  const std::int64_t item_bytes = rows.dtype == KVKEEP_F32 ? 4 : 2;
  return static_cast<const std::uint8_t *>(rows.data) +
         (row * rows.row_stride + head * rows.head_stride + dim) * item_bytes;
}

void prepare_query(const Attention &a, const KvkeepRows &q, int kv_head, int query, float *x) {
  const int k_dim = a.arena->k_dim;
  const std::size_t num_queries = a.plan->query_rows.size();
  for (int g = 0; g < a.group_size; ++g) {
    const std::size_t to = (kv_head * num_queries + query) * a.group_size + g;
    Numbers<Isa>::load(row_begin(q, a.plan->query_rows[query], kv_head * a.group_size + g), q.dtype,
                       k_dim, x);
    for (int i = 0; i <= a.is_first_apart; ++i) {
      const Tiles &tiles = a.tiles[i];
      tiles.keys->prepare_query(x, k_dim, tiles.arena->k_signs, a.is_bf16,
                                tiles.queries + to * tiles.query_bytes);
    }
    if (!a.is_latent) continue;
    const int v_dim = a.arena->v_dim;
    Numbers<Isa>::load(row_begin(q, a.plan->query_rows[query], kv_head * a.group_size + g, k_dim),
                       q.dtype, v_dim, x);
    a.latent.rotated_keys->prepare_query(x, v_dim, nullptr, a.is_bf16,
                                         a.latent.queries + to * a.latent.query_bytes);
  }
}

// What the units of an item found for one of its rows.
struct ItemRow {
  const Attention &a;
  const Part *parts;
  const int kv_head, query, g;

  const Unit &unit(int i) const { return a.plan->units[parts[i].unit]; }
  std::int64_t partial(int i) const {
    return a.partial_row(unit(i), kv_head, parts[i].first_query + query) + g;
  }

  // Sums parts first .. last - 1, which are of one format, in place of the first one.
  float *sum(int first, int last, float most, float &total) const {
    const int dim = a.out_dim;
    float *out = a.acc + partial(first) * dim;
    for (int i = first; i < last; ++i) {
      const std::int64_t row = partial(i);
      const float weight = a.totals[row] == 0 ? 0 : std::exp2(a.most[row] - most);
      const float *acc = a.acc + row * dim;
      total += weight * a.totals[row];
      for (int d = 0; d < dim; ++d) out[d] = (i == first ? 0 : out[d]) + weight * acc[d];
    }
    const Tiles &tiles = a.tiles_of(unit(first));
    tiles.values->finish(out, dim, tiles.arena->v_signs);
    return out;
  }
};

// Sums what the units of an item found for one of its rows, in place; returns it.
float *merge_row(const Attention &a, int item, int kv_head, int query, int g) {
  const int dim = a.out_dim;
  const ItemRow row{a, a.plan->parts.data() + a.plan->item_parts[item], kv_head, query, g};
  const int num_parts = a.plan->item_parts[item + 1] - a.plan->item_parts[item];
  const int head = kv_head * a.group_size + g;
  float sink = a.terms->sinks == nullptr ? -INFINITY : a.terms->sinks[head];
  // Units count the positions of ALiBi from the query's.
  if (a.terms->alibi_slopes != nullptr) {
    sink -= a.terms->alibi_slopes[head] * static_cast<float>(a.items->starts[item] + query);
  }
  sink *= 1.44269504f;  // partial results count in powers of two
  float most = sink;
  for (int i = 0; i < num_parts; ++i) most = std::max(most, a.most[row.partial(i)]);
  float total = sink == -INFINITY ? 0 : std::exp2(sink - most);
  // A first block that lies apart has another format, so it is summed apart.
  const int cut = a.is_first_apart && row.unit(0).begin == 0 ? 1 : num_parts;
  float *out = row.sum(0, cut, most, total);
  if (cut < num_parts) {
    const float *rest = row.sum(cut, num_parts, most, total);
    for (int d = 0; d < dim; ++d) out[d] += rest[d];
  }
  const float scale = total == 0 ? 0 : 1 / total;
  for (int d = 0; d < dim; ++d) out[d] *= scale;
  return out;
}

void merge_item(const Attention &a, const KvkeepRows &out, int item, int kv_head) {
  for (int i = 0; i < a.items->num_queries[item]; ++i) {
    for (int g = 0; g < a.group_size; ++g) {
      const float *x = merge_row(a, item, kv_head, i, g);
      auto *row = const_cast<std::uint8_t *>(
          row_begin(out, a.items->rows[item] + i, kv_head * a.group_size + g));
      Numbers<Isa>::store(x, out.dtype, a.out_dim, row);
    }
  }
}

Task task_of(const Attention &a, std::int64_t i) {
  const int num_heads = a.arena->num_kv_heads;
  return {&a.plan->units[i / num_heads], static_cast<int>(i % num_heads)};
}

void run(const Attention &a, const KvkeepRows &q, const KvkeepRows &out,
         std::uint8_t *thread_memory, std::size_t thread_bytes, int num_threads) {
  const int num_heads = a.arena->num_kv_heads;
  const int num_queries = static_cast<int>(a.plan->query_rows.size());
  const std::int64_t num_tasks = static_cast<std::int64_t>(a.plan->units.size()) * num_heads;
  // Neighbouring tasks go to one thread, as far as that leaves enough for all to end together.
  // NOLINTNEXTLINE(clang-analyzer-deadcode.DeadStores): read by a pragma that the linter skips.
  const std::int64_t tasks_at_once =
      std::clamp<std::int64_t>(num_tasks / (8 * num_threads), 1, num_heads);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    auto *x = reinterpret_cast<float *>(thread_memory + omp_get_thread_num() * thread_bytes);
#pragma omp for schedule(static) collapse(2)
    for (int head = 0; head < num_heads; ++head) {
      for (int query = 0; query < num_queries; ++query) prepare_query(a, q, head, query, x);
    }
#pragma omp for schedule(dynamic, tasks_at_once)
    for (std::int64_t i = 0; i < num_tasks; ++i) {
      compute_task(a, task_of(a, i), task_of(a, std::min(i + 1, num_tasks - 1)), x);
    }
#pragma omp for schedule(static) collapse(2) nowait
    for (int item = 0; item < a.items->num_items; ++item) {
      for (int head = 0; head < num_heads; ++head) merge_item(a, out, item, head);
    }
    a.ops->end_thread();
  }
}

bool is_dim(int dim) { return dim > 0 && dim % 8 == 0 && dim <= kMaxDim; }

bool is_float(int dtype) { return dtype >= KVKEEP_F32 && dtype <= KVKEEP_BF16; }

bool has_formats(const KvkeepArena &arena, int layer) {
  const int k_format = arena.k_formats[layer], v_format = arena.v_formats[layer];
  return k_format >= 0 && k_format < kNumFormats && v_format >= 0 && v_format < kNumFormats;
}

bool is_known(const KvkeepArena &arena, int layer, int num_heads, const KvkeepRows &q,
              const KvkeepRows &out, int num_threads) {
  if (layer < 0 || layer >= arena.num_layers || num_heads < 1 || arena.num_kv_heads < 1 ||
      num_heads % arena.num_kv_heads != 0 || num_threads < 1) {
    return false;
  }
  return arena.block_size > 0 && arena.block_size % 8 == 0 && is_dim(arena.k_dim) &&
         is_dim(arena.v_dim) && has_formats(arena, layer) && is_float(q.dtype) &&
         q.dtype == out.dtype &&
         (arena.first_blocks == nullptr ||
          (are_first_blocks(arena) && has_formats(*arena.first_blocks, layer)));
}

Tiles tiles_in(const KvkeepArena &arena, std::int64_t first_id, int layer, const Ops &ops) {
  const int k_format = arena.k_formats[layer], v_format = arena.v_formats[layer];
  Tiles tiles{};
  tiles.arena = &arena;
  tiles.first_id = first_id;
  tiles.layer_offset = arena.layer_offsets[layer];
  tiles.keys = &ops.keys[k_format];
  tiles.values = &ops.values[v_format];
  tiles.key_bytes = tile_bytes(k_format, arena.k_dim, arena.block_size);
  tiles.value_bytes = tile_bytes(v_format, arena.v_dim, arena.block_size);
  tiles.latent_codec = &ops.key_codecs[k_format];
  tiles.rotated_codec = &ops.value_codecs[v_format];
  tiles.query_bytes = tiles.keys->query_bytes(arena.k_dim);
  return tiles;
}

Attention attention_of(const KvkeepArena &arena, int layer, const KvkeepItems &items,
                       const KvkeepTerms &terms, int num_heads, int dtype, const Plan &plan) {
  Attention a{};
  a.ops = &ops();
  a.arena = &arena;
  a.items = &items;
  a.terms = &terms;
  a.plan = &plan;
  a.is_first_apart = arena.first_blocks != nullptr;
  a.tiles[0] = tiles_in(arena, 0, layer, *a.ops);
  if (a.is_first_apart) {
    a.tiles[1] = tiles_in(*arena.first_blocks, arena.num_blocks, layer, *a.ops);
  }
  a.group_size = num_heads / arena.num_kv_heads;
  a.is_bf16 = dtype == KVKEEP_BF16;
  a.out_dim = arena.v_dim;
  return a;
}

// Latents are decoded to floats once for all query heads, of which MLA has many.
void read_latents(Attention &a) {
  a.is_latent = true;
  a.out_dim = a.arena->k_dim;
  for (Tiles &tiles : a.tiles) tiles.values = &a.ops->values[KVKEEP_F32];
  a.latent.rotated_keys = &a.ops->keys[KVKEEP_F32];
  a.latent.query_bytes = a.latent.rotated_keys->query_bytes(a.arena->v_dim);
}

// Divides scratch memory; returns what is left for the threads, or nullptr.
std::uint8_t *take_scratch(Attention &a, Scratch &scratch, std::size_t thread_bytes) {
  const std::size_t num_heads = a.arena->num_kv_heads * static_cast<std::size_t>(a.group_size);
  const std::size_t num_partials = a.plan->num_unit_queries * num_heads;
  const std::size_t row_bytes = lines(num_partials * sizeof(float));
  const std::size_t acc_bytes = lines(num_partials * a.out_dim * sizeof(float));
  const std::size_t num_queries = a.plan->query_rows.size() * num_heads;
  const std::size_t query_bytes = num_queries * a.tiles[0].query_bytes;
  const std::size_t first_bytes = num_queries * a.tiles[1].query_bytes;
  const std::size_t rotated_bytes = num_queries * a.latent.query_bytes;
  std::uint8_t *p = scratch.reserve(query_bytes + first_bytes + rotated_bytes + acc_bytes +
                                    2 * row_bytes + thread_bytes);
  if (p == nullptr) return nullptr;
  a.tiles[0].queries = p;
  a.tiles[1].queries = p += query_bytes;
  a.latent.queries = p += first_bytes;
  a.acc = reinterpret_cast<float *>(p += rotated_bytes);
  a.most = reinterpret_cast<float *>(p += acc_bytes);
  a.totals = reinterpret_cast<float *>(p += row_bytes);
  return p + row_bytes;
}

// Attention of known arguments.
int32_t attend(Attention &a, Kept &kept, const KvkeepRows &q, const KvkeepRows &out,
               int num_threads) {
  const int block_size = a.arena->block_size;
  a.chunk = (kChunk + block_size - 1) / block_size * block_size;
  try {
    plan_units(*a.items, {block_size, a.chunk, a.is_first_apart},
               std::max(kMostQueries, kMostRows / a.group_size), kept.plan);
  } catch (const std::bad_alloc &) {
    return KVKEEP_NO_MEMORY;
  }
  const std::size_t num_rows = static_cast<std::size_t>(kept.plan.most_unit_queries) * a.group_size;
  a.num_scores = std::max<std::size_t>(num_rows * score_stride(a.chunk),
                                       std::max(a.arena->k_dim, a.arena->v_dim));
  const std::size_t num_floats =
      a.num_scores + (a.is_latent ? LatentBlock::num_floats(a, num_rows) : 0);
  const std::size_t thread_bytes = lines(num_floats * sizeof(float));
  std::uint8_t *memory = take_scratch(a, kept.scratch, thread_bytes * num_threads);
  if (memory == nullptr) return KVKEEP_NO_MEMORY;
  run(a, q, out, memory, thread_bytes, num_threads);
  return KVKEEP_OK;
}

}  // namespace
}  // namespace kvkeep

extern "C" int32_t kvkeep_attend(const KvkeepArena *arena, int32_t layer, const KvkeepItems *items,
                                 const KvkeepTerms *terms, int32_t num_heads, const KvkeepRows *q,
                                 const KvkeepRows *out, int32_t num_threads) {
  using namespace kvkeep;
  if (!is_known(*arena, layer, num_heads, *q, *out, num_threads)) return KVKEEP_BAD_ARGUMENT;
  if (items->num_items < 1) return KVKEEP_OK;
  static thread_local Kept kept;
  Attention a = attention_of(*arena, layer, *items, *terms, num_heads, q->dtype, kept.plan);
  return attend(a, kept, *q, *out, num_threads);
}

extern "C" int32_t kvkeep_attend_latent(const KvkeepArena *arena, int32_t layer,
                                        const KvkeepItems *items, const KvkeepTerms *terms,
                                        int32_t num_heads, const KvkeepRows *q,
                                        const KvkeepRows *out, int32_t num_threads) {
  using namespace kvkeep;
  if (arena->num_kv_heads != 1 || !is_known(*arena, layer, num_heads, *q, *out, num_threads)) {
    return KVKEEP_BAD_ARGUMENT;
  }
  if (items->num_items < 1) return KVKEEP_OK;
  static thread_local Kept kept;
  Attention a = attention_of(*arena, layer, *items, *terms, num_heads, q->dtype, kept.plan);
  read_latents(a);
  return attend(a, kept, *q, *out, num_threads);
}
