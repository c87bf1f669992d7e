// The C interface of kvkeep's CPU kernels: plain C, no torch, nothing is allocated or kept for the caller.
//
// Layout "words/1". Everything in a block is a matrix of 32-bit words. With `b` bits an element, a word of
// keys holds 32/b neighbouring dims of one token, and a word of values 32/b neighbouring tokens of one dim:
//
//     block   [layer][ keys: kv head | values: kv head ]
//     keys    [k_dim * b / 32][block_size] words, then [block_size] words of metadata
//     values  [block_size * b / 32][v_dim] words, then [block_size] words of metadata
//
// Inside a word element 0 is lowest (little endian); of eight 4-bit elements, element i < 4 is the low nibble
// of byte i and element 4 + i the high nibble of byte i. Metadata, one word for each token of a kv head, exist
// in quantised formats only: a float scale (fp8, int8), or a half scale (low 16 bits) and a half minimum
// (high 16 bits) (int4). What a code stands for:
//
//     int8   scale * code,            code in -127 .. 127, stored + 128
//     fp8    scale * e4m3fn(code),    no subnormal codes are written
//     int4   minimum + scale * code,  code in 0 .. 15, of the rotated vector
//
// Rotation of a vector x of n dims (int4 only): with m the largest power of two that divides n, each run of m
// dims becomes H(signs * x) / sqrt(m), H the Walsh-Hadamard matrix in natural order. Keys are rotated as they
// come from the model (after RoPE); queries are rotated alike, and outputs are rotated back.
//
// block_size, k_dim and v_dim are multiples of 8, and k_dim and v_dim at most 2048.

#ifndef KVKEEP_NATIVE_H
#define KVKEEP_NATIVE_H

#include <stdint.h>

#if defined(__GNUC__)
#define KVKEEP_EXPORT __attribute__((visibility("default")))
#else
#define KVKEEP_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { KVKEEP_ABI = 2 };

// Elements of the model's tensors, and of unquantised K/V.
enum { KVKEEP_F32 = 0, KVKEEP_F16 = 1, KVKEEP_BF16 = 2 };
// Formats of stored keys or values: the three above, and these.
enum { KVKEEP_FP8 = 3, KVKEEP_INT8 = 4, KVKEEP_INT4 = 5 };

// Instruction sets, each containing the ones before it. AMX is used only where it is asked for: it has not
// been measured on a processor yet.
enum {
  KVKEEP_PORTABLE = 0,
  KVKEEP_AVX2 = 1,
  KVKEEP_AVX512 = 2,
  KVKEEP_AVX512_BF16 = 3,
  KVKEEP_AMX = 4
};

// What a function returns.
enum {
  KVKEEP_OK = 0,
  KVKEEP_BAD_ARGUMENT = 1,   // a size, format or dtype that this library does not know
  KVKEEP_OUT_OF_BOUNDS = 2,  // a block id, offset or row outside of its arena or tensor
  KVKEEP_NO_MEMORY = 3,      // scratch memory cannot be had
};

// Which earlier positions a query at position p reads: as kvkeep.spec.LayerKind.
enum { KVKEEP_FULL = 0, KVKEEP_SLIDING = 1, KVKEEP_CHUNKED = 2 };

// The arena of one KV group. Formats and offsets (bytes from a block's begin) are one for each layer.
//
// `first_blocks`, if not null, is an arena of the same sizes but other formats, which has none itself. The block of
// positions 0 .. block_size - 1 of every item lies there, and no other one does; its block i has the id
// num_blocks + i.
typedef struct KvkeepArena {
  uint8_t *base;
  int64_t num_blocks;
  int64_t block_bytes;
  int32_t block_size;
  int32_t num_layers;
  int32_t num_kv_heads;
  int32_t k_dim;
  int32_t v_dim;
  const int64_t *layer_offsets;
  const int32_t *k_formats;
  const int32_t *v_formats;
  const float *k_signs;  // [k_dim] of 1 and -1
  const float *v_signs;  // [v_dim]
  const struct KvkeepArena *first_blocks;
} KvkeepArena;

// A tensor [rows][heads][dim], the last dim contiguous; strides count elements.
typedef struct {
  void *data;
  int64_t row_stride;
  int64_t head_stride;
  int32_t dtype;
} KvkeepRows;

