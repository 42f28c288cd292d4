// A layer's attention for one new token of each of several streams, each with a cache of its own: one node for all.
//
// Owns: appending to a cache's buffer, and the node. Does not know: who owns a buffer.
// Why: by MLX's operations it is nine nodes a stream. And MLX copies a buffer that tasks to come still read, as they do
// where the next step's graph is evaluated far enough ahead: rows behind those that others read are written where they
// lie, if the stream is `owned`.
// Invariant: a result is the bits that a stream alone gives. Next: src/cenacle/model/stream_caches.py.
#include <array>
#include <cstring>

#include "primitives/fast_ops.h"
#include "primitives/primitives.h"

namespace cenacle {
namespace {

template <class T>
void write_row(const float* from, int64_t n, char* to) {
  auto* out = reinterpret_cast<T*>(to);
  for (int64_t i = 0; i < n; i++) out[i] = static_cast<T>(from[i]);
}

// A new row of each head into a buffer [1, heads, capacity, width]: in place, or into a copy that may have more room.
struct Append {
  const char* from;  // null: in place
  mx::Strides strides;
  char* to;
  int64_t kept, capacity, heads, width, size, at;
  void (*write)(const float*, int64_t, char*);

  Append(const mx::array& in, mx::array& out, int64_t row, bool owned)
      : kept(in.shape(2)), capacity(out.shape(2)), heads(out.shape(1)), width(out.shape(3)), size(out.itemsize()), at(row) {
    if (owned && in.flags().row_contiguous && in.shape() == out.shape()) {
      out.copy_shared_buffer(in);
      from = nullptr;
    } else {
      out.set_data(mx::allocator::malloc(out.nbytes()));
      from = in.data<char>(), strides = in.strides();
    }
    to = out.data<char>();
    write = out.dtype() == mx::float32    ? write_row<float>
            : out.dtype() == mx::bfloat16 ? write_row<mx::bfloat16_t>
                                          : write_row<mx::float16_t>;
  }

  // row [width], of head `h`.
  void run(int64_t h, const float* row) const {
    char* const all = to + h * capacity * width * size;
    if (from) copy_head(h, all);
    write(row, width, all + at * width * size);
  }

  void copy_head(int64_t h, char* all) const {
    for (int64_t t = 0; t < kept; t++) {
      const char* old = from + (h * strides[1] + t * strides[2]) * size;
      char* now = all + t * width * size;
      if (strides[3] == 1)
        std::memcpy(now, old, width * size);
      else
        for (int64_t i = 0; i < width; i++) std::memcpy(now + i * size, old + i * strides[3] * size, size);
    }
    std::memset(all + kept * width * size, 0, (capacity - kept) * width * size);
  }
};

class StreamAttentionPrimitive : public Primitive {
 public:
  StreamAttentionPrimitive(mx::Stream s, const StreamAttention& settings, std::array<Linear, 3> layers,
                           std::optional<Linear> output, const Kernels* kernels, std::vector<int64_t> offsets,
                           std::vector<int> owned)
      : Primitive(s), layers_(layers), output_(output), kernels_(kernels), width_(settings.width),
        normed_{settings.q_norm.has_value(), settings.k_norm.has_value()}, eps_{settings.q_eps, settings.k_eps},
        eps_of_input_(settings.input_eps), normed_input_(settings.input_norm.has_value()), add_(settings.add),
        scale_(settings.attention_scale), offsets_(std::move(offsets)), owned_(std::move(owned)) {
    rope_.dims = settings.dims, rope_.traditional = settings.traditional, rope_.scale = settings.scale;
  }
  const char* name() const override { return "CenacleStreamAttention"; }

