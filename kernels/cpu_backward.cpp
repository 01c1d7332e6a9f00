// Block-sparse attention backward: dQ, dK and dV from the results of the forward, also through the log-sum-exp.
//
// With P = exp(scale S + bias - lse), delta = rowsum(dO * O) - dlse (FlashAttention-2, Dao 2023, section 3.1.2):
//   dV = P^T dO      dS = P * (dO V^T - delta)      dQ = scale dS K      dK = scale dS^T Q
// Two passes, each in the style of the forward: the side that is accumulated lies in the lanes, the other side is read
// in place, P and dS are made in the epilogue of the product that yields S or dP.
//   pass 1, lanes are queries:  S^T = K Q^T,  dP^T = V dO^T,  dQ^T += K^T dS^T
//   pass 2, lanes are keys:     S = Q K^T,    dP = dO V^T,    dV^T += dO^T P,  dK^T += Q^T dS
// S and dP are computed twice (seven products instead of five). In return every task owns what it accumulates: no
// atomics, no order that depends on the threads, and as much parallelism as there are blocks. Pass 2 walks the
// transposed lists, in ascending query blocks.
//
// Memory: per thread O(block (dim + block)) as in the forward; per call O(batch heads queries) for delta and lse, the
// transposed lists, and O(batch (kv_heads keys + heads queries) dim) for operands in bf16 pairs or converted to fp32.
#include <vector>

#include "cpu_attention.h"

namespace blade {
namespace {

// Which query blocks keep a key block: per list head, rows[offset[key block] .. offset[key block + 1]], ascending.
class TransposedLists {
 public:
  explicit TransposedLists(const Problem& p)
      : lists_(p.lists),
        batch_(varies(0) ? p.batch : 1),
        heads_(varies(1) ? p.heads : 1),
        offset_(batch_ * heads_ * (lists_.key_blocks + 1)) {
    int64_t total = 0;
    for (int64_t list = 0; list < batch_ * heads_; list++) {
      int64_t* offset = offset_.data() + list * (lists_.key_blocks + 1);
      each(list, [&](int64_t, int32_t key) { offset[key]++; });
      for (int64_t key = 0; key <= lists_.key_blocks; key++) {  // counts -> starts
        const int64_t count = offset[key];
        offset[key] = total;
        total += key < lists_.key_blocks ? count : 0;
      }
    }
    rows_.resize(total);
    std::vector<int64_t> next(offset_);
    for (int64_t list = 0; list < batch_ * heads_; list++)
      each(list, [&](int64_t row, int32_t key) { rows_[next[list * (lists_.key_blocks + 1) + key]++] = (int32_t)row; });
  }

  const int32_t* begin(int64_t b, int64_t h, int64_t key) const { return rows_.data() + offset_[place(b, h, key)]; }
  const int32_t* end(int64_t b, int64_t h, int64_t key) const { return rows_.data() + offset_[place(b, h, key) + 1]; }

 private:
  bool varies(int axis) const { return lists_.count_stride[axis] || lists_.index_stride[axis]; }
  int64_t place(int64_t b, int64_t h, int64_t key) const {
    return ((varies(0) ? b : 0) * heads_ + (varies(1) ? h : 0)) * (lists_.key_blocks + 1) + key;
  }
  template <class Visit>
  void each(int64_t list, const Visit& visit) const {
    const int64_t b = list / heads_, h = list % heads_;
    for (int64_t row = 0; row < lists_.query_blocks; row++)
      for (int64_t i = 0; i < lists_.size(b, h, row); i++) visit(row, lists_.entries(b, h, row)[i]);
  }

  const Lists& lists_;
  int64_t batch_, heads_;
  std::vector<int64_t> offset_;
  std::vector<int32_t> rows_;
};

// Scores -> P = exp2(score * factor + row_term + lane_term), [rows][LANES]; with `paired` also as rows of bf16 pairs.
template <bool Pairs, int LANES>
struct StoreWeights {
  float *weights, *paired;
  float factor;
  const float *row_term, *lane_term;

