// The functions of `mlx.core.fast`, and logsumexp, by our own operations: same names, same arguments, same results.
//
// Owns: which calls ours can take, and where arrays lie. What ours do not know (another type than
// float32, another device, unusual shapes) goes on to MLX's own function, errors included, so these can
// stand in MLX's place for any model: src/cenacle/model/native_layers.py puts them there.
// Invariant: float32 in and out; each call is one node of the graph, where MLX's CPU backend makes ten.
// Next: ops.h, what is computed.
#include "primitives/enqueue.h"
#include "primitives/fast_ops.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/fast.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace nb = nanobind;
namespace mx = mlx::core;

namespace cenacle {
namespace {

using Arrays = std::vector<mx::array>;
using MaybeArray = std::optional<mx::array>;

class Primitive : public mx::Primitive {
 public:
  explicit Primitive(mx::Stream s) : mx::Primitive(s), ops_(&ops()) {}
  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("cenacle's native operations run on the CPU only");
  }

 protected:
  const Ops* ops_;

  template <class F>
  void enqueue(const Arrays& outputs, F&& work) {
    cenacle::enqueue(stream(), outputs[0].nbytes(), std::forward<F>(work));
  }
};

// An array's floats, rows (its last dimension) in one piece; copied if they are not.
template <class T = float>
struct Rows {
  const T* data;
  mx::Shape shape;
  mx::Strides strides;
  bool contiguous;

  explicit Rows(const mx::array& a)
      : data(a.data<T>()), shape(a.shape()), strides(a.strides()),
        contiguous(a.flags().row_contiguous) {}

  int64_t width() const { return shape.back(); }

  // All of it as one piece.
  const T* whole(std::vector<T>& copy) const {
    if (contiguous) return data;
    int64_t rows = 1;
    for (size_t d = 0; d + 1 < shape.size(); d++) rows *= shape[d];
    copy.resize(rows * width());
    std::vector<int64_t> at(shape.size(), 0);
    int64_t offset = 0;
    const int64_t step = strides.back();
    for (int64_t r = 0; r < rows; r++) {
      T* to = copy.data() + r * width();
      if (step == 1)
        std::memcpy(to, data + offset, size_t(width()) * sizeof(T));
      else
        for (int64_t i = 0; i < width(); i++) to[i] = data[offset + i * step];
      for (int d = int(shape.size()) - 2; d >= 0; d--) {
        offset += strides[d];
        if (++at[d] < shape[d]) break;
        offset -= strides[d] * shape[d];
        at[d] = 0;
      }
    }
    return copy.data();
  }

  // Of three or four dimensions, the strides of the first three.
  const T* pieces(std::vector<T>& copy, int64_t (&to)[3]) const {
    const size_t n = shape.size();
    if (width() > 1 && strides.back() != 1) {
      to[2] = width(), to[1] = to[2] * shape[n - 2], to[0] = n == 4 ? to[1] * shape[1] : to[1];
      return whole(copy);
    }
    to[0] = strides[0], to[1] = n == 4 ? strides[1] : 0, to[2] = strides[n - 2];
    return data;
  }
};

// The stream of a call, if it is the CPU's and the arrays are such as ours take.
std::optional<mx::Stream> stream_for(mx::StreamOrDevice s, std::initializer_list<const mx::array*> arrays) {
  for (const auto* a : arrays)
    if (a->dtype() != mx::float32 || a->size() == 0) return {};
  const mx::Stream stream = mx::to_stream(s);
  if (stream.device != mx::Device::cpu) return {};
  return stream;
}

bool is_vector(const MaybeArray& a, int size) {
  return !a || (a->ndim() == 1 && a->shape(0) == size && a->dtype() == mx::float32);
}

// ---- norms ------------------------------------------------------------------------------------

class Norm : public Primitive {
 public:
  Norm(mx::Stream s, bool centered, float eps, bool weight, bool bias)
      : Primitive(s), centered_(centered), eps_(eps), weight_(weight), bias_(bias) {}
  const char* name() const override { return centered_ ? "CenacleLayerNorm" : "CenacleRMSNorm"; }
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs[0].shape()}; }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    outputs[0].set_data(mx::allocator::malloc(outputs[0].nbytes()));
    std::vector<Rows<>> others;
    for (size_t i = 1; i < inputs.size(); i++) others.emplace_back(inputs[i]);
    enqueue(outputs, [x = Rows<>(inputs[0]), rows = int64_t(inputs[0].size()) / inputs[0].shape(-1),
                   others = std::move(others), out = outputs[0].data<float>(), ops = ops_, eps = eps_,
                   centered = centered_, weighted = weight_, biased = bias_] {
          std::vector<float> copy, copied[2];
          const float* weight = weighted ? others.front().whole(copied[0]) : nullptr;
          const float* bias = biased ? others.back().whole(copied[1]) : nullptr;
          if (centered)
            layer_norm(*ops, x.whole(copy), weight, bias, eps, rows, x.width(), out);
          else
            rms_norm(*ops, x.whole(copy), weight, eps, rows, x.width(), out);
        });
  }

 private:
  bool centered_;
  float eps_;
  bool weight_, bias_;
};