  // Inputs: x [streams, 1, in], rates, norms' weights (the input's last), each stream's keys, then its values, matrices.
  // Outputs: [streams, 1, out], the keys, the values.
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const size_t streams = offsets_.size();
    outputs[0].set_data(mx::allocator::malloc(outputs[0].nbytes()));
    size_t next = 2;
    std::array<const float*, 2> norms{};
    for (int i = 0; i < 2; i++)
      if (normed_[i]) norms[i] = inputs[next++].data<float>();
    const Frame frame{normed_input_ ? inputs[next++].data<float>() : nullptr, eps_of_input_, add_};
    std::vector<Append> appends;
    for (size_t i = 0; i < 2 * streams; i++)
      appends.emplace_back(inputs[next + i], outputs[1 + i], offsets_[i % streams], owned_[i % streams] != 0);
    const int64_t heads = layers_[0].rows / width_, kv_heads = layers_[1].rows / width_;
    std::vector<Attention> all(streams);
    for (size_t i = 0; i < streams; i++) {
      const mx::array &k = outputs[1 + i], &v = outputs[1 + streams + i];
      Attention& a = all[i];
      a = {};
      a.batch = a.length = 1, a.heads = heads, a.kv_heads = kv_heads, a.width = a.v_width = width_;
      a.keys = offsets_[i] + 1, a.scale = scale_;
      a.type = k.dtype() == mx::float32 ? Float::f32 : k.dtype() == mx::bfloat16 ? Float::bf16 : Float::f16;
      a.k = k.data<char>(), a.v = v.data<char>();
      a.k_strides[1] = a.v_strides[1] = appends[i].capacity * width_;
      a.k_strides[2] = a.v_strides[2] = width_;
    }
    Rope rope = rope_;
    rope.batch = int64_t(streams), rope.length = 1, rope.width = width_, rope.offset_stride = streams > 1;
    rope.rates = inputs[1].data<float>(), rope.rate_stride = inputs[1].strides(0);
    enqueue(stream(), outputs[0].nbytes(),
            [x = StridedInput(inputs[0]), out = outputs[0].data<float>(), layers = layers_, output = output_,
             kernels = kernels_, ops = &ops(), width = width_, norms, eps = eps_, rope, frame,
             appends = std::move(appends), all = std::move(all), offsets = offsets_]() mutable {
              const KernelTimer busy;
              std::vector<uint32_t> copy;
              const int64_t streams = int64_t(offsets.size());
              rope.offsets = offsets.data();
              const auto append = [&](int64_t stream, int64_t head, const float* key, const float* value) {
                appends[stream].run(head, key);
                appends[streams + stream].run(head, value);
              };
              attend_streams(*kernels, *ops, {layers, output ? &*output : nullptr, width, norms, eps, rope, frame},
                             all.data(), streams, append, x.read<float>(copy), out);
            });
  }

 private:
  std::array<Linear, 3> layers_;
  std::optional<Linear> output_;
  const Kernels* kernels_;
  int64_t width_;
  std::array<bool, 2> normed_;
  std::array<float, 2> eps_;
  float eps_of_input_;
  bool normed_input_, add_;
  float scale_;
  Rope rope_{};
  std::vector<int64_t> offsets_;
  std::vector<int> owned_;
};

void check(const mx::array& x, const StreamAttention& s, const std::vector<mx::array>& keys,
           const std::vector<mx::array>& values, const std::vector<int64_t>& offsets, const std::vector<int>& owned) {
  const size_t streams = offsets.size();
  if (x.ndim() != 3 || streams == 0 || x.shape(0) != int(streams) || x.shape(1) != 1)
    throw std::invalid_argument("attend_streams: expected x [streams, 1, width]");
  if (keys.size() != streams || values.size() != streams || owned.size() != streams)
    throw std::invalid_argument("attend_streams: expected keys, values, an offset and an owner for each stream");
  const int64_t heads = s.k.rows / s.width;
  for (size_t i = 0; i < streams; i++)
    for (const auto* a : {&keys[i], &values[i]})
      if (a->ndim() != 4 || a->shape(0) != 1 || a->shape(1) != heads || a->shape(3) != s.width ||
          a->shape(2) != keys[i].shape(2) || a->dtype() != keys[i].dtype() || offsets[i] < 0 ||
          offsets[i] > a->shape(2) ||
          (a->dtype() != mx::float32 && a->dtype() != mx::bfloat16 && a->dtype() != mx::float16))
        throw std::invalid_argument("attend_streams: expected buffers [1, heads, capacity, width] of floats with as "
                                    "many rows as the offset says");
}

}  // namespace