  template <int R, int N>
  BLADE_INLINE void operator()(int row, int lane, Vec (&acc)[R][N]) const {
    for (int n = 0; n < N; n++) {
      const int at = lane + n * kWidth;
      const Vec term = load(lane_term + at);
      for (int r = 0; r < R; r++) {
        acc[r][n] = exp2<!Pairs>(acc[r][n] * factor + (term + row_term[row + r]));
        store(weights + (row + r) * LANES + at, acc[r][n]);
      }
      if constexpr (Pairs)
        if (paired)
          for (int r = 0; r < R; r += 2)
            store(paired + (row + r) / 2 * LANES + at, interleave_bf16(acc[r][n], acc[r + 1][n]));
    }
  }
};

// dP -> dS = P * (dP - delta) in place of P, as rows of words. (Row j/2 of pairs is written after rows j and j+1 of P
// were read.) delta = row_delta + lane_delta, one of them zero: it belongs to the queries.
template <bool Pairs, int LANES>
struct StoreScoreGradients {
  float* weights;
  const float *row_delta, *lane_delta;

  template <int R, int N>
  BLADE_INLINE void operator()(int row, int lane, Vec (&acc)[R][N]) const {
    for (int n = 0; n < N; n++) {
      const int at = lane + n * kWidth;
      const Vec delta = load(lane_delta + at);
      for (int r = 0; r < R; r++)
        acc[r][n] = load(weights + (row + r) * LANES + at) * (acc[r][n] - (delta + row_delta[row + r]));
      for (int r = 0; r < R; r += 1 + Pairs)
        store(weights + words<Pairs>(row + r) * LANES + at,
              Pairs ? interleave_bf16(acc[r][n], acc[r + Pairs][n]) : acc[r][n]);
    }
  }
};

template <int LANES>
struct Add {
  float* sum;  // [dim][LANES]

  template <int R, int N>
  BLADE_INLINE void operator()(int row, int lane, Vec (&acc)[R][N]) const {
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++) {
        float* s = sum + (row + r) * LANES + lane + n * kWidth;
        store(s, load(s) + acc[r][n]);
      }
  }
};

// Everything both passes read. *_rows are summed over dim, *_sums over tokens.
template <bool Pairs>
struct Inputs {
  const Problem& p;
  const Tensor& grad_out;
  Rows q_rows, k_rows, v_rows, grad_rows, q_sums, k_sums, grad_sums;
  Buffer delta, minus_lse;  // [batch, heads, queries]; minus_lse in log2 units

  Inputs(const Problem& p, const Tensor& out, const Tensor& grad_out, const float* lse, const float* grad_lse,
         blade_parallel_for_t parallel_for)
      : p(p),
        grad_out(grad_out),
        q_rows(rows(p.q, p.heads, p.queries, parallel_for)),
        k_rows(rows(p.k, p.kv_heads, p.keys, parallel_for)),
        v_rows(rows(p.v, p.kv_heads, p.keys, parallel_for)),
        grad_rows(rows(grad_out, p.heads, p.queries, parallel_for)),
        q_sums(sums(q_rows, p.q, p.heads, p.queries, parallel_for)),
        k_sums(sums(k_rows, p.k, p.kv_heads, p.keys, parallel_for)),
        grad_sums(sums(grad_rows, grad_out, p.heads, p.queries, parallel_for)),
        delta(p.batch * p.heads * p.queries),
        minus_lse(p.batch * p.heads * p.queries) {
    const int64_t blocks = p.lists.query_blocks;
    run_tasks(parallel_for, p.batch * p.heads * blocks, 2 * p.dim, [&](int64_t task, float* scratch) {
      const int64_t b = task / blocks / p.heads, h = task / blocks % p.heads, first = task % blocks * p.block;
      for (int64_t s = first; s < first + p.queries_in(task % blocks); s++) {
        to_float(out.at(p.type(), b, h, s), p.type(), out.stride[3], p.dim, scratch);
        to_float(grad_out.at(p.type(), b, h, s), p.type(), grad_out.stride[3], p.dim, scratch + p.dim);
        float sum[16] = {};  // sixteen partial sums: vectors, and a smaller rounding error
        for (int64_t d = 0; d < p.dim; d++) sum[d % 16] += scratch[d] * scratch[p.dim + d];
        for (int width = 8; width; width /= 2)
          for (int i = 0; i < width; i++) sum[i] += sum[i + width];
        const int64_t at = (b * p.heads + h) * p.queries + s;
        const bool empty = lse[at] == -kInf;  // weights of 0, without inf - inf
        minus_lse.floats()[at] = empty ? -kInf : -lse[at] * kLog2e;
        delta.floats()[at] = empty ? 0.f : sum[0] - (grad_lse ? grad_lse[at] : 0.f);
      }
    });
  }

