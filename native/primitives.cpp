// The module cenacle._native: layers as MLX primitives.
//
// Owns: what enters MLX's lazy graph, checks of shapes and types at load, the choice of a kernel set.
// Does not know: models, ranks. Weights are checked once, when a `Weights` is made; a call costs one
// graph node; matrices that the kernels want packed are copied then. Outputs are float32. See docs/structure.md for where it enters a model.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <chrono>
#include <cstring>
#if defined(__GLIBC__)
#include <malloc.h>
#endif
#include <optional>
#include <stdexcept>
#include <string>
#include <variant>

#include "deal.h"
#include "decode.inc.h"
#include "fast.h"
#include "layers.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"
#include "mlx/version.h"
#include "pool.h"

namespace nb = nanobind;
namespace mx = mlx::core;

namespace cenacle {
namespace {

std::atomic<const Kernels*> chosen{usable().front()};

// Nanoseconds spent in layers and experts so far: what a token's time is compared with.
std::atomic<int64_t> busy_ns{0};
class Busy {
 public:
  ~Busy() {
    busy_ns += std::chrono::nanoseconds(std::chrono::steady_clock::now() - since_).count();
  }

 private:
  std::chrono::steady_clock::time_point since_ = std::chrono::steady_clock::now();
};

void use(const std::string& name) {
  for (const Kernels* k : usable())
    if (name == k->name) {
      chosen = k;
      return;
    }
  throw std::invalid_argument("this processor has no kernels named " + name);
}

// Bits of the activations' integers, for weights that are made from now on.
std::atomic<int> activations{16};

void use_activations(int bits) {
  if (bits != 16 && bits != 8)
    throw std::invalid_argument("activations: expected 16 or 8 bits, got " + std::to_string(bits));
  activations = bits;
}

// The matrices of one linear layer, or of a stack of them, as its kernels want them; held, so that a graph
// can use pointers.
struct Weights {
  mx::array weight;
  std::optional<mx::array> scales, biases, bias;
  Format format;
  Float type;
  int bits, group;
  int64_t count, rows, width;
  const Kernels* kernels = chosen;
  bool stacked, packed = false;
  int bits_of_activations = activations;

  Weights(mx::array w, std::optional<mx::array> s, std::optional<mx::array> z,
          std::optional<mx::array> b, int bits, int group, const std::string& mode)
      : weight(std::move(w)), scales(std::move(s)), biases(std::move(z)), bias(std::move(b)),
        bits(bits), group(group) {
    if (weight.ndim() != 2 && weight.ndim() != 3)
      throw std::invalid_argument("weight: expected [rows, width] or [experts, rows, width]");
    stacked = weight.ndim() == 3;
    count = stacked ? weight.shape(0) : 1;
    rows = weight.shape(-2);
    std::vector<mx::array> all{weight};
    if (!scales) {
      format = Format::dense;
      type = real(weight.dtype());
      width = weight.shape(-1);
    } else if (mode == "affine" || mode == "mxfp4") {
      const bool affine = mode == "affine";
      format = affine ? Format::affine : Format::mxfp4;
      const std::string given = std::to_string(bits) + " bits in groups of " + std::to_string(group);
      const bool known = affine ? (bits >= 2 && bits <= 8 && bits != 7) &&
                                      (group == 32 || group == 64 || group == 128)
                                : bits == 4 && group == 32;
      if (!known) throw std::invalid_argument(mode + " with " + given + " has no kernels");
      if (affine != biases.has_value() || weight.dtype() != mx::uint32)
        throw std::invalid_argument("these are not weights as mx.quantize gives them");
      width = int64_t(scales->shape(-1)) * group;
      if (weight.shape(-1) * int64_t(32) != width * bits || scales->ndim() != weight.ndim() ||
          scales->shape(-2) != rows || (affine && biases->shape() != scales->shape()) ||
          (weight.ndim() == 3 && scales->shape(0) != count))
        throw std::invalid_argument("scales do not fit the weight");
      if (affine) {
        type = real(scales->dtype());
        if (biases->dtype() != scales->dtype())
          throw std::invalid_argument("scales and biases have different types");
        all.push_back(*biases);
      } else {
        type = Float::f32;
        if (scales->dtype() != mx::uint8)
          throw std::invalid_argument("mxfp4: expected scales of 8 bits");
      }
      all.push_back(*scales);
    } else {
      throw std::invalid_argument(mode + " has no kernels");
    }
    if (bias) {
      if (bias->size() != size_t(count * rows) || bias->dtype() != mx::float32)
        throw std::invalid_argument("bias: expected a float32 for every row");
      all.push_back(*bias);
    }
    {
      nb::gil_scoped_release release;
      mx::eval(all);
    }
    for (const auto& array : all)
      if (!array.flags().row_contiguous)
        throw std::invalid_argument("weights must be contiguous");
    if (kernels->packs(linear().matrix)) pack_all();
  }