mx::array call_norm(const mx::array& x, const MaybeArray& weight, const MaybeArray& bias, float eps,
                    bool centered, mx::Stream stream) {
  Arrays inputs{x};
  if (weight) inputs.push_back(*weight);
  if (bias) inputs.push_back(*bias);
  return mx::array(
      x.shape(), mx::float32,
      std::make_shared<Norm>(stream, centered, eps, weight.has_value(), bias.has_value()),
      std::move(inputs));
}

mx::array call_rms_norm(const mx::array& x, const MaybeArray& weight, float eps, mx::StreamOrDevice s) {
  const auto stream = stream_for(s, {&x});
  if (!stream || x.ndim() == 0 || !is_vector(weight, x.shape(-1)))
    return mx::fast::rms_norm(x, weight, eps, s);
  return call_norm(x, weight, {}, eps, false, *stream);
}

mx::array call_layer_norm(const mx::array& x, const MaybeArray& weight, const MaybeArray& bias, float eps,
                          mx::StreamOrDevice s) {
  const auto stream = stream_for(s, {&x});
  if (!stream || x.ndim() == 0 || !is_vector(weight, x.shape(-1)) || !is_vector(bias, x.shape(-1)))
    return mx::fast::layer_norm(x, weight, bias, eps, s);
  return call_norm(x, weight, bias, eps, true, *stream);
}

// ---- log of a sum of exponentials ---------------------------------------------------------------

class LogSumExp : public Primitive {
 public:
  using Primitive::Primitive;
  const char* name() const override { return "CenacleLogSumExp"; }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    outputs[0].set_data(mx::allocator::malloc(outputs[0].nbytes()));
    enqueue(outputs, [x = Rows<>(inputs[0]), rows = int64_t(outputs[0].size()), out = outputs[0].data<float>(),
                   ops = ops_] {
          std::vector<float> copy;
          const float* from = x.whole(copy);
          for (int64_t r = 0; r < rows; r++) out[r] = ops->log_sum_exp(from + r * x.width(), x.width());
        });
  }
};

using Axes = std::variant<std::monostate, int, std::vector<int>>;

mx::array call_logsumexp(const mx::array& x, const Axes& axis, bool keepdims, mx::StreamOrDevice s) {
  const auto* one = std::get_if<int>(&axis);
  const auto stream = stream_for(s, {&x});
  if (!stream || !one || x.ndim() == 0 || (*one != -1 && *one != int(x.ndim()) - 1)) {
    if (one) return mx::logsumexp(x, *one, keepdims, s);
    if (const auto* some = std::get_if<std::vector<int>>(&axis)) return mx::logsumexp(x, *some, keepdims, s);
    return mx::logsumexp(x, keepdims, s);
  }
  mx::Shape shape = x.shape();
  if (keepdims)
    shape.back() = 1;
  else
    shape.pop_back();
  return mx::array(std::move(shape), mx::float32, std::make_shared<LogSumExp>(*stream), {x});
}

// ---- rotary positions -------------------------------------------------------------------------

class Rotation : public Primitive {
 public:
  Rotation(mx::Stream s, int dims, bool traditional, float scale, bool reciprocal,
           std::optional<int64_t> offset)
      : Primitive(s), dims_(dims), traditional_(traditional), scale_(scale), reciprocal_(reciprocal),
        offset_(offset) {}
  const char* name() const override { return "CenacleRoPE"; }