 private:
  Rows rows(const Tensor& t, int64_t heads, int64_t tokens, blade_parallel_for_t parallel_for) const {
    return token_rows<Pairs>(t, p.type(), p.batch, heads, tokens, p.dim, parallel_for);
  }
  Rows sums(const Rows& rows, const Tensor& t, int64_t heads, int64_t tokens, blade_parallel_for_t parallel_for) const {
    return Pairs ? summed_rows<Pairs>(t, p.type(), p.batch, heads, tokens, p.dim, parallel_for) : rows.view();
  }
};

// Cuts a thread's scratch into arrays, in the order of the calls. With a null start it only counts.
struct Arena {
  float* start;
  int64_t used = 0;

  float* take(int64_t floats) {
    float* result = start + used;
    used += round_up(floats, 16);
    return result;
  }
};

template <bool Pairs, int LANES>
struct QueryGradients {  // pass 1: one task per (batch, head, query block)
  const Inputs<Pairs>& in;
  const Tensor& dq;

  struct Tile {
    float *q, *grad, *dq, *minus_lse, *delta;
  };
  struct Scratch {
    Tile tile[kMaxTiles];
    float *weights, *staging, *bias, *zero;
  };
  int64_t layout(float* start, Scratch* s) const {
    const Problem& p = in.p;
    Arena arena{start};
    const int64_t packed = LANES * round_up(words<Pairs>(p.dim), 16), wide = LANES * round_up(p.dim, 16);
    for (int u = 0; u < p.block / LANES; u++)
      s->tile[u] = {arena.take(packed), arena.take(packed), arena.take(wide), arena.take(LANES), arena.take(LANES)};
    s->weights = arena.take(p.block * LANES);
    s->staging = arena.take(wide);
    s->bias = arena.take(p.block);
    s->zero = arena.take(p.block);
    return arena.used;
  }

  void operator()(int64_t task, float* scratch) const {
    const Problem& p = in.p;
    const int64_t row = task % p.lists.query_blocks, bh = task / p.lists.query_blocks;
    const int64_t b = bh / p.heads, h = bh % p.heads, kv = p.kv_head(h), first = row * p.block;
    const int tiles = (int)((p.queries_in(row) + LANES - 1) / LANES);
    const int64_t depth = words<Pairs>(p.dim);
    const float c = p.scale * kLog2e;
    Scratch s;
    layout(scratch, &s);
    auto rows_of = [&](int u) { return std::min<int64_t>(LANES, p.queries - first - u * LANES); };
    for (int u = 0; u < tiles; u++) {
      const Tile& t = s.tile[u];
      const int64_t row0 = first + u * LANES, rows = rows_of(u), at = bh * p.queries + row0;
      pack_lanes<Pairs, LANES>(p.q, p.type(), b, h, row0, rows, p.dim, s.staging, t.q);
      pack_lanes<Pairs, LANES>(in.grad_out, p.type(), b, h, row0, rows, p.dim, s.staging, t.grad);
      std::fill(t.dq, t.dq + LANES * round_up(p.dim, 16), 0.f);
      for (int64_t r = 0; r < LANES; r++) {
        t.minus_lse[r] = r < rows ? in.minus_lse.floats()[at + r] : -kInf;
        t.delta[r] = r < rows ? in.delta.floats()[at + r] : 0.f;
      }
    }
    std::fill(s.zero, s.zero + p.block, 0.f);
    const int32_t* entries = p.lists.entries(b, h, row);
    for (int i = 0, size = p.lists.size(b, h, row); i < size; i++) {
      const int64_t key0 = entries[i] * p.block;
      const int keys = (int)p.keys_in(entries[i]);
      load_bias(p, b, h, key0, keys, p.block, s.bias);
      for (int u = 0; u < tiles; u++) {
        const Tile& t = s.tile[u];
        product<Pairs, LANES>(keys, in.k_rows.at(b, kv, key0), in.k_rows.stride[2], One{}, depth, t.q,
                              StoreWeights<Pairs, LANES>{s.weights, nullptr, c, s.bias, t.minus_lse});
        product<Pairs, LANES>(keys, in.v_rows.at(b, kv, key0), in.v_rows.stride[2], One{}, depth, t.grad,
                              StoreScoreGradients<Pairs, LANES>{s.weights, s.zero, t.delta});
        product<Pairs, LANES>((int)p.dim, in.k_sums.at(b, kv, Pairs ? key0 / 2 : key0), One{}, in.k_sums.stride[2],
                              words<Pairs>(keys), s.weights, Add<LANES>{t.dq});
      }
    }
    for (int u = 0; u < tiles; u++) {
      std::fill(s.weights, s.weights + LANES, p.scale);
      store_lanes<LANES>(s.tile[u].dq, s.weights, dq, p.type(), b, h, first + u * LANES, rows_of(u), p.dim, s.staging);
    }
  }
};

template <bool Pairs, int LANES>
struct KeyGradients {  // pass 2: one task per (batch, key head, key block), summed over the query heads of the group
  const Inputs<Pairs>& in;
  const TransposedLists& lists;
  const Tensor &dk, &dv;

