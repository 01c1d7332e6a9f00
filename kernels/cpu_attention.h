// What attention forward and backward share: the problem as Python describes it, its block lists, and operands whose
// rows the product reads in place.
#pragma once
#include <algorithm>

#include "cpu_tensor.h"

namespace blade {

// Block lists of one (batch, head, query block) row each; strides in elements, 0 where broadcast, last stride 1.
struct Lists {
  const int32_t* count;
  const int32_t* index;
  int64_t count_stride[3], index_stride[3];
  int64_t capacity, query_blocks, key_blocks;

  BLADE_INLINE int32_t size(int64_t b, int64_t h, int64_t row) const {
    return count[b * count_stride[0] + h * count_stride[1] + row * count_stride[2]];
  }
  BLADE_INLINE const int32_t* entries(int64_t b, int64_t h, int64_t row) const {
    return index + b * index_stride[0] + h * index_stride[1] + row * index_stride[2];
  }
};

// Laid out as cpu.py's ctypes structure of the same name.
struct Problem {
  Tensor q, k, v;
  Lists lists;
  const float* bias;  // null, or added to the scores of a key: fp32 [batch, heads, keys], natural units
  int64_t bias_stride[3];
  int64_t batch, heads, kv_heads, queries, keys, dim, block;
  float scale;
  int32_t dtype;

  DType type() const { return (DType)dtype; }
  int64_t kv_head(int64_t head) const { return head / (heads / kv_heads); }
  int64_t queries_in(int64_t block_index) const { return std::min(block, queries - block_index * block); }
  int64_t keys_in(int64_t block_index) const { return std::min(block, keys - block_index * block); }
};

// Where a list is broken, for the message in Python.
struct BadEntry {
  int64_t batch, head, row, value;
};

namespace {

constexpr int kMaxTiles = 2;  // of 64 lanes in a block of 128; smaller blocks are one tile

// Lists are read before anything is computed: a bad one can neither reach out of bounds nor cost a wrong result.
inline Status check_lists(const Problem& p, BadEntry* bad) {
  const Lists& lists = p.lists;
  // A broadcast list is checked once.
  const int64_t batch = lists.count_stride[0] || lists.index_stride[0] ? p.batch : 1;
  const int64_t heads = lists.count_stride[1] || lists.index_stride[1] ? p.heads : 1;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t row = 0; row < lists.query_blocks; row++) {
        const int64_t size = lists.size(b, h, row);
        if (size < 0 || size > lists.capacity) {
          *bad = {b, h, row, size};
          return kBadCount;
        }
        const int32_t* entries = lists.entries(b, h, row);
        for (int64_t i = 0; i < size; i++)
          if (entries[i] < 0 || entries[i] >= lists.key_blocks) {
            *bad = {b, h, row, entries[i]};
            return kBadIndex;
          }
      }
  return kOk;
}

// Key biases of tokens token0 .. token0+count in log2 units (0 without a bias); -inf from there to out[padded].
inline void load_bias(const Problem& p, int64_t b, int64_t h, int64_t token0, int64_t count, int64_t padded,
                      float* out) {
  std::fill(out + count, out + padded, -kInf);
  if (!p.bias) return std::fill(out, out + count, 0.f);
  const float* source = p.bias + b * p.bias_stride[0] + h * p.bias_stride[1] + token0 * p.bias_stride[2];
  for (int64_t i = 0; i < count; i++) {
    const float bias = source[i * p.bias_stride[2]];
    // A large finite bias must not become a mask by the change of unit.
    const float finite = std::max(bias * kLog2e, -std::numeric_limits<float>::max());
    out[i] = bias == -kInf ? bias : finite;
  }
}

// A [batch, heads, tokens, dim] operand as rows of words, in place where the tensor allows it.
struct Rows {
  const uint32_t* data;
  int64_t stride[3];  // words: batch, head, row
  Buffer copy;

