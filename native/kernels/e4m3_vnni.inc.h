// Packed matrices of e4m3 values (mxfp8, fp8) for AVX-512: included by vnni.cpp.
//
// A code becomes a half float by shifts: the sign, a zero, the other seven bits. Its exponent is then 8 too
// small, which the end makes good, and the processor converts it to float, subnormal or not: that
// conversion is what limits the speed in cache, 22 to 24 GB/s on Zen 4. Activations stay floats, so nothing is
// rounded but sums. Sixteen rows have 16-bit words side by side, each of two columns.
#pragma once

#include "kernels/repack_vnni.inc.h"

namespace cenacle {
namespace {

// Of the next group.
inline __m512 e4m3_scales(const Matrix& m, const uint8_t* p) {
  if (m.format == Format::fp8) return sixteen(m.type, p, 0);
  return _mm512_add_ps(halved_powers(p), halved_powers(p));
}

// Sixteen rows, of which `rows` are wanted, with T tokens.
template <int T>
void e4m3_tile(const Matrix& m, const uint8_t* w, const Activations& a, const int32_t* tokens,
               float* const* out, int64_t at, __mmask16 rows) {
  const __m256i digits = _mm256_set1_epi16(int16_t(0xbf80));
  const float* x[T];
  __m512 sum[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) {
    x[t] = a.plain + int64_t(tokens[t]) * m.width;
    sum[t] = _mm512_setzero_ps();
  }
  const int64_t tail = packed_group(m) - packed_weights(m);
  for (int64_t column = 0; column < m.width; w += tail) {
    const uint8_t* end = w + packed_weights(m);
    __m512 part[T][4];  // apart, so that additions need not wait for one another
#pragma GCC unroll 4
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) part[t][i] = _mm512_setzero_ps();
    for (; w < end; w += 64, column += 4) {
      if constexpr (T > 1) _mm_prefetch(reinterpret_cast<const char*>(w + PREFETCH_BYTES), _MM_HINT_T0);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * (i / 2)));
        const __m256i code = i % 2 ? v : _mm256_slli_epi16(v, 8);
        const __m512 u = _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(code, 1), digits));
#pragma GCC unroll 4
        for (int t = 0; t < T; t++)
          part[t][i] = _mm512_fmadd_ps(u, _mm512_set1_ps(x[t][column + i]), part[t][i]);
      }
    }
    const __m512 scale = e4m3_scales(m, end);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      const __m512 whole = _mm512_add_ps(_mm512_add_ps(part[t][0], part[t][1]),
                                         _mm512_add_ps(part[t][2], part[t][3]));
      sum[t] = _mm512_fmadd_ps(whole, scale, sum[t]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; t++)
    _mm512_mask_storeu_ps(out[t] + at, rows, _mm512_mul_ps(sum[t], _mm512_set1_ps(256.f)));
}

void multiply_e4m3(const Matrix& m, int64_t begin, int64_t end, const Activations& a, const int32_t* tokens,
                   int count, float* const* out) {
  for (int64_t row = begin; row < end; row += ROWS_PER_PACK) {
    const uint8_t* w = m.weight + row * m.weight_stride;
    const __mmask16 rows = end - row < ROWS_PER_PACK ? __mmask16((1u << (end - row)) - 1) : 0xffff;
    for_token_tiles(count, [&](int j, auto size) {
      e4m3_tile<size()>(m, w, a, tokens + j, out + j, row - begin, rows);
    });
  }
}

}  // namespace
}  // namespace cenacle
