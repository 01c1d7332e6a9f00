// Vectors, number formats and the one register-blocked matrix product that every CPU kernel of blade is made of.
//
// C++17 with GCC/clang vector extensions, so one source gives AVX-512 (with or without bf16 pair dots), AVX2, SSE2
// and NEON; intrinsics appear only where the extensions have no word for the instruction. Everything is inline: the
// .cpp files of this folder are compiled together into one shared library per instruction set (see cpu_build.py).
//
// The idea shared by all kernels: *lanes are tokens*. A tile of LANES tokens (64, or 32/16 for small blocks) is
// transposed once to [word][LANES]; the other operand is then read in place, one element at a time, as a broadcast:
//     out[r][lane] = sum_k a[r][k] * tile[k][lane]
// No packing of `a`, no horizontal reduction anywhere, and softmax over r is plain vertical arithmetic.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define BLADE_INLINE inline __attribute__((always_inline))
#define BLADE_NOINLINE inline __attribute__((noinline))  // called a few times per tile: one copy compiles faster

namespace blade {
namespace {

// ---- vectors ---------------------------------------------------------------------------------------------------

// kWidth: floats per vector. kGroup: vectors held side by side in the product's register tile; with kRows(...) rows
// the tile fills the register file (24 of 32 accumulators on AVX-512 and NEON, 12 of 16 on AVX2 and SSE).
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
#define BLADE_AVX512 1
constexpr int kWidth = 16, kGroup = 4;
#elif defined(__AVX2__)
constexpr int kWidth = 8, kGroup = 2;
#elif defined(__aarch64__)
constexpr int kWidth = 4, kGroup = 4;
#else
constexpr int kWidth = 4, kGroup = 2;
#endif
#if defined(BLADE_AVX512) && defined(__AVX512BF16__)
#define BLADE_PAIRS 1  // the bf16 pair dot product exists
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

BLADE_INLINE Vec load(const float* p) { return *(const Vec*)p; }  // 64-byte aligned scratch only
BLADE_INLINE void store(float* p, Vec v) { *(Vec*)p = v; }
BLADE_INLINE Vec broadcast(float x) { return Vec{} + x; }

// A NaN in b is returned; one in a may be lost (the x86 rule, kept on every machine).
BLADE_INLINE Vec max(Vec a, Vec b) {
#if defined(BLADE_AVX512)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// 2^x for x <= 0 (small positive x is fine too); exactly 0 for -inf and exactly 1 for 0; NaN stays NaN.
// Accurate: relative error 1.5e-7. Otherwise 1e-4, for results that are rounded to bf16 (4e-3) anyway.
// Polynomials: minimax of 2^r with p(0) = 1, on [0, 1) for AVX-512 (floor) and [-1/2, 1/2] elsewhere (nearest).
template <bool Accurate>
BLADE_INLINE Vec exp2(Vec x) {
#if defined(BLADE_AVX512)
  // reduce gives x - floor(x) (and 0 for -inf); scalef multiplies by 2^floor(x), so the floor is never formed.
  const Vec r = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec p;
  if constexpr (Accurate)
    p = (((1.8671317e-3f * r + 9.0170270e-3f) * r + 5.5799916e-2f) * r + 2.4016444e-1f) * r + 6.9315130e-1f;
  else
    p = (7.7067196e-2f * r + 2.2764482e-1f) * r + 6.9511682e-1f;
  return (Vec)_mm512_scalef_ps((__m512)(p * r + 1.0f), (__m512)x);
#else
  const Vec clamped = x < -126.f ? broadcast(-126.f) : x;
  const Vec magic = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec n = (clamped + magic) - magic, r = clamped - n;
  Vec p;
  if constexpr (Accurate)
    p = (((1.3264727e-3f * r + 9.6715130e-3f) * r + 5.5507336e-2f) * r + 2.4022242e-1f) * r + 6.9314700e-1f;
  else
    p = (5.5008952e-2f * r + 2.4221101e-1f) * r + 6.9328290e-1f;
  const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return x < -126.f ? Vec{} : (p * r + 1.0f) * (Vec)exponent;
#endif
}

// ---- number formats ----------------------------------------------------------------------------------------------

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };  // the numbers cpu.py passes

BLADE_INLINE int64_t item_size(DType t) { return t == kFloat32 ? 4 : 2; }

BLADE_INLINE float bits_to_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
BLADE_INLINE uint32_t float_to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
BLADE_INLINE float bf16_to_float(uint16_t h) { return bits_to_float((uint32_t)h << 16); }
BLADE_INLINE uint16_t float_to_bf16(float f) {  // nearest even
  const uint32_t u = float_to_bits(f), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : (uint16_t)rounded;
}

#if defined(__F16C__)
BLADE_INLINE float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
BLADE_INLINE uint16_t float_to_half(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__aarch64__)
BLADE_INLINE float half_to_float(uint16_t h) { __fp16 x; memcpy(&x, &h, 2); return x; }
BLADE_INLINE uint16_t float_to_half(float f) { __fp16 x = f; uint16_t h; memcpy(&h, &x, 2); return h; }
#else
inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);  // inf, NaN
  // Shifted into place the exponent is 112 too small; the product also normalises subnormals.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}
inline uint16_t float_to_half(float f) {  // nearest even
  const uint32_t u = float_to_bits(f), magnitude = u & 0x7fffffffu;
  const uint16_t sign = (uint16_t)(u >> 16 & 0x8000);
  if (magnitude > 0x7f800000u) return sign | 0x7e00;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // rounds past 65504
  if (magnitude < 0x38800000u)                         // subnormal: adding 0.5 aligns and rounds
    return sign | (uint16_t)(float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u);
  return sign | (uint16_t)((magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
#endif

// count elements (element stride `stride`) -> dense fp32
BLADE_NOINLINE void to_float(const void* source, DType type, int64_t stride, int64_t count, float* out) {
  const uint16_t* halves = (const uint16_t*)source;
  if (type == kFloat32) {
    const float* floats = (const float*)source;
    if (stride == 1) memcpy(out, floats, count * 4);
    else for (int64_t i = 0; i < count; i++) out[i] = floats[i * stride];
  } else if (type == kBFloat16) {
    if (stride == 1) for (int64_t i = 0; i < count; i++) out[i] = bf16_to_float(halves[i]);
    else for (int64_t i = 0; i < count; i++) out[i] = bf16_to_float(halves[i * stride]);
  } else {
    int64_t i = 0;
#if defined(__F16C__)
    if (stride == 1)
      for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(halves + i))));
#endif
    for (; i < count; i++) out[i] = half_to_float(halves[i * stride]);
  }
}

// dense fp32 -> count contiguous elements
BLADE_NOINLINE void from_float(const float* source, DType type, int64_t count, void* out) {
  uint16_t* halves = (uint16_t*)out;
  if (type == kFloat32) {
    memcpy(out, source, count * 4);
  } else if (type == kBFloat16) {
    for (int64_t i = 0; i < count; i++) halves[i] = float_to_bf16(source[i]);
  } else {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8)
      _mm_storeu_si128((__m128i*)(halves + i), _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < count; i++) halves[i] = float_to_half(source[i]);
  }
}