  struct Tile {
    float *k, *v, *dk, *dv, *bias;
  };
  struct Scratch {
    Tile tile[kMaxTiles];
    float *weights, *paired, *staging, *minus_lse, *delta, *zero;
  };
  int64_t layout(float* start, Scratch* s) const {
    const Problem& p = in.p;
    Arena arena{start};
    const int64_t packed = LANES * round_up(words<Pairs>(p.dim), 16), wide = LANES * round_up(p.dim, 16);
    for (int u = 0; u < p.block / LANES; u++)
      s->tile[u] = {arena.take(packed), arena.take(packed), arena.take(wide), arena.take(wide), arena.take(LANES)};
    s->weights = arena.take(p.block * LANES);
    s->paired = arena.take(Pairs ? p.block * LANES / 2 : 0);
    s->staging = arena.take(wide);
    s->minus_lse = arena.take(p.block);
    s->delta = arena.take(p.block);
    s->zero = arena.take(LANES);
    return arena.used;
  }

  void operator()(int64_t task, float* scratch) const {
    const Problem& p = in.p;
    const int64_t block = task % p.lists.key_blocks, bh = task / p.lists.key_blocks;
    const int64_t b = bh / p.kv_heads, kv = bh % p.kv_heads, first = block * p.block, group = p.heads / p.kv_heads;
    const int tiles = (int)((p.keys_in(block) + LANES - 1) / LANES);
    Scratch s;
    layout(scratch, &s);
    auto rows_of = [&](int u) { return std::min<int64_t>(LANES, p.keys - first - u * LANES); };
    for (int u = 0; u < tiles; u++) {
      const Tile& t = s.tile[u];
      pack_lanes<Pairs, LANES>(p.k, p.type(), b, kv, first + u * LANES, rows_of(u), p.dim, s.staging, t.k);
      pack_lanes<Pairs, LANES>(p.v, p.type(), b, kv, first + u * LANES, rows_of(u), p.dim, s.staging, t.v);
      std::fill(t.dk, t.dk + LANES * round_up(p.dim, 16), 0.f);
      std::fill(t.dv, t.dv + LANES * round_up(p.dim, 16), 0.f);
    }
    std::fill(s.zero, s.zero + LANES, 0.f);
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
      for (int u = 0; u < tiles; u++) load_bias(p, b, h, first + u * LANES, rows_of(u), LANES, s.tile[u].bias);
      for (const int32_t* row = lists.begin(b, h, block); row < lists.end(b, h, block); row++) {
        load_row_terms(s, b, h, *row);
        for (int u = 0; u < tiles; u++) add_queries(s, s.tile[u], b, h, *row);
      }
    }
    for (int u = 0; u < tiles; u++) {
      const int64_t row0 = first + u * LANES;
      std::fill(s.weights, s.weights + LANES, p.scale);
      store_lanes<LANES>(s.tile[u].dk, s.weights, dk, p.type(), b, kv, row0, rows_of(u), p.dim, s.staging);
      std::fill(s.weights, s.weights + LANES, 1.f);
      store_lanes<LANES>(s.tile[u].dv, s.weights, dv, p.type(), b, kv, row0, rows_of(u), p.dim, s.staging);
    }
  }