  // A copy takes the place of the arrays, which are free to go when their owner lets them.
  void pack_all() {
    nb::gil_scoped_release release;
    const Linear plain = linear();
    Matrix one = plain.matrix;
    one.rows = rows;
    const int64_t each = packed_bytes(one);
    const int64_t lines = (count * each + 63) / 64 + 1;
    mx::array all(mx::allocator::malloc(lines * 64), {int(lines), 64}, mx::uint8);
    uint8_t* to = aligned(all);
    Pool::get().run(count, [&](int64_t i) {
      Matrix m = plain.of(i);
      m.rows = rows;
      cenacle::pack(m, to + i * each);
    });
    weight = all;
    scales.reset();
    biases.reset();
    packed = true;
  }

  // A vector of words should not lie on two lines of the cache.
  static uint8_t* aligned(const mx::array& a) {
    const auto at = reinterpret_cast<uintptr_t>(a.data<char>());
    return reinterpret_cast<uint8_t*>((at + 63) / 64 * 64);
  }

  static Float real(mx::Dtype t) {
    if (t == mx::float32) return Float::f32;
    if (t == mx::bfloat16) return Float::bf16;
    if (t == mx::float16) return Float::f16;
    throw std::invalid_argument("expected weights or scales of float32, bfloat16 or float16");
  }

  void inputs(std::vector<mx::array>& to) const {
    to.push_back(weight);
    for (const auto* a : {&scales, &biases, &bias})
      if (*a) to.push_back(**a);
  }

  Linear linear() const {
    const auto bytes = [](const std::optional<mx::array>& a) {
      return a ? reinterpret_cast<const uint8_t*>(a->data<char>()) : nullptr;
    };
    Matrix m{format, type, bits, group, bytes(weight), bytes(scales), bytes(biases),
             count * rows, width, 0, 0};
    m.activations = bits_of_activations;
    if (packed) {
      m = cenacle::packed(m, aligned(weight));
    } else {
      m.weight_stride = int64_t(weight.shape(-1)) * mx::size_of(weight.dtype());
      if (scales) m.scale_stride = int64_t(scales->shape(-1)) * mx::size_of(scales->dtype());
    }
    return {m, bias ? bias->data<float>() : nullptr, rows, count};
  }
};

// A strided array of 32-bit values as a contiguous copy.
struct Strided {
  const uint32_t* data;
  mx::Shape shape;
  mx::Strides strides;
  int64_t size;
  bool contiguous;

  explicit Strided(const mx::array& a)
      : data(a.data<uint32_t>()), shape(a.shape()), strides(a.strides()), size(a.size()),
        contiguous(a.flags().row_contiguous) {}

  template <class T>
  const T* read(std::vector<uint32_t>& copy) const {
    if (contiguous) return reinterpret_cast<const T*>(data);
    copy.resize(size);
    std::vector<int64_t> at(shape.size(), 0);
    int64_t offset = 0;
    for (int64_t i = 0; i < size; i++) {
      copy[i] = data[offset];
      for (int d = int(shape.size()) - 1; d >= 0; d--) {
        offset += strides[d];
        if (++at[d] < shape[d]) break;
        offset -= strides[d] * shape[d];
        at[d] = 0;
      }
    }
    return reinterpret_cast<const T*>(copy.data());
  }
};

class Primitive : public mx::Primitive {
 public:
  explicit Primitive(mx::Stream s) : mx::Primitive(s) {}
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("cenacle's native layers run on the CPU only");
  }

 protected:
  float* begin(const std::vector<mx::array>& inputs, mx::array& out) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (const auto& a : inputs) encoder.set_input_array(a);
    encoder.set_output_array(out);
    return out.data<float>();
  }
};

class LinearPrimitive : public Primitive {
 public:
  LinearPrimitive(mx::Stream s, Linear layer, const Kernels* kernels)
      : Primitive(s), layer_(layer), kernels_(kernels) {}
  const char* name() const override { return "CenacleLinear"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    float* out = begin(inputs, outputs[0]);
    const int64_t tokens = inputs[0].size() / layer_.matrix.width;
    mx::cpu::get_command_encoder(stream()).dispatch(
        [x = Strided(inputs[0]), out, tokens, layer = layer_, kernels = kernels_] {
          const Busy busy;
          std::vector<uint32_t> copy;
          linear(*kernels, layer, x.read<float>(copy), tokens, out);
        });
  }

