// Random arenas, items and tensors for the stress test. Every buffer is exactly as large as the interface
// says, and holds NaN wherever nothing was written, so that sanitizers and results show a stray access.

#ifndef KVKEEP_TESTS_RANDOM_CASE_H
#define KVKEEP_TESTS_RANDOM_CASE_H

#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kvkeep_native.h"

namespace kvkeep_tests {

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine_); }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[between(0, static_cast<int>(values.size()) - 1)];
  }
  float normal() { return std::normal_distribution<float>()(engine_); }

 private:
  std::mt19937_64 engine_;
};

inline int bits_of(int format) {
  return format == KVKEEP_F32 ? 32 : format <= KVKEEP_BF16 ? 16 : format == KVKEEP_INT4 ? 4 : 8;
}

inline bool is_quantised(int format) { return format >= KVKEEP_FP8; }

inline std::int64_t tile_bytes(int format, int block_size, int dim) {
  return std::int64_t{block_size} * dim * bits_of(format) / 8 +
         (is_quantised(format) ? 4 * block_size : 0);
}

// A tensor [rows][heads][dim] in one of the orders that models produce, with NaN in what lies between.
class Rows {
 public:
  Rows(Random &random, int num_rows, int num_heads, int dim, int dtype)
      : num_rows_(num_rows), num_heads_(num_heads), dim_(dim) {
    const int order = random.between(0, 2), gap = order == 2 ? random.between(1, 9) : 0;
    view_.dtype = dtype;
    view_.head_stride = order == 1 ? std::int64_t{num_rows} * dim : dim + gap;
    view_.row_stride = order == 1 ? dim : num_heads * view_.head_stride + gap;
    const std::int64_t last =
        (num_rows - 1) * view_.row_stride + (num_heads - 1) * view_.head_stride + dim;
    bytes_.assign(static_cast<std::size_t>(last) * itemsize(), 0xff);
    view_.data = bytes_.data();
  }
  Rows(const Rows &) = delete;
  Rows &operator=(const Rows &) = delete;

  const KvkeepRows *view() const { return &view_; }
  const std::vector<std::uint8_t> &bytes() const { return bytes_; }
  int num_heads() const { return num_heads_; }
  int dim() const { return dim_; }

  void fill(Random &random) {
    for (int row = 0; row < num_rows_; ++row)
      for (int head = 0; head < num_heads_; ++head)
        for (int d = 0; d < dim_; ++d) set(row, head, d, random.normal());
  }

  float get(int row, int head, int d) const {
    const std::uint8_t *at = bytes_.data() + offset(row, head, d);
    if (view_.dtype == KVKEEP_F32) return load<float>(at);
    if (view_.dtype == KVKEEP_F16) return static_cast<float>(load<_Float16>(at));
    const std::uint32_t bits = std::uint32_t{load<std::uint16_t>(at)} << 16;
    return load<float>(&bits);
  }

  void set(int row, int head, int d, float value) {
    std::uint8_t *at = bytes_.data() + offset(row, head, d);
    if (view_.dtype == KVKEEP_F32) {
      std::memcpy(at, &value, 4);
    } else if (view_.dtype == KVKEEP_F16) {
      const _Float16 half = static_cast<_Float16>(value);
      std::memcpy(at, &half, 2);
    } else {
      const std::uint16_t upper = static_cast<std::uint16_t>(load<std::uint32_t>(&value) >> 16);
      std::memcpy(at, &upper, 2);
    }
  }

 private:
  template <class T>
  static T load(const void *at) {
    T value;
    std::memcpy(&value, at, sizeof(T));
    return value;
  }
  std::size_t itemsize() const { return view_.dtype == KVKEEP_F32 ? 4 : 2; }
  std::size_t offset(int row, int head, int d) const {
    return static_cast<std::size_t>(row * view_.row_stride + head * view_.head_stride + d) *
           itemsize();
  }

  int num_rows_, num_heads_, dim_;
  KvkeepRows view_{};
  std::vector<std::uint8_t> bytes_;
};

// Which formats are drawn from.
struct Formats {
  int first = KVKEEP_F32, last = KVKEEP_INT4;
};

// The arena of one group, all bytes 0xff: NaN in every format that has one. In every other case first blocks lie
// apart, in an arena of the same sizes.
struct Arena {
  Arena(Random &random, const Formats &formats) {
    view.block_size = 8 * random.between(1, 6);
    view.num_layers = random.between(1, 3);
    view.num_kv_heads = random.between(1, 3);
    view.k_dim = 8 * random.one_of({1, 2, 3, 5, 8, 9, 10, 12, 16, 24, 32});
    view.v_dim = random.between(0, 1) ? view.k_dim : 8 * random.between(1, 16);
    choose_formats(random, formats);
    if (random.between(0, 1)) first = std::make_unique<Arena>(random, view);
    if (first) view.first_blocks = &first->view;
  }
  Arena(Random &random, const KvkeepArena &sizes) : view(sizes) {
    view.block_bytes = 0;
    choose_formats(random, {});
  }
  Arena(const Arena &) = delete;
  Arena &operator=(const Arena &) = delete;

