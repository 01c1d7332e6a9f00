// Block-sparse attention forward: out = softmax(scale * Q K^T + bias) V over the kept blocks, and its log-sum-exp.
//
// Online softmax (FlashAttention-2, Dao 2023) with queries as lanes. For a tile of 64 queries and one key block:
//   S^T = K Q^T         K read in place; the running maximum is taken while the scores are still in registers
//   P^T = exp2(S - m)   vertical: every lane is its own row, so no reduction crosses lanes; P overwrites S
//   O^T = a O^T + V^T P^T   V read in place; the rescale by a = exp2(m_old - m_new) rides on the store
// A task is one (batch, head, query block); its K and V blocks are shared by the tiles of the block.
//
// Memory: per thread about block (2 dim + 64) + 64 dim floats, O(block (dim + block)), and once per call
// O(batch kv_heads keys dim) for V in bf16 pairs, or for K and V in fp32 where the hardware lacks the format.
// Nothing grows with queries x keys.
#include "cpu_attention.h"

namespace blade {
namespace {

template <int LANES>
struct StoreScores {
  float *scores, *top;  // [block][LANES], [LANES]
  const float* bias;    // null, or log2 units per key: then scores are stored scaled and biased
  float factor;

  template <int R, int N>
  BLADE_INLINE void operator()(int row, int lane, Vec (&acc)[R][N]) const {
    if (bias)
      for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) acc[r][n] = acc[r][n] * factor + bias[row + r];
    for (int n = 0; n < N; n++) {
      Vec m = load(top + lane + n * kWidth);
      for (int r = 0; r < R; r++) {
        m = max(m, acc[r][n]);
        store(scores + (row + r) * LANES + lane + n * kWidth, acc[r][n]);
      }
      store(top + lane + n * kWidth, m);
    }
  }
};

template <int LANES>
struct AddValues {
  float* out;  // [dim][LANES]
  const float* rescale;

  template <int R, int N>
  BLADE_INLINE void operator()(int row, int lane, Vec (&acc)[R][N]) const {
    for (int n = 0; n < N; n++) {
      const Vec a = load(rescale + lane + n * kWidth);
      for (int r = 0; r < R; r++) {
        float* o = out + (row + r) * LANES + lane + n * kWidth;
        // Summed block by block, not element by element: the rounding error grows with the blocks only.
        store(o, load(o) * a + acc[r][n]);
      }
    }
  }
};

// Scores [keys][LANES] -> weights exp2(score * factor - reference) in place, as rows of words; adds to the row sums.
template <bool Pairs, int LANES>
BLADE_INLINE void weigh(float* scores, int keys, const float* reference, float factor, float* sum) {
  constexpr int N = LANES / kWidth;
  auto weight = [&](int j, int n) __attribute__((always_inline)) {
    return exp2<!Pairs>(load(scores + j * LANES + n * kWidth) * factor - load(reference + n * kWidth));
  };
  Vec total[N] = {};
  int j = 0;
  if constexpr (Pairs) {  // word row j/2 is written after rows j and j+1 were read
    for (; j + 2 <= keys; j += 2)
      for (int n = 0; n < N; n++) {
        const Vec even = weight(j, n), odd = weight(j + 1, n);
        total[n] += even + odd;
        store(scores + j / 2 * LANES + n * kWidth, interleave_bf16(even, odd));
      }
  }
  for (; j < keys; j++)  // without Pairs all rows; with Pairs a last unpaired key
    for (int n = 0; n < N; n++) {
      const Vec w = weight(j, n);
      total[n] += w;
      store(scores + words<Pairs>(j) * LANES + n * kWidth, Pairs ? interleave_bf16(w, Vec{}) : w);
    }
  for (int n = 0; n < N; n++) store(sum + n * kWidth, load(sum + n * kWidth) + total[n]);
}

template <bool Pairs, int LANES>
struct Forward {
  const Problem& p;
  const Rows &keys, &values;
  const Tensor& out;
  float* lse;  // [batch, heads, queries]

  // One tile of LANES queries: its part of the scratch.
  struct Tile {
    float *q, *out, *top, *sum;
  };
  int64_t tile_floats() const { return LANES * (round_up(words<Pairs>(p.dim), 16) + round_up(p.dim, 16) + 2); }
  int64_t scratch_floats() const {
    return p.block / LANES * tile_floats() + LANES * (p.block + round_up(p.dim, 16) + 2) + p.block;
  }