 private:
  Linear layer_;
  const Kernels* kernels_;
};

class ExpertsPrimitive : public Primitive {
 public:
  ExpertsPrimitive(mx::Stream s, Experts experts, const Kernels* kernels,
                   std::shared_ptr<const Dealer> dealer, bool summed)
      : Primitive(s), experts_(std::move(experts)), kernels_(kernels), dealer_(std::move(dealer)),
        summed_(summed) {}
  const char* name() const override { return summed_ ? "CenacleExpertsSum" : "CenacleExperts"; }

  // Inputs: x, ids, which row each id is, the ids' weights if they are summed, matrices.
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    float* out = begin(inputs, outputs[0]);
    const int64_t k = inputs[1].shape(-1), tokens = k ? inputs[1].size() / k : 0;
    mx::cpu::get_command_encoder(stream()).dispatch(
        [x = Strided(inputs[0]), ids = Strided(inputs[1]), map = inputs[2].data<int32_t>(),
         known = int64_t(inputs[2].size()), out, tokens, k, e = experts_,
         kernels = kernels_, dealer = dealer_,
         weights = summed_ ? std::optional<Strided>(inputs[3]) : std::nullopt] {
          const Busy busy;
          std::vector<uint32_t> copy, copied, weighted;
          const uint32_t* id = ids.read<uint32_t>(copied);
          std::vector<int32_t> rows(tokens * k);
          for (int64_t i = 0; i < tokens * k; i++) {
            if (id[i] >= uint64_t(known))
              throw std::runtime_error("expert id " + std::to_string(id[i]) + " of " +
                                       std::to_string(known));
            rows[i] = map[id[i]];
          }
          if (dealer) {  // replicas of what we hold may be computed elsewhere
            std::vector<int64_t> counts(dealer->holders.size(), 0);
            for (int64_t i = 0; i < tokens * k; i++)
              if (id[i] < counts.size()) counts[id[i]]++;
            const std::vector<int> dealt = dealer->deal(counts);
            for (int64_t i = 0; i < tokens * k; i++)
              if (rows[i] >= 0 && dealt[id[i]] != dealer->rank) rows[i] = -1;
          }
          if (weights)
            experts_sum(*kernels, e, x.read<float>(copy), rows.data(), weights->read<float>(weighted),
                        tokens, k, out);
          else
            experts(*kernels, e, x.read<float>(copy), rows.data(), tokens, k, out);
        });
  }

 private:
  Experts experts_;
  const Kernels* kernels_;
  std::shared_ptr<const Dealer> dealer_;
  bool summed_;
};

mx::array as(const mx::array& a, mx::Dtype t, mx::Stream s) {
  return a.dtype() == t ? a : mx::astype(a, t, s);
}

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

class EmbedPrimitive : public Primitive {
 public:
  EmbedPrimitive(mx::Stream s, Linear layer) : Primitive(s), layer_(layer) {}
  const char* name() const override { return "CenacleEmbed"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    float* out = begin(inputs, outputs[0]);
    mx::cpu::get_command_encoder(stream()).dispatch(
        [ids = Strided(inputs[0]), out, m = layer_.matrix] {
          std::vector<uint32_t> copy;
          const uint32_t* id = ids.read<uint32_t>(copy);
          for (int64_t i = 0; i < ids.size; i++) {
            if (id[i] >= uint64_t(m.rows))
              throw std::runtime_error("token " + std::to_string(id[i]) + " of " +
                                       std::to_string(m.rows));
            decode_row(m, id[i], out + i * m.width);
          }
        });
  }

 private:
  Linear layer_;
};

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

// What `Weights` was made of: weight, scales and biases, in the lazy graph; nothing if it keeps them itself.
std::vector<mx::array> arrays(const Weights& w) {
  if (!w.packed) return {};
  const auto shape = [&](int64_t n) {
    return w.stacked ? mx::Shape{int(w.count), int(w.rows), int(n)} : mx::Shape{int(w.rows), int(n)};
  };
  const mx::Dtype types[] = {mx::float32, mx::bfloat16, mx::float16};
  std::vector<mx::Shape> shapes{shape(w.width * w.bits / 32), shape(w.width / w.group)};
  std::vector<mx::Dtype> kinds{mx::uint32, w.format == Format::mxfp4 ? mx::uint8 : types[int(w.type)]};
  if (w.format == Format::affine) {
    shapes.push_back(shapes[1]);
    kinds.push_back(kinds[1]);
  }
  const mx::Stream s = mx::default_stream(mx::Device::cpu);
  return mx::array::make_arrays(shapes, kinds, std::make_shared<UnpackPrimitive>(s, w.linear()), {w.weight});
}

