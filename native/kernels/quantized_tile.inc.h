// What the kernels that multiply integers have in common, whatever the instruction set.
//
// Included by each of them, and local to it: see decode.inc.h.
#pragma once

#include <type_traits>

#include "kernels/decode.inc.h"

namespace cenacle {
namespace {

constexpr int ROWS = 16;  // rows whose weights stay in the first-level cache while tokens pass

enum class Code { nibbles, bytes, e2m1 };

// Scale and bias of a row's groups, read one for each `m.group` weights, spread in place to one for each
// `group_size` of them, and padded with zeros to `groups`.
inline void spread_scales(const Matrix& m, int group_size, int64_t groups, float* scale, float* bias) {
  const int64_t n = m.width / m.group;
  const int times = m.group / group_size;
  if (times > 1)
    for (int64_t g = n - 1; g >= 0; g--)
      for (int64_t i = (g + 1) * times - 1; i >= g * times; i--) scale[i] = scale[g], bias[i] = bias[g];
  for (int64_t g = n * times; g < groups; g++) scale[g] = bias[g] = 0.f;
}

// Rows that are decoded to float and multiplied as such, where no kernel takes them as they are. `dense(m,
// out)` multiplies a matrix of floats; `scratch` holds DECODED_ROWS of them.
constexpr int DECODED_ROWS = 4;
template <class Dense>
inline void multiply_decoded(const Matrix& m, int64_t first, int64_t last, int count, float* const* out,
                             float* scratch, Dense&& dense) {
  Matrix floats{Format::dense, Float::f32, 0, 0, reinterpret_cast<const uint8_t*>(scratch), nullptr, nullptr,
                0, m.width, m.width * 4, 0};
  float* to[TOKENS];
  for (int64_t row = first; row < last; row += DECODED_ROWS) {
    floats.rows = last - row < DECODED_ROWS ? last - row : DECODED_ROWS;
    for (int64_t r = 0; r < floats.rows; r++) decode_row(m, row + r, scratch + r * m.width);
    for (int j = 0; j < count; j++) to[j] = out[j] + (row - first);
    dense(floats, to);
  }
}

// How a group of values whose largest magnitude has the bits `largest` becomes integers up to `limit`.
// A group that holds an infinity or a NaN becomes NaN as a whole.
struct GroupScale {
  bool finite;
  float inverse, scale;

  GroupScale(uint32_t largest_bits, float limit) : finite(largest_bits < 0x7f800000u) {
    // Below 1e-30 the reciprocal overflows; such values are nothing beside any others.
    const float largest = finite && from_bits(largest_bits) > 1e-30f ? from_bits(largest_bits) : 0.f;
    inverse = largest > 0.f ? limit / largest : 0.f;
    scale = finite ? largest / limit : NAN;
  }
};

// Calls `run(first, constant)` for tiles of four, two and one of `count` tokens; the constant is the size.
template <class Run>
inline void for_token_tiles(int count, Run&& run) {
  int first = 0;
  for (; first + 4 <= count; first += 4) run(first, std::integral_constant<int, 4>());
  for (; first + 2 <= count; first += 2) run(first, std::integral_constant<int, 2>());
  if (first < count) run(first, std::integral_constant<int, 1>());
}

}  // namespace
}  // namespace cenacle
