// The weights of a linear layer, or of a stack of them, as the kernels take them.
//
// Owns: checks of shapes and types, once, and packing. Does not know: what is computed with them.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <atomic>
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
  std::optional<mx::array> scales, biases, bias, output_scale;
  Format format;
  Float type;
  int bits, group;
  int64_t count, rows, width;
  const Kernels* kernels = chosen;
  bool stacked, packed = false;
  int activation_bits_ = activation_bits;

  Weights(mx::array w, std::optional<mx::array> s, std::optional<mx::array> z,
          std::optional<mx::array> b, int bits, int group, const std::string& mode,
          std::optional<mx::array> output_scale_)
      : weight(std::move(w)), scales(std::move(s)), biases(std::move(z)), bias(std::move(b)),
        output_scale(std::move(output_scale_)), bits(bits), group(group) {
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
    } else {
      read_format(mode);
      if (weight.dtype() != mx::uint32 || (format == Format::affine) != biases.has_value())
        throw std::invalid_argument("these are not weights as mx.quantize gives them");
      width = int64_t(scales->shape(-1)) * group;
      if (weight.shape(-1) * int64_t(32) != width * bits || scales->ndim() != weight.ndim() ||
          scales->shape(-2) != rows || (biases && biases->shape() != scales->shape()) ||
          (weight.ndim() == 3 && scales->shape(0) != count))
        throw std::invalid_argument("scales do not fit the weight");
      type = Float::f32;
      if (format == Format::affine || format == Format::fp8)
        type = real(scales->dtype());
      else if (scales->dtype() != mx::uint8)
        throw std::invalid_argument(mode + ": expected scales of 8 bits");
      if (biases && biases->dtype() != scales->dtype())
        throw std::invalid_argument("scales and biases have different types");
      if (biases) all.push_back(*biases);
      all.push_back(*scales);
    }
    for (const auto& [name, array] : {std::pair{"bias", bias}, {"output_scale", output_scale}})
      if (array) {
        if (array->size() != size_t(count * rows) || array->dtype() != mx::float32)
          throw std::invalid_argument(std::string(name) + ": expected a float32 for every row");
        all.push_back(*array);
      }
    {
      nb::gil_scoped_release release;
      mx::eval(all);
    }
    for (const auto& array : all)
      if (!array.flags().row_contiguous)
        throw std::invalid_argument("weights must be contiguous");
    if ((format == Format::nvfp4 && has_nan(*scales)) || (is_e4m3(linear().matrix) && has_nan(weight)))
      throw std::invalid_argument(mode + ": NaN has no kernels");
    if (kernels->packs(linear().matrix)) pack_all();
  }

  void read_format(const std::string& mode) {
    if (mode == "affine") {
      format = Format::affine;
      if (bits >= 2 && bits <= 8 && bits != 7 && (group == 32 || group == 64 || group == 128)) return;
    } else if (mode == "fp8") {
      format = Format::fp8;
      if (bits == 8 && (group == 32 || group == 64 || group == 128)) return;
    } else if (mode == "mxfp4") {
      format = Format::mxfp4;
      if (bits == 4 && group == 32) return;
    } else if (mode == "nvfp4") {
      format = Format::nvfp4;
      if (bits == 4 && group == 16) return;
    } else if (mode == "mxfp8") {
      format = Format::mxfp8;
      if (bits == 8 && group == 32) return;
    }
    throw std::invalid_argument(mode + " with " + std::to_string(bits) + " bits in groups of " +
                                std::to_string(group) + " has no kernels");
  }

  // Whether any byte is e4m3's NaN.
  static bool has_nan(const mx::array& a) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(a.data<char>());
    const int64_t n = int64_t(a.nbytes()), size = 1 << 18;
    std::atomic<bool> found{false};
    nb::gil_scoped_release release;
    WorkerPool::get().run((n + size - 1) / size, [&](int64_t i) {
      uint8_t any = 0;
      for (int64_t j = i * size; j < std::min(n, (i + 1) * size); j++) any |= (bytes[j] & 0x7f) == 0x7f;
      if (any) found = true;
    });
    return found;
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
    for (const auto* a : {&scales, &biases, &bias, &output_scale})
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
    const auto floats = [](const std::optional<mx::array>& a) { return a ? a->data<float>() : nullptr; };
    return {m, floats(bias), rows, count, floats(output_scale)};
  }
};

}  // namespace cenacle
