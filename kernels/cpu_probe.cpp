// ASA mask prediction: block map of sampled tokens and its selection (BLADE section 3.2, algorithms 1.2).
//
// A task is a group of query blocks of one head whose sampled queries fill the 64 lanes of a tile (a block with more
// than 64 samples takes two tiles). One pass over the head's sampled keys leaves the running maximum and sum of each
// lane and a strip of cell maxima [nK][64]; the strip becomes the group's map rows, which are written out or selected
// at once. Memory per thread: the sampled keys of one head, one strip, the map rows of one group.
//
// B batch, H query heads, Hkv key heads, S and T tokens, D head dim, pq and pk samples per block.
#include "cpu_select.h"
#include "cpu_tensor.h"

namespace blade {
namespace {

constexpr int LANES = 64;
constexpr int64_t kChunkRows = 48;  // key rows between two softmax updates: scores and queries stay in the L1 cache
constexpr int kSpill = 4;           // rows that a product may write beyond its last one

// Mirrored field by field by cpu_probe.py.
struct Probe {
  Tensor q, k;                       // [B, H, S, D] and [B, Hkv, T, D]
  const float* bias;                 // [B|1, H|1, T] added to the scores, -inf: never attended to; may be null
  int64_t bias_stride[3];
  const int32_t *pos_q, *pos_k;      // [H, nQ, pq] and [H, nK, pk] tokens, -1: none
  float* map;                        // [B, H, nQ, nK], or null: select
  int32_t *num, *idx;                // [B, H, nQ] and [B, H, nQ, nK]
  Selection selection;
  int64_t type, B, H, Hkv, S, T, D, block, pq, pk;
  double scale;
};

// body(begin, end) over contiguous ranges of [0, count): tasks are of one length, and a thread that stays within a head
// gathers its keys once.
template <class Body>
void run_ranges(blade_parallel_for_t parallel_for, int64_t count, const Body& body) {
  auto call = [](int64_t begin, int64_t end, void* context) { (*(const Body*)context)(begin, end); };
  if (parallel_for) parallel_for(0, count, 1, call, (void*)&body);
  else call(0, count, (void*)&body);
}

// Exponentials of differences: errors are relative to the distance from the maximum, not to the size of the scores.
BLADE_INLINE Vec weight(Vec score, Vec from) { return exp2<true>((score - from) * kLog2e); }
// A lane that has seen no valid key has its maximum at -inf: measure from 0 then, -inf - -inf would be NaN.
BLADE_INLINE Vec origin(Vec top) { return top == -kInf ? Vec{} : top; }

// One block's scores [rows][LANES] into the running maximum `top` and sum `sum` of each lane; its own maxima into
// `cell`. A NaN score makes `sum` NaN for good; the maxima may forget it.
BLADE_INLINE void update_softmax(const float* scores, int64_t rows, float* top, float* sum, float* cell) {
  constexpr int N = group<LANES>();  // independent chains, to hide latencies
  for (int lane = 0; lane < LANES; lane += N * kWidth) {
    Vec best[N], from[N], total[N] = {};
    for (Vec& x : best) x = broadcast(-kInf);
    for (int64_t r = 0; r < rows; r++)
      for (int n = 0; n < N; n++) best[n] = max(best[n], load(scores + r * LANES + lane + n * kWidth));
    for (int n = 0; n < N; n++) from[n] = origin(max(load(top + lane + n * kWidth), best[n]));
    for (int64_t r = 0; r < rows; r++)
      for (int n = 0; n < N; n++) total[n] += weight(load(scores + r * LANES + lane + n * kWidth), from[n]);
    for (int n = 0; n < N; n++) {
      const int i = lane + n * kWidth;
      const Vec old = load(top + i);
      store(sum + i, load(sum + i) * weight(old, from[n]) + total[n]);
      store(top + i, max(old, best[n]));
      store(cell + i, best[n]);
    }
  }
}

// Map values are the bits of floats >= 0, or of NaN with its sign cleared: as integers they order alike, NaN on top.
BLADE_INLINE int32_t largest(const int32_t* x, int64_t n) {
  int32_t best = 0;
  for (int64_t i = 0; i < n; i++) best = x[i] > best ? x[i] : best;
  return best;
}

struct Scratch {
  uint32_t* keys;      // [nK * pk][depth]
  float* bias;         // [nK * pk + spill]
  uint8_t* unseen;     // [nK]: no sampled key may be attended to, another one may
  float* rows;         // [LANES][padded] gathered queries
  float* queries;      // [padded][LANES]
  float* scores;       // [chunk * pk + spill][LANES]
  float* strip;        // [nK][LANES]
  float *top, *sum;    // [LANES]
  int32_t* lane_bits;  // [LANES]: 0 for a lane without a query
  float* map;          // [group][nK]
  uint64_t* order;     // [nK]
  uint8_t* keep;       // [nK]
};

template <bool Pairs>
struct Predictor {
  const Probe& a;
  const DType type = (DType)a.type;
  const int64_t nQ = (a.S + a.block - 1) / a.block, nK = (a.T + a.block - 1) / a.block;
  const int64_t group = a.pq < LANES ? LANES / a.pq : 1, groups = (nQ + group - 1) / group;
  const int64_t depth = words<Pairs>(a.D), padded = round_up(depth, 16);
  const int64_t chunk = a.pk < kChunkRows ? kChunkRows / a.pk : 1;  // key blocks
  const float scale = (float)a.scale;

