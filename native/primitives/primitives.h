// The layers that the module offers, each a node of MLX's lazy graph.
//
// Owns: their declarations. Outputs are float32. Next: linear.cpp, experts.cpp, qkv.cpp.
#pragma once

#include <memory>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "load_balancer.h"
#include "primitives/weights.h"

namespace cenacle {

// x [..., width] -> [..., rows].
mx::array call_linear(const mx::array& x, const Weights& w);

// ids [...] -> the rows of the weight that they name, [..., width].
mx::array call_embed(const mx::array& ids, const Weights& w);

// What `Weights` was made of: weight, scales and biases, in the lazy graph; nothing if it keeps them itself.
std::vector<mx::array> arrays(const Weights& w);

// The matrices of a layer's experts and what is between them.
struct Stack {
  std::vector<Weights> in;
  Weights down;
  mx::array map;
  Activation act;
  float a, b;
  std::shared_ptr<const ReplicaAssigner> assigner;  // null: every expert that we hold is ours to compute

  Stack(std::vector<Weights> in_, Weights down_, mx::array map_, int act_, float a, float b,
        const std::optional<ReplicaAssigner>& assigner_)
      : in(std::move(in_)), down(std::move(down_)), map(std::move(map_)), act(Activation(act_)), a(a), b(b) {
    if (assigner_) assigner = std::make_shared<const ReplicaAssigner>(*assigner_);
    if (assigner && assigner->holders.size() + 1 != map.size())
      throw std::invalid_argument("map: expected an entry for every expert assigned, and one more");
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

// x [..., width], ids [..., k] -> [..., k, rows], or with weights [..., k] their weighted sum [..., rows].
mx::array call_experts(const mx::array& x, const mx::array& ids, const Stack& e,
                       const std::optional<mx::array>& weights);

// x [batch, length, in] -> queries, keys and values [batch, heads, length, width], the first two
// normalized by head where a norm is given, and turned as `rope` does with the base's rates.
std::vector<mx::array> call_qkv(const mx::array& x, const Weights& q, const Weights& k, const Weights& v,
                                int width, const std::optional<mx::array>& q_norm,
                                const std::optional<mx::array>& k_norm, float q_eps, float k_eps, int dims,
                                bool traditional, float base, float scale,
                                const std::variant<int, mx::array>& offset);

}  // namespace cenacle