  // Inputs: x, rates, and the offsets if they are an array.
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    outputs[0].set_data(mx::allocator::malloc(outputs[0].nbytes()));
    const mx::Shape& shape = inputs[0].shape();
    const bool four = shape.size() == 4;
    Rope r{};
    r.batch = shape[0], r.heads = four ? shape[1] : 1, r.length = shape[shape.size() - 2];
    r.width = shape.back(), r.dims = dims_;
    r.traditional = traditional_, r.scale = scale_, r.reciprocal = reciprocal_;
    r.rates = inputs[1].data<float>(), r.rate_stride = inputs[1].strides(0);
    r.out = outputs[0].data<float>();
    const void* where = offset_ ? nullptr : inputs[2].data<char>();
    const bool wide = !offset_ && inputs[2].dtype() == mx::int64;
    const int64_t count = offset_ ? 1 : inputs[2].size();
    const int64_t step = offset_ || inputs[2].ndim() == 0 ? 0 : inputs[2].strides(0);
    enqueue(outputs, [r, x = Rows<>(inputs[0]), where, wide, count, step, ops = ops_,
                   offset = offset_.value_or(0)]() mutable {
          std::vector<float> copy;
          r.x = x.pieces(copy, r.strides);
          std::vector<int64_t> offsets(count, offset);
          for (int64_t i = 0; where && i < count; i++)
            offsets[i] = wide ? static_cast<const int64_t*>(where)[i * step]
                              : static_cast<const int32_t*>(where)[i * step];
          r.offsets = offsets.data(), r.offset_stride = count > 1;
          rope(*ops, r);
        });
  }

 private:
  int dims_;
  bool traditional_;
  float scale_;
  bool reciprocal_;
  std::optional<int64_t> offset_;
};

mx::array call_rope(const mx::array& x, int dims, bool traditional, std::optional<float> base, float scale,
                    const std::variant<int, mx::array>& offset, const MaybeArray& freqs,
                    mx::StreamOrDevice s) {
  const auto* at = std::get_if<mx::array>(&offset);
  const auto stream = stream_for(s, {&x});
  const bool known_base = base && !freqs && *base > 0 && !x.is_tracer();
  const bool known_freqs = freqs && !base && freqs->dtype() == mx::float32 && freqs->ndim() == 1 &&
                           freqs->shape(0) == dims / 2;
  const bool known_offset = !at || ((at->dtype() == mx::int32 || at->dtype() == mx::int64) &&
                                    at->ndim() <= 1 &&
                                    (at->size() == 1 || (x.ndim() > 0 && int(at->size()) == x.shape(0))));
  if (!stream || (x.ndim() != 3 && x.ndim() != 4) || dims <= 0 || dims % 2 || dims > x.shape(-1) ||
      !known_offset || !(known_base || known_freqs)) {
    if (at) return mx::fast::rope(x, dims, traditional, base, scale, *at, freqs, s);
    return mx::fast::rope(x, dims, traditional, base, scale, std::get<int>(offset), freqs, s);
  }
  Arrays inputs{x, freqs ? *freqs : rates_of(*base, dims / 2)};
  std::optional<int64_t> number;
  if (at)
    inputs.push_back(*at);
  else
    number = std::get<int>(offset);
  return mx::array(x.shape(), mx::float32,
                   std::make_shared<Rotation>(*stream, dims, traditional, scale, freqs.has_value(), number),
                   std::move(inputs));
}

// ---- attention --------------------------------------------------------------------------------

class Attend : public Primitive {
 public:
  Attend(mx::Stream s, float scale, float cap, bool causal, bool mask, bool sinks, bool flat)
      : Primitive(s), scale_(scale), cap_(cap), causal_(causal), mask_(mask), sinks_(sinks), flat_(flat) {}
  const char* name() const override { return "CenacleAttention"; }

  // Inputs: q, k, v, then the mask and the sinks if there are any.
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    const auto &q = inputs[0], &k = inputs[1], &v = inputs[2];
    Attention a{};
    a.batch = q.shape(0), a.heads = q.shape(1), a.length = q.shape(2), a.width = q.shape(3);
    a.kv_heads = k.shape(1), a.keys = k.shape(2), a.v_width = v.shape(3);
    a.scale = scale_, a.cap = cap_, a.causal = causal_;
    a.type = k.dtype() == mx::float32 ? Float::f32 : k.dtype() == mx::bfloat16 ? Float::bf16 : Float::f16;
    if (mask_) {
      const auto& mask = inputs[3];
      for (int d = 4 - int(mask.ndim()), i = 0; d < 4; d++, i++)
        a.mask_strides[d] = mask.shape(i) > 1 ? mask.strides(i) : 0;
      if (mask.dtype() == mx::bool_)
        a.allowed = reinterpret_cast<const uint8_t*>(mask.data<bool>());
      else
        a.added = mask.data<float>();
    }
    // Laid out as the output projection wants it: its transposition and reshaping cost nothing then.
    auto& out = outputs[0];
    const int64_t head = a.v_width, token = head * a.heads;
    if (flat_)
      out.set_data(mx::allocator::malloc(out.nbytes()));
    else
      out.set_data(mx::allocator::malloc(out.nbytes()), out.size(), {token * a.length, head, token, 1},
                   {true, a.length == 1 || a.heads == 1, out.size() == size_t(head)});
    a.out = out.data<float>();
    std::optional<Rows<>> sinks;
    if (sinks_) sinks.emplace(inputs.back());
    const auto run = [&](auto kind) {
      using T = decltype(kind);
      enqueue(outputs, [a, q = Rows<>(q), k = Rows<T>(k), v = Rows<T>(v), sinks, ops = ops_]() mutable {
        std::vector<float> copy, copied_sinks;
        std::vector<T> copied[2];
        a.q = q.pieces(copy, a.q_strides);
        a.k = k.pieces(copied[0], a.k_strides);
        a.v = v.pieces(copied[1], a.v_strides);
        if (sinks) a.sinks = sinks->whole(copied_sinks);
        attention(*ops, &a);
      });
    };
    a.type == Float::f32 ? run(float{}) : run(uint16_t{});
  }

 private:
  float scale_, cap_;
  bool causal_, mask_, sinks_, flat_;
};

