#include "layers/layers.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>

#include "thread_pool.h"

namespace cenacle {
namespace {

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
    const Layout l = kernels.choose(m);
    const int64_t width = m.width, groups = groups_of(l, width), bytes = bytes_of(l, width);
    Activations a{l, width, x, nullptr, nullptr, nullptr};
    if (l.interleave == Interleave::none) return a;
    uint8_t* quantized = quantized_.get(tokens * bytes);
    float* scales = scales_.get(2 * tokens * groups);
    float* sums = scales + tokens * groups;
    const int64_t some = std::max<int64_t>(1, 8192 / width);
    WorkerPool::get().run((tokens + some - 1) / some, [&](int64_t i) {
      for (int64_t t = i * some; t < std::min(tokens, (i + 1) * some); t++)
        kernels.prepare(l, width, x + t * width, quantized + t * bytes, scales + t * groups,
                        sums + t * groups);
    });
    a.quantized = quantized, a.scales = scales, a.sums = sums;
    return a;
  }

 private:
  Buffer<uint8_t> quantized_;
  Buffer<float> scales_;
};

thread_local Buffer<float> scratch, wide;
thread_local Prepared first_input, second_input, hidden_input;
thread_local Buffer<float> hidden_values, parts;

// Rows for one task, where a matrix meets `tokens` tokens (one of a stack: on average). With many as many as stay in a
// cache. With few, memory binds, and what is read in one go should be long: kernels ask for lines ahead, and those beyond
// a task's end are read in vain.
constexpr int64_t FEW_TOKENS = 8;
int64_t chunk(int64_t rows, int64_t most, int64_t tokens) {
  const int64_t threads = WorkerPool::get().threads();
  if (tokens > FEW_TOKENS) return std::clamp<int64_t>(rows / (8 * threads) / 16 * 16, 32, most);
  if (threads == 1) return rows;
  return std::max<int64_t>(32, (rows / (4 * threads) + 15) / 16 * 16);
}

}  // namespace

void linear(const Kernels& kernels, const Linear& layer, const float* x, int64_t tokens, float* out) {
  const Matrix& m = layer.matrix;
  const Activations a = first_input.make(kernels, m, x, tokens);
  const int64_t rows = layer.rows, size = chunk(rows, 256, tokens), chunks = (rows + size - 1) / size;
  WorkerPool::get().run(chunks, [&](int64_t i) {
    const int64_t first = i * size, last = std::min(rows, first + size);
    float* memory = scratch.get(kernels.scratch(m));
    int32_t which[TOKENS];
    float* to[TOKENS];
    for (int64_t begin = 0; begin < tokens; begin += TOKENS) {
      const int count = int(std::min<int64_t>(TOKENS, tokens - begin));
      for (int j = 0; j < count; j++) {
        which[j] = int32_t(begin + j);
        to[j] = out + (begin + j) * rows + first;
      }
      kernels.multiply(m, first, last, a, which, count, to, memory);
      layer.finish(0, first, last - first, to, count);
    }
  });
}

