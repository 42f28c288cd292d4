#include "layers/layers.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "layers/parts.h"

namespace cenacle {
namespace {

thread_local Buffer<float> scratch, wide;
thread_local Prepared first_input, second_input, gate_input, hidden_input;
thread_local Buffer<float> hidden_values, parts, normed, routed;

}  // namespace

void linear(const Kernels& kernels, const Linear& layer, const float* x, int64_t tokens, float* out) {
  const Matrix& m = layer.matrix;
  const Activations a = first_input.make(kernels, m, x, tokens);
  const int64_t rows = layer.rows, size = chunk(rows, 256, tokens), chunks = (rows + size - 1) / size;
  WorkerPool::get().run(
      chunks, [&](int64_t i) { multiply_rows(kernels, layer, a, i * size, std::min(rows, (i + 1) * size), tokens, out); });
}

namespace {

// `out` [tokens, k, width]; if there are `weights`, `sums` [tokens, width] too, plus `added` if that is there. `ready`: x
// as the first matrices want it, if it was made.
//
// One job for all threads: first matrices, hidden values to integers by whoever finishes an expert's last rows, second
// matrices, sums. A thread that runs ahead goes on with what is ready, where a job for each would have it wait.
void run_experts(const Kernels& kernels, const Experts& e, const float* x, const int32_t* rows, int64_t tokens,
                 int64_t k, float* out, const float* weights, float* sums, const Activations* ready = nullptr,
                 const float* added = nullptr) {
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
    for (int64_t i = 0; weights && i < tokens * width; i++) sums[i] = added ? added[i] : 0.f;
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
  const Activations a0 = ready ? *ready : first_input.make(kernels, in, x, tokens);
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
      if (added)
        for (int64_t c = 0; c < width; c++) to[c] += added[t * width + c];
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

void moe(const Kernels& kernels, const Ops& ops, const Linear& gate, const Experts& e, const Frame& frame, const Choose& choose,
         const float* x, int64_t tokens, int64_t k, float* out) {
  const Matrix &in = e.in[0].matrix, &of_gate = gate.matrix;
  const int64_t width = in.width;
  float* const scores = routed.get(tokens * (gate.rows + k));
  float* const from = frame.norm ? normed.get(tokens * width) : nullptr;
  const float* const input = from ? from : x;
  Prepared &first = first_input, &second = gate_input;
  const Activations a = first.reserve(kernels, in, input, tokens);
  const bool alike = kernels.choose(of_gate) == a.layout;
  const Activations b = alike ? a : second.reserve(kernels, of_gate, input, tokens);
  // One job: what matrices want of each token, then the gate's rows.
  const int64_t some = tokens > FEW_TOKENS ? std::max<int64_t>(1, 8192 / width) : 1, pieces = (tokens + some - 1) / some;
  const int64_t share = gate.rows / (2 * WorkerPool::get().threads()) / 16 * 16;
  const int64_t size = std::clamp<int64_t>(share, 16, 256), chunks = (gate.rows + size - 1) / size;
  Countdown unprepared;
  unprepared.expect(pieces);
  WorkerPool::get().run(pieces + chunks, [&](int64_t i) {
    if (i >= pieces) {
      unprepared.wait();
      const int64_t row = (i - pieces) * size;
      return multiply_rows(kernels, gate, b, row, std::min(gate.rows, row + size), tokens, scores);
    }
    const Finally end{[&] { unprepared.finish(); }};
    const int64_t begin = i * some, last = std::min(tokens, begin + some);
    if (from) ops.rms_norm(x + begin * width, frame.norm, frame.eps, last - begin, width, from + begin * width);
    first.fill(kernels, begin, last);
    if (!alike) second.fill(kernels, begin, last);
  });
  float* const weights = scores + tokens * gate.rows;
  const std::vector<int32_t> rows = choose(scores, weights);
  run_experts(kernels, e, input, rows.data(), tokens, k, parts.get(tokens * k * e.down.rows), weights, out, &a,
              frame.add ? x : nullptr);
}

}  // namespace cenacle
