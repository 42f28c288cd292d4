// What one set of kernels offers: the seam between the primitives and the instruction sets.
//
// Owns: the description of a weight matrix as MLX lays it out, and the table of functions that every
// instruction set fills in. Does not know: MLX, threads, experts.
// Invariant: a result depends on the kernel set only, never on how rows or tokens were divided among
// calls: each output is summed in one order. Next: kernels_portable.cpp, which is the specification.
#pragma once

#include <cstdint>
#include <vector>

namespace cenacle {

enum class Float : int { f32, bf16, f16 };
enum class Format : int { dense, affine, mxfp4 };

// Rows of weights; y = W x. Strides are in bytes.
struct Matrix {
  Format format;
  Float type;  // of the weights if dense, of scales and biases if affine
  int bits, group;
  const uint8_t *weight, *scales, *biases;
  int64_t rows, width;
  int64_t weight_stride, scale_stride;

  Matrix from(int64_t row) const {
    Matrix m = *this;
    m.weight += row * weight_stride;
    if (scales) m.scales += row * scale_stride;
    if (biases) m.biases += row * scale_stride;
    return m;
  }
};

// The form in which a kernel wants its activations: 0, as they are; else int16 with a scale for every
// `fine` values, dealt out to `ways` vectors as the unpacking of the weights leaves them.
using Layout = int;
constexpr Layout layout(int ways, int fine) { return ways << 16 | fine; }
constexpr int ways_of(Layout l) { return l >> 16; }
constexpr int fine_of(Layout l) { return l & 0xffff; }
// Groups are padded to eight, for the kernels' sake; the padding is zero.
constexpr int64_t groups_of(Layout l, int64_t width) {
  return l ? (width / fine_of(l) + 7) / 8 * 8 : 0;
}

// The activations of some tokens.
struct Activations {
  Layout layout;
  int64_t width;
  const float* plain;           // [tokens, width]
  const int16_t* fixed;         // [tokens, width], if layout
  const float *scales, *sums;   // [tokens, groups]: of the int16 values; sums are scaled
};

enum class Act : int {
  swiglu,    // silu(gate) * up
  oai,       // gpt-oss: clipped, (up + 1) * gate * sigmoid(a * gate); b is the limit
  geglu,     // gelu(gate) * up, tanh approximation
  clipped,   // swiglu of min(gate, a), clip(up, -a, a)
  capped,    // min(silu(gate), a) * clip(up, -a, a)
  situ,      // a tanh(gate / a) sigmoid(gate) * up, up = b tanh(up / b) if b
  gelu_tanh, gelu_erf, gelu_fast, relu2,  // of one matrix
};
constexpr bool gated(Act a) { return a < Act::gelu_tanh; }

constexpr int TOKENS = 64;  // most tokens in one call of `multiply`

struct Kernels {
  const char* name;
  Layout (*choose)(const Matrix&);
  // One token's values in a layout.
  void (*prepare)(Layout, int64_t width, const float* x, int16_t* fixed, float* scales, float* sums);
  // Floats of scratch memory that `multiply` wants.
  int64_t (*scratch)(const Matrix&);
  // out[j][row - first] = W[row] . x[tokens[j]] for first <= row < last, j < count <= TOKENS.
  void (*multiply)(const Matrix&, int64_t first, int64_t last, const Activations&,
                   const int32_t* tokens, int count, float* const* out, float* scratch);
  // gate = act(gate, up), in place; `up` is not read if the activation is not gated.
  void (*activate)(Act, float a, float b, float* gate, const float* up, int64_t n);
};

extern const Kernels portable;
#ifdef CENACLE_AVX2
extern const Kernels avx2, vnni;
#endif
#ifdef CENACLE_NEON
extern const Kernels neon;
#endif

// The sets that this processor can run, the best first.
std::vector<const Kernels*> usable();

}  // namespace cenacle
