// Which blocks of one map row are kept. Equals select_blocks of reference.py exactly: integers and comparisons only.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace blade {

// Mirrored field by field by cpu_probe.py.
struct Selection {
  int64_t count;                     // free blocks kept in each row; 0: tau decides
  int64_t low, high;                 // caps of that number in tau mode
  double tau;                        // share of the mass to reach; 1 and more: all
  const uint8_t *force_q, *force_k;  // [nQ] rows and [nK] columns kept on top of the budget; may be null
};

// Free blocks as keys whose ascending order is: better score first, then lower index. Scores are >= 0, so their bits
// order like integers; adding 0 turns -0.0 into 0.0.
inline uint64_t select_key(float score, int64_t index) {
  score += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  return (uint64_t)~bits << 32 | (uint32_t)index;
}

// floor(score * 2^40): sums of these are exact, so every order of summation agrees.
inline int64_t select_mass(uint64_t key) {
  const uint32_t bits = ~(uint32_t)(key >> 32);
  float score;
  std::memcpy(&score, &bits, 4);
  return (int64_t)((double)score * 1099511627776.0);
}

// Smallest m whose m first keys hold tau of the mass: bisection by partial sorting, O(n) on average.
inline int64_t tau_count(uint64_t* keys, int64_t n, double tau) {
  if (tau >= 1) return n;
  int64_t total = 0, before = 0, lo = 0, hi = n;  // the answer lies in (lo, hi], `before` is the mass of the first lo
  for (int64_t i = 0; i < n; i++) total += select_mass(keys[i]);
  const double target = tau * (double)total;
  while (hi - lo > 1) {
    const int64_t mid = lo + (hi - lo) / 2;
    std::nth_element(keys + lo, keys + mid, keys + hi);
    int64_t mass = before;
    for (int64_t i = lo; i < mid; i++) mass += select_mass(keys[i]);
    if ((double)mass >= target) hi = mid;
    else lo = mid, before = mass;
  }
  return hi;
}

// row [nK] of query block i -> num [1] and idx [nK], ascending, zeros past the count. Scratch: keys [nK], keep [nK].
inline void select_row(const float* row, int64_t nK, int64_t i, const Selection& s, uint64_t* keys, uint8_t* keep,
                       int32_t* num, int32_t* idx) {
  const bool forced_row = s.force_q && s.force_q[i];
  int64_t n = 0;
  for (int64_t j = 0; j < nK; j++) {
    keep[j] = forced_row || row[j] != row[j] || (s.force_k && s.force_k[j]);
    keys[n] = select_key(row[j], j);
    n += !keep[j];
  }
  int64_t m = s.count ? s.count : std::min(std::max(tau_count(keys, n, s.tau), s.low), s.high);
  m = std::min(m, n);
  if (m < n) std::nth_element(keys, keys + m, keys + n);
  for (int64_t i = 0; i < m; i++) keep[(uint32_t)keys[i]] = 1;
  int64_t kept = 0;
  for (int64_t j = 0; j < nK; j++) {
    idx[kept] = (int32_t)j;
    kept += keep[j];
  }
  std::fill(idx + kept, idx + nK, 0);
  *num = (int32_t)kept;
}

}  // namespace blade