  // Lays the buffers out from `base` and returns the bytes they take; a null `base` asks for the size only.
  int64_t layout(char* base, Scratch& s) const {
    int64_t used = 0;
    auto take = [&](auto*& p, int64_t n) {
      p = (std::remove_reference_t<decltype(p)>)(base + used);
      used += round_up(n * (int64_t)sizeof(*p), 64);
    };
    take(s.keys, nK * a.pk * depth);
    take(s.bias, nK * a.pk + kSpill);
    take(s.unseen, nK);
    take(s.rows, LANES * padded);
    take(s.queries, padded * LANES);
    take(s.scores, (chunk * a.pk + kSpill) * LANES);
    take(s.strip, nK * LANES);
    take(s.top, LANES);
    take(s.sum, LANES);
    take(s.lane_bits, LANES);
    take(s.map, group * nK);
    take(s.order, nK);
    take(s.keep, nK);
    return used;
  }

  int32_t run(blade_parallel_for_t parallel_for) const {
    std::atomic<int32_t> status{kOk};
    run_ranges(parallel_for, a.B * a.H * groups, [&](int64_t begin, int64_t end) {
      Scratch s;
      char* memory = (char*)aligned_alloc(64, layout(nullptr, s));
      if (!memory) {
        status = kNoMemory;
        return;
      }
      layout(memory, s);
      for (int64_t task = begin, gathered = -1; task < end; task++) {
        const int64_t head = task / groups;
        if (head != gathered) gather_keys(head, s);
        gathered = head;
        predict_group(head, task % groups * group, s);
      }
      free(memory);
    });
    return status;
  }

  void gather_keys(int64_t head, const Scratch& s) const {
    const int64_t b = head / a.H, h = head % a.H, kv_head = h / (a.H / a.Hkv), step = a.bias_stride[2];
    const float* bias = a.bias ? a.bias + b * a.bias_stride[0] + h * a.bias_stride[1] : nullptr;
    for (int64_t j = 0; j < nK; j++) {
      bool seen = false;
      for (int64_t i = j * a.pk; i < (j + 1) * a.pk; i++) {
        const int64_t token = a.pos_k[h * nK * a.pk + i];
        const float added = token < 0 ? -kInf : bias ? bias[token * step] : 0.f;
        s.bias[i] = added;
        // A hidden key may hold NaN: zeros keep it out.
        if (added == -kInf) {
          memset(s.keys + i * depth, 0, depth * 4);
        } else {
          load_words<Pairs>(a.k.at(type, b, kv_head, token), type, a.k.stride[3], a.D, s.keys + i * depth);
          seen = true;
        }
      }
      s.unseen[j] = 0;
      if (!bias || seen) continue;
      for (int64_t t = j * a.block; t < std::min((j + 1) * a.block, a.T); t++) s.unseen[j] |= bias[t * step] > -kInf;
    }
  }

  // The head's sampled queries `first` .. `first` + LANES, up to `end`, into the lanes.
  void gather_queries(int64_t head, int64_t first, int64_t end, const Scratch& s) const {
    const int64_t b = head / a.H, h = head % a.H;
    for (int64_t lane = 0; lane < LANES; lane++) {
      const int64_t i = first + lane, token = i < end ? a.pos_q[h * nQ * a.pq + i] : -1;
      float* row = s.rows + lane * padded;
      if (token >= 0) load_words<Pairs>(a.q.at(type, b, h, token), type, a.q.stride[3], a.D, (uint32_t*)row);
      const int64_t filled = token >= 0 ? depth : 0;
      memset(row + filled, 0, 4 * (padded - filled));
      s.lane_bits[lane] = token >= 0 ? 0x7fffffff : 0;
    }
    transpose(s.rows, padded, LANES, (int)padded, s.queries, LANES);
  }

