// How Python hands tensors to the CPU kernels, scratch memory, and tasks over threads.
#pragma once
#include <atomic>
#include <cstdlib>
#include <new>
#include <utility>

#include "cpu_simd.h"

// The signature of libtorch's stable C function torch_parallel_for: body(begin, end, context) on torch's own threads.
typedef void (*blade_body_t)(int64_t begin, int64_t end, void* context);
typedef int32_t (*blade_parallel_for_t)(int64_t begin, int64_t end, int64_t grain, blade_body_t body, void* context);

namespace blade {

// A [batch, heads, tokens, dim] tensor; strides in elements. Laid out as cpu.py's ctypes structure.
struct Tensor {
  void* data;
  int64_t stride[4];

  BLADE_INLINE char* at(DType type, int64_t batch, int64_t head, int64_t token) const {
    return (char*)data + item_size(type) * (batch * stride[0] + head * stride[1] + token * stride[2]);
  }
};

enum Status : int32_t { kOk = 0, kNoMemory = 1, kBadCount = 2, kBadIndex = 3, kBadArgument = 4 };

namespace {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// 64-byte aligned, uninitialised. Throws std::bad_alloc: only ever constructed on the calling thread.
class Buffer {
 public:
  explicit Buffer(int64_t floats)
      : data_(floats > 0 ? (float*)aligned_alloc(64, round_up(floats * 4, 64)) : nullptr) {
    if (floats > 0 && !data_) throw std::bad_alloc();
  }
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() { free(data_); }
  float* floats() const { return data_; }
  uint32_t* words() const { return (uint32_t*)data_; }

 private:
  float* data_;
};

// Calls task(index, scratch) for every index < count, on all of torch's threads; scratch is private to the thread.
// Tasks are handed out one by one from a counter because rows of a sparse mask differ in length and torch splits
// ranges statically. Which thread runs a task must not change what it computes: a task owns all it writes.
template <class Task>
Status run_tasks(blade_parallel_for_t parallel_for, int64_t count, int64_t scratch_floats, const Task& task) {
  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<Status> status{kOk};
    int64_t count, scratch_floats;
    const Task& task;
  } shared{{0}, {kOk}, count, scratch_floats, task};
  auto body = [](int64_t, int64_t, void* context) {
    Shared& s = *(Shared*)context;
    float* scratch = nullptr;
    for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.count;) {
      if (!scratch && s.scratch_floats && !(scratch = (float*)aligned_alloc(64, round_up(s.scratch_floats * 4, 64)))) {
        s.status = kNoMemory;
        break;
      }
      s.task(i, scratch);
    }
    free(scratch);
  };
  if (parallel_for) parallel_for(0, count, 1, body, &shared);
  else body(0, count, &shared);
  return shared.status;
}

// Tokens row0 .. row0+rows of one head as lanes: out[word][LANES], zero in the missing lanes. `staging` holds
// LANES x round_up(words, 16) floats.
template <bool Pairs, int LANES>
BLADE_NOINLINE void pack_lanes(const Tensor& t, DType type, int64_t batch, int64_t head, int64_t row0, int64_t rows,
                               int64_t dim, float* staging, float* out) {
  const int64_t count = words<Pairs>(dim), padded = round_up(count, 16);
  for (int64_t r = 0; r < LANES; r++) {
    uint32_t* row = (uint32_t*)staging + r * padded;
    if (r < rows) load_words<Pairs>(t.at(type, batch, head, row0 + r), type, t.stride[3], dim, row);
    const int64_t filled = r < rows ? count : 0;
    memset(row + filled, 0, 4 * (padded - filled));
  }
  transpose(staging, padded, LANES, (int)padded, out, LANES);
}

}  // namespace
}  // namespace blade
