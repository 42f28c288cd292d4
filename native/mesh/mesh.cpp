// cenacle._mesh: the exchange as an MLX primitive, and its Python class.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

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

class AllSum : public mx::Primitive {
 public:
  AllSum(mx::Stream stream, std::shared_ptr<Links> links, uint64_t number)
      : Primitive(stream), links_(std::move(links)), number_(number) {}

  // inputs[0] is the vector; a second one is only there to come first.
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const auto& in = inputs[0];
    auto& out = outputs[0];
    out.set_data(mx::allocator::malloc(out.nbytes()));
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (const auto& input : inputs) encoder.set_input_array(input);
    encoder.set_output_array(out);
    encoder.dispatch([links = links_, from = in.data<char>(), to = out.data<char>(),
                      count = in.size(), type = type_of(in.dtype()), number = number_] {
      links->all_sum(from, to, count, type, number);
    });
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("the mesh exchange runs on a CPU stream");
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }

  DEFINE_NAME(MeshAllSum)

 private:
  std::shared_ptr<Links> links_;
  uint64_t number_;
};

// Gives exchanges their numbers and their order. Two sums that do not need one another could be
// evaluated in another order on a rank whose graph differs (rank 0 shares its token, the others
// zeros), so each takes the one before as an input: they run in the order in which they were made.
class Mesh {
 public:
  Mesh(int rank, std::vector<int> fds, Settings settings)
      : links_(std::make_shared<Links>(rank, std::move(fds), settings)) {}

  mx::array all_sum(const mx::array& x) {
    type_of(x.dtype());
    const auto stream = mx::to_stream(std::monostate{}, mx::Device(mx::Device::cpu));
    std::vector<mx::array> inputs{mx::contiguous(x, false, stream)};
    // In a traced function there is no order beyond the function's own.
    const bool traced = x.is_tracer();
    if (last_ && !traced) inputs.push_back(*last_);
    auto primitive = std::make_shared<AllSum>(stream, links_, next_++);
    mx::array sum(x.shape(), x.dtype(), std::move(primitive), std::move(inputs));
    if (!traced) last_ = sum;
    return sum;
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
          [](Mesh* self, int rank, std::vector<int> fds, double deadline_s, size_t scatter_bytes,
             double spin_us) {
            new (self) Mesh(rank, std::move(fds), {deadline_s, scatter_bytes, spin_us});
          },
          nb::arg("rank"), nb::arg("fds"), nb::arg("deadline_s"), nb::arg("scatter_bytes"),
          nb::arg("spin_us"))
      .def("all_sum", &Mesh::all_sum, nb::arg("x"))
      .def("close", &Mesh::close);
}
