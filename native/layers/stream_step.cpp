#include "layers/stream_step.h"

#include <cstring>
#include <vector>

#include "layers/parts.h"

namespace cenacle {
namespace {

thread_local Buffer<float> floats;
thread_local std::array<Prepared, 3> projected_input;
thread_local Prepared output_input;

}  // namespace

void attend_streams(const Kernels& kernels, const Ops& ops, const StreamStep& s, Attention* each, int64_t streams,
                    const AppendHead& append, const float* x, float* out) {
  const int64_t wide = s.layers[0].rows, narrow = s.layers[1].rows, in = s.layers[0].matrix.width, width = s.width;
  const int64_t kv_heads = narrow / width, group = wide / narrow, half = s.rope.dims / 2;
  float* const q = floats.get(streams * (2 * (wide + narrow) + in));
  float *const k = q + streams * wide, *const v = k + streams * narrow, *const all_seen = v + streams * narrow;
  float *const seen = s.output ? all_seen : out, *const normed = all_seen + streams * wide;
  float* const projected[3] = {q, k, v};
  const float* const from = s.frame.norm ? normed : x;
  const float* const turns = rope_table(s.rope);
  bool is_short = true;  // the attention of each is one task for each key head
  for (int64_t t = 0; t < streams; t++) {
    Attention& a = each[t];
    a.q = q + t * wide, a.q_strides[1] = a.q_strides[2] = width, a.out = seen + t * wide;
    is_short = is_short && a.rows() <= ROWS_AT_ONCE && a.keys <= KEYS_OF_PART;
  }

  // Tasks: what the projections want of each token, the projections' rows, heads, the output's rows.
  std::array<Prepared, 3>& inputs = projected_input;
  Prepared& attended = output_input;
  Activations a[3] = {}, b{};
  bool is_same[3] = {};
  int64_t first_of[4], sizes[3];
  const int64_t size = chunk(wide + 2 * narrow, 256, streams);
  first_of[0] = streams;
  for (int i = 0; i < 3; i++) {
    const Layout layout = kernels.choose(s.layers[i].matrix);
    for (int j = 0; j < i && !is_same[i]; j++)
      if (a[j].layout == layout) a[i] = a[j], is_same[i] = true;
    if (!is_same[i]) a[i] = inputs[i].reserve(kernels, s.layers[i].matrix, from, streams);
    const int64_t rows = s.layers[i].rows, tasks = (rows + size - 1) / size;
    sizes[i] = ((rows + tasks - 1) / tasks + 15) / 16 * 16;  // about as many rows in each
    first_of[i + 1] = first_of[i] + (rows + sizes[i] - 1) / sizes[i];
  }
  const int64_t heads = first_of[3], ends = heads + streams * kv_heads;
  int64_t all = ends, output_size = 0;
  if (s.output && is_short) {
    b = attended.reserve(kernels, s.output->matrix, seen, streams);
    output_size = chunk(s.output->rows, 256, streams);
    all += (s.output->rows + output_size - 1) / output_size;
  }
  Countdown unprepared, unprojected, unseen;
  unprepared.expect(streams), unprojected.expect(heads - streams), unseen.expect(streams);
  static thread_local std::vector<Countdown> unattended;  // heads of each stream
  if (int64_t(unattended.size()) < streams) unattended = std::vector<Countdown>(streams);
  Countdown* const left = unattended.data();
  for (int64_t t = 0; t < streams; t++) left[t].expect(kv_heads);

  const auto prepare = [&](int64_t t) {
    const Finally end{[&] { unprepared.finish(); }};
    if (s.frame.norm) ops.rms_norm(x + t * in, s.frame.norm, s.frame.eps, 1, in, normed + t * in);
    for (int i = 0; i < 3; i++)
      if (!is_same[i]) inputs[i].fill(kernels, t, t + 1);
  };
  const auto project = [&](int64_t i) {
    const Finally end{[&] { unprojected.finish(); }};
    unprepared.wait();
    const int m = i < first_of[1] ? 0 : i < first_of[2] ? 1 : 2;
    const int64_t first = (i - first_of[m]) * sizes[m];
    multiply_rows(kernels, s.layers[m], a[m], first, std::min(s.layers[m].rows, first + sizes[m]), streams, projected[m]);
  };
  const auto attend = [&](int64_t t, int64_t head) {
    const Finally end{[&] {
      if (!left[t].finish()) return;
      if (all > ends) attended.fill(kernels, t, t + 1);
      unseen.finish();
    }};
    unprojected.wait();
    float* const parts[2] = {q + t * wide + head * group * width, k + t * narrow + head * width};
    const float* const turn = turns + (s.rope.offset_stride ? 2 * t * half : 0);
    for (int i = 0; i < 2; i++) {
      const int64_t rows = i ? 1 : group;
      if (s.norms[i]) ops.rms_norm(parts[i], s.norms[i], s.eps[i], rows, width, parts[i]);
      for (int64_t r = 0; r < rows; r++)
        ops.rotate(parts[i] + r * width, turn, turn + half, half, s.rope.traditional, parts[i] + r * width);
    }
    append(t, head, parts[1], v + t * narrow + head * width);
    if (is_short) attend_head(ops, each[t], 0, head);
  };
  const auto put_out = [&](int64_t i) {
    unseen.wait();
    const int64_t rows = s.output->rows, first = i * output_size, last = std::min(rows, first + output_size);
    multiply_rows(kernels, *s.output, b, first, last, streams, out);
    for (int64_t t = 0; s.frame.add && t < streams; t++)
      for (int64_t r = first; r < last; r++) out[t * rows + r] += x[t * rows + r];
  };
  WorkerPool::get().run(all, [&](int64_t i) {
    if (i < streams)
      prepare(i);
    else if (i < heads)
      project(i);
    else if (i < ends)
      attend((i - heads) / kv_heads, (i - heads) % kv_heads);
    else
      put_out(i - ends);
  });
  if (is_short) return;
  attention(ops, each, streams);
  if (!s.output) return;
  linear(kernels, *s.output, seen, streams, out);
  for (int64_t i = 0; s.frame.add && i < streams * s.output->rows; i++) out[i] += x[i];
}

}  // namespace cenacle