  // Where a position of an item lies.
  const Arena &of(int position) const {
    return first && position < view.block_size ? *first : *this;
  }
  std::int64_t num_first_blocks() const { return first ? first->view.num_blocks : 0; }

  void take_memory(std::int64_t num_blocks) {
    view.num_blocks = num_blocks;
    bytes.assign(static_cast<std::size_t>(num_blocks * view.block_bytes), 0xff);
    view.base = bytes.data();
  }

  KvkeepArena view{};
  std::unique_ptr<Arena> first;
  std::vector<std::uint8_t> bytes;
  std::vector<std::int64_t> layer_offsets;
  std::vector<std::int32_t> k_formats, v_formats;
  std::vector<float> k_signs, v_signs;

 private:
  void choose_formats(Random &random, const Formats &formats) {
    for (int layer = 0; layer < view.num_layers; ++layer) {
      k_formats.push_back(random.between(formats.first, formats.last));
      v_formats.push_back(random.between(formats.first, formats.last));
      layer_offsets.push_back(view.block_bytes);
      view.block_bytes +=
          view.num_kv_heads * (tile_bytes(k_formats.back(), view.block_size, view.k_dim) +
                               tile_bytes(v_formats.back(), view.block_size, view.v_dim));
    }
    for (int d = 0; d < view.k_dim; ++d) k_signs.push_back(random.one_of({1.0f, -1.0f}));
    for (int d = 0; d < view.v_dim; ++d) v_signs.push_back(random.one_of({1.0f, -1.0f}));
    view.layer_offsets = layer_offsets.data();
    view.k_formats = k_formats.data();
    view.v_formats = v_formats.data();
    view.k_signs = k_signs.data();
    view.v_signs = v_signs.data();
  }
};

// Items whose tables list blocks in random order, each block once; takes the arena's memory for them.
struct Items {
  Items(Random &random, Arena &arena) {
    const int block_size = arena.view.block_size, num_items = random.between(1, 5);
    view.num_items = num_items;
    view.kind = random.between(KVKEEP_FULL, KVKEEP_CHUNKED);
    view.window = view.kind == KVKEEP_FULL ? 0 : random.between(1, 3 * block_size);
    table_offsets.push_back(0);
    for (int i = 0; i < num_items; ++i) {
      rows.push_back(num_rows);
      num_queries.push_back(random.between(0, 2) ? random.between(1, 16) : 1);
      starts.push_back(random.between(0, 2) ? random.between(0, 300) : 0);
      table_firsts.push_back(first_read(starts.back()) / block_size);
      const int end = starts.back() + num_queries.back();
      const int num_blocks = (end + block_size - 1) / block_size - table_firsts.back();
      table_offsets.push_back(table_offsets.back() + num_blocks);
      num_rows += num_queries.back() + random.between(0, 1);
    }
    choose_blocks(random, arena);
    point();
  }
  Items(const Items &) = delete;
  Items &operator=(const Items &) = delete;

  void choose_blocks(Random &random, Arena &arena) {
    std::vector<int> own, first;  // entries of the table
    for (int i = 0; i < view.num_items; ++i)
      for (int at = table_offsets[i]; at < table_offsets[i + 1]; ++at) {
        const bool is_first = arena.first && table_firsts[i] == 0 && at == table_offsets[i];
        (is_first ? first : own).push_back(at);
      }
    table.resize(table_offsets.back());
    int block = 0;
    for (auto *entries : {&own, &first}) {
      for (int at = static_cast<int>(entries->size()) - 1; at > 0; --at)
        std::swap((*entries)[at], (*entries)[random.between(0, at)]);
      for (const int at : *entries) table[at] = block++;
    }
    arena.take_memory(static_cast<std::int64_t>(own.size()));
    if (arena.first) arena.first->take_memory(static_cast<std::int64_t>(first.size()));
  }

  void point() {
    view.rows = rows.data();
    view.num_queries = num_queries.data();
    view.starts = starts.data();
    view.table_firsts = table_firsts.data();
    view.table_offsets = table_offsets.data();
    view.table = table.data();
  }

  // The first position that a query at `position` reads.
  int first_read(int position) const {
    if (view.kind == KVKEEP_FULL) return 0;
    if (view.kind == KVKEEP_CHUNKED) return position / view.window * view.window;
    return position < view.window ? 0 : position - view.window + 1;
  }

  int num_rows = 0;
  KvkeepItems view{};
  std::vector<std::int32_t> rows, num_queries, starts, table_firsts, table_offsets, table;
};

// The slots of positions first..end of an item.
struct Slots {
  Slots(const Items &items, int item, int first, int end, int block_size) {
    for (int position = first; position < end; ++position) {
      const int entry = position / block_size - items.table_firsts[item];
      blocks.push_back(items.table[items.table_offsets[item] + entry]);
      offsets.push_back(position % block_size);
    }
    view = {static_cast<std::int64_t>(blocks.size()), blocks.data(), offsets.data()};
  }
  Slots(const Slots &) = delete;
  Slots &operator=(const Slots &) = delete;

  int size() const { return static_cast<int>(blocks.size()); }

  KvkeepSlots view{};
  std::vector<std::int64_t> blocks, offsets;
};

}  // namespace kvkeep_tests

#endif
