#include "ops/ops.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/decode.inc.h"
#include "thread_pool.h"

namespace cenacle {
namespace {

// `task(first, last)` for all of `count` things of `size` floats, some at a time.
template <class Task>
void share(int64_t count, int64_t size, Task&& task) {
  const int64_t some = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, size));
  WorkerPool::get().run((count + some - 1) / some,
                  [&](int64_t i) { task(i * some, std::min(count, (i + 1) * some)); });
}

// Rows whose keys were all forbidden weigh all values alike, because MLX's masked scores are finite.
void average(const Attention& a, int64_t batch, int64_t kv_head, float* out) {
  const int64_t first = batch * a.v_strides[0] + kv_head * a.v_strides[1];
  std::fill(out, out + a.v_width, 0.f);
  for (int64_t j = 0; j < a.keys; j++)
    for (int64_t i = 0; i < a.v_width; i++)
      out[i] += at(a.type, static_cast<const uint8_t*>(a.v), first + j * a.v_strides[2] + i) / float(a.keys);
}

}  // namespace

void rms_norm(const Ops& ops, const float* x, const float* weight, float eps, int64_t rows, int64_t width,
              float* out) {
  share(rows, width, [&](int64_t first, int64_t last) {
    ops.rms_norm(x + first * width, weight, eps, last - first, width, out + first * width);
  });
}

void layer_norm(const Ops& ops, const float* x, const float* weight, const float* bias, float eps,
                int64_t rows, int64_t width, float* out) {
  share(rows, width, [&](int64_t first, int64_t last) {
    ops.layer_norm(x + first * width, weight, bias, eps, last - first, width, out + first * width);
  });
}

const float* rope_table(const Rope& r) {
  const int64_t half = r.dims / 2, tables = r.offset_stride ? r.batch : 1;
  struct Key {
    std::vector<float> rates;
    std::vector<int64_t> offsets;
    int64_t length = 0;
    float scale = 0;
    bool operator==(const Key&) const = default;
  };
  static thread_local Key made, key;
  static thread_local std::vector<float> table;
  key.rates.resize(half);
  for (int64_t i = 0; i < half; i++) {
    const float rate = r.rates[i * r.rate_stride];
    key.rates[i] = r.reciprocal ? 1.f / rate : rate;
  }
  key.offsets.resize(tables);
  for (int64_t i = 0; i < tables; i++) key.offsets[i] = r.offsets[i * r.offset_stride];
  key.length = r.length, key.scale = r.scale;
  if (key == made) return table.data();
  made.length = 0;  // until it is there
  table.resize(2 * tables * r.length * half);
  float* const all = table.data();
  const float* const by = key.rates.data();
  share(tables * r.length, 16 * half, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; p++) {
      const int64_t offset = r.offsets[p / r.length * r.offset_stride];
      const float position = float(p % r.length + offset) * r.scale;
      for (int64_t i = 0; i < half; i++) {
        all[2 * p * half + i] = std::cos(position * by[i]);
        all[2 * p * half + half + i] = std::sin(position * by[i]);
      }
    }
  });
  std::swap(made, key);
  return all;
}

void rope(const Ops& ops, const Rope& r) {
  const int64_t half = r.dims / 2;
  const float* const all = rope_table(r);
  share(r.batch * r.heads * r.length, r.width, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++) {
      const int64_t t = n % r.length, head = n / r.length % r.heads, b = n / r.length / r.heads;
      const float* x = r.x + b * r.strides[0] + head * r.strides[1] + t * r.strides[2];
      const float* turn = all + 2 * ((r.offset_stride ? b : 0) * r.length + t) * half;
      float* out = r.out + n * r.width;
      ops.rotate(x, turn, turn + half, half, r.traditional, out);
      std::memcpy(out + r.dims, x + r.dims, size_t(r.width - r.dims) * sizeof(float));
    }
  });
}

namespace {

// Row `r` of a tile of one key head, of `tiles`: its sums over all keys become the output.
void finish_row(const Attention& a, int64_t tiles, int64_t tile, int64_t r, const float* out, float top, float sum) {
  const int64_t batch = tile / tiles / a.kv_heads, kv_head = tile / tiles % a.kv_heads;
  const int64_t row = tile % tiles * ROWS_AT_ONCE + r, at = row / a.group();
  const int64_t head = kv_head * a.group() + row % a.group();
  float* to = a.out + ((batch * a.length + at) * a.heads + head) * a.v_width;
  if (a.allowed && top <= -FLT_MAX) return average(a, batch, kv_head, to);
  for (int64_t i = 0; i < a.v_width; i++) to[i] = out[i] / sum;
}

// A thread's own memory for `attend`.
float* attend_memory(const Attention& a) {
  static thread_local std::vector<float> scratch;
  scratch.resize(std::max<size_t>(scratch.size(), attend_scratch(a)));
  return scratch.data();
}

// And for the sums of up to ROWS_AT_ONCE rows over all keys.
float* sums_memory(const Attention& a, int64_t rows) {
  static thread_local std::vector<float> own;
  own.resize(std::max<size_t>(own.size(), rows * (padded(a.v_width) + 2)));
  return own.data();
}

}  // namespace