// ---- words -------------------------------------------------------------------------------------------------------
// The product works on 32-bit words. Pairs = false: a word is a float. Pairs = true: a word is two bf16 neighbours of
// the summed dimension, and multiply_add sums both of their products (AVX512_BF16).

template <bool Pairs>
constexpr int64_t words(int64_t elements) { return Pairs ? (elements + 1) / 2 : elements; }

template <bool Pairs>
BLADE_INLINE Vec multiply_add(Vec acc, const uint32_t* a, Vec b) {
  uint32_t word;
  memcpy(&word, a, 4);
#if defined(BLADE_PAIRS)
  if constexpr (Pairs) return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)word), (__m512bh)b);
#endif
  return acc + b * bits_to_float(word);
}

// One row of `count` elements -> words<Pairs>(count) words. Pairs needs bf16 input.
template <bool Pairs>
BLADE_INLINE void load_words(const void* source, DType type, int64_t stride, int64_t count, uint32_t* out) {
  if constexpr (!Pairs) {
    to_float(source, type, stride, count, (float*)out);
  } else {
    const uint16_t* h = (const uint16_t*)source;
    if (stride == 1) {
      memcpy(out, h, count / 2 * 4);
    } else {
      for (int64_t i = 0; i < count / 2; i++) out[i] = h[2 * i * stride] | (uint32_t)h[(2 * i + 1) * stride] << 16;
    }
    if (count % 2) out[count / 2] = h[(count - 1) * stride];
  }
}

// Two rows of results as one row of bf16 pairs: low half from `even`, high half from `odd`, rounded to nearest even.
#if defined(BLADE_PAIRS)
BLADE_INLINE Vec interleave_bf16(Vec even, Vec odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Vec)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}
#else
BLADE_INLINE Vec interleave_bf16(Vec even, Vec) { return even; }  // never reached: Pairs is false without the hardware
#endif

// ---- transposes --------------------------------------------------------------------------------------------------

#if defined(BLADE_AVX512)
BLADE_INLINE void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}
#endif

// out[j * out_stride + i] = in[i * in_stride + j] for i < rows, j < columns; both must be multiples of 16 and the
// arrays 64-byte aligned scratch with strides that are multiples of 16 (callers pad).
BLADE_NOINLINE void transpose(const float* in, int64_t in_stride, int rows, int columns, float* out,
                              int64_t out_stride) {
#if defined(BLADE_AVX512)
  for (int i = 0; i < rows; i += 16)
    for (int j = 0; j < columns; j += 16) {
      __m512i r[16];
      for (int u = 0; u < 16; u++) r[u] = _mm512_load_si512(in + (i + u) * in_stride + j);
      transpose16(r);
      for (int u = 0; u < 16; u++) _mm512_store_si512(out + (j + u) * out_stride + i, r[u]);
    }
#else
  for (int i = 0; i < rows; i += 4)
    for (int j = 0; j < columns; j++)
      for (int u = 0; u < 4; u++) out[j * out_stride + i + u] = in[(i + u) * in_stride + j];
#endif
}

