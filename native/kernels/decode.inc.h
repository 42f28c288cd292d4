// Weights of any format to float, and activations: included by each instruction set's file, so that
// the compiler makes a copy for it. Everything is local to the file that includes it: a function of
// the same name compiled for another instruction set must not be picked by the linker.
#pragma once

#include <math.h>
#include <string.h>

#include "kernels/repack.h"

namespace cenacle {
namespace {

inline float from_bits(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline uint32_t to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

inline float bf16(uint16_t h) { return from_bits(uint32_t(h) << 16); }

// The exponent is moved by a multiplication, which also makes subnormal halves right.
inline float f16(uint16_t h) {
  uint32_t magnitude = uint32_t(h & 0x7fff) << 13;
  float f = from_bits(magnitude) * 0x1p112f;
  uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000u | magnitude : to_bits(f);
  return from_bits(special | uint32_t(h & 0x8000) << 16);
}

inline float e8m0(uint8_t e) { return from_bits(e ? uint32_t(e) << 23 : 0x400000u); }

// Exact, subnormal values included; no code stands for infinity, and 0x7f and 0xff, NaN, are not expected.
inline float e4m3(uint8_t b) {
  return from_bits(uint32_t(b & 0x80) << 24 | uint32_t(b & 0x7f) << 20) * 0x1p120f;
}

inline void floats(Float type, const uint8_t* from, int64_t n, float* to) {
  if (type == Float::f32) {
    memcpy(to, from, size_t(n) * 4);
    return;
  }
  for (int64_t i = 0; i < n; i++) {
    uint16_t h;
    memcpy(&h, from + 2 * i, 2);
    to[i] = type == Float::bf16 ? bf16(h) : f16(h);
  }
}

inline float at(Float type, const uint8_t* from, int64_t i) {
  float f;
  floats(type, from + i * (type == Float::f32 ? 4 : 2), 1, &f);
  return f;
}

// The scale of group `g` of a row.
inline float scale_at(const Matrix& m, const uint8_t* scales, int64_t g) {
  switch (m.format) {
    case Format::mxfp4: case Format::mxfp8: return e8m0(scales[g]);
    case Format::nvfp4: return e4m3(scales[g]);
    default: return at(m.type, scales, g);
  }
}

// Eight values in BITS bytes, the first in the lowest bits.
template <int BITS>
inline void unpack(const uint8_t* from, int64_t n, float scale, float bias, float* to) {
  for (int64_t i = 0; i < n; i += 8, from += BITS) {
    uint64_t word = 0;
    memcpy(&word, from, BITS);
    for (int j = 0; j < 8; j++)
      to[i + j] = float(int(word >> (j * BITS) & ((1u << BITS) - 1))) * scale + bias;
  }
}

inline void decode_row(const Matrix& m, int64_t row, float* to) {
  const int64_t lane = m.packed ? row % ROWS_PER_PACK : 0;
  const Matrix r = m.from(row - lane);
  if (m.format == Format::dense) {
    floats(m.type, r.weight, m.width, to);
    return;
  }
  const int64_t groups = m.width / m.group, bytes = int64_t(m.group) * m.bits / 8;
  for (int64_t g = 0; g < groups; g++) {
    const uint8_t *w = r.weight + g * bytes, *scales = r.scales, *biases = r.biases;
    int64_t in = g;
    uint8_t words[128];
    if (m.packed) {
      const uint8_t* from = r.weight + g * packed_group(m);
      const int word = word_bytes(m);
      for (int64_t i = 0; i < bytes; i += word) memcpy(words + i, from + ROWS_PER_PACK * i + word * lane, word);
      w = words;
      scales = from + packed_weights(m);
      biases = scales + ROWS_PER_PACK * scale_bytes(m);
      in = lane;
    }
    float* y = to + g * m.group;
    const float scale = scale_at(m, scales, in);
    if (is_e4m3(m)) {
      for (int64_t i = 0; i < bytes; i++) y[i] = e4m3(w[i]) * scale;
      continue;
    }
    if (is_e2m1(m)) {
      const float values[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
      for (int64_t i = 0; i < bytes; i++) {
        y[2 * i] = values[w[i] & 15] * scale;
        y[2 * i + 1] = values[w[i] >> 4] * scale;
      }
      continue;
    }
    const float bias = at(m.type, biases, in);
    switch (m.bits) {
      case 2: unpack<2>(w, m.group, scale, bias, y); break;
      case 3: unpack<3>(w, m.group, scale, bias, y); break;
      case 4: unpack<4>(w, m.group, scale, bias, y); break;
      case 5: unpack<5>(w, m.group, scale, bias, y); break;
      case 6: unpack<6>(w, m.group, scale, bias, y); break;
      default: unpack<8>(w, m.group, scale, bias, y); break;
    }
  }
}

// e^x to 2e-7 relative for normal results, 0 and infinity beyond; a polynomial that the compiler turns
// into vectors. NaN stays NaN.
inline float exponential(float x) {
  float y = x > 88.f ? 88.f : x;
  y = y < -87.f ? -87.f : y;
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (y * 1.44269504088896341f + magic) - magic;
  const float r = (y - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  float p = 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + .5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const float whole = from_bits(uint32_t(int32_t(n) + 127) << 23);
  float result = p * whole;
  result = x < -87.f ? 0.f : result;
  result = x > 88.f ? HUGE_VALF : result;
  return x == x ? result : x;
}

inline float sigmoid(float x) { return 1.f / (1.f + exponential(-x)); }
inline float silu(float x) { return x / (1.f + exponential(-x)); }
// gelu's 1 + tanh(z) is 2 sigmoid(2 z).
inline float gelu(float x) {
  return x * sigmoid(2.f * 0.797884560802865356f * (x + 0.044715f * x * x * x));
}
inline float minimum(float x, float limit) { return x > limit ? limit : x; }
inline float clip(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }

inline void activate(Activation act, float a, float b, float* gate, const float* up, int64_t n) {
  switch (act) {
    case Activation::swiglu:
      for (int64_t i = 0; i < n; i++) gate[i] = silu(gate[i]) * up[i];
      break;
    case Activation::gpt_oss:
      for (int64_t i = 0; i < n; i++) {
        const float g = minimum(gate[i], b);
        gate[i] = (clip(up[i], b) + 1.f) * (g * sigmoid(a * g));
      }
      break;
    case Activation::geglu:
      for (int64_t i = 0; i < n; i++) gate[i] = gelu(gate[i]) * up[i];
      break;
    case Activation::clipped:
      for (int64_t i = 0; i < n; i++) gate[i] = silu(minimum(gate[i], a)) * clip(up[i], a);
      break;
    case Activation::capped:
      for (int64_t i = 0; i < n; i++) gate[i] = minimum(silu(gate[i]), a) * clip(up[i], a);
      break;
    case Activation::situ:
      for (int64_t i = 0; i < n; i++) {
        const float u = b != 0.f ? b * tanhf(up[i] / b) : up[i];
        gate[i] = a * tanhf(gate[i] / a) * sigmoid(gate[i]) * u;
      }
      break;
    case Activation::gelu_tanh:
      for (int64_t i = 0; i < n; i++) gate[i] = gelu(gate[i]);
      break;
    case Activation::gelu_erf:
      for (int64_t i = 0; i < n; i++)
        gate[i] = gate[i] * (1.f + erff(gate[i] * 0.707106781186547524f)) / 2.f;
      break;
    case Activation::gelu_fast:
      for (int64_t i = 0; i < n; i++) gate[i] *= sigmoid(1.702f * gate[i]);
      break;
    case Activation::relu2:
      for (int64_t i = 0; i < n; i++) {
        const float g = gate[i] > 0.f || gate[i] != gate[i] ? gate[i] : 0.f;
        gate[i] = g * g;
      }
      break;
  }
}

}  // namespace
}  // namespace cenacle