// The matrices of a layer's experts and what is between them.
struct Stack {
  std::vector<Weights> in;
  Weights down;
  mx::array map;
  Act act;
  float a, b;
  std::shared_ptr<const Dealer> dealer;  // null: every expert that we hold is ours to compute

  Stack(std::vector<Weights> in_, Weights down_, mx::array map_, int act_, float a, float b,
        const std::optional<Dealer>& dealer_)
      : in(std::move(in_)), down(std::move(down_)), map(std::move(map_)), act(Act(act_)), a(a), b(b) {
    if (dealer_) dealer = std::make_shared<const Dealer>(*dealer_);
    if (dealer && dealer->holders.size() + 1 != map.size())
      throw std::invalid_argument("map: expected an entry for every expert dealt, and one more");
    if (in.size() != (gated(act) ? 2u : 1u))
      throw std::invalid_argument("wrong number of matrices for this activation");
    for (const auto& w : in)
      if (w.count != down.count || w.rows != down.width || w.width != in[0].width)
        throw std::invalid_argument("the experts' matrices do not fit each other");
    for (const auto& w : in)
      if (w.kernels != down.kernels)
        throw std::invalid_argument("the experts' matrices were made for different kernels");
    {
      nb::gil_scoped_release release;
      mx::eval(map);
    }
    if (map.dtype() != mx::int32 || map.ndim() != 1 || !map.flags().row_contiguous)
      throw std::invalid_argument("map: expected a vector of int32");
    for (size_t i = 0; i < map.size(); i++)
      if (map.data<int32_t>()[i] >= down.count)
        throw std::invalid_argument("map: names an expert that is not there");
  }
};

mx::array call_experts(const mx::array& x, const mx::array& ids, const Stack& e,
                       const std::optional<mx::array>& weights) {
  mx::Shape shape = ids.shape();
  if (weights && weights->shape() != shape)
    throw std::invalid_argument("expected a weight for each of the ids");
  if (x.ndim() == 0 || ids.ndim() != x.ndim() || x.shape(-1) != e.in[0].width ||
      !std::equal(shape.begin(), shape.end() - 1, x.shape().begin()))
    throw std::invalid_argument("expected x [..., " + std::to_string(e.in[0].width) +
                                "] and ids [..., k]");
  if (weights) shape.pop_back();
  shape.push_back(int(e.down.rows));
  const mx::Stream s = mx::default_stream(mx::Device::cpu);
  const bool word = ids.dtype() == mx::uint32 || ids.dtype() == mx::int32;
  std::vector<mx::array> inputs{as(x, mx::float32, s), word ? ids : mx::astype(ids, mx::uint32, s),
                                e.map};
  if (weights) inputs.push_back(as(*weights, mx::float32, s));
  Experts raw{{}, e.down.linear(), e.act, e.a, e.b};
  for (const auto& w : e.in) {
    raw.in.push_back(w.linear());
    w.inputs(inputs);
  }
  e.down.inputs(inputs);
  return mx::array(std::move(shape), mx::float32,
                   std::make_shared<ExpertsPrimitive>(s, std::move(raw), e.down.kernels, e.dealer,
                                                      weights.has_value()),
                   std::move(inputs));
}

// ---- queries, keys and values -----------------------------------------------------------------

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
    encoder.dispatch([x = Strided(inputs[0]), out0 = out[0], out1 = out[1], out2 = out[2],
                      norm0 = norms[0], norm1 = norms[1], eps = eps_, layers = layers_, tokens, length,
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
      static thread_local std::vector<float> projected;
      float* const to[2] = {out0, out1};
      const float* const norm[2] = {norm0, norm1};
      for (int i = 0; i < 2; i++) {
        const int64_t row = layers[i].rows;
        projected.resize(tokens * row);
        float* p = projected.data();
        {
          const Busy busy;
          linear(*kernels, layers[i], from, tokens, p);
        }
        if (norm[i]) rms_norm(*ops, p, norm[i], eps[i], tokens * row / width, width, p);
        rope.x = p, rope.heads = row / width, rope.out = to[i];
        rope.strides[0] = length * row, rope.strides[1] = width, rope.strides[2] = row;
        cenacle::rope(*ops, rope);
      }
      const Busy busy;
      linear(*kernels, layers[2], from, tokens, out2);
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

// x [batch, length, in] -> queries, keys and values [batch, heads, length, width], the first two
// normalised by head where a norm is given, and turned as `rope` does with the base's rates.
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

}  // namespace

const Ops& ops() {
#ifdef CENACLE_AVX2
  if (chosen != &portable) return ops_avx2;
#endif
  return ops_portable;
}

}  // namespace cenacle

