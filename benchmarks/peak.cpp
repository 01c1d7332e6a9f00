// The fastest that this machine multiplies and adds: independent chains of the instruction that the kernels use, in
// registers only. What a kernel reaches is quoted as a share of this.
#include <cstdint>
#include <utility>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define PEAK_BYTES 64
#elif defined(__AVX2__)
#define PEAK_BYTES 32
#else
#define PEAK_BYTES 16
#endif

// Tells the compiler that the vector may have changed: nothing is merged, hoisted or dropped.
#if defined(__aarch64__)
#define KEEP(x) asm volatile("" : "+w"(x))
#else
#define KEEP(x) asm volatile("" : "+v"(x))
#endif

namespace {
typedef float Vec __attribute__((vector_size(PEAK_BYTES)));
// Latency times throughput of a multiply-add is 8 to 10; SSE and AVX2 have 16 registers in all.
constexpr int kChains = PEAK_BYTES == 64 ? 20 : 12;
using Chains = std::make_integer_sequence<int, kChains>;
typedef void (*ParallelFor)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);

// Written over an index sequence, not as loops over an array: the chains then live in registers.
template <int... Chain>
float run_fp32(int64_t iterations, std::integer_sequence<int, Chain...>) {
  Vec a, b;
  for (unsigned i = 0; i < sizeof(Vec) / 4; i++) a[i] = 0.999f, b[i] = 1e-3f;
  KEEP(a);
  KEEP(b);
  Vec sum[] = {(void(Chain), a)...};
  for (int64_t n = 0; n < iterations; n++) {
    ((sum[Chain] = sum[Chain] * a + b), ...);
    ([&] { KEEP(sum[Chain]); }(), ...);
  }
  return (sum[Chain][0] + ...);
}

#if defined(__AVX512BF16__)
template <int... Chain>
float run_bf16(int64_t iterations, std::integer_sequence<int, Chain...>) {
  __m512i ones = _mm512_set1_epi32(0x3f803f80);  // pairs of 1.0
  KEEP(ones);
  __m512 sum[] = {(void(Chain), _mm512_setzero_ps())...};
  for (int64_t n = 0; n < iterations; n++) {
    ((sum[Chain] = _mm512_dpbf16_ps(sum[Chain], (__m512bh)ones, (__m512bh)ones)), ...);
    ([&] { KEEP(sum[Chain]); }(), ...);
  }
  return (_mm512_cvtss_f32(sum[Chain]) + ...);
}
#else
template <class Chains>
float run_bf16(int64_t iterations, Chains chains) { return run_fp32(iterations, chains); }  // bf16 is computed in fp32 here
#endif

struct Job {
  int64_t iterations;
  int bf16;
};
}  // namespace

// Floating-point operations of one iteration on one thread.
extern "C" int64_t peak_operations(int bf16) {
#if defined(__AVX512BF16__)
  return (int64_t)kChains * (sizeof(Vec) / 4) * (bf16 ? 4 : 2);
#else
  return (int64_t)kChains * (sizeof(Vec) / 4) * 2;
#endif
}

// Runs `threads` equal jobs, on torch's own pool where its parallel_for is given.
extern "C" void peak_run(int64_t iterations, int bf16, int64_t threads, ParallelFor parallel_for) {
  Job job{iterations, bf16};
  auto body = [](int64_t begin, int64_t end, void* context) {
    const Job& j = *(const Job*)context;
    for (int64_t i = begin; i < end; i++) {
      volatile float sink = j.bf16 ? run_bf16(j.iterations, Chains{}) : run_fp32(j.iterations, Chains{});
      (void)sink;
    }
  };
  if (parallel_for) parallel_for(0, threads, 1, body, &job);
  else body(0, threads, &job);
}