mx::array norm_weights(const mx::array& norm, int64_t width) {
  if (norm.ndim() != 1 || norm.shape(0) != width || norm.dtype() != mx::float32)
    throw std::invalid_argument("norms: expected float32 of width " + std::to_string(width));
  if (norm.is_available() && norm.flags().row_contiguous) return norm;
  mx::array weights = mx::contiguous(norm, false, mx::default_stream(mx::Device::cpu));
  nb::gil_scoped_release release;
  weights.eval();
  return weights;
}

StreamAttention::StreamAttention(Weights q_, Weights k_, Weights v_, int width_, std::optional<mx::array> q_norm_,
                                 std::optional<mx::array> k_norm_, float q_eps_, float k_eps_, int dims_,
                                 bool traditional_, float base_, float scale_, float attention_scale_,
                                 std::optional<Weights> output_, std::optional<mx::array> input_norm_,
                                 float input_eps_, bool add_)
    : q(std::move(q_)), k(std::move(k_)), v(std::move(v_)), width(width_), q_norm(std::move(q_norm_)),
      k_norm(std::move(k_norm_)), q_eps(q_eps_), k_eps(k_eps_), dims(dims_), traditional(traditional_), base(base_),
      scale(scale_), attention_scale(attention_scale_), output(std::move(output_)), input_norm(std::move(input_norm_)),
      input_eps(input_eps_), add(add_) {
  if (dims <= 0 || dims % 2 || dims > width)
    throw std::invalid_argument("dims: expected an even number up to " + std::to_string(width));
  if (add && (!output || output->rows != q.width))
    throw std::invalid_argument("add: expected an output projection to the input's width");
  for (auto* norm : {&q_norm, &k_norm})
    if (*norm) *norm = norm_weights(**norm, width);
  if (input_norm) input_norm = norm_weights(*input_norm, q.width);
  for (const auto* w : {&q, &k, &v})
    if (w->width != q.width || w->rows % width || w->kernels != q.kernels || w->stacked)
      throw std::invalid_argument("expected projections of one width, to heads of " + std::to_string(width));
  if (k.rows != v.rows || q.rows % k.rows || (output && (output->width != q.rows || output->kernels != q.kernels)))
    throw std::invalid_argument("the projections do not fit each other");
}

std::vector<mx::array> StreamAttention::call(const mx::array& x, const std::vector<mx::array>& keys,
                                             const std::vector<mx::array>& values, const std::vector<int64_t>& offsets,
                                             const std::vector<int>& owned) const {
  check(x, *this, keys, values, offsets, owned);
  if (x.shape(2) != q.width)
    throw std::invalid_argument("expected an input of width " + std::to_string(q.width));
  constexpr int64_t STEP = 256;  // rows that a buffer grows by
  const mx::Stream s = mx::default_stream(mx::Device::cpu);
  std::vector<mx::array> inputs{as(x, mx::float32, s), rates_of(base, dims / 2)};
  std::vector<mx::Shape> shapes{{x.shape(0), 1, int(output ? output->rows : q.rows)}};
  std::vector<mx::Dtype> types{mx::float32};
  for (const auto* norm : {&q_norm, &k_norm})
    if (*norm) inputs.push_back(**norm);
  if (input_norm) inputs.push_back(*input_norm);
  for (const auto* buffers : {&keys, &values})
    for (size_t i = 0; i < offsets.size(); i++) {
      const mx::array& buffer = (*buffers)[i];
      inputs.push_back(buffer);
      shapes.push_back(buffer.shape());
      if (offsets[i] == buffer.shape(2)) shapes.back()[2] = int((offsets[i] / STEP + 1) * STEP);
      types.push_back(buffer.dtype());
    }
  for (const auto* w : {&q, &k, &v}) w->inputs(inputs);
  if (output) output->inputs(inputs);
  return mx::array::make_arrays(
      std::move(shapes), types,
      std::make_shared<StreamAttentionPrimitive>(s, *this, std::array{q.linear(), k.linear(), v.linear()},
                                                 output ? std::optional(output->linear()) : std::nullopt, q.kernels,
                                                 offsets, owned),
      inputs);
}

}  // namespace cenacle