  void operator()(int64_t task, float* scratch) const {
    const int64_t row = task % p.lists.query_blocks, bh = task / p.lists.query_blocks;
    const int64_t b = bh / p.heads, h = bh % p.heads, first = row * p.block;
    const int tiles = (int)((p.queries_in(row) + LANES - 1) / LANES);
    float* scores = scratch + p.block / LANES * tile_floats();
    float* staging = scores + p.block * LANES;
    float* block_top = staging + LANES * round_up(p.dim, 16);
    float* rescale = block_top + LANES;
    float* bias = rescale + LANES;

    auto tile = [&](int u) {
      float* base = scratch + u * tile_floats();
      float* o = base + LANES * round_up(words<Pairs>(p.dim), 16);
      float* top = o + LANES * round_up(p.dim, 16);
      return Tile{base, o, top, top + LANES};
    };
    auto rows_of = [&](int u) { return std::min<int64_t>(LANES, p.queries - first - u * LANES); };

    for (int u = 0; u < tiles; u++) {
      const Tile t = tile(u);
      pack_lanes<Pairs, LANES>(p.q, p.type(), b, h, first + u * LANES, rows_of(u), p.dim, staging, t.q);
      std::fill(t.out, t.out + LANES * round_up(p.dim, 16), 0.f);
      std::fill(t.top, t.top + LANES, -kInf);
      std::fill(t.sum, t.sum + LANES, 0.f);
    }
    const int32_t* entries = p.lists.entries(b, h, row);
    for (int i = 0, size = p.lists.size(b, h, row); i < size; i++) {
      const int64_t key0 = entries[i] * p.block;
      const int count = (int)p.keys_in(entries[i]);
      load_bias(p, b, h, key0, count, p.block, bias);
      for (int u = 0; u < tiles; u++)
        attend(tile(u), keys.at(b, p.kv_head(h), key0), values.at(b, p.kv_head(h), Pairs ? key0 / 2 : key0), count,
               scores, block_top, rescale, bias);
    }
    for (int u = 0; u < tiles; u++) finish(tile(u), b, h, first + u * LANES, rows_of(u), rescale, staging);
  }

  // One key block for one tile.
  BLADE_INLINE void attend(const Tile& t, const uint32_t* k, const uint32_t* v, int count, float* scores,
                           float* block_top, float* rescale, const float* bias) const {
    // Without a bias the scale is applied inside the exponent for free. It has to be positive there, because the
    // maximum is taken before it.
    const float c = p.scale * kLog2e;
    const bool scaled = p.bias || !(c >= 0);
    const float factor = scaled ? 1.f : c;
    std::fill(block_top, block_top + LANES, -kInf);
    product<Pairs, LANES>(count, k, keys.stride[2], One{}, words<Pairs>(p.dim), t.q,
                          StoreScores<LANES>{scores, block_top, scaled ? bias : nullptr, c});
    for (int n = 0; n < LANES; n += kWidth) {
      const Vec old = load(t.top + n), top = max(old, load(block_top + n) * factor);
      // Nothing but masked keys so far: any finite reference makes all weights exp2(-inf) = 0, without inf - inf.
      const Vec reference = top == -kInf ? Vec{} : top;
      const Vec shrink = exp2<true>(old - reference);
      store(t.top + n, top);
      store(block_top + n, reference);
      store(rescale + n, shrink);
      store(t.sum + n, load(t.sum + n) * shrink);
    }
    weigh<Pairs, LANES>(scores, count, block_top, factor, t.sum);
    product<Pairs, LANES>((int)p.dim, v, One{}, values.stride[2], words<Pairs>(count), scores,
                          AddValues<LANES>{t.out, rescale});
  }

  void finish(const Tile& t, int64_t b, int64_t h, int64_t row0, int64_t rows, float* inverse, float* staging) const {
    for (int r = 0; r < LANES; r++) {
      const bool empty = t.sum[r] == 0;  // NaN isn't
      inverse[r] = empty ? 0.f : 1.f / t.sum[r];
      if (r < rows)
        lse[(b * p.heads + h) * p.queries + row0 + r] =
            empty ? -kInf : (float)(t.top[r] * 0.6931471805599453 + std::log((double)t.sum[r]));
    }
    store_lanes<LANES>(t.out, inverse, out, p.type(), b, h, row0, rows, p.dim, staging);
  }
};

}  // namespace
}  // namespace blade

// out [batch, heads, queries, dim] with last stride 1, lse contiguous. Returns a blade::Status.
extern "C" int32_t blade_attention_forward(const blade::Problem* problem, const blade::Tensor* out, float* lse,
                                           blade::BadEntry* bad, blade_parallel_for_t parallel_for) {
  using namespace blade;
  const Problem& p = *problem;
  return dispatch(p, [&](auto pairs, auto lanes) {
    constexpr bool Pairs = decltype(pairs)::value;
    if (const Status status = check_lists(p, bad)) return status;
    const Rows keys = token_rows<Pairs>(p.k, p.type(), p.batch, p.kv_heads, p.keys, p.dim, parallel_for);
    const Rows values = summed_rows<Pairs>(p.v, p.type(), p.batch, p.kv_heads, p.keys, p.dim, parallel_for);
    const Forward<Pairs, decltype(lanes)::value> forward{p, keys, values, *out, lse};
    return run_tasks(parallel_for, p.batch * p.heads * p.lists.query_blocks, forward.scratch_floats(), forward);
  });
}
