// What every primitive needs: the kernel set in use, time spent, and the base class.
//
// Owns: the choice of a kernel set. Does not know: layers.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"
#include "primitives/enqueue.h"

namespace cenacle {

namespace mx = mlx::core;

inline std::atomic<const Kernels*> chosen{available_kernels().front()};

// Nanoseconds spent in layers and experts so far: what a token's time is compared with.
inline std::atomic<int64_t> kernel_time_ns{0};
class KernelTimer {
 public:
  ~KernelTimer() {
    kernel_time_ns += std::chrono::nanoseconds(std::chrono::steady_clock::now() - since_).count();
  }

 private:
  std::chrono::steady_clock::time_point since_ = std::chrono::steady_clock::now();
};

inline void select_kernels(const std::string& name) {
  for (const Kernels* k : available_kernels())
    if (name == k->name) {
      chosen = k;
      return;
    }
  throw std::invalid_argument("this processor has no kernels named " + name);
}

// Bits of the activations' integers, for weights that are made from now on.
inline std::atomic<int> activation_bits{16};

inline void set_activation_bits(int bits) {
  if (bits != 16 && bits != 8)
    throw std::invalid_argument("activations: expected 16 or 8 bits, got " + std::to_string(bits));
  activation_bits = bits;
}

// A strided array of 32-bit values as a contiguous copy.
struct StridedInput {
  const uint32_t* data;
  mx::Shape shape;
  mx::Strides strides;
  int64_t size;
  bool contiguous;

  explicit StridedInput(const mx::array& a)
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

inline mx::array as(const mx::array& a, mx::Dtype t, mx::Stream s) {
  return a.dtype() == t ? a : mx::astype(a, t, s);
}

}  // namespace cenacle
