// Queries, keys and values in one node: three projections, norms by head, and rotation.
#include <array>

#include "primitives/fast_ops.h"
#include "primitives/primitives.h"

namespace cenacle {
namespace {

// What `call_qkv` computes, over raw pointers.
void project(const std::array<Linear, 3>& layers, const Kernels& kernels, const Ops& ops, int64_t width,
             std::array<const float*, 2> norms, std::array<float, 2> eps, Rope rope, const float* x, int64_t tokens,
             std::array<float*, 3> out) {
  static thread_local std::vector<float> projected;
  for (int i = 0; i < 2; i++) {
    const int64_t row = layers[i].rows;
    projected.resize(tokens * row);
    float* p = projected.data();
    {
      const KernelTimer busy;
      linear(kernels, layers[i], x, tokens, p);
    }
    if (norms[i]) rms_norm(ops, p, norms[i], eps[i], tokens * row / width, width, p);
    rope.x = p, rope.heads = row / width, rope.out = out[i];
    rope.strides[0] = rope.length * row, rope.strides[1] = width, rope.strides[2] = row;
    cenacle::rope(ops, rope);
  }
  const KernelTimer busy;
  linear(kernels, layers[2], x, tokens, out[2]);
}

class QkvPrimitive : public Primitive {
 public:
  QkvPrimitive(mx::Stream s, std::array<Linear, 3> layers, const Kernels* kernels, int64_t width, std::array<bool, 2> normed,
               std::array<float, 2> eps, Rope rope, std::optional<int64_t> offset)
      : Primitive(s), layers_(layers), kernels_(kernels), width_(width), normed_(normed), eps_(eps), rope_(rope),
        offset_(offset) {}
  const char* name() const override { return "CenacleQKV"; }

  // Inputs: x, rates, the offsets if they are an array, norms' weights, matrices.
  // Outputs: [batch, heads, length, width] each; values lie as their projection left them.
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const int64_t batch = inputs[0].shape(0), length = inputs[0].shape(1), tokens = batch * length;
    float* out[3];
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (const auto& a : inputs) encoder.set_input_array(a);
    for (int i = 0; i < 3; i++) {
      auto& o = outputs[i];
      if (i < 2) {
        o.set_data(mx::allocator::malloc(o.nbytes()));
      } else {
        const int64_t heads = layers_[2].rows / width_, row = heads * width_;
        o.set_data(mx::allocator::malloc(o.nbytes()), o.size(), {length * row, width_, row, 1},
                   {true, length == 1 || heads == 1, o.size() == size_t(width_)});
      }
      encoder.set_output_array(o);
      out[i] = o.data<float>();
    }
    size_t next = 2;
    const mx::array* offsets = offset_ ? nullptr : &inputs[next++];
    const float* norms[2];
    for (int i = 0; i < 2; i++) norms[i] = normed_[i] ? inputs[next++].data<float>() : nullptr;
    Rope rope = rope_;
    rope.batch = batch, rope.length = length, rope.width = width_;
    rope.rates = inputs[1].data<float>(), rope.rate_stride = inputs[1].strides(0);
    enqueue(stream(), outputs[0].nbytes(), [x = StridedInput(inputs[0]), out0 = out[0], out1 = out[1], out2 = out[2],
                      norm0 = norms[0], norm1 = norms[1], eps = eps_, layers = layers_, tokens,
                      width = width_, rope, kernels = kernels_, ops = &ops(), number = offset_.value_or(0),
                      where = offsets ? offsets->data<char>() : nullptr,
                      wide = offsets && offsets->dtype() == mx::int64,
                      count = offsets ? int64_t(offsets->size()) : int64_t(1),
                      step = offsets && offsets->ndim() ? int64_t(offsets->strides(0)) : int64_t(0)]() mutable {
      std::vector<uint32_t> copy;
      const float* from = x.read<float>(copy);
      std::vector<int64_t> positions(count, number);
      for (int64_t i = 0; where && i < count; i++)
        positions[i] = wide ? reinterpret_cast<const int64_t*>(where)[i * step]
                            : reinterpret_cast<const int32_t*>(where)[i * step];
      rope.offsets = positions.data(), rope.offset_stride = count > 1;
      project(layers, *kernels, *ops, width, {norm0, norm1}, eps, rope, from, tokens, {out0, out1, out2});
    });
  }

 private:
  std::array<Linear, 3> layers_;
  const Kernels* kernels_;
  int64_t width_;
  std::array<bool, 2> normed_;
  std::array<float, 2> eps_;
  Rope rope_;
  std::optional<int64_t> offset_;
};

}  // namespace

std::vector<mx::array> call_qkv(const mx::array& x, const Weights& q, const Weights& k, const Weights& v,
                                int width, const std::optional<mx::array>& q_norm,
                                const std::optional<mx::array>& k_norm, float q_eps, float k_eps, int dims,
                                bool traditional, float base, float scale,
                                const std::variant<int, mx::array>& offset) {
  if (x.ndim() != 3) throw std::invalid_argument("expected x [batch, length, width]");
  const auto* at = std::get_if<mx::array>(&offset);
  if (at && ((at->dtype() != mx::int32 && at->dtype() != mx::int64) || at->ndim() > 1 ||
             (at->size() != 1 && int(at->size()) != x.shape(0))))
    throw std::invalid_argument("offset: expected one whole number, or one for each row of the batch");
  if (dims <= 0 || dims % 2 || dims > width)
    throw std::invalid_argument("dims: expected an even number up to " + std::to_string(width));
  const mx::Stream s = mx::default_stream(mx::Device::cpu);
  std::vector<mx::array> inputs{as(x, mx::float32, s), rates_of(base, dims / 2)};
  std::optional<int64_t> number;
  if (at)
    inputs.push_back(*at);
  else
    number = std::get<int>(offset);
  for (const auto* norm : {&q_norm, &k_norm})
    if (*norm) {
      if ((*norm)->shape() != mx::Shape{width} || (*norm)->dtype() != mx::float32 ||
          !(*norm)->flags().row_contiguous)
        throw std::invalid_argument("norms: expected contiguous float32 of a head's width");
      inputs.push_back(**norm);
    }
  std::vector<mx::Shape> shapes;
  for (const auto* w : {&q, &k, &v}) {
    if (w->width != x.shape(2) || w->rows % width)
      throw std::invalid_argument("expected projections from " + std::to_string(x.shape(2)) +
                                  " to heads of " + std::to_string(width));
    if (w->kernels != q.kernels)
      throw std::invalid_argument("the projections were made for different kernels");
    shapes.push_back({x.shape(0), int(w->rows / width), x.shape(1), width});
    w->inputs(inputs);
  }
  Rope rope{};
  rope.dims = dims, rope.traditional = traditional, rope.scale = scale;
  return mx::array::make_arrays(
      std::move(shapes), {mx::float32, mx::float32, mx::float32},
      std::make_shared<QkvPrimitive>(s, std::array{q.linear(), k.linear(), v.linear()}, q.kernels, width,
                                     std::array{q_norm.has_value(), k_norm.has_value()},
                                     std::array{q_eps, k_eps}, rope, number),
      inputs);
}

}  // namespace cenacle
