#include "layers/layers.h"

#include <algorithm>
#include <atomic>
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

namespace {

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

// `out` [tokens, k, width]; if there are `weights`, `sums` [tokens, width] too.
//
// One job for all threads: first matrices, hidden values to integers by whoever finishes an expert's last rows, second
// matrices, sums. A thread that runs ahead goes on with what is ready, where a job for each would have it wait.
void run_experts(const Kernels& kernels, const Experts& e, const float* x, const int32_t* rows, int64_t tokens,
                 int64_t k, float* out, const float* weights, float* sums) {
  const int64_t pairs = tokens * k, width = e.down.rows, hidden = e.down.matrix.width;
  const int64_t count = e.down.experts;
  // Pairs by expert: those of expert i are order[start[i]] up to order[start[i + 1]].
  std::vector<int64_t> start(count + 1, 0), order;
  for (int64_t p = 0; p < pairs; p++) {
    if (rows[p] >= 0)
      start[rows[p] + 1]++;
    else if (!weights)
      std::memset(out + p * width, 0, width * sizeof(float));
  }
  std::partial_sum(start.begin(), start.end(), start.begin());
  const int64_t mine = start[count];
  if (mine == 0) {
    if (weights) std::memset(sums, 0, tokens * width * sizeof(float));
    return;
  }
  order.resize(mine);
  std::vector<int64_t> active, place(start.begin(), start.end() - 1);
  for (int64_t p = 0; p < pairs; p++)
    if (rows[p] >= 0) order[place[rows[p]]++] = p;
  for (int64_t i = 0; i < count; i++)
    if (start[i] < start[i + 1]) active.push_back(i);
  // The longest first, so that what is left for the end is short.
  const auto tokens_of = [&](int64_t expert) { return start[expert + 1] - start[expert]; };
  std::stable_sort(active.begin(), active.end(), [&](int64_t a, int64_t b) { return tokens_of(a) > tokens_of(b); });

  const Matrix& in = e.in[0].matrix;
  const Activations a0 = first_input.make(kernels, in, x, tokens);
  Activations a1 = a0;
  if (e.in.size() > 1 && !(kernels.choose(e.in[1].matrix) == a0.layout))
    a1 = second_input.make(kernels, e.in[1].matrix, x, tokens);
  float* const h = hidden_values.get(mine * hidden);
  Prepared& prepared = hidden_input;
  const Activations ah = prepared.reserve(kernels, e.down.matrix, h, mine);

  const int64_t work = int64_t(active.size()), each = (mine + work - 1) / work;  // experts, and tokens of one of them
  const int64_t size = std::min(hidden, chunk(hidden * work, 64, each)), chunks = (hidden + size - 1) / size;
  const int64_t down = std::min(width, chunk(width * work, 128, each)), downs = (width + down - 1) / down;
  const int64_t some = std::max<int64_t>(1, 16384 / (width * std::max<int64_t>(1, k)));  // sums of a task
  std::vector<Countdown> unfinished(work), unprepared(work);
  for (auto& c : unfinished) c.expect(chunks);
  for (auto& c : unprepared) c.expect(1);
  Countdown unsummed;
  unsummed.expect(work * downs);

  const auto first_matrices = [&](int64_t i) {
    const int64_t expert = active[i / chunks], first = i % chunks * size;
    const int64_t last = std::min(hidden, first + size), n = last - first;
    const Finally end{[&] {
      if (!unfinished[i / chunks].finish()) return;
      prepared.fill(kernels, start[expert], start[expert + 1]);
      unprepared[i / chunks].finish();
    }};
    float* up = wide.get(TOKENS * size);
    int32_t which[TOKENS];
    float* to[2][TOKENS];
    for (int64_t begin = start[expert]; begin < start[expert + 1]; begin += TOKENS) {
      const int now = int(std::min<int64_t>(TOKENS, start[expert + 1] - begin));
      for (int j = 0; j < now; j++) {
        which[j] = int32_t(order[begin + j] / k);
        to[0][j] = h + (begin + j) * hidden + first;
        to[1][j] = up + j * size;
      }
      for (size_t s = 0; s < e.in.size(); s++) {
        const Linear& l = e.in[s];
        const Matrix m = l.of(expert);
        kernels.multiply(m, first, last, s ? a1 : a0, which, now, to[s], scratch.get(kernels.scratch(m)));
        l.finish(expert, first, n, to[s], now);
      }
      for (int j = 0; j < now; j++) kernels.activate(e.act, e.a, e.b, to[0][j], to[1][j], n);
    }
  };

  const auto second_matrix = [&](int64_t i) {
    const int64_t expert = active[i / downs], first = i % downs * down;
    const int64_t last = std::min(width, first + down);
    const Finally end{[&] { unsummed.finish(); }};
    const Matrix m = e.down.of(expert);
    float* memory = scratch.get(kernels.scratch(m));
    int32_t which[TOKENS];
    float* to[TOKENS];
    unprepared[i / downs].wait();
    for (int64_t begin = start[expert]; begin < start[expert + 1]; begin += TOKENS) {
      const int now = int(std::min<int64_t>(TOKENS, start[expert + 1] - begin));
      for (int j = 0; j < now; j++) {
        which[j] = int32_t(begin + j);
        to[j] = out + order[begin + j] * width + first;
      }
      kernels.multiply(m, first, last, ah, which, now, to, memory);
      e.down.finish(expert, first, last - first, to, now);
    }
  };

  const auto sum = [&](int64_t i) {
    unsummed.wait();
    for (int64_t t = i * some; t < std::min(tokens, (i + 1) * some); t++) {
      float* to = sums + t * width;
      std::memset(to, 0, width * sizeof(float));
      for (int64_t p = t * k; p < (t + 1) * k; p++) {
        if (rows[p] < 0) continue;
        const float *from = out + p * width, by = weights[p];
        for (int64_t c = 0; c < width; c++) to[c] += by * from[c];
      }
    }
  };

  const int64_t gates = work * chunks, all = gates + work * downs;
  WorkerPool::get().run(all + (weights ? (tokens + some - 1) / some : 0), [&](int64_t i) {
    if (i < gates)
      first_matrices(i);
    else if (i < all)
      second_matrix(i - gates);
    else
      sum(i - all);
  });
}

}  // namespace

void experts(const Kernels& kernels, const Experts& e, const float* x, const int32_t* rows,
             int64_t tokens, int64_t k, float* out) {
  run_experts(kernels, e, x, rows, tokens, k, out, nullptr, nullptr);
}

void experts_sum(const Kernels& kernels, const Experts& e, const float* x, const int32_t* rows,
                 const float* weights, int64_t tokens, int64_t k, float* out) {
  run_experts(kernels, e, x, rows, tokens, k, parts.get(tokens * k * e.down.rows), weights, out);
}

}  // namespace cenacle