NB_MODULE(_native, m) {
  using namespace cenacle;
  m.attr("mlx_version") = std::to_string(MLX_VERSION_MAJOR) + "." +
                          std::to_string(MLX_VERSION_MINOR) + "." +
                          std::to_string(MLX_VERSION_PATCH);
  m.def("set_threads", [](int n) {
    nb::gil_scoped_release release;
    Pool::get().resize(n);
  });
  m.def("threads", [] { return Pool::get().threads(); });
  m.def("kernels", [] {
    std::vector<std::string> names;
    for (const Kernels* k : usable()) names.push_back(k->name);
    return names;
  });
  m.def("used", [] { return std::string(chosen.load()->name); });
  m.def("use", &use);
  // Gives freed memory back to the machine: what was packed leaves holes that the next array does not fit.
  m.def("trim", [] {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
  });
  m.def("use_activations", &use_activations, nb::arg("bits"));
  m.def("activations", [] { return activations.load(); });
  nb::class_<Weights>(m, "Weights")
      .def(nb::init<mx::array, std::optional<mx::array>, std::optional<mx::array>,
                    std::optional<mx::array>, int, int, const std::string&>(),
           nb::arg("weight"), nb::arg("scales").none(), nb::arg("biases").none(),
           nb::arg("bias").none(), nb::arg("bits"), nb::arg("group_size"), nb::arg("mode"))
      .def("arrays", &arrays);
  nb::class_<Dealer>(m, "Dealer")
      .def("__init__",
           [](Dealer* self, std::vector<std::vector<int>> holders, std::vector<int64_t> speeds,
              int rank) {
             for (const auto& ranks : holders)
               for (const int r : ranks)
                 if (r < 0 || size_t(r) >= speeds.size())
                   throw std::invalid_argument("holders: expected ranks that have a speed");
             new (self) Dealer{std::move(holders), std::move(speeds), rank};
           },
           nb::arg("holders"), nb::arg("speeds"), nb::arg("rank"))
      .def("deal", [](const Dealer& self, const std::vector<int64_t>& counts) {
        if (counts.size() != self.holders.size())
          throw std::invalid_argument("counts: expected one for every expert");
        return self.deal(counts);
      }, nb::arg("counts"));
  nb::class_<Stack>(m, "Stack")
      .def(nb::init<std::vector<Weights>, Weights, mx::array, int, float, float,
                    const std::optional<Dealer>&>(),
           nb::arg("inputs"), nb::arg("down"), nb::arg("rows"), nb::arg("activation"), nb::arg("a"),
           nb::arg("b"), nb::arg("dealer").none() = nb::none());
  m.def("busy_s", [] { return double(busy_ns) * 1e-9; });
  define_fast(m);
  m.def("embed", &call_embed, nb::arg("ids"), nb::arg("weights"));
  m.def("linear", &call_linear, nb::arg("x"), nb::arg("weights"));
  m.def("experts", &call_experts, nb::arg("x"), nb::arg("ids"), nb::arg("stack"),
        nb::arg("weights").none() = nb::none());
  m.def("qkv", &call_qkv, nb::arg("x"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::kw_only(),
        nb::arg("width"), nb::arg("q_norm").none(), nb::arg("k_norm").none(), nb::arg("q_eps"),
        nb::arg("k_eps"), nb::arg("dims"), nb::arg("traditional"), nb::arg("base"), nb::arg("scale"),
        nb::arg("offset"));
  // A benchmark's ceiling: reads bytes as fast as one core or all can, and adds them up.
  m.def("read", [](const mx::array& a) {
    const uint64_t* data = reinterpret_cast<const uint64_t*>(a.data<char>());
    const int64_t words = int64_t(a.nbytes()) / 8, size = 1 << 15;
    std::atomic<uint64_t> sum{0};
    nb::gil_scoped_release release;
    Pool::get().run((words + size - 1) / size, [&](int64_t i) {
      uint64_t part[8] = {};
      const int64_t last = std::min(words, (i + 1) * size);
      for (int64_t j = i * size; j + 8 <= last; j += 8) {
        for (int k = 0; k < 8; k++) part[k] += data[j + k];
      }
      for (const uint64_t p : part) sum += p;
    });
    return sum.load();
  });
}
