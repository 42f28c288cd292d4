// The module cenacle._native: layers as MLX primitives.
//
// Owns: what enters MLX's lazy graph, checks of shapes and types at load, the choice of a kernel set.
// Does not know: models, ranks. Weights are checked once, when a `Weights` is made; a call costs one
// graph node. Outputs are float32. See docs/structure.md for where it enters a model.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include "deal.h"
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

std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> all;
#ifdef CENACLE_AVX2
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
      all.push_back(&vnni);
    all.push_back(&avx2);
  }
#endif
  all.push_back(&portable);
  return all;
}

std::atomic<const Kernels*> chosen{usable().front()};

void use(const std::string& name) {
  for (const Kernels* k : usable())
    if (name == k->name) {
      chosen = k;
      return;
    }
  throw std::invalid_argument("this processor has no kernels named " + name);
}

// The matrices of one linear layer, or of a stack of them; held, so that a graph can use pointers.
struct Weights {
  mx::array weight;
  std::optional<mx::array> scales, biases, bias;
  Format format;
  Float type;
  int bits, group;
  int64_t count, rows, width;

  Weights(mx::array w, std::optional<mx::array> s, std::optional<mx::array> z,
          std::optional<mx::array> b, int bits, int group, const std::string& mode)
      : weight(std::move(w)), scales(std::move(s)), biases(std::move(z)), bias(std::move(b)),
        bits(bits), group(group) {
    if (weight.ndim() != 2 && weight.ndim() != 3)
      throw std::invalid_argument("weight: expected [rows, width] or [experts, rows, width]");
    count = weight.ndim() == 3 ? weight.shape(0) : 1;
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
    m.weight_stride = int64_t(weight.shape(-1)) * mx::size_of(weight.dtype());
    if (scales) m.scale_stride = int64_t(scales->shape(-1)) * mx::size_of(scales->dtype());
    return {m, bias ? bias->data<float>() : nullptr, rows};
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
  explicit Primitive(mx::Stream s) : mx::Primitive(s), kernels_(chosen) {}
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("cenacle's native layers run on the CPU only");
  }

 protected:
  const Kernels* kernels_;

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
  LinearPrimitive(mx::Stream s, Linear layer) : Primitive(s), layer_(layer) {}
  const char* name() const override { return "CenacleLinear"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    float* out = begin(inputs, outputs[0]);
    const int64_t tokens = inputs[0].size() / layer_.matrix.width;
    mx::cpu::get_command_encoder(stream()).dispatch(
        [x = Strided(inputs[0]), out, tokens, layer = layer_, kernels = kernels_] {
          std::vector<uint32_t> copy;
          linear(*kernels, layer, x.read<float>(copy), tokens, out);
        });
  }

 private:
  Linear layer_;
};

class ExpertsPrimitive : public Primitive {
 public:
  ExpertsPrimitive(mx::Stream s, Experts experts, std::shared_ptr<const Dealer> dealer)
      : Primitive(s), experts_(std::move(experts)), dealer_(std::move(dealer)) {}
  const char* name() const override { return "CenacleExperts"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    float* out = begin(inputs, outputs[0]);
    const int64_t k = inputs[1].shape(-1), tokens = k ? inputs[1].size() / k : 0;
    mx::cpu::get_command_encoder(stream()).dispatch(
        [x = Strided(inputs[0]), ids = Strided(inputs[1]), map = inputs[2].data<int32_t>(),
         known = int64_t(inputs[2].size()), out, tokens, k, e = experts_, kernels = kernels_,
         dealer = dealer_] {
          std::vector<uint32_t> copy, copied;
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
          experts(*kernels, e, x.read<float>(copy), rows.data(), tokens, k, out);
        });
  }

 private:
  Experts experts_;
  std::shared_ptr<const Dealer> dealer_;
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
                   std::make_shared<LinearPrimitive>(s, w.linear()), std::move(inputs));
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

mx::array call_experts(const mx::array& x, const mx::array& ids, const Stack& e) {
  mx::Shape shape = ids.shape();
  if (x.ndim() == 0 || ids.ndim() != x.ndim() || x.shape(-1) != e.in[0].width ||
      !std::equal(shape.begin(), shape.end() - 1, x.shape().begin()))
    throw std::invalid_argument("expected x [..., " + std::to_string(e.in[0].width) +
                                "] and ids [..., k]");
  shape.push_back(int(e.down.rows));
  const mx::Stream s = mx::default_stream(mx::Device::cpu);
  const bool word = ids.dtype() == mx::uint32 || ids.dtype() == mx::int32;
  std::vector<mx::array> inputs{as(x, mx::float32, s), word ? ids : mx::astype(ids, mx::uint32, s),
                                e.map};
  Experts raw{{}, e.down.linear(), e.act, e.a, e.b};
  for (const auto& w : e.in) {
    raw.in.push_back(w.linear());
    w.inputs(inputs);
  }
  e.down.inputs(inputs);
  return mx::array(std::move(shape), mx::float32,
                   std::make_shared<ExpertsPrimitive>(s, std::move(raw), e.dealer),
                   std::move(inputs));
}

}  // namespace
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
  nb::class_<Weights>(m, "Weights")
      .def(nb::init<mx::array, std::optional<mx::array>, std::optional<mx::array>,
                    std::optional<mx::array>, int, int, const std::string&>(),
           nb::arg("weight"), nb::arg("scales").none(), nb::arg("biases").none(),
           nb::arg("bias").none(), nb::arg("bits"), nb::arg("group_size"), nb::arg("mode"));
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
  m.def("linear", &call_linear, nb::arg("x"), nb::arg("weights"));
  m.def("experts", &call_experts, nb::arg("x"), nb::arg("ids"), nb::arg("stack"));
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
        __builtin_prefetch(data + j + 256);
        for (int k = 0; k < 8; k++) part[k] += data[j + k];
      }
      for (const uint64_t p : part) sum += p;
    });
    return sum.load();
  });
}
