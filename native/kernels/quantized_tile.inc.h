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
  const bool twice = m.group > group_size;  // 128 weights a scale, 64 activations
  if (twice)
    for (int64_t g = n - 1; g >= 0; g--) {
      scale[2 * g] = scale[2 * g + 1] = scale[g];
      bias[2 * g] = bias[2 * g + 1] = bias[g];
    }
  for (int64_t g = twice ? 2 * n : n; g < groups; g++) scale[g] = bias[g] = 0.f;
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
