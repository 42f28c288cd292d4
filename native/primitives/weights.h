// The weights of a linear layer, or of a stack of them, as the kernels take them.
//
// Owns: checks of shapes and types, once, and packing. Does not know: what is computed with them.
#pragma once

#include <nanobind/nanobind.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "layers/layers.h"
#include "primitives/primitive.h"
#include "thread_pool.h"

namespace cenacle {

namespace nb = nanobind;

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
  int activation_bits_ = activation_bits;

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
    WorkerPool::get().run(count, [&](int64_t i) {
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
    m.activations = activation_bits_;
    if (packed) {
      m = cenacle::packed(m, aligned(weight));
    } else {
      m.weight_stride = int64_t(weight.shape(-1)) * mx::size_of(weight.dtype());
      if (scales) m.scale_stride = int64_t(scales->shape(-1)) * mx::size_of(scales->dtype());
    }
    return {m, bias ? bias->data<float>() : nullptr, rows, count};
  }
};

}  // namespace cenacle