  BLADE_INLINE const uint32_t* at(int64_t b, int64_t h, int64_t row) const {
    return data + b * stride[0] + h * stride[1] + row * stride[2];
  }
  Rows view() const { return Rows{data, {stride[0], stride[1], stride[2]}, Buffer(0)}; }  // must not outlive this
};

constexpr int64_t kCopyRows = 64;  // rows of every head per task when copying

// fill(b, h, row, out) writes each row of a new contiguous operand. Heads are the inner loop because projections lay
// tensors out as [batch, tokens, heads, dim]: memory is then read in order.
template <class Fill>
Rows build_rows(int64_t batch, int64_t heads, int64_t rows, int64_t words_per_row, blade_parallel_for_t parallel_for,
                const Fill& fill) {
  Buffer copy(batch * heads * rows * words_per_row);
  uint32_t* data = copy.words();
  const int64_t parts = (rows + kCopyRows - 1) / kCopyRows;
  run_tasks(parallel_for, batch * parts, 0, [&](int64_t task, float*) {
    const int64_t b = task / parts, first = task % parts * kCopyRows, end = std::min(rows, first + kCopyRows);
    for (int64_t row = first; row < end; row++)
      for (int64_t h = 0; h < heads; h++) fill(b, h, row, data + ((b * heads + h) * rows + row) * words_per_row);
  });
  return Rows{data, {heads * rows * words_per_row, rows * words_per_row, words_per_row}, std::move(copy)};
}

// Rows summed over the head dimension: row j is words<Pairs>(dim) words.
template <bool Pairs>
Rows token_rows(const Tensor& t, DType type, int64_t batch, int64_t heads, int64_t tokens, int64_t dim,
                blade_parallel_for_t parallel_for) {
  const int64_t per_word = Pairs ? 2 : 1;
  bool in_place = type == (Pairs ? kBFloat16 : kFloat32) && t.stride[3] == 1 && dim % per_word == 0 &&
                  (uintptr_t)t.data % 4 == 0;
  for (int i = 0; i < 3; i++) in_place = in_place && t.stride[i] % per_word == 0;
  if (in_place)
    return Rows{(const uint32_t*)t.data,
                {t.stride[0] / per_word, t.stride[1] / per_word, t.stride[2] / per_word},
                Buffer(0)};
  return build_rows(batch, heads, tokens, words<Pairs>(dim), parallel_for,
                    [&](int64_t b, int64_t h, int64_t row, uint32_t* out) {
                      load_words<Pairs>(t.at(type, b, h, row), type, t.stride[3], dim, out);
                    });
}

// Rows summed over tokens: with Pairs, row j holds tokens 2j and 2j+1 interleaved (a missing last one is zero),
// dim words each; without, the same rows as above.
template <bool Pairs>
Rows summed_rows(const Tensor& t, DType type, int64_t batch, int64_t heads, int64_t tokens, int64_t dim,
                 blade_parallel_for_t parallel_for) {
  if constexpr (!Pairs) return token_rows<false>(t, type, batch, heads, tokens, dim, parallel_for);
  return build_rows(batch, heads, words<true>(tokens), dim, parallel_for,
                    [&](int64_t b, int64_t h, int64_t row, uint32_t* out) {
                      const int64_t s = t.stride[3];
                      const uint16_t* even = (const uint16_t*)t.at(type, b, h, 2 * row);
                      const uint16_t* odd = 2 * row + 1 < tokens ? even + t.stride[2] : nullptr;
                      if (s == 1 && odd)
                        for (int64_t d = 0; d < dim; d++) out[d] = even[d] | (uint32_t)odd[d] << 16;
                      else
                        for (int64_t d = 0; d < dim; d++)
                          out[d] = even[d * s] | (odd ? (uint32_t)odd[d * s] << 16 : 0);
                    });
}

// Accumulated lanes [dim][LANES], times factor[lane], to rows of a tensor with last stride 1. Scratch: staging is
// LANES x round_up(dim, 16); lanes has round_up(dim, 16) rows. Lanes whose factor is 0 give 0, whatever they hold.
template <int LANES>
BLADE_NOINLINE void store_lanes(float* lanes, const float* factor, const Tensor& t, DType type, int64_t b, int64_t h,
                                int64_t row0, int64_t rows, int64_t dim, float* staging) {
  const int64_t padded = round_up(dim, 16);
  for (int64_t d = 0; d < dim; d++)
    for (int n = 0; n < LANES; n += kWidth) {
      const Vec f = load(factor + n);
      store(lanes + d * LANES + n, f == 0.f ? Vec{} : load(lanes + d * LANES + n) * f);
    }
  transpose(lanes, LANES, (int)padded, LANES, staging, padded);
  for (int64_t r = 0; r < rows; r++) from_float(staging + r * padded, type, dim, t.at(type, b, h, row0 + r));
}

// Calls kernel(pairs, lanes) with both as integral constants.
template <class Kernel>
Status dispatch(const Problem& p, const Kernel& kernel) {
  auto with_lanes = [&](auto pairs) {
    if (p.block == 16) return kernel(pairs, std::integral_constant<int, 16>{});
    if (p.block == 32) return kernel(pairs, std::integral_constant<int, 32>{});
    return kernel(pairs, std::integral_constant<int, 64>{});
  };
  if (p.block != 16 && p.block != 32 && p.block != 64 && p.block != 128) return kBadArgument;
  try {
#if defined(BLADE_PAIRS)
    if (p.type() == kBFloat16) return with_lanes(std::true_type{});
#endif
    return with_lanes(std::false_type{});
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // namespace
}  // namespace blade
