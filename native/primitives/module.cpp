// The module cenacle._native: layers as MLX primitives.
//
// Owns: what Python sees. Does not know: models, ranks.
// Invariant: weights are checked once, when a `Weights` is made; a call costs one graph node.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "mlx/version.h"
#include "primitives/fast_ops.h"
#include "primitives/primitives.h"

namespace cenacle {

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
    WorkerPool::get().resize(n);
  });
  m.def("threads", [] { return WorkerPool::get().threads(); });
  m.def("available_kernels", [] {
    std::vector<std::string> names;
    for (const Kernels* k : available_kernels()) names.push_back(k->name);
    return names;
  });
  m.def("selected_kernels", [] { return std::string(chosen.load()->name); });
  m.def("select_kernels", &select_kernels);
  // Gives freed memory back to the machine: what was packed leaves holes that the next array does not fit.
  m.def("trim", [] {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
  });
  m.def("set_activation_bits", &set_activation_bits, nb::arg("bits"));
  m.def("activation_bits", [] { return activation_bits.load(); });
  nb::class_<Weights>(m, "Weights")
      .def(nb::init<mx::array, std::optional<mx::array>, std::optional<mx::array>,
                    std::optional<mx::array>, int, int, const std::string&,
                    std::optional<mx::array>>(),
           nb::arg("weight"), nb::arg("scales").none(), nb::arg("biases").none(),
           nb::arg("bias").none(), nb::arg("bits"), nb::arg("group_size"), nb::arg("mode"),
           nb::arg("output_scale").none() = nb::none())
      .def("arrays", &arrays);
  nb::class_<ReplicaAssigner>(m, "ReplicaAssigner")
      .def("__init__",
           [](ReplicaAssigner* self, std::vector<std::vector<int>> holders, std::vector<int64_t> speeds,
              int rank) {
             for (const auto& ranks : holders)
               for (const int r : ranks)
                 if (r < 0 || size_t(r) >= speeds.size())
                   throw std::invalid_argument("holders: expected ranks that have a speed");
             new (self) ReplicaAssigner{std::move(holders), std::move(speeds), rank};
           },
           nb::arg("holders"), nb::arg("speeds"), nb::arg("rank"))
      .def("assign", [](const ReplicaAssigner& self, const std::vector<int64_t>& counts) {
        if (counts.size() != self.holders.size())
          throw std::invalid_argument("counts: expected one for every expert");
        return self.assign(counts);
      }, nb::arg("counts"));
  nb::class_<Stack>(m, "Stack")
      .def(nb::init<std::vector<Weights>, Weights, mx::array, int, float, float,
                    const std::optional<ReplicaAssigner>&>(),
           nb::arg("inputs"), nb::arg("down"), nb::arg("rows"), nb::arg("activation"), nb::arg("a"),
           nb::arg("b"), nb::arg("assigner").none() = nb::none());
  m.def("busy_s", [] { return double(kernel_time_ns) * 1e-9; });
  define_fast(m);
  m.def("embed", &call_embed, nb::arg("ids"), nb::arg("weights"));
  m.def("linear", &call_linear, nb::arg("x"), nb::arg("weights"));
  m.def("experts", &call_experts, nb::arg("x"), nb::arg("ids"), nb::arg("stack"),
        nb::arg("weights").none() = nb::none());
  m.def("qkv", &call_qkv, nb::arg("x"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::kw_only(),
        nb::arg("width"), nb::arg("q_norm").none(), nb::arg("k_norm").none(), nb::arg("q_eps"),
        nb::arg("k_eps"), nb::arg("dims"), nb::arg("traditional"), nb::arg("base"), nb::arg("scale"),
        nb::arg("offset"));
  nb::class_<StreamAttention>(m, "StreamAttention")
      .def(nb::init<Weights, Weights, Weights, int, std::optional<mx::array>, std::optional<mx::array>, float, float,
                    int, bool, float, float, float, std::optional<Weights>, std::optional<mx::array>, float, bool>(),
           nb::kw_only(), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("width"), nb::arg("q_norm").none(),
           nb::arg("k_norm").none(), nb::arg("q_eps"), nb::arg("k_eps"), nb::arg("dims"), nb::arg("traditional"),
           nb::arg("base"), nb::arg("scale"), nb::arg("attention_scale"), nb::arg("output").none(),
           nb::arg("input_norm").none() = nb::none(), nb::arg("input_eps") = 0.f, nb::arg("add") = false)
      .def("__call__", &StreamAttention::call, nb::arg("x"), nb::arg("keys"), nb::arg("values"), nb::arg("offsets"),
           nb::arg("owned"));
  m.def("moe", &call_moe, nb::arg("x"), nb::arg("gate"), nb::arg("stack"), nb::arg("k"), nb::arg("normalized"),
        nb::arg("norm").none() = nb::none(), nb::arg("eps") = 0.f, nb::arg("add") = false);
  // A benchmark's ceiling: reads bytes as fast as one core or all can, and adds them up.
  m.def("read", [](const mx::array& a) {
    const uint64_t* data = reinterpret_cast<const uint64_t*>(a.data<char>());
    const int64_t words = int64_t(a.nbytes()) / 8, size = 1 << 15;
    std::atomic<uint64_t> sum{0};
    nb::gil_scoped_release release;
    WorkerPool::get().run((words + size - 1) / size, [&](int64_t i) {
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
