// What jobs over a layer's matrices are made of: memory, integers of activations, tasks that wait for others.
//
// Owns: these, and how many rows a task has. Does not know: which layers there are. Next: layers.cpp, stream_step.cpp.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "layers/layers.h"
#include "thread_pool.h"

namespace cenacle {

// Memory that stays with its thread: layers come every few hundred microseconds.
template <class T>
class Buffer {
 public:
  ~Buffer() { std::free(data_); }
  T* get(int64_t n) {
    if (n > size_) {
      std::free(data_);
      size_ = n;
      data_ = static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64));
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// Activations in the layout that a matrix wants, made by all threads.
class Prepared {
 public:
  Activations make(const Kernels& kernels, const Matrix& m, const float* x, int64_t tokens) {
    const Activations a = reserve(kernels, m, x, tokens);
    const int64_t some = std::max<int64_t>(1, 8192 / a.width);
    if (a.quantized)
      WorkerPool::get().run((tokens + some - 1) / some,
                            [&](int64_t i) { fill(kernels, i * some, std::min(tokens, (i + 1) * some)); });
    return a;
  }

  // The same before any token is filled in.
  Activations reserve(const Kernels& kernels, const Matrix& m, const float* x, int64_t tokens) {
    const Layout l = kernels.choose(m);
    all_ = {l, m.width, x, nullptr, nullptr, nullptr};
    if (l.interleave == Interleave::none) return all_;
    const int64_t groups = groups_of(l, m.width);
    float* scales = scales_.get(2 * tokens * groups);
    all_.quantized = quantized_.get(tokens * bytes_of(l, m.width));
    all_.scales = scales, all_.sums = scales + tokens * groups;
    return all_;
  }

  void fill(const Kernels& kernels, int64_t first, int64_t last) const {
    if (!all_.quantized) return;
    const int64_t groups = groups_of(all_.layout, all_.width), bytes = bytes_of(all_.layout, all_.width);
    for (int64_t t = first; t < last; t++)
      kernels.prepare(all_.layout, all_.width, all_.plain + t * all_.width,
                      const_cast<uint8_t*>(all_.quantized) + t * bytes, const_cast<float*>(all_.scales) + t * groups,
                      const_cast<float*>(all_.sums) + t * groups);
  }

 private:
  Activations all_;
  Buffer<uint8_t> quantized_;
  Buffer<float> scales_;
};

// Rows for one task, where a matrix meets `tokens` tokens (one of a stack: on average). With many as many as stay in a
// cache. With few, memory binds, and what is read in one go should be long: kernels ask for lines ahead, and those beyond
// a task's end are read in vain.
constexpr int64_t FEW_TOKENS = 8;
inline int64_t chunk(int64_t rows, int64_t most, int64_t tokens) {
  const int64_t threads = WorkerPool::get().threads();
  if (tokens > FEW_TOKENS) return std::clamp<int64_t>(rows / (8 * threads) / 16 * 16, 32, most);
  if (threads == 1) return rows;
  return std::max<int64_t>(32, (rows / (4 * threads) + 15) / 16 * 16);
}

// Rows [first, last) of a layer for all tokens: out [tokens, rows].
inline void multiply_rows(const Kernels& kernels, const Linear& layer, const Activations& a, int64_t first, int64_t last,
                          int64_t tokens, float* out) {
  static thread_local Buffer<float> scratch;
  float* memory = scratch.get(kernels.scratch(layer.matrix));
  int32_t which[TOKENS];
  float* to[TOKENS];
  for (int64_t begin = 0; begin < tokens; begin += TOKENS) {
    const int count = int(std::min<int64_t>(TOKENS, tokens - begin));
    for (int j = 0; j < count; j++) {
      which[j] = int32_t(begin + j);
      to[j] = out + (begin + j) * layer.rows + first;
    }
    kernels.multiply(layer.matrix, first, last, a, which, count, to, memory);
    layer.finish(0, first, last - first, to, count);
  }
}

// Tasks that later ones of the same job wait for. Tasks are begun in order, so those are running or done.
class Countdown {
 public:
  void expect(int64_t tasks) { left_ = tasks; }
  // Whether it was the last.
  bool finish() { return left_.fetch_sub(1) == 1; }
  void wait() const {
    while (left_ > 0) WorkerPool::pause();
  }

 private:
  std::atomic<int64_t> left_{0};
};

// Calls `f` in the end, also of a task that failed: others may wait for it.
template <class F>
struct Finally {
  F f;
  ~Finally() { f(); }
};
template <class F>
Finally(F) -> Finally<F>;

}  // namespace cenacle