void experts(const Kernels& kernels, const Experts& e, const float* x, const int32_t* rows,
             int64_t tokens, int64_t k, float* out) {
  const int64_t pairs = tokens * k, width = e.down.rows, hidden = e.down.matrix.width;
  const int64_t count = e.down.experts;
  // Pairs by expert: those of expert i are order[start[i]] up to order[start[i + 1]].
  std::vector<int64_t> start(count + 1, 0), order;
  for (int64_t p = 0; p < pairs; p++) {
    if (rows[p] < 0)
      std::memset(out + p * width, 0, width * sizeof(float));
    else
      start[rows[p] + 1]++;
  }
  std::partial_sum(start.begin(), start.end(), start.begin());
  const int64_t mine = start[count];
  if (mine == 0) return;
  order.resize(mine);
  std::vector<int64_t> active, place(start.begin(), start.end() - 1);
  for (int64_t p = 0; p < pairs; p++)
    if (rows[p] >= 0) order[place[rows[p]]++] = p;
  for (int64_t i = 0; i < count; i++)
    if (start[i] < start[i + 1]) active.push_back(i);

  const Matrix& in = e.in[0].matrix;
  const Activations a0 = first_input.make(kernels, in, x, tokens);
  Activations a1 = a0;
  if (e.in.size() > 1 && !(kernels.choose(e.in[1].matrix) == a0.layout))
    a1 = second_input.make(kernels, e.in[1].matrix, x, tokens);
  float* h = hidden_values.get(mine * hidden);

  const int64_t work = int64_t(active.size()), each = (mine + work - 1) / work;  // experts, and tokens of one of them
  const int64_t size = std::min(hidden, chunk(hidden * work, 64, each)), chunks = (hidden + size - 1) / size;
  WorkerPool::get().run(work * chunks, [&](int64_t i) {
    const int64_t expert = active[i / chunks], first = i % chunks * size;
    const int64_t last = std::min(hidden, first + size), n = last - first;
    float* up = wide.get(TOKENS * size);
    int32_t which[TOKENS];
    float* to[2][TOKENS];
    for (int64_t begin = start[expert]; begin < start[expert + 1]; begin += TOKENS) {
      const int some = int(std::min<int64_t>(TOKENS, start[expert + 1] - begin));
      for (int j = 0; j < some; j++) {
        which[j] = int32_t(order[begin + j] / k);
        to[0][j] = h + (begin + j) * hidden + first;
        to[1][j] = up + j * size;
      }
      for (size_t s = 0; s < e.in.size(); s++) {
        const Linear& l = e.in[s];
        const Matrix m = l.of(expert);
        kernels.multiply(m, first, last, s ? a1 : a0, which, some, to[s],
                         scratch.get(kernels.scratch(m)));
        l.finish(expert, first, n, to[s], some);
      }
      for (int j = 0; j < some; j++) kernels.activate(e.act, e.a, e.b, to[0][j], to[1][j], n);
    }
  });

  const Activations ah = hidden_input.make(kernels, e.down.matrix, h, mine);
  const int64_t down = std::min(width, chunk(width * work, 128, each)), downs = (width + down - 1) / down;
  WorkerPool::get().run(work * downs, [&](int64_t i) {
    const int64_t expert = active[i / downs], first = i % downs * down;
    const int64_t last = std::min(width, first + down);
    const Matrix m = e.down.of(expert);
    float* memory = scratch.get(kernels.scratch(m));
    int32_t which[TOKENS];
    float* to[TOKENS];
    for (int64_t begin = start[expert]; begin < start[expert + 1]; begin += TOKENS) {
      const int some = int(std::min<int64_t>(TOKENS, start[expert + 1] - begin));
      for (int j = 0; j < some; j++) {
        which[j] = int32_t(begin + j);
        to[j] = out + order[begin + j] * width + first;
      }
      kernels.multiply(m, first, last, ah, which, some, to, memory);
      e.down.finish(expert, first, last - first, to, some);
    }
  });
}

void experts_sum(const Kernels& kernels, const Experts& e, const float* x, const int32_t* rows,
                 const float* weights, int64_t tokens, int64_t k, float* out) {
  const int64_t width = e.down.rows, some = std::max<int64_t>(1, 16384 / (width * std::max<int64_t>(1, k)));
  float* part = parts.get(tokens * k * width);
  experts(kernels, e, x, rows, tokens, k, part);
  WorkerPool::get().run((tokens + some - 1) / some, [&](int64_t i) {
    for (int64_t t = i * some; t < std::min(tokens, (i + 1) * some); t++) {
      float* to = out + t * width;
      std::memset(to, 0, width * sizeof(float));
      for (int64_t p = t * k; p < (t + 1) * k; p++) {
        if (rows[p] < 0) continue;
        const float *from = part + p * width, by = weights[p];
        for (int64_t c = 0; c < width; c++) to[c] += by * from[c];
      }
    }
  });
}

}  // namespace cenacle