// Places of tokens: slot i is offset `offsets[i]` of block `blocks[i]`.
typedef struct {
  int64_t num_slots;
  const int64_t *blocks;
  const int64_t *offsets;
} KvkeepSlots;

// Items whose queries read the arena. Item i has `num_queries[i]` (1 to 16) queries at positions
// `starts[i]` and on, in packed rows `rows[i]` and on. Its table lists the blocks of positions
// `table_firsts[i] * block_size` and on: `table[table_offsets[i]] .. table[table_offsets[i + 1] - 1]`.
typedef struct {
  int32_t num_items;
  int32_t kind;
  int32_t window;  // of KVKEEP_SLIDING and KVKEEP_CHUNKED
  const int32_t *rows;
  const int32_t *num_queries;
  const int32_t *starts;
  const int32_t *table_firsts;
  const int32_t *table_offsets;  // [num_items + 1]
  const int32_t *table;
} KvkeepItems;

// score = softcap(scaling * q.k) + alibi_slope * position; sinks are logits that carry no value.
typedef struct {
  float scaling;
  float softcap;              // 0: none
  const float *sinks;         // [query heads] or null
  const float *alibi_slopes;  // [query heads] or null
} KvkeepTerms;

KVKEEP_EXPORT int32_t kvkeep_abi(void);

// The best instruction set that this machine runs, of those before AMX.
KVKEEP_EXPORT int32_t kvkeep_best_isa(void);

// Use an instruction set no better than `isa` from now on; returns the one in use.
KVKEEP_EXPORT int32_t kvkeep_use_isa(int32_t isa);

// Whether every block of the tables that the items read lies in the arena, first blocks in theirs, and every row
// below num_rows.
KVKEEP_EXPORT int32_t kvkeep_check_items(const KvkeepArena *arena, const KvkeepItems *items,
                                         int64_t num_rows);

// Whether every slot lies in the arena.
KVKEEP_EXPORT int32_t kvkeep_check_slots(const KvkeepArena *arena, const KvkeepSlots *slots);

// Encode rows i of k and v into slots i of a layer. Slots are distinct, and were checked.
KVKEEP_EXPORT int32_t kvkeep_write(const KvkeepArena *arena, int32_t layer,
                                   const KvkeepSlots *slots, const KvkeepRows *k,
                                   const KvkeepRows *v, int32_t num_threads);

// Decode slots i of a layer into rows i of k and v. Slots were checked.
KVKEEP_EXPORT int32_t kvkeep_read(const KvkeepArena *arena, int32_t layer, const KvkeepSlots *slots,
                                  const KvkeepRows *k, const KvkeepRows *v, int32_t num_threads);

// Attention of all items over a layer: rows of `out` [rows][query heads][v_dim] from rows of `q`
// [rows][query heads][k_dim], both of the same dtype. Items were checked. What an item gets does not depend, to the last
// bit, on the other items or on num_threads.
KVKEEP_EXPORT int32_t kvkeep_attend(const KvkeepArena *arena, int32_t layer,
                                    const KvkeepItems *items, const KvkeepTerms *terms,
                                    int32_t num_heads, const KvkeepRows *q, const KvkeepRows *out,
                                    int32_t num_threads);

// The same where K/V are latents (MLA, absorbed): one kv head, whose keys are latents and whose values are the
// rotated part of the keys. Rows of q are [k_dim + v_dim], and what is summed up are the latents: rows of `out`
// are [k_dim].
KVKEEP_EXPORT int32_t kvkeep_attend_latent(const KvkeepArena *arena, int32_t layer,
                                           const KvkeepItems *items, const KvkeepTerms *terms,
                                           int32_t num_heads, const KvkeepRows *q,
                                           const KvkeepRows *out, int32_t num_threads);

// out[m][n] = sum_k x[m][k] * weight[n][k] + bias[n], all bf16, rows contiguous, sums in float; bias may be
// null, 1 <= num_rows <= 32.
KVKEEP_EXPORT int32_t kvkeep_linear(const uint16_t *weight, const uint16_t *bias, const uint16_t *x,
                                    uint16_t *out, int64_t num_outputs, int64_t num_inputs,
                                    int32_t num_rows, int32_t num_threads);

#ifdef __cplusplus
}
#endif

#endif
