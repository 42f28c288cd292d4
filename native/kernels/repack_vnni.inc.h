// Packed matrices (packed.h) for AVX-512 with VNNI: included by kernels_vnni.cpp.
//
// A vector of words holds four bytes of sixteen rows. The four activations that belong to them are the
// same for all rows: `vpdpbusd` broadcasts them from memory. A token's integers of 16 bits are two byte_planes
// of signed bytes, each with a sum of its own until the group ends: 256 x upper + lower, exact.
// For several tokens the words are read and taken apart once.
#pragma once

#include <immintrin.h>

#include "kernels/quantized_tile.inc.h"

namespace cenacle {
namespace {

// How far ahead lines are asked for where several tokens keep the processor from running ahead itself, in
// bytes. With one token that only hurts (docs/devlog.md).
constexpr int64_t PREFETCH_BYTES = 4608;

// Sixteen numbers of a group: scales or biases.
inline __m512 sixteen(Float type, const uint8_t* p, int which) {
  if (type == Float::f32) return _mm512_loadu_ps(p + 64 * which);
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * which));
  if (type == Float::f16) return _mm512_cvtph_ps(h);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

// Powers of two, halved, because the values of e2m1 are doubled.
inline __m512 halved_powers(const uint8_t* p) {
  const __m512i e = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512i least = _mm512_maskz_set1_epi32(_mm512_cmpeq_epi32_mask(e, _mm512_setzero_si512()),
                                                0x400000);
  return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_or_si512(_mm512_slli_epi32(e, 23), least)),
                       _mm512_set1_ps(.5f));
}

// Scales of e4m3, halved. As half floats (see e4m3_vnni.inc.h) they are 256 times smaller.
inline __m512 halved_e4m3(const uint8_t* p) {
  const __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i h = _mm256_and_si256(_mm256_slli_epi16(b, 7), _mm256_set1_epi16(int16_t(0xbfff)));
  return _mm512_mul_ps(_mm512_cvtph_ps(h), _mm512_set1_ps(128.f));
}

// Sixteen rows, of which `rows` are wanted, with T tokens of PLANES bytes a value and GROUP values a scale.
// The compiler keeps sums in registers only where all loops over them are unrolled.
template <Code C, int PLANES, int GROUP, int T>
void packed_tile(const Matrix& m, const uint8_t* w, const Activations& a, const int32_t* tokens,
             float* const* out, int64_t at, __mmask16 rows) {
  constexpr int PARTS = C == Code::bytes ? 1 : 2;  // vectors of weights in one of words
  constexpr int STEPS = GROUP / 4 / PARTS;
  const __m512i low = _mm512_set1_epi8(15);
  // Twice the value plus 12: not negative.
  const __m512i values = _mm512_broadcast_i32x4(
      _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  const int64_t bytes = bytes_of(a.layout, m.width), padded = groups_of(a.layout, m.width);
  const uint8_t* x[T];
  const float *scales[T], *sums[T];
  __m512 sum[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; t++) {
    x[t] = a.quantized + tokens[t] * bytes;
    scales[t] = a.scales + tokens[t] * padded;
    sums[t] = a.sums + tokens[t] * padded;
    sum[t] = _mm512_setzero_ps();
  }
  const int64_t tail = packed_group(m) - packed_weights(m);
  int64_t offset = 0;  // in the activations
  for (int64_t g = 0; g < m.width / GROUP;) {
    const uint8_t* end = w + packed_weights(m);
    for (int64_t b = 0; T > 1 && b < packed_group(m); b += 64)
      _mm_prefetch(reinterpret_cast<const char*>(w + b + PREFETCH_BYTES), _MM_HINT_T0);
    const __m512 scale = C != Code::e2m1 ? sixteen(m.type, end, 0)
                         : GROUP == 16   ? halved_e4m3(end)
                                         : halved_powers(end);
    const __m512 bias = C == Code::e2m1 ? _mm512_mul_ps(scale, _mm512_set1_ps(-12.f))
                                        : sixteen(m.type, end, 1);
    for (; w < end; g++) {
      __m512i part[T][PLANES];
#pragma GCC unroll 8
      for (int t = 0; t < T; t++)
#pragma GCC unroll 2
        for (int p = 0; p < PLANES; p++) part[t][p] = _mm512_setzero_si512();
#pragma GCC unroll 16
      for (int i = 0; i < STEPS; i++) {
        __m512i v[PARTS];
        v[0] = _mm512_loadu_si512(w + 64 * i);
        if constexpr (PARTS == 2) {
          v[1] = _mm512_and_si512(_mm512_srli_epi16(v[0], 4), low);
          v[0] = _mm512_and_si512(v[0], low);
        }
        if constexpr (C == Code::e2m1)
          for (auto& u : v) u = _mm512_shuffle_epi8(values, u);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
#pragma GCC unroll 2
          for (int p = 0; p < PLANES; p++)
#pragma GCC unroll 2
            for (int j = 0; j < PARTS; j++) {
              int32_t four;
              memcpy(&four, x[t] + offset + 4 * ((i * PLANES + p) * PARTS + j), 4);
              part[t][p] = _mm512_dpbusd_epi32(part[t][p], v[j], _mm512_set1_epi32(four));
            }
      }
      w += 64 * STEPS;
      offset += GROUP * PLANES;
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) {
        __m512i whole = part[t][0];
        if constexpr (PLANES == 2) whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), part[t][1]);
        const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(scales[t][g]));
        sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), factor, sum[t]);
        sum[t] = _mm512_fmadd_ps(bias, _mm512_set1_ps(sums[t][g]), sum[t]);
      }
    }
    w += tail;
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; t++) _mm512_mask_storeu_ps(out[t] + at, rows, sum[t]);
}

