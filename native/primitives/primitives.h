// The layers that the module offers, each a node of MLX's lazy graph.
//
// Owns: their declarations. Outputs are float32. Next: linear.cpp, experts.cpp, qkv.cpp, streams.cpp.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "layers/stream_step.h"
#include "load_balancer.h"
#include "primitives/weights.h"

namespace cenacle {

// A norm's weights as float32 [width] in one piece, there now.
mx::array norm_weights(const mx::array& norm, int64_t width);

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

// A layer's attention for one new token of each of some streams.
struct StreamAttention {
  Weights q, k, v;
  int width;
  std::optional<mx::array> q_norm, k_norm;
  float q_eps, k_eps;
  int dims;
  bool traditional;
  float base, scale, attention_scale;
  std::optional<Weights> output;
  std::optional<mx::array> input_norm;  // of x, before the projections
  float input_eps;
  bool add;  // x to the output

  StreamAttention(Weights q, Weights k, Weights v, int width, std::optional<mx::array> q_norm,
                  std::optional<mx::array> k_norm, float q_eps, float k_eps, int dims, bool traditional, float base,
                  float scale, float attention_scale, std::optional<Weights> output, std::optional<mx::array> input_norm,
                  float input_eps, bool add);

  // x [streams, 1, in]; keys and values [1, heads, capacity, width], of which `offsets[i]` rows are filled. The new rows
  // are put behind them, in place where the stream is `owned`: nobody else writes into its buffers. -> [streams, 1, out]
  // (without an output projection heads * width), then the streams' keys, then their values, some with more capacity.
  std::vector<mx::array> call(const mx::array& x, const std::vector<mx::array>& keys,
                              const std::vector<mx::array>& values, const std::vector<int64_t>& offsets,
                              const std::vector<int>& owned) const;
};

// x [..., in] -> the weighted sum of the k experts that a gate's softmax likes best, and their ids [..., k]; weights are
// divided by their sum if `normalized`. With a `norm` [in], of x as it normalizes it; x is added to the sum if `add`.
std::vector<mx::array> call_moe(const mx::array& x, const Weights& gate, const Stack& e, int k, bool normalized,
                                const std::optional<mx::array>& norm, float eps, bool add);

}  // namespace cenacle
