#include <algorithm>
#include <cmath>

#include "attend.h"
#include "attend_latent.h"
#include "items.h"

namespace kvkeep {
namespace {

constexpr float kMasked = -INFINITY;
constexpr float kLog2OfE = 1.44269504f;

// A task while it is computed.
class TaskRun {
 public:
  TaskRun(const Attention &attention, const Task &task, float *memory)
      : a_(attention),
        unit_(*task.unit),
        tiles_(attention.tiles_of(unit_)),
        kv_head_(task.kv_head),
        block_size_(attention.arena->block_size),
        first_block_(unit_.first / block_size_),
        num_blocks_((unit_.last - 1) / block_size_ - first_block_ + 1),
        num_rows_(unit_.num_queries * attention.group_size),
        stride_(score_stride(attention.chunk)),
        scores_(memory),
        latents_(attention, tiles_, memory + attention.num_scores) {}

  const std::uint8_t *first_tile() const { return key_tile(0); }

  // Scores of all tokens of the unit's blocks, unscaled and unmasked.
  void score() {
    for (int i = 0; i < num_blocks_; ++i) {
      const std::uint8_t *next = i + 1 < num_blocks_ ? key_tile(i + 1) : value_tile(0);
      if (a_.is_latent) latents_.read_rotated(value_tile(i));
      for (int part = unit_.first_part; part >= 0;) {
        part = score_items(i, part, part == unit_.first_part ? next - key_tile(i) : 0);
      }
    }
  }

  // Weights from scores, with the largest score and the sum of each row.
  void soften() {
    const std::vector<Part> &parts = a_.plan->parts;
    for (int p = unit_.first_part; p >= 0; p = parts[p].next) {
      const int item = parts[p].item;
      for (int i = 0; i < a_.items->num_queries[item]; ++i) {
        for (int g = 0; g < a_.group_size; ++g) {
          soften_row((parts[p].first_query + i) * a_.group_size + g, g, a_.items->starts[item] + i);
        }
      }
    }
  }

  void accumulate(const std::uint8_t *tile_after) {
    const int dim = a_.out_dim;
    float *acc = a_.acc + a_.partial_row(unit_, kv_head_, 0) * dim;
    std::fill_n(acc, static_cast<std::size_t>(num_rows_) * dim, 0.0f);
    for (int i = 0; i < num_blocks_; ++i) {
      const std::uint8_t *tile = a_.is_latent ? latents_.read_latents(key_tile(i)) : value_tile(i);
      const std::uint8_t *next = i + 1 < num_blocks_ ? value_tile(i + 1) : tile_after;
      const int position = (first_block_ + i) * block_size_;
      tiles_.values->accumulate(tile, block_size_, dim, scores_ + position - unit_.begin, stride_,
                                num_rows_, std::max(unit_.first - position, 0),
                                std::min(unit_.last - position, block_size_), a_.is_bf16, acc,
                                a_.is_latent ? 0 : next - tile);
    }
  }

 private:
  const std::uint8_t *layer_of(int i) const {
    const std::int64_t block = unit_.blocks[i] - tiles_.first_id;
    return tiles_.arena->base + block * tiles_.arena->block_bytes + tiles_.layer_offset;
  }

  const std::uint8_t *key_tile(int i) const { return layer_of(i) + kv_head_ * tiles_.key_bytes; }

  const std::uint8_t *value_tile(int i) const {
    return layer_of(i) + a_.arena->num_kv_heads * tiles_.key_bytes + kv_head_ * tiles_.value_bytes;
  }

  // Scores block i for a part, and for the parts behind it whose prepared queries follow; returns the next part.
  int score_items(int i, int part, std::ptrdiff_t ahead) {
    const std::vector<Part> &parts = a_.plan->parts;
    const std::vector<int> &queries = a_.plan->item_queries;
    int last = part;
    while (parts[last].next >= 0 && parts[parts[last].next].item == parts[last].item + 1) {
      last = parts[last].next;
    }
    const int first_query = queries[parts[part].item];
    const int num_queries = queries[parts[last].item + 1] - first_query;
    const std::size_t row =
        (static_cast<std::size_t>(kv_head_) * a_.plan->query_rows.size() + first_query) *
        a_.group_size;
    const int column = (first_block_ + i) * block_size_ - unit_.begin;
    const std::size_t score_row = static_cast<std::size_t>(parts[part].first_query) * a_.group_size;
    float *scores = scores_ + score_row * stride_ + column;
    tiles_.keys->score(key_tile(i), block_size_, a_.arena->k_dim,
                       tiles_.queries + row * tiles_.query_bytes, num_queries * a_.group_size,
                       scores, stride_, ahead);
    if (a_.is_latent) latents_.add_scores(row, num_queries * a_.group_size, scores, stride_);
    return parts[last].next;
  }

  void soften_row(int row, int g, int position) {
    float *x = scores_ + static_cast<std::size_t>(row) * stride_;
    const int size = (first_block_ + num_blocks_) * block_size_ - unit_.begin;
    const int first = std::clamp(first_read(*a_.items, position), unit_.first, unit_.last);
    const int last = std::clamp(position + 1, first, unit_.last);
    const float scale = apply_terms(x, size, kv_head_ * a_.group_size + g, position);
    std::fill(x, x + (first - unit_.begin), kMasked);
    std::fill(x + (last - unit_.begin), x + size, kMasked);
    const float most = scale * a_.ops->max(x, size);
    const std::int64_t partial = a_.partial_row(unit_, kv_head_, 0) + row;
    a_.most[partial] = most;
    if (most == kMasked) {
      std::fill_n(x, size, 0.0f);
      a_.totals[partial] = 0;
    } else {
      a_.totals[partial] = a_.ops->exp2_sum(x, size, scale, most);
    }
  }

  // What the scores are still to be multiplied with, to count them in powers of two, after everything that is not
  // a multiplication.
  float apply_terms(float *x, int size, int head, int position) const {
    const KvkeepTerms &terms = *a_.terms;
    float scale = terms.scaling * kLog2OfE;
    if (terms.softcap != 0) {
      a_.ops->softcap(x, size, terms.scaling, terms.softcap);
      scale = kLog2OfE;
    }
    // With a negative scale the largest score would not be the largest product.
    if (terms.alibi_slopes == nullptr && scale > 0) return scale;
    const float slope = terms.alibi_slopes == nullptr ? 0 : terms.alibi_slopes[head] * kLog2OfE;
    // Counted from the query, which changes nothing but keeps the numbers small; see `merge` for sinks.
    for (int t = 0; t < size; ++t) {
      x[t] = scale * x[t] + slope * static_cast<float>(unit_.begin + t - position);
    }
    return 1;
  }

  const Attention &a_;
  const Unit &unit_;
  const Tiles &tiles_;
  const int kv_head_;
  const int block_size_;
  const int first_block_;
  const int num_blocks_;
  const int num_rows_;
  const int stride_;
  float *const scores_;
  LatentBlock latents_;
};

}  // namespace

void compute_task(const Attention &attention, const Task &task, const Task &next, float *memory) {
  TaskRun run(attention, task, memory);
  run.score();
  run.soften();
  run.accumulate(TaskRun(attention, next, memory).first_tile());
}

}  // namespace kvkeep