bool fits(const mx::array& mask, const mx::array& q, int keys) {
  if (mask.ndim() > 4 || (mask.dtype() != mx::bool_ && mask.dtype() != mx::float32)) return false;
  const int whole[4] = {q.shape(0), q.shape(1), q.shape(2), keys};
  for (int d = 4 - int(mask.ndim()), i = 0; d < 4; d++, i++)
    if (mask.shape(i) != 1 && mask.shape(i) != whole[d]) return false;
  return true;
}

using Mask = std::variant<std::monostate, std::string, mx::array>;

// Keys and values of 16 bits may go with queries of float32.
mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, float scale, const Mask& mask,
                 const MaybeArray& sinks, float cap, bool force_fused, mx::StreamOrDevice s, bool flat) {
  const auto* mode = std::get_if<std::string>(&mask);
  const auto* array = std::get_if<mx::array>(&mask);
  const auto stream = stream_for(s, {&q});
  const bool causal = mode && *mode == "causal";
  const mx::Dtype kept = k.dtype();
  const bool ours = stream && !force_fused && q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4 &&
                    kept == v.dtype() && (kept == mx::float32 || kept == mx::bfloat16 || kept == mx::float16) &&
                    k.size() && v.size() &&
                    k.shape(0) == q.shape(0) && v.shape(0) == q.shape(0) && k.shape(1) == v.shape(1) &&
                    k.shape(2) == v.shape(2) && k.shape(3) == q.shape(3) &&
                    q.shape(1) % k.shape(1) == 0 && is_vector(sinks, q.shape(1)) &&
                    (!mode || causal || mode->empty()) && (!array || fits(*array, q, k.shape(2))) &&
                    !(causal && k.shape(2) < q.shape(2));
  if (!ours) {
    if (cap != 0.f) throw std::invalid_argument("attend: expected arrays that a cap on scores is supported for");
    const auto out = mx::fast::scaled_dot_product_attention(
        q, k, v, scale, mode ? *mode : array ? "array" : "", array ? MaybeArray(*array) : MaybeArray(),
        sinks, force_fused, s);
    return flat ? mx::flatten(mx::swapaxes(out, 1, 2, s), 2, 3, s) : out;
  }
  Arrays inputs{q, k, v};
  if (array) inputs.push_back(*array);
  if (sinks) inputs.push_back(*sinks);
  mx::Shape shape = q.shape();
  shape[3] = v.shape(3);
  if (flat) shape = {shape[0], shape[2], shape[1] * shape[3]};
  return mx::array(
      std::move(shape), mx::float32,
      std::make_shared<Attend>(*stream, scale, cap, causal, array != nullptr, sinks.has_value(), flat),
      std::move(inputs));
}

mx::array call_attention(const mx::array& q, const mx::array& k, const mx::array& v, float scale,
                         const Mask& mask, const MaybeArray& sinks, bool force_fused,
                         mx::StreamOrDevice s) {
  return attend(q, k, v, scale, mask, sinks, 0, force_fused, s, false);
}

// As attention, but [batch, length, heads * width]: what an output projection takes.
mx::array call_attend(const mx::array& q, const mx::array& k, const mx::array& v, float scale,
                      const Mask& mask) {
  return attend(q, k, v, scale, mask, {}, 0, false, {}, true);
}

// As attention, with scores s made cap tanh(s / cap) before the mask.
mx::array call_capped(const mx::array& q, const mx::array& k, const mx::array& v, float scale, float softcap,
                      const Mask& mask) {
  return attend(q, k, v, scale, mask, {}, softcap, false, {}, false);
}

// ---- routing ----------------------------------------------------------------------------------