void attend_head(const Ops& ops, const Attention& a, int64_t batch, int64_t kv_head) {
  const int64_t rows = a.rows(), columns = padded(a.v_width);
  float* const out = sums_memory(a, rows);
  float *const top = out + rows * columns, *const sum = top + rows;
  ops.attend(a, batch, kv_head, 0, rows, 0, a.keys, out, top, sum, attend_memory(a));
  for (int64_t r = 0; r < rows; r++)
    finish_row(a, 1, batch * a.kv_heads + kv_head, r, out + r * columns, top[r], sum[r]);
}

void attention(const Ops& ops, const Attention* all, int64_t count) {
  // How one of them is divided: tiles of its rows and, of few rows over many keys, parts of the keys too.
  struct Division {
    int64_t rows, tiles, parts, size, columns, each, many, height;
    int64_t first;     // of its tasks
    float* kept;       // [many, parts, height, each], if there are parts
  };
  static thread_local std::vector<Division> divisions;
  static thread_local std::vector<float> partial;
  divisions.clear();
  int64_t tasks = 0, floats = 0;
  for (int64_t n = 0; n < count; n++) {
    const Attention& a = all[n];
    Division d{};
    d.rows = a.rows(), d.tiles = (d.rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    d.parts = d.tiles <= 4 ? std::max<int64_t>(1, (a.keys + KEYS_OF_PART - 1) / KEYS_OF_PART) : 1;
    d.size = d.parts > 1 ? KEYS_OF_PART : a.keys, d.columns = padded(a.v_width), d.each = d.columns + 2;
    d.many = a.batch * a.kv_heads * d.tiles, d.height = std::min<int64_t>(d.rows, ROWS_AT_ONCE);
    d.first = tasks;
    tasks += d.many * d.parts;
    if (d.parts > 1) floats += d.many * d.parts * d.height * d.each;
    divisions.push_back(d);
  }
  partial.resize(floats);
  floats = 0;
  for (Division& d : divisions)
    if (d.parts > 1) d.kept = partial.data() + floats, floats += d.many * d.parts * d.height * d.each;
  const Division* const by = divisions.data();  // another thread has divisions of its own

  WorkerPool::get().run(tasks, [&](int64_t task) {
    const int64_t n = std::upper_bound(by, by + count, task, [](int64_t t, const Division& d) { return t < d.first; }) -
                      by - 1;
    const Attention& a = all[n];
    const Division& d = by[n];
    const int64_t i = task - d.first, tile = i / d.parts, part = i % d.parts;
    const int64_t first = tile % d.tiles * ROWS_AT_ONCE, some = std::min<int64_t>(ROWS_AT_ONCE, d.rows - first);
    float* out = d.parts == 1 ? sums_memory(a, d.height) : d.kept + i * d.height * d.each;
    float *top = out + d.height * d.columns, *sum = top + d.height;
    ops.attend(a, tile / d.tiles / a.kv_heads, tile / d.tiles % a.kv_heads, first, some, part * d.size,
               std::min(a.keys, (part + 1) * d.size), out, top, sum, attend_memory(a));
    if (d.parts == 1)
      for (int64_t r = 0; r < some; r++) finish_row(a, d.tiles, tile, r, out + r * d.columns, top[r], sum[r]);
  });
  for (int64_t n = 0; n < count; n++) {
    const Attention& a = all[n];
    const Division& d = by[n];
    if (d.parts == 1) continue;
    share(d.many * d.height, d.parts * d.columns, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; m++) {
        const int64_t tile = m / d.height, r = m % d.height;
        if (tile % d.tiles * ROWS_AT_ONCE + r >= d.rows) continue;
        float* const of = d.kept + tile * d.parts * d.height * d.each;
        const auto out = [&](int64_t p) { return of + p * d.height * d.each + r * d.columns; };
        const auto top = [&](int64_t p) { return of[p * d.height * d.each + d.height * d.columns + r]; };
        const auto sum = [&](int64_t p) { return of[p * d.height * d.each + d.height * (d.columns + 1) + r]; };
        float highest = top(0), whole = 0;
        for (int64_t p = 1; p < d.parts; p++) highest = !(top(p) <= highest) ? top(p) : highest;
        for (int64_t p = 0; p < d.parts; p++) {
          const float factor = top(p) == -HUGE_VALF ? 0.f : std::exp(top(p) - highest);
          whole += factor * sum(p);
          for (int64_t i = 0; i < a.v_width; i++) out(0)[i] = factor * out(p)[i] + (p ? out(0)[i] : 0.f);
        }
        finish_row(a, d.tiles, tile, r, out(0), highest, whole);
      }
    });
  }
}

}  // namespace cenacle
