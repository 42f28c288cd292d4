// cenacle._mesh: the all-reduce as an MLX primitive, and its Python class.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>

#include "links.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"
#include "mlx/version.h"

namespace nb = nanobind;
namespace mx = mlx::core;

namespace cenacle {
namespace {

Type type_of(mx::Dtype dtype) {
  if (dtype == mx::float32) return Type::f32;
  if (dtype == mx::bfloat16) return Type::bf16;
  if (dtype == mx::float16) return Type::f16;
  if (dtype == mx::int32) return Type::i32;
  if (dtype == mx::uint32) return Type::u32;
  throw std::invalid_argument(
      "all_sum: expected an array of float32, bfloat16, float16, int32 or uint32");
}

// What routing decisions are compared by: ids [..., k] as a sum over (token, id), so that the order
// in which a token's experts are listed makes no difference. Never 0.
uint32_t digest_of(const uint32_t* ids, const mx::Shape& shape, const mx::Strides& strides) {
  const int last = static_cast<int>(shape.size()) - 1;
  const int64_t k = last < 0 ? 1 : shape[last], step = last < 0 ? 0 : strides[last];
  int64_t tokens = 1;
  for (int i = 0; i < last; ++i) tokens *= shape[i];
  uint64_t sum = 0;
  for (int64_t token = 0; token < tokens; ++token) {
    int64_t at = 0;
    for (int64_t i = last - 1, left = token; i >= 0; --i) {
      at += left % shape[i] * strides[i];
      left /= shape[i];
    }
    for (int64_t j = 0; j < k; ++j) {
      uint64_t h = (uint64_t(token) << 32 | ids[at + j * step]) + 0x9e3779b97f4a7c15;
      h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9;  // splitmix64
      h = (h ^ (h >> 27)) * 0x94d049bb133111eb;
      sum += h ^ (h >> 31);
    }
  }
  const auto folded = static_cast<uint32_t>(sum ^ (sum >> 32));
  return folded ? folded : 1;
}

class AllSum : public mx::Primitive {
 public:
  AllSum(mx::Stream stream, std::shared_ptr<Links> links, uint64_t number, int layer, bool routed)
      : Primitive(stream), links_(std::move(links)), tag_{number, layer, 0}, routed_(routed) {}

  // inputs[0] is the vector, then the routing if there is one; a last one is only there to come
  // first.
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const auto& in = inputs[0];
    auto& out = outputs[0];
    out.set_data(mx::allocator::malloc(out.nbytes()));
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (const auto& input : inputs) encoder.set_input_array(input);
    encoder.set_output_array(out);
    const auto sum = [links = links_, from = in.data<char>(), to = out.data<char>(),
                      count = in.size(), bytes = out.nbytes(),
                      type = type_of(in.dtype())](Tag tag) {
      try {
        links->all_sum(from, to, count, type, tag);
      } catch (...) {
        // MLX goes on with the graph until somebody asks for a result. What was left here by chance
        // could be a token of 4 billion, and a crash at its embedding would hide the reason.
        std::memset(to, 0, bytes);
        throw;
      }
    };
    if (!routed_) {
      encoder.dispatch([sum, tag = tag_] { sum(tag); });
      return;
    }
    const auto& ids = inputs[1];
    encoder.dispatch([sum, tag = tag_, data = ids.data<uint32_t>(), shape = ids.shape(),
                      strides = ids.strides()]() mutable {
      tag.digest = digest_of(data, shape, strides);
      sum(tag);
    });
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("the mesh runs on a CPU stream");
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }

  DEFINE_NAME(MeshAllSum)

 private:
  std::shared_ptr<Links> links_;
  Tag tag_;
  bool routed_;
};

// Gives all-reduces their numbers and their order. Two sums that do not need one another could be
// evaluated in another order on a rank whose graph differs (rank 0 shares its token, the others
// zeros), so each takes the one before as an input: they run in the order in which they were made.
class Mesh {
 public:
  Mesh(int rank, std::vector<int> fds, Settings settings)
      : links_(std::make_shared<Links>(rank, std::move(fds), settings)) {}

  mx::array all_sum(const mx::array& x, const std::optional<mx::array>& ids, int layer) {
    type_of(x.dtype());
    const auto stream = mx::to_stream(std::monostate{}, mx::Device(mx::Device::cpu));
    std::vector<mx::array> inputs{mx::contiguous(x, false, stream)};
    if (ids) {
      const bool fits = ids->dtype() == mx::uint32 || ids->dtype() == mx::int32;
      inputs.push_back(fits ? *ids : mx::astype(*ids, mx::uint32, stream));
    }
    // In a traced function there is no order beyond the function's own.
    const bool traced = x.is_tracer();
    if (last_ && !traced) inputs.push_back(*last_);
    auto primitive = std::make_shared<AllSum>(stream, links_, next_++, layer, ids.has_value());
    mx::array sum(x.shape(), x.dtype(), std::move(primitive), std::move(inputs));
    if (!traced) last_ = sum;
    return sum;
  }

  std::optional<std::string> failure() const {
    const char* why = links_->failure();
    return why ? std::optional<std::string>(why) : std::nullopt;
  }

  void close() {
    last_.reset();
    links_->close();
  }

 private:
  std::shared_ptr<Links> links_;
  std::optional<mx::array> last_;
  uint64_t next_ = 0;
};

}  // namespace
}  // namespace cenacle

NB_MODULE(_mesh, m) {
  using cenacle::Mesh;
  m.attr("MLX_VERSION") = std::to_string(MLX_VERSION_MAJOR) + "." +
      std::to_string(MLX_VERSION_MINOR) + "." + std::to_string(MLX_VERSION_PATCH);
  nb::class_<Mesh>(m, "Mesh")
      .def(
          "__init__",
          [](Mesh* self, int rank, std::vector<int> fds, double silence_s, double deadline_s,
             size_t scatter_bytes, double spin_us, bool bf16_wire) {
            new (self) Mesh(
                rank, std::move(fds), {silence_s, deadline_s, scatter_bytes, spin_us, bf16_wire});
          },
          nb::arg("rank"), nb::arg("fds"), nb::kw_only(), nb::arg("silence_s"),
          nb::arg("deadline_s"), nb::arg("scatter_bytes"), nb::arg("spin_us"),
          nb::arg("bf16_wire"))
      .def("all_sum", &Mesh::all_sum, nb::arg("x"), nb::arg("ids") = nb::none(),
           nb::arg("layer") = -1)
      .def("failure", &Mesh::failure)
      .def("close", &Mesh::close);
}