// ---- the product -------------------------------------------------------------------------------------------------

template <int LANES>
constexpr int group() { return LANES / kWidth < kGroup ? LANES / kWidth : kGroup; }
// Rows per register tile. Fewer lanes leave room for more rows, which hides the latency of the multiply-add.
template <int LANES>
constexpr int panel_rows() { return group<LANES>() == kGroup ? 6 : 12; }

// A stride of 1 that the compiler knows.
struct One {
  constexpr operator int64_t() const { return 1; }
};

// acc[r][n] += sum_k *at(r, k) * b[k][n]; b is [depth][LANES].
template <bool Pairs, int LANES, int R, int N, class Address>
BLADE_INLINE void accumulate(const Address& at, int64_t depth, const float* __restrict__ b, Vec (&acc)[R][N]) {
  auto step = [&](int64_t k) __attribute__((always_inline)) {
    Vec lanes[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) lanes[n] = load(b + k * LANES + n * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) acc[r][n] = multiply_add<Pairs>(acc[r][n], at(r, k), lanes[n]);
  };
  int64_t k = 0;
#pragma GCC unroll 1
  for (; k + 4 <= depth; k += 4)
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) step(k + u);
#pragma GCC unroll 1
  for (; k < depth; k++) step(k);
}

// The same with one running sum per kPart terms: the rounding of a long sum grows with its number of terms, and head
// dimensions above 128 would exceed twice dense attention's error. Shorter sums never enter the loop.
constexpr int64_t kPart = 128;
template <bool Pairs, int LANES, int R, int N, class Address>
BLADE_INLINE void accumulate_in_parts(const Address& at, int64_t depth, const float* b, Vec (&acc)[R][N]) {
  accumulate<Pairs, LANES>(at, std::min(depth, kPart), b, acc);
#pragma GCC unroll 1
  for (int64_t start = kPart; start < depth; start += kPart) {
    Vec part[R][N] = {};
    auto shifted = [&](int r, int64_t k) { return at(r, start + k); };
    accumulate<Pairs, LANES>(shifted, std::min(depth - start, kPart), b + start * LANES, part);
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++) acc[r][n] += part[r][n];
  }
}

// One register tile, and what to do with it: epilogue(row, lane, acc) gets R rows x N vectors while they are still in
// registers. Not inlined: each instance then has the whole register file for its accumulators. With Clamped, rows past
// the end repeat the last one.
template <bool Pairs, int LANES, int R, bool Clamped, class RowStride, class DepthStride, class Epilogue>
BLADE_NOINLINE void panel(int row, int rows, const uint32_t* a, RowStride row_stride, DepthStride depth_stride,
                          int64_t depth, const float* b, const Epilogue& epilogue) {
  constexpr int N = group<LANES>();
  const uint32_t* first = a + row * row_stride;
  for (int lane = 0; lane < LANES; lane += N * kWidth) {
    Vec acc[R][N] = {};
    if constexpr (Clamped) {
      const uint32_t* in[R];
      for (int r = 0; r < R; r++) in[r] = first + std::min(r, rows - row - 1) * row_stride;
      auto at = [&](int r, int64_t k) { return in[r] + k * depth_stride; };
      accumulate_in_parts<Pairs, LANES>(at, depth, b + lane, acc);
    } else {
      auto at = [&](int r, int64_t k) { return first + r * row_stride + k * depth_stride; };
      accumulate_in_parts<Pairs, LANES>(at, depth, b + lane, acc);
    }
    epilogue(row, lane, acc);
  }
}

// product[r][lane] = sum_k a[r * row_stride + k * depth_stride] * b[k][lane] for r < rows. Panels start at even rows
// (epilogues may pair rows up). The last one may go up to three rows further, which repeat the last row of `a`:
// epilogues must have room for them. Only these two heights, because each costs compile time in every kernel.
template <bool Pairs, int LANES, class RowStride, class DepthStride, class Epilogue>
BLADE_INLINE void product(int rows, const uint32_t* a, RowStride row_stride, DepthStride depth_stride, int64_t depth,
                          const float* b, const Epilogue& epilogue) {
  constexpr int R = panel_rows<LANES>();
  int row = 0, high = rows / R;
  // Sixes and fours add up to any even number but 2; two rows left over would waste half a panel.
  if (R == 6 && high > 0 && (rows + 1) / 2 * 2 - high * R == 2) high--;
  for (; high > 0; high--, row += R)
    panel<Pairs, LANES, R, false>(row, rows, a, row_stride, depth_stride, depth, b, epilogue);
  for (; row < rows; row += 4) panel<Pairs, LANES, 4, true>(row, rows, a, row_stride, depth_stride, depth, b, epilogue);
}

}  // namespace
}  // namespace blade