  // The terms of a query block's rows, padded so that rows past the last query get weights of 0.
  void load_row_terms(const Scratch& s, int64_t b, int64_t h, int64_t block) const {
    const int64_t queries = in.p.queries_in(block), at = (b * in.p.heads + h) * in.p.queries + block * in.p.block;
    std::copy_n(in.minus_lse.floats() + at, queries, s.minus_lse);
    std::copy_n(in.delta.floats() + at, queries, s.delta);
    std::fill(s.minus_lse + queries, s.minus_lse + in.p.block, -kInf);
    std::fill(s.delta + queries, s.delta + in.p.block, 0.f);
  }

  // What one query block adds to one tile.
  BLADE_INLINE void add_queries(const Scratch& s, const Tile& t, int64_t b, int64_t h, int64_t block) const {
    const Problem& p = in.p;
    const int64_t query0 = block * p.block, pair0 = Pairs ? query0 / 2 : query0;
    const int queries = (int)p.queries_in(block);
    const int64_t depth = words<Pairs>(p.dim), summed = words<Pairs>(queries);
    product<Pairs, LANES>(queries, in.q_rows.at(b, h, query0), in.q_rows.stride[2], One{}, depth, t.k,
                          StoreWeights<Pairs, LANES>{s.weights, s.paired, p.scale * kLog2e, s.minus_lse, t.bias});
    product<Pairs, LANES>((int)p.dim, in.grad_sums.at(b, h, pair0), One{}, in.grad_sums.stride[2], summed,
                          Pairs ? s.paired : s.weights, Add<LANES>{t.dv});
    product<Pairs, LANES>(queries, in.grad_rows.at(b, h, query0), in.grad_rows.stride[2], One{}, depth, t.v,
                          StoreScoreGradients<Pairs, LANES>{s.weights, s.delta, s.zero});
    product<Pairs, LANES>((int)p.dim, in.q_sums.at(b, h, pair0), One{}, in.q_sums.stride[2], summed, s.weights,
                          Add<LANES>{t.dk});
  }
};

template <class Pass>
Status run_pass(const Pass& pass, int64_t tasks, blade_parallel_for_t parallel_for) {
  typename Pass::Scratch unused;
  return run_tasks(parallel_for, tasks, pass.layout(nullptr, &unused), pass);
}

}  // namespace
}  // namespace blade

// out, grad_out, dq: [batch, heads, queries, dim]; lse, grad_lse (may be null): contiguous [batch, heads, queries];
// dk, dv: [batch, kv_heads, keys, dim]. Gradients have last stride 1. Returns a blade::Status.
extern "C" int32_t blade_attention_backward(const blade::Problem* problem, const blade::Tensor* out,
                                            const blade::Tensor* grad_out, const float* lse, const float* grad_lse,
                                            const blade::Tensor* dq, const blade::Tensor* dk, const blade::Tensor* dv,
                                            blade::BadEntry* bad, blade_parallel_for_t parallel_for) {
  using namespace blade;
  const Problem& p = *problem;
  return dispatch(p, [&](auto pairs, auto lanes) {
    constexpr bool Pairs = decltype(pairs)::value;
    constexpr int LANES = decltype(lanes)::value;
    if (const Status status = check_lists(p, bad)) return status;
    const TransposedLists lists(p);
    const Inputs<Pairs> in(p, *out, *grad_out, lse, grad_lse, parallel_for);
    const QueryGradients<Pairs, LANES> query_pass{in, *dq};
    const int64_t query_tasks = p.batch * p.heads * p.lists.query_blocks;
    if (const Status status = run_pass(query_pass, query_tasks, parallel_for)) return status;
    const KeyGradients<Pairs, LANES> key_pass{in, lists, *dk, *dv};
    return run_pass(key_pass, p.batch * p.kv_heads * p.lists.key_blocks, parallel_for);
  });
}