  void predict_group(int64_t head, int64_t first_block, const Scratch& s) const {
    const int64_t blocks = std::min(group, nQ - first_block), end = (first_block + blocks) * a.pq;
    memset(s.map, 0, blocks * nK * 4);
    for (int64_t first = first_block * a.pq; first < end; first += LANES) {
      gather_queries(head, first, end, s);
      score_strip(s);
      pool_strip(blocks, std::min<int64_t>({a.pq, end - first, LANES}), s);
    }
    for (int64_t g = 0; g < blocks; g++) {
      float* row = s.map + g * nK;
      for (int64_t j = 0; j < nK; j++)
        if (s.unseen[j]) row[j] = std::numeric_limits<float>::quiet_NaN();
      const int64_t i = first_block + g, out = head * nQ + i;
      if (a.map) memcpy(a.map + out * nK, row, nK * 4);
      else select_row(row, nK, i, a.selection, s.order, s.keep, a.num + out, a.idx + out * nK);
    }
  }

  // Scores of all sampled keys, a chunk of blocks at a time, into the strip and the softmax of each lane.
  void score_strip(const Scratch& s) const {
    for (int n = 0; n < LANES; n += kWidth) store(s.top + n, broadcast(-kInf)), store(s.sum + n, Vec{});
    for (int64_t j = 0; j < nK; j += chunk) {
      const int64_t blocks = std::min(chunk, nK - j);
      const float* bias = s.bias + j * a.pk;
      const float c = scale;
      float* scores = s.scores;
      product<Pairs, LANES>((int)(blocks * a.pk), s.keys + j * a.pk * depth, depth, 1, depth, s.queries,
                            [=](int row, int lane, auto& acc) __attribute__((always_inline)) {
        for (auto& line : acc) {
          const Vec added = broadcast(bias[row]);
          float* out = scores + row++ * LANES + lane;
          for (Vec& x : line) store(out, x * c + added), out += kWidth;
        }
      });
      for (int64_t i = 0; i < blocks; i++)
        update_softmax(scores + i * a.pk * LANES, a.pk, s.top, s.sum, s.strip + (j + i) * LANES);
    }
  }

  // Strip -> map rows: probabilities with the true denominator, the largest over the `lanes` lanes of a query block.
  void pool_strip(int64_t blocks, int64_t lanes, const Scratch& s) const {
    alignas(64) float inverse[LANES];
    alignas(64) int32_t cells[LANES];
    for (int lane = 0; lane < LANES; lane++) inverse[lane] = s.sum[lane] == 0 ? 0.f : 1.f / s.sum[lane];
    for (int64_t j = 0; j < nK; j++) {
      for (int n = 0; n < LANES; n += kWidth) {
        const Vec p = weight(load(s.strip + j * LANES + n), origin(load(s.top + n))) * load(inverse + n);
        *(IntVec*)(cells + n) = (IntVec)p & *(const IntVec*)(s.lane_bits + n);
      }
      for (int64_t g = 0; g < blocks; g++) {
        const int32_t* lane = cells + g * a.pq;
        float& cell = s.map[g * nK + j];
        cell = bits_to_float(std::max<int32_t>(float_to_bits(cell), lanes == 16 ? largest(lane, 16) : largest(lane, lanes)));
      }
    }
  }
};

bool all_below(const int32_t* x, int64_t n, int64_t limit) {
  bool ok = true;
  for (int64_t i = 0; i < n; i++) ok &= x[i] < limit;
  return ok;
}

}  // namespace
}  // namespace blade

// Map or lists of a whole call. Returns a Status.
extern "C" int32_t blade_probe(const blade::Probe* args, blade_parallel_for_t parallel_for) {
  const blade::Predictor<false> predictor{*args};
  const int64_t samples_q = args->H * predictor.nQ * args->pq, samples_k = args->H * predictor.nK * args->pk;
  if (!blade::all_below(args->pos_q, samples_q, args->S) || !blade::all_below(args->pos_k, samples_k, args->T))
    return blade::kBadIndex;
#if defined(BLADE_PAIRS)
  if (args->type == blade::kBFloat16) return blade::Predictor<true>{*args}.run(parallel_for);
#endif
  return predictor.run(parallel_for);
}

// map [rows][nK] -> num [rows] and idx [rows][nK]; row r is query block r % nQ. Returns a Status.
extern "C" int32_t blade_select(const float* map, int64_t rows, int64_t nQ, int64_t nK, const blade::Selection* selection,
                                int32_t* num, int32_t* idx, blade_parallel_for_t parallel_for) {
  std::atomic<int32_t> status{blade::kOk};
  blade::run_ranges(parallel_for, rows, [&](int64_t begin, int64_t end) {
    uint64_t* order = (uint64_t*)malloc(nK * (sizeof(uint64_t) + 1));
    if (!order) {
      status = blade::kNoMemory;
      return;
    }
    for (int64_t r = begin; r < end; r++)
      blade::select_row(map + r * nK, nK, r % nQ, *selection, order, (uint8_t*)(order + nK), num + r, idx + r * nK);
    free(order);
  });
  return status;
}
