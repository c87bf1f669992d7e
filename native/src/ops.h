// What an instruction set offers: functions on one tile (the K or V of one block, layer and kv head), which
// the drivers in attend.cpp, codec.cpp and linear.cpp call. One table for each instruction set.
//
// Weights and scores of queries lie in rows of `stride` floats, one row a query, one column a token of the
// tile. `lo <= token < hi` is what may be read of a tile: other slots may hold anything, NaN included.
// `ahead` leads from a place of the tile to the same place of the one that is read next, in bytes: while they
// read, functions prefetch there, into the second level cache.

#ifndef KVKEEP_OPS_H
#define KVKEEP_OPS_H

#include <cstddef>
#include <cstdint>

namespace kvkeep {

constexpr int kNumFormats = 6;  // KVKEEP_F32 .. KVKEEP_INT4
// The largest k_dim or v_dim; the drivers refuse more.
constexpr int kMaxDim = 2048;

struct KeyOps {
  // Bytes of one prepared query; a multiple of 64.
  std::size_t (*query_bytes)(int k_dim);
  // Bring a query into the form that `score` wants. `is_bf16` says that every q[d] is a bf16 number.
  void (*prepare_query)(const float *q, int k_dim, const float *signs, bool is_bf16,
                        void *prepared);
  // scores[i * stride + t] = q_i . k_t, unscaled, for all tokens of the tile; what lies outside of lo..hi may become
  // anything. Queries lie query_bytes(k_dim) apart. Each result depends on its own query and token only, to the
  // last bit, however many are computed together.
  void (*score)(const std::uint8_t *tile, int block_size, int k_dim, const void *queries,
                int num_queries, float *scores, int stride, std::ptrdiff_t ahead);
};

struct ValueOps {
  // acc[i * v_dim + d] += sum of weights[i * stride + t] * v_t[d] over lo <= t < hi. Weights are >= 0 and
  // finite inside lo..hi. Each acc depends on its own query only, to the last bit.
  void (*accumulate)(const std::uint8_t *tile, int block_size, int v_dim, const float *weights,
                     int stride, int num_queries, int lo, int hi, bool is_bf16, float *acc,
                     std::ptrdiff_t ahead);
  // Turn what was accumulated into values as the model knows them (int4 rotates back), in place.
  void (*finish)(float *acc, int v_dim, const float *signs);
};

// Rows of a tensor: neighbours lie `stride` numbers of type `dtype` apart.
struct RowRun {
  void *data;
  std::int64_t stride;
  int dtype;
  int count;
  int dim;
};

// Neighbouring slots of a tile, as many as there are rows.
struct SlotRun {
  std::uint8_t *tile;
  int block_size;
  int offset;
};

// Both keep the bits of numbers whose format is the dtype.
struct CodecOps {
  // Encode rows into slots, leaving the other slots as they are.
  void (*encode)(const RowRun &rows, const float *signs, const SlotRun &slots);
  // Decode slots into rows.
  void (*decode)(const SlotRun &slots, const float *signs, const RowRun &rows);
};

struct Ops {
  KeyOps keys[kNumFormats];
  ValueOps values[kNumFormats];
  CodecOps key_codecs[kNumFormats];
  CodecOps value_codecs[kNumFormats];
  // On rows of scores; n is a multiple of 8. exp2_sum: x[i] = 2 ^ (scale * x[i] - max), -inf gives 0; returns their sum.
  float (*exp2_sum)(float *x, int n, float scale, float max);
  float (*max)(const float *x, int n);
  // x[i] = cap * tanh(scale * x[i] / cap)
  void (*softcap)(float *x, int n, float scale, float cap);
  // out[n] of rows n of a bf16 matrix, for num_rows <= 32 rows of x; see kvkeep_linear.
  void (*linear)(const std::uint16_t *weight, const std::uint16_t *bias, const std::uint16_t *x,
                 std::uint16_t *out, std::int64_t first_output, std::int64_t last_output,
                 std::int64_t num_outputs, std::int64_t num_inputs, int num_rows);
  // Gives back what functions on tiles have set up in the processor; called by each thread of a call after
  // its last one.
  void (*end_thread)();
};

// Each is filled in by the file of its instruction set, starting from the table of the one before it.
void fill_portable(Ops &ops);
void fill_avx2(Ops &ops);
void fill_avx512(Ops &ops);
void fill_avx512_bf16(Ops &ops);
void fill_amx(Ops &ops);

// The table in use.
const Ops &ops();

}  // namespace kvkeep

#endif
