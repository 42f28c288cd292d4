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
// The values of mxfp8 and fp8 are e4m3, those of mxfp4 and nvfp4 e2m1. Scales are e8m0 (mxfp4, mxfp8), e4m3
// (nvfp4) or floats (affine, fp8).
enum class Format : int { dense, affine, mxfp4, nvfp4, mxfp8, fp8 };

// Rows of weights; y = W x. Strides are in bytes.
struct Matrix {
  Format format;
  Float type;  // of the weights if dense, of scales and biases if these are floats
  int bits, group;
  const uint8_t *weight, *scales, *biases;
  int64_t rows, width;
  int64_t weight_stride, scale_stride;
  bool packed = false;   // sixteen rows side by side, all in `weight`: see packed.h
  int activations = 16;  // bits of their integers, or 8 where a set has kernels for that

  Matrix from(int64_t row) const {
    Matrix m = *this;
    m.weight += row * weight_stride;
    if (scales) m.scales += row * scale_stride;
    if (biases) m.biases += row * scale_stride;
    return m;
  }
};

constexpr bool is_e2m1(const Matrix& m) { return m.format == Format::mxfp4 || m.format == Format::nvfp4; }
constexpr bool is_e4m3(const Matrix& m) { return m.format == Format::mxfp8 || m.format == Format::fp8; }
// Of a scale of a quantized matrix; a bias is as long.
constexpr int scale_bytes(const Matrix& m) {
  if (m.format != Format::affine && m.format != Format::fp8) return 1;
  return m.type == Float::f32 ? 4 : 2;
}

// How a kernel wants its activations: as they are, or as integers of 16 or 8 bits with a scale for
// every `group_size` values, dealt out as the unpacking of the weights leaves them.
enum class Interleave : int {
  none,
  int16x2,  // int16, to two vectors: value 2 * lane + way goes to that lane of that vector
  int16_pairs4, int16_pairs8,  // int16: of each 4 values 0 2 1 3, and of each 8 values 0 4 1 5 2 6 3 7
  // The upper and the lower byte apart, as `vpdpbusd` wants them: value = 256 upper + lower, both signed.
  byte_planes,  // of each 64 values [upper 64][lower 64]
  // The two bytes apart for a packed matrix, in which a word of 32 bits is four or eight weights: of each
  // 4 values [upper 4][lower 4], and of each 8 [upper even 4][upper odd 4][lower even 4][lower odd 4].
  byte_quads, byte_quads_even,
  // One byte a value, as it is or of each 8 values [even 4][odd 4].
  int8_quads, int8_quads_even,
  // Planes for `sdot`: of each 32 values [upper 32][lower 32], and with even places before odd ones.
  byte_planes32, byte_planes32_even,
  // Floats, times a power of two: of each 32 values those at 4 j, at 4 j + 1, 4 j + 2 and 4 j + 3.
  float_quads,
};
struct Layout {
  Interleave interleave;
  int group;
  bool operator==(const Layout&) const = default;
};
// Groups are padded to sixteen, for the kernels' sake; the padding is zero.
constexpr int64_t groups_of(Layout l, int64_t width) {
  return l.interleave == Interleave::none ? 0 : (width / l.group + 15) / 16 * 16;
}
// Of one token.
constexpr int64_t bytes_of(Layout l, int64_t width) {
  switch (l.interleave) {
    case Interleave::none: return 0;
    case Interleave::byte_planes: return (width + 63) / 64 * 128;
    case Interleave::int8_quads: case Interleave::int8_quads_even: return width;
    case Interleave::float_quads: return 4 * width;
    default: return 2 * width;
  }
}

// The activations of some tokens.
struct Activations {
  Layout layout;
  int64_t width;
  const float* plain;          // [tokens, width]
  const uint8_t* quantized;        // [tokens, bytes_of(layout, width)]
  const float *scales, *sums;  // [tokens, groups]: of the integers; sums are scaled
};

enum class Activation : int {
  swiglu,    // silu(gate) * up
  gpt_oss,       // gpt-oss: clipped, (up + 1) * gate * sigmoid(a * gate); b is the limit
  geglu,     // gelu(gate) * up, tanh approximation
  clipped,   // swiglu of min(gate, a), clip(up, -a, a)
  capped,    // min(silu(gate), a) * clip(up, -a, a)
  situ,      // a tanh(gate / a) sigmoid(gate) * up, up = b tanh(up / b) if b
  gelu_tanh, gelu_erf, gelu_fast, relu2,  // of one matrix
};
constexpr bool gated(Activation a) { return a < Activation::gelu_tanh; }

constexpr int TOKENS = 64;  // most tokens in one call of `multiply`

struct Kernels {
  const char* name;
  bool (*packs)(const Matrix&);  // whether such a matrix is to be packed before it is used
  Layout (*choose)(const Matrix&);
  // One token's values in a layout.
  void (*prepare)(Layout, int64_t width, const float* x, uint8_t* quantized, float* scales, float* sums);
  // Floats of scratch memory that `multiply` wants.
  int64_t (*scratch)(const Matrix&);
  // out[j][row - first] = W[row] . x[tokens[j]] for first <= row < last, j < count <= TOKENS.
  // Of a packed matrix `first` is a multiple of sixteen, and so is `last`, or it is the last row's end.
  void (*multiply)(const Matrix&, int64_t first, int64_t last, const Activations&,
                   const int32_t* tokens, int count, float* const* out, float* scratch);
  // gate = act(gate, up), in place; `up` is not read if the activation is not gated.
  void (*activate)(Activation, float a, float b, float* gate, const float* up, int64_t n);
};

extern const Kernels portable;
#ifdef CENACLE_AVX2
extern const Kernels avx2, vnni;
#endif
#ifdef CENACLE_NEON
extern const Kernels neon;
#endif

// The sets that this processor can run, the best first.
std::vector<const Kernels*> available_kernels();

}  // namespace cenacle
