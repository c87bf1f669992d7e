// Drives every function of the interface with random shapes, formats and strides, for each instruction set
// that this machine has: stress [FIRST_SEED] [NUM_SEEDS]. It is there to be run under sanitizers, which see
// what lies outside of a buffer; results are compared with plain arithmetic in double besides.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>
#include <thread>

#include "random_case.h"

namespace kvkeep_tests {
namespace {

void require(bool holds, const std::string &what) {
  if (!holds) throw std::runtime_error(what);
}

int random_dtype(Random &random) { return random.one_of({KVKEEP_F32, KVKEEP_F16, KVKEEP_BF16}); }

// One item's keys and values of a layer, as the library gives them back.
struct ReadBack {
  ReadBack(Random &random, const Arena &arena, const Slots &slots, int layer, int dtype)
      : k(random, slots.size(), arena.view.num_kv_heads, arena.view.k_dim, dtype),
        v(random, slots.size(), arena.view.num_kv_heads, arena.view.v_dim, dtype) {
    const int threads = random.between(1, 2);
    const int code = kvkeep_read(&arena.view, layer, &slots.view, k.view(), v.view(), threads);
    require(code == KVKEEP_OK, "read refuses");
  }
  Rows k, v;
};

// Write an item's positions from the first that is read, and see that they come back.
void write_item(Random &random, const Arena &arena, const Items &items, int item, int layer) {
  const int first = items.first_read(items.starts[item]);
  const int end = items.starts[item] + items.num_queries[item];
  const Slots slots(items, item, first, end, arena.view.block_size);
  require(kvkeep_check_slots(&arena.view, &slots.view) == KVKEEP_OK, "check_slots refuses");
  const int dtype = random_dtype(random), heads = arena.view.num_kv_heads;
  Rows k(random, slots.size(), heads, arena.view.k_dim, dtype);
  Rows v(random, slots.size(), heads, arena.view.v_dim, dtype);
  k.fill(random);
  v.fill(random);
  const int threads = random.between(1, 2);
  require(kvkeep_write(&arena.view, layer, &slots.view, k.view(), v.view(), threads) == KVKEEP_OK,
          "write refuses");
  const ReadBack back(random, arena, slots, layer, dtype);
  using OfLayers = std::vector<std::int32_t> Arena::*;
  const auto compare = [&](const Rows &put, const Rows &got, OfLayers formats, const char *name) {
    for (int row = 0; row < slots.size(); ++row) {
      const int format = (arena.of(first + row).*formats)[layer];
      const bool is_exact = format == KVKEEP_F32 || format == dtype;
      // Of a normal vector at most about 4.5 is stored with 4, 7 or 3 significant bits.
      const float tolerance = is_exact                ? 0.0f
                              : !is_quantised(format) ? 0.03f
                              : format == KVKEEP_INT8 ? 0.05f
                              : format == KVKEEP_FP8  ? 0.4f
                                                      : 1.5f;
      for (int head = 0; head < heads; ++head)
        for (int d = 0; d < put.dim(); ++d) {
          const float error = std::fabs(put.get(row, head, d) - got.get(row, head, d));
          require(error <= tolerance, std::string(name) + " of format " + std::to_string(format) +
                                          " come back with error " + std::to_string(error));
        }
    }
  };
  compare(k, back.k, &Arena::k_formats, "keys");
  compare(v, back.v, &Arena::v_formats, "values");
}

struct Terms {
  Terms(Random &random, int num_heads, int k_dim) {
    for (int head = 0; head < num_heads; ++head) {
      sinks.push_back(random.normal());
      slopes.push_back(-0.02f * static_cast<float>(head + 1));
    }
    view.scaling = 1.0f / std::sqrt(static_cast<float>(k_dim));
    view.softcap = random.between(0, 1) ? 20.0f : 0.0f;
    view.sinks = random.between(0, 1) ? sinks.data() : nullptr;
    view.alibi_slopes = random.between(0, 1) ? slopes.data() : nullptr;
  }
  KvkeepTerms view{};
  std::vector<float> sinks, slopes;
};

// One query's attention in double over what was read back; position `first` is row 0 of `back`.
std::vector<double> attend_one(const ReadBack &back, const Terms &terms, const Rows &q, int row,
                               int head, int first, int low, int position) {
  const int kv_head = head / (q.num_heads() / back.k.num_heads());
  std::vector<double> scores;
  double most = terms.view.sinks ? terms.sinks[head] : -INFINITY;
  for (int at = low; at <= position; ++at) {
    double score = 0;
    for (int d = 0; d < q.dim(); ++d)
      score += double{q.get(row, head, d)} * back.k.get(at - first, kv_head, d);
    score *= terms.view.scaling;
    if (terms.view.softcap != 0) score = terms.view.softcap * std::tanh(score / terms.view.softcap);
    if (terms.view.alibi_slopes) score += double{terms.slopes[head]} * at;
    scores.push_back(score);
    most = std::max(most, score);
  }
  double total = terms.view.sinks ? std::exp(terms.sinks[head] - most) : 0;
  std::vector<double> out(back.v.dim());
  for (int at = low; at <= position; ++at) {
    const double weight = std::exp(scores[at - low] - most);
    total += weight;
    for (int d = 0; d < back.v.dim(); ++d) out[d] += weight * back.v.get(at - first, kv_head, d);
  }
  for (double &value : out) value /= total;
  return out;
}

void compare_item(Random &random, const Arena &arena, const Items &items, int item, int layer,
                  const Terms &terms, const Rows &q, const Rows &out) {
  const int start = items.starts[item], first = items.first_read(start);
  const Slots slots(items, item, first, start + items.num_queries[item], arena.view.block_size);
  const ReadBack back(random, arena, slots, layer, KVKEEP_F32);
  const Arena &begin = arena.of(first);
  const int formats[] = {arena.k_formats[layer], arena.v_formats[layer], begin.k_formats[layer],
                         begin.v_formats[layer]};
  const int coarsest = *std::max_element(std::begin(formats), std::end(formats));
  const bool is_float32 = coarsest == KVKEEP_F32 && q.view()->dtype == KVKEEP_F32;
  const double tolerance = is_float32 ? 1e-4 : is_quantised(coarsest) ? 0.08 : 0.04;
  for (int query = 0; query < items.num_queries[item]; ++query) {
    const int position = start + query, row = items.rows[item] + query;
    for (int head = 0; head < q.num_heads(); ++head) {
      const auto expected =
          attend_one(back, terms, q, row, head, first, items.first_read(position), position);
      for (int d = 0; d < out.dim(); ++d) {
        const double error = std::fabs(out.get(row, head, d) - expected[d]);
        require(error <= tolerance, "attention over formats " + std::to_string(formats[0]) + ", " +
                                        std::to_string(formats[1]) + " has error " +
                                        std::to_string(error));
      }
    }
  }
}

// Attention of all items at once, by one and two threads, and of one item alone: the same bits.
void attend(Random &random, const Arena &arena, const Items &items, int layer) {
  const int dtype = random_dtype(random), heads = arena.view.num_kv_heads * random.between(1, 8);
  const Terms terms(random, heads, arena.view.k_dim);
  Rows q(random, items.num_rows, heads, arena.view.k_dim, dtype);
  q.fill(random);
  const Random order = random;
  const auto run = [&](const KvkeepItems &chosen, int threads) {
    Random same_order = order;  // the same strides each time
    Rows out(same_order, items.num_rows, heads, arena.view.v_dim, dtype);
    require(kvkeep_attend(&arena.view, layer, &chosen, &terms.view, heads, q.view(), out.view(),
                          threads) == KVKEEP_OK,
            "attend refuses");
    if (threads == 1 || chosen.num_items == 1)
      for (int item = 0; item < chosen.num_items; ++item)
        compare_item(same_order, arena, items, item, layer, terms, q, out);
    return out.bytes();
  };
  const auto bytes = run(items.view, 1);
  require(bytes == run(items.view, 2), "attend depends on the number of threads");
  if (items.view.num_items == 1) return;
  KvkeepItems one = items.view;
  one.num_items = 1;
  // What the item alone does not write is 0xff, and the whole call agrees elsewhere.
  const auto alone = run(one, random.between(1, 2));
  for (std::size_t at = 0; at < bytes.size(); ++at)
    require(alone[at] == bytes[at] || alone[at] == 0xff, "attend depends on the other items");
}

void refuse_what_is_outside(const Arena &arena, Items &items) {
  const KvkeepArena *view = &arena.view;
  require(kvkeep_check_items(view, &items.view, items.num_rows) == KVKEEP_OK,
          "check_items refuses");
  const int used = items.rows.back() + items.num_queries.back();
  require(kvkeep_check_items(view, &items.view, used - 1) == KVKEEP_OUT_OF_BOUNDS,
          "check_items lets a row pass");
  const int num_blocks = static_cast<int>(view->num_blocks);
  const int end = num_blocks + static_cast<int>(arena.num_first_blocks());
  const int last_item = items.view.num_items - 1;
  const int last_number = items.table_firsts[last_item] + items.table_offsets[last_item + 1] -
                          items.table_offsets[last_item] - 1;
  const bool is_apart = arena.first && last_number == 0;
  for (const int block : {-1, is_apart ? num_blocks - 1 : num_blocks, end}) {
    const int kept = items.table.back();
    items.table.back() = block;
    require(kvkeep_check_items(view, &items.view, items.num_rows) == KVKEEP_OUT_OF_BOUNDS,
            "check_items lets a block pass");
    items.table.back() = kept;
  }
  const std::int64_t cases[][2] = {{-1, 0}, {end, 0}, {0, -1}, {0, view->block_size}};
  for (const auto &slot : cases) {
    const KvkeepSlots slots{1, &slot[0], &slot[1]};
    require(kvkeep_check_slots(view, &slots) == KVKEEP_OUT_OF_BOUNDS, "check_slots lets one pass");
  }
}

void linear(Random &random) {
  const int n = random.between(1, 400), k = random.between(1, 500), m = random.between(1, 16);
  Rows weight(random, 1, 1, n * k, KVKEEP_BF16), bias(random, 1, 1, n, KVKEEP_BF16);
  Rows x(random, 1, 1, m * k, KVKEEP_BF16);
  weight.fill(random);
  bias.fill(random);
  x.fill(random);
  const auto words = [](const Rows &rows) {
    return static_cast<const std::uint16_t *>(rows.view()->data);
  };
  const bool has_bias = random.between(0, 1);
  const auto run = [&](int threads) {
    Rows out(random, 1, 1, m * n, KVKEEP_BF16);
    auto *to = static_cast<std::uint16_t *>(out.view()->data);
    require(kvkeep_linear(words(weight), has_bias ? words(bias) : nullptr, words(x), to, n, k, m,
                          threads) == KVKEEP_OK,
            "linear refuses");
    for (int at = 0; at < m * n; ++at) {
      double sum = has_bias ? bias.get(0, 0, at % n) : 0, size = 1;
      for (int i = 0; i < k; ++i) {
        const double product =
            double{weight.get(0, 0, at % n * k + i)} * x.get(0, 0, at / n * k + i);
        sum += product;
        size += std::fabs(product);
      }
      const double error = std::fabs(out.get(0, 0, at) - sum);
      require(error <= 0.01 * std::fabs(sum) + 1e-5 * size, "linear is wrong");
    }
    return out.bytes();
  };
  require(run(1) == run(2), "linear depends on the number of threads");
}

void run_seed(int isa, std::uint64_t seed) {
  Random random(seed);
  // AMX has functions of its own for bf16 tiles only.
  Arena arena(random, isa == KVKEEP_AMX ? Formats{KVKEEP_BF16, KVKEEP_BF16} : Formats{});
  Items items(random, arena);
  refuse_what_is_outside(arena, items);
  for (int layer = 0; layer < arena.view.num_layers; ++layer) {
    for (int item = 0; item < items.view.num_items; ++item)
      write_item(random, arena, items, item, layer);
    attend(random, arena, items, layer);
  }
  linear(random);
}

int run_seeds(int isa, std::uint64_t first, std::uint64_t end) {
  for (std::uint64_t seed = first; seed < end; ++seed) {
    try {
      run_seed(isa, seed);
    } catch (const std::runtime_error &error) {
      std::printf("instruction set %d, seed %d: %s\n", isa, static_cast<int>(seed), error.what());
      return 1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace kvkeep_tests

int main(int num_arguments, char **arguments) {
  const std::uint64_t first = num_arguments > 1 ? std::strtoull(arguments[1], nullptr, 10) : 0;
  const std::uint64_t count = num_arguments > 2 ? std::strtoull(arguments[2], nullptr, 10) : 40;
  int num_failed = 0;
  for (int isa = KVKEEP_PORTABLE; isa <= KVKEEP_AMX; ++isa) {
    if (kvkeep_use_isa(isa) != isa) {
      if (isa <= kvkeep_best_isa()) return 2;
      continue;
    }
    // Two callers at once, as two engines in one process are.
    int failed[2] = {0, 0};
    std::thread other([&] { failed[0] = kvkeep_tests::run_seeds(isa, first, first + count / 2); });
    failed[1] = kvkeep_tests::run_seeds(isa, first + count / 2, first + count);
    other.join();
    num_failed += failed[0] + failed[1];
    std::printf("instruction set %d: %d seeds\n", isa, static_cast<int>(count));
  }
  return num_failed > 0;
}
