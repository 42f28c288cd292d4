// Rows of e4m3 values (mxfp8, fp8) for AVX2: included by avx2.cpp.
//
// Shifts make floats of the codes: the sign, four zeros, the exponent's four bits, the mantissa's three. Their
// exponents are 120 too small, and a subnormal code is a subnormal float, so nothing is rounded. So that
// products stay normal, a token's activations are multiplied by a power of two that makes their largest
// about 2^60; the end makes both good. Of four codes in a word of 32 bits each goes to a vector of its own, and
// activations are dealt out that way once a token.
#pragma once

#include <immintrin.h>

#include "kernels/quantized_tile.inc.h"

namespace cenacle {
namespace {

constexpr int E4M3_BLOCK = 32;          // weights of four vectors
constexpr int64_t E4M3_AHEAD = 2048;    // bytes; half a line at a time and past the second-level cache: devlog
constexpr float E4M3_RESTORE = 0x1p60f;  // with the 60 of the activations: 120

// Four vectors of floats, 2^120 times too small, of 32 codes: codes 4 j + i in vector i. Where the byte before
// them may be read, codes at even places come into the upper byte of 16 bits by a load instead of a shift.
template <bool FIRST>
inline void floats_of_e4m3(const uint8_t* w, __m256* to) {
  const __m256i digits = _mm256_set1_epi32(int32_t(0x87f00000));
  const auto masked = [&](__m256i v) { return _mm256_castsi256_ps(_mm256_and_si256(v, digits)); };
  // Four places to the right, by a multiplication that reads memory itself: one instruction less than a shift.
  const __m256i places = _mm256_set1_epi16(1 << 12);
  const auto load = [&](const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
  const __m256i up = FIRST ? _mm256_slli_epi16(load(w), 8) : load(w - 1);
  const __m256i odd = _mm256_mulhi_epi16(load(w), places), even = _mm256_mulhi_epi16(up, places);
  to[0] = masked(_mm256_slli_epi32(even, 16));
  to[1] = masked(_mm256_slli_epi32(odd, 16));
  to[2] = masked(even);
  to[3] = masked(odd);
}

// Adds one row times T tokens to `sum`. `scale` holds a factor for every group of `GROUP` weights.
// Two sums a token, so that additions need not wait for one another.
template <int GROUP, int T>
inline void e4m3_tile(const uint8_t* w, int64_t width, const float* scale, const float* const* x, __m256* out) {
  constexpr int BLOCKS = GROUP / E4M3_BLOCK;
  __m256 sum[2][T];
  for (auto& s : sum)
    for (auto& t : s) t = _mm256_setzero_ps();
  const auto group = [&](int64_t i, float of, int which, auto first) __attribute__((always_inline)) {
    __m256 part[T], other[T];  // the other only where a group is long: it costs an addition
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; b++) {
      const int64_t at = i + b * E4M3_BLOCK;
      if constexpr (T == 1) _mm_prefetch(reinterpret_cast<const char*>(w + at + E4M3_AHEAD), _MM_HINT_NTA);
      __m256 u[4];
      if (b == 0)
        floats_of_e4m3<first()>(w + at, u);
      else
        floats_of_e4m3<false>(w + at, u);
      for (int t = 0; t < T; t++) {
        const float* y = x[t] + at;
        __m256& p = b % 2 ? other[t] : part[t];
        p = b > 1 ? _mm256_fmadd_ps(u[0], _mm256_loadu_ps(y), p) : _mm256_mul_ps(u[0], _mm256_loadu_ps(y));
        for (int way = 1; way < 4; way++) p = _mm256_fmadd_ps(u[way], _mm256_loadu_ps(y + 8 * way), p);
      }
    }
    const __m256 factor = _mm256_set1_ps(of);
    for (int t = 0; t < T; t++) {
      const __m256 whole = BLOCKS == 1 ? part[t] : _mm256_add_ps(part[t], other[t]);
      sum[which][t] = _mm256_fmadd_ps(whole, factor, sum[which][t]);
    }
  };
  constexpr std::false_type inside;
  group(0, scale[0], 0, std::true_type());
  int64_t i = GROUP, g = 1;
  for (; i + 2 * GROUP <= width; i += 2 * GROUP, g += 2) {
    group(i, scale[g], 1, inside);
    group(i + GROUP, scale[g + 1], 0, inside);
  }
  if (i < width) group(i, scale[g], 1, inside);
  for (int t = 0; t < T; t++) out[t] = _mm256_add_ps(sum[0][t], sum[1][t]);
}

// Scales of a row as floats, at `to` unless they are floats already.
inline const float* e4m3_scales(const Matrix& m, int64_t row, int64_t groups, float* to) {
  const uint8_t* from = m.scales + row * m.scale_stride;
  _mm_prefetch(reinterpret_cast<const char*>(from + 2 * m.scale_stride), _MM_HINT_T0);
  int64_t g = 0;
  if (m.format == Format::fp8) {
    if (m.type == Float::f32) return reinterpret_cast<const float*>(from);
    for (; g + 8 <= groups; g += 8) _mm256_storeu_ps(to + g, eight_floats(m.type, from, g));
  } else {
    for (; g + 16 <= groups; g += 16) {
      _mm256_storeu_ps(to + g, powers_of_two(from + g));
      _mm256_storeu_ps(to + g + 8, powers_of_two(from + g + 8));
    }
  }
  for (; g < groups; g++) to[g] = scale_at(m, from, g);
  return to;
}

template <int GROUP>
void e4m3_rows(const Matrix& m, int64_t first, int64_t last, const Activations& a, const int32_t* tokens, int count,
               float* const* out, float* scratch) {
  const int64_t groups = m.width / GROUP, padded = groups_of(a.layout, m.width);
  for (int64_t row = first; row < last; row += ROWS) {
    const int64_t n = last - row < ROWS ? last - row : ROWS;
    const uint8_t* w = m.weight + row * m.weight_stride;
    const float* scales[ROWS];
    for (int64_t r = 0; count > 1 && r < n; r++) scales[r] = e4m3_scales(m, row + r, groups, scratch + r * groups);
    for_token_tiles(count, [&](int j, auto size) {
      const float* x[size()];
      float restore[size()];
      __m256 sum[size()];
      for (int t = 0; t < size(); t++) {
        x[t] = reinterpret_cast<const float*>(a.quantized) + int64_t(tokens[j + t]) * a.width;
        restore[t] = a.scales[tokens[j + t] * padded];
      }
      for (int64_t r = 0; r < n; r++) {
        const float* s = count > 1 ? scales[r] : e4m3_scales(m, row + r, groups, scratch);
        e4m3_tile<GROUP, size()>(w + r * m.weight_stride, m.width, s, x, sum);
        for (int t = 0; t < size(); t++) out[j + t][row - first + r] = total(sum[t]) * E4M3_RESTORE * restore[t];
      }
    });
  }
}

void multiply_e4m3(const Matrix& m, int64_t first, int64_t last, const Activations& a, const int32_t* tokens,
                   int count, float* const* out, float* scratch) {
  const auto run = m.group == 32 ? e4m3_rows<32> : m.group == 64 ? e4m3_rows<64> : e4m3_rows<128>;
  run(m, first, last, a, tokens, count, out, scratch);
}

// One token's values, multiplied by a power of two, four ways apart. scales[0] undoes the power, but for 2^60.
// An infinity or a NaN makes that NaN.
void prepare_e4m3(int64_t width, const float* x, uint8_t* quantized, float* scales, float* sums) {
  uint32_t top = 0;
  for (int64_t i = 0; i < width; i++) {
    const uint32_t bits = to_bits(x[i]) & 0x7fffffff;
    top = bits > top ? bits : top;
  }
  const bool finite = top < 0x7f800000u;
  const int exponent = int(top >> 23) - 127 < -60 ? -60 : int(top >> 23) - 127;
  const float by = finite ? from_bits(uint32_t(127 + 60 - exponent) << 23) : 0.f;
  auto* to = reinterpret_cast<float*>(quantized);
  for (int64_t i = 0; i < width; i += E4M3_BLOCK)
    for (int way = 0; way < 4; way++)
      for (int lane = 0; lane < 8; lane++) to[i + 8 * way + lane] = finite ? x[i + 4 * lane + way] * by : 0.f;
  scales[0] = finite ? from_bits(uint32_t(127 + exponent) << 23) : NAN;
  sums[0] = 0.f;
}

}  // namespace
}  // namespace cenacle