template <Code C, int PLANES, int GROUP>
void packed_tiles(const Matrix& m, int64_t begin, int64_t end, const Activations& a,
                    const int32_t* tokens, int count, float* const* out) {
  for (int64_t row = begin; row < end; row += ROWS_PER_PACK) {
    const uint8_t* w = m.weight + row * m.weight_stride;
    const __mmask16 rows = end - row < ROWS_PER_PACK ? __mmask16((1u << (end - row)) - 1) : 0xffff;
    for (int j = 0; j < count;) {
      // With groups of 16 the sums of eight tokens do not stay in registers.
      const int left = count - j, some = left >= 8 && GROUP > 16 ? 8 : left >= 4 ? 4 : left;
      const auto run = some == 8   ? packed_tile<C, PLANES, GROUP, 8>
                       : some == 4 ? packed_tile<C, PLANES, GROUP, 4>
                       : some == 3 ? packed_tile<C, PLANES, GROUP, 3>
                       : some == 2 ? packed_tile<C, PLANES, GROUP, 2>
                                   : packed_tile<C, PLANES, GROUP, 1>;
      run(m, w, a, tokens + j, out + j, row - begin, rows);
      j += some;
    }
  }
}

void multiply_packed(const Matrix& m, int64_t first, int64_t last, const Activations& a,
                     const int32_t* tokens, int count, float* const* out) {
  const bool one = m.activations == 8, small = a.layout.group == 32;
  using enum Code;
  const auto run =
      m.format == Format::nvfp4   ? (one ? packed_tiles<e2m1, 1, 16> : packed_tiles<e2m1, 2, 16>)
      : m.format == Format::mxfp4 ? (one ? packed_tiles<e2m1, 1, 32> : packed_tiles<e2m1, 2, 32>)
      : m.bits == 4 ? (one     ? packed_tiles<nibbles, 1, 32>
                       : small ? packed_tiles<nibbles, 2, 32>
                               : packed_tiles<nibbles, 2, 64>)
                    : (one     ? packed_tiles<bytes, 1, 32>
                       : small ? packed_tiles<bytes, 2, 32>
                               : packed_tiles<bytes, 2, 64>);
  run(m, first, last, a, tokens, count, out);
}

// How a group of values becomes integers of up to `most`, all zero and of no scale where one is no number.
struct Quantizer {
  __m512 factor;
  float scale;
  __m512i of(const float* x) const {
    return scale == scale ? _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), factor))
                          : _mm512_setzero_si512();
  }
};
inline Quantizer quantizer_of(const float* x, int n, float most) {
  __m512i top = _mm512_setzero_si512();
  for (int i = 0; i < n; i += 16)
    top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_castps_si512(_mm512_loadu_ps(x + i)),
                                                 _mm512_set1_epi32(0x7fffffff)));
  const GroupScale of(_mm512_reduce_max_epu32(top), most);
  return {_mm512_set1_ps(of.inverse), of.scale};
}
// So that the upper byte of the rounded sum stays a signed byte: 127 * 256 + 127.
constexpr float MAX_QUANTIZED = 32639.f;

struct Bytes {
  __m128i upper, lower;
};
inline Bytes bytes_of(__m512i q) {
  const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
  return {_mm512_cvtepi32_epi8(h), _mm512_cvtepi32_epi8(_mm512_sub_epi32(q, _mm512_slli_epi32(h, 8)))};
}

// One token's values for a packed matrix.
void prepare_packed(Layout l, int64_t width, const float* x, uint8_t* to, float* scales, float* sums) {
  const bool one = l.interleave == Interleave::int8_quads || l.interleave == Interleave::int8_quads_even;
  const bool halves = l.interleave == Interleave::byte_quads_even || l.interleave == Interleave::int8_quads_even;
  const __m128i evens = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const auto reorder = [&](__m128i v) { return halves ? _mm_shuffle_epi8(v, evens) : v; };
  const int64_t groups = width / l.group;
  for (int64_t g = 0; g < groups; g++, x += l.group) {
    const Quantizer steps = quantizer_of(x, l.group, one ? 127.f : MAX_QUANTIZED);
    __m512i total = _mm512_setzero_si512();
    for (int i = 0; i < l.group; i += 16, to += one ? 16 : 32) {
      const __m512i q = steps.of(x + i);
      total = _mm512_add_epi32(total, q);
      auto* place = reinterpret_cast<__m128i*>(to);
      if (one) {
        _mm_storeu_si128(place, reorder(_mm512_cvtepi32_epi8(q)));
        continue;
      }
      const Bytes b = bytes_of(q);
      const __m128i u = reorder(b.upper), w = reorder(b.lower);
      _mm_storeu_si128(place, halves ? _mm_unpacklo_epi64(u, w) : _mm_unpacklo_epi32(u, w));
      _mm_storeu_si128(place + 1, halves ? _mm_unpackhi_epi64(u, w) : _mm_unpackhi_epi32(u, w));
    }
    scales[g] = steps.scale;
    sums[g] = float(_mm512_reduce_add_epi32(total)) * scales[g];
  }
  for (int64_t g = groups; g < groups_of(l, width); g++) scales[g] = sums[g] = 0.f;
}

}  // namespace
}  // namespace cenacle