class Route : public Primitive {
 public:
  Route(mx::Stream s, int k, bool normalized) : Primitive(s), k_(k), normalized_(normalized) {}
  const char* name() const override { return "CenacleRoute"; }

  // Outputs: ids and their weights.
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    for (auto& o : outputs) o.set_data(mx::allocator::malloc(o.nbytes()));
    enqueue(outputs, [x = Rows<>(inputs[0]), rows = int64_t(inputs[0].size() / inputs[0].shape(-1)),
                      ids = outputs[0].data<uint32_t>(), weights = outputs[1].data<float>(), k = k_,
                      normalized = normalized_] {
      std::vector<float> copy;
      route(x.whole(copy), rows, x.width(), k, normalized, ids, weights);
    });
  }

 private:
  int k_;
  bool normalized_;
};

// Scores [..., experts] -> ids and weights [..., k]: the softmax's k largest, the best first, perhaps
// divided by their sum (which is the softmax of the k largest scores).
std::vector<mx::array> call_route(const mx::array& scores, int k, bool normalized) {
  if (scores.ndim() == 0 || scores.dtype() != mx::float32 || k < 1 || k > scores.shape(-1))
    throw std::invalid_argument("route: expected float32 scores of at least k experts");
  mx::Shape shape = scores.shape();
  shape.back() = k;
  const mx::Stream s = mx::default_stream(mx::Device::cpu);
  return mx::array::make_arrays({shape, shape}, {mx::uint32, mx::float32},
                                std::make_shared<Route>(s, k, normalized), {scores});
}

}  // namespace

void route(const float* from, int64_t rows, int64_t n, int k, bool normalized, uint32_t* ids, float* weights) {
  std::vector<uint32_t> order(n);
  for (int64_t r = 0; r < rows; r++, from += n, ids += k, weights += k) {
    for (int64_t i = 0; i < n; i++) order[i] = uint32_t(i);
    std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](uint32_t a, uint32_t b) {
      return from[a] != from[b] ? from[a] > from[b] : a < b;
    });
    const float top = from[order[0]];
    float sum = 0;
    for (int j = 0; j < k; j++) {
      ids[j] = order[j];
      sum += weights[j] = std::exp(from[order[j]] - top);
    }
    for (int64_t i = k; !normalized && i < n; i++) sum += std::exp(from[order[i]] - top);
    for (int j = 0; j < k; j++) weights[j] /= sum;
  }
}

// The rates of a base as MLX computes them: at position 10,000 a rounding more would be seen. Kept,
// because a model asks for the same ones in each layer of each token (Python's lock guards the map).
const mx::array& rates_of(float base, int half) {
  static auto* known = new std::map<std::pair<float, int>, mx::array>;
  const auto found = known->find({base, half});
  if (found != known->end()) return found->second;
  const auto cpu = mx::default_stream(mx::Device::cpu);
  auto rates = mx::exp(mx::multiply(mx::arange(0, -half, -1, mx::float32, cpu),
                                    mx::array(std::log(base) / half, mx::float32), cpu), cpu);
  mx::eval(rates);
  return known->emplace(std::make_pair(base, half), std::move(rates)).first->second;
}

void define_fast(nb::module_& m) {
  using namespace nb::literals;
  m.def("rms_norm", &call_rms_norm, "x"_a, "weight"_a.none(), "eps"_a, nb::kw_only(),
        "stream"_a = nb::none());
  m.def("layer_norm", &call_layer_norm, "x"_a, "weight"_a.none(), "bias"_a.none(), "eps"_a, nb::kw_only(),
        "stream"_a = nb::none());
  m.def("attend", &call_attend, "q"_a, "k"_a, "v"_a, "scale"_a, "mask"_a = nb::none());
  m.def("attend_capped", &call_capped, "queries"_a, "keys"_a, "values"_a, "scale"_a, "softcap"_a,
        "mask"_a.none());
  m.def("route", &call_route, "scores"_a, "k"_a, "normalized"_a);
  m.def("logsumexp", &call_logsumexp, "a"_a, "axis"_a = nb::none(), "keepdims"_a = false, nb::kw_only(),
        "stream"_a = nb::none());
  m.def("rope", &call_rope, "a"_a, "dims"_a, nb::kw_only(), "traditional"_a, "base"_a.none(), "scale"_a,
        "offset"_a, "freqs"_a = nb::none(), "stream"_a = nb::none());
  m.def("scaled_dot_product_attention", &call_attention, "q"_a, "k"_a, "v"_a, nb::kw_only(), "scale"_a,
        "mask"_a = nb::none(), "sinks"_a = nb::none(), "force_fused"_a = false, "stream"_a = nb::none());
}

}  // namespace cenacle
