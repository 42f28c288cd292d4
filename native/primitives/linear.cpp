// Linear layers, embeddings, and unpacking of packed weights.
#include "primitives/primitives.h"

#include "kernels/decode.inc.h"

namespace cenacle {
namespace {

class LinearPrimitive : public Primitive {
 public:
  LinearPrimitive(mx::Stream s, Linear layer, const Kernels* kernels)
      : Primitive(s), layer_(layer), kernels_(kernels) {}
  const char* name() const override { return "CenacleLinear"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    float* out = begin(inputs, outputs[0]);
    const int64_t tokens = inputs[0].size() / layer_.matrix.width;
    enqueue(
        stream(), outputs[0].nbytes(),
        [x = StridedInput(inputs[0]), out, tokens, layer = layer_, kernels = kernels_] {
          const KernelTimer busy;
          std::vector<uint32_t> copy;
          linear(*kernels, layer, x.read<float>(copy), tokens, out);
        });
  }

 private:
  Linear layer_;
  const Kernels* kernels_;
};

class EmbedPrimitive : public Primitive {
 public:
  EmbedPrimitive(mx::Stream s, Linear layer) : Primitive(s), layer_(layer) {}
  const char* name() const override { return "CenacleEmbed"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    float* out = begin(inputs, outputs[0]);
    enqueue(
        stream(), outputs[0].nbytes(),
        [ids = StridedInput(inputs[0]), out, m = layer_.matrix, scale = layer_.output_scale] {
          std::vector<uint32_t> copy;
          const uint32_t* id = ids.read<uint32_t>(copy);
          for (int64_t i = 0; i < ids.size; i++) {
            if (id[i] >= uint64_t(m.rows))
              throw std::runtime_error("token " + std::to_string(id[i]) + " of " +
                                       std::to_string(m.rows));
            float* row = out + i * m.width;
            decode_row(m, id[i], row);
            for (int64_t c = 0; scale && c < m.width; c++) row[c] *= scale[id[i]];
          }
        });
  }

 private:
  Linear layer_;
};

// A packed layer's arrays as they were given.
class UnpackPrimitive : public Primitive {
 public:
  UnpackPrimitive(mx::Stream s, Linear layer) : Primitive(s), layer_(layer) {}
  const char* name() const override { return "CenacleUnpack"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    std::vector<uint8_t*> to;
    for (auto& out : outputs) {
      begin(inputs, out);
      to.push_back(reinterpret_cast<uint8_t*>(out.data<char>()));
    }
    to.resize(3, nullptr);
    mx::cpu::get_command_encoder(stream()).dispatch(
        [l = layer_, to, w = outputs[0].nbytes() / layer_.experts,
         s = outputs[1].nbytes() / layer_.experts] {
          for (int64_t i = 0; i < l.experts; i++)
            unpack(l.of(i), 0, l.rows, to[0] + i * w, to[1] + i * s, to[2] ? to[2] + i * s : nullptr);
        });
  }

 private:
  Linear layer_;
};

}  // namespace

mx::array call_linear(const mx::array& x, const Weights& w) {
  if (x.ndim() == 0 || x.shape(-1) != w.width)
    throw std::invalid_argument("expected an input of width " + std::to_string(w.width));
  const mx::Stream s = mx::default_stream(mx::Device::cpu);
  mx::Shape shape = x.shape();
  shape.back() = int(w.rows);
  std::vector<mx::array> inputs{as(x, mx::float32, s)};
  w.inputs(inputs);
  return mx::array(std::move(shape), mx::float32,
                   std::make_shared<LinearPrimitive>(s, w.linear(), w.kernels), std::move(inputs));
}

mx::array call_embed(const mx::array& ids, const Weights& w) {
  const mx::Stream s = mx::default_stream(mx::Device::cpu);
  mx::Shape shape = ids.shape();
  shape.push_back(int(w.width));
  const bool word = ids.dtype() == mx::uint32 || ids.dtype() == mx::int32;
  std::vector<mx::array> inputs{word ? ids : mx::astype(ids, mx::uint32, s)};
  w.inputs(inputs);
  return mx::array(std::move(shape), mx::float32, std::make_shared<EmbedPrimitive>(s, w.linear()),
                   std::move(inputs));
}

std::vector<mx::array> arrays(const Weights& w) {
  if (!w.packed) return {};
  const auto shape = [&](int64_t n) {
    return w.stacked ? mx::Shape{int(w.count), int(w.rows), int(n)} : mx::Shape{int(w.rows), int(n)};
  };
  const mx::Dtype types[] = {mx::float32, mx::bfloat16, mx::float16};
  std::vector<mx::Shape> shapes{shape(w.width * w.bits / 32), shape(w.width / w.group)};
  const bool floats = w.format == Format::affine || w.format == Format::fp8;
  std::vector<mx::Dtype> kinds{mx::uint32, floats ? types[int(w.type)] : mx::uint8};
  if (w.format == Format::affine) {
    shapes.push_back(shapes[1]);
    kinds.push_back(kinds[1]);
  }
  const mx::Stream s = mx::default_stream(mx::Device::cpu);
  return mx::array::make_arrays(shapes, kinds, std::make_shared<UnpackPrimitive>(s, w.linear()), {w.weight});
}

}  // namespace cenacle
