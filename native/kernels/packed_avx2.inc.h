// Packed matrices (repack.h) of four bits for AVX2: included by avx2.cpp.
//
// A vector of words holds four bytes of eight rows, which are eight weights each. `vpmaddubsw` multiplies them, without a
// sign, with signed bytes of the activations that all rows share, and adds pairs into 16 bits. An activation of
// 16 bits is 256 upper + lower, two such bytes, and has two sums, which `vpmaddwd` joins in 32 bits before they
// overflow. So a group costs one conversion for eight rows and no sums over lanes; the integers are exact.
#pragma once

#include <immintrin.h>

#include "kernels/e4m3_avx2.inc.h"

namespace cenacle {
namespace {

constexpr int64_t HALF_PACK = ROWS_PER_PACK / 2;  // rows of a vector
// How far ahead lines are asked for, in bytes.
constexpr int64_t PACKED_AHEAD = 4096;

// What a token's groups are multiplied with: `factors` the rows' scales, `offsets` the rows' biases, or the scales again
// where the weights have none. The result times `restore` times RESTORE is what was asked for.
struct GroupFactors {
  const uint8_t* integers;
  const float *factors, *offsets;
  float restore;
};

// Scales of eight rows, or biases: `p` is the first row's. Those of nvfp4 are 2^120 times too small.
template <Code C, int GROUP>
inline __m256 packed_scales(const Matrix& m, const uint8_t* p) {
  if constexpr (C != Code::e2m1) return eight_floats(m.type, p, 0);
  if constexpr (GROUP == 32) return powers_of_two(p);
  const __m256i codes = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m256i bits = _mm256_and_si256(_mm256_slli_epi32(codes, 20), _mm256_set1_epi32(int32_t(0x87f00000)));
  return _mm256_castsi256_ps(bits);
}

// 8 HALVES rows, of which `rows` are wanted, with T tokens of PLANES bytes a value and GROUP values a scale. AHEAD: asks
// for the lines of rows to come. The compiler keeps sums in registers only where all loops over them are unrolled.
template <Code C, int PLANES, int GROUP, int T, int HALVES, bool AHEAD>
[[gnu::noinline]] void packed_tile(const Matrix& m, const uint8_t* w, const GroupFactors* tokens, float* const* out,
                                   int64_t at, int64_t rows, int64_t half) {
  constexpr int STEPS = GROUP / 8;
  // Words whose products 16 bits can hold: 2 x 15 x 128 or 2 x 24 x 128 for each half byte.
  constexpr int WORDS = C == Code::e2m1 ? 2 : 4;
  const __m256i low = _mm256_set1_epi8(15);
  // Twice the value plus 12: not negative.
  const __m256i values = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  const __m256i weight_of_plane[2] = {_mm256_set1_epi16(PLANES == 2 ? 256 : 1), _mm256_set1_epi16(1)};
  __m256 sum[T][HALVES];
#pragma GCC unroll 4
  for (int t = 0; t < T; t++)
#pragma GCC unroll 2
    for (int h = 0; h < HALVES; h++) sum[t][h] = _mm256_setzero_ps();
  const int size = scale_bytes(m), of_scales = HALF_PACK * size;
  const int64_t weights = C == Code::e2m1 ? ROWS_PER_PACK * GROUP / 2 : packed_weights(m);
  const int64_t all = C == Code::e2m1 ? weights + ROWS_PER_PACK : packed_group(m);
  int64_t g = 0, offset = 0;  // in the activations
  const uint8_t* const end = w + m.width / m.group * all;
  for (; w < end; w += all) {
    __m256 scale[HALVES], bias[HALVES];
    const auto read_scales = [&]() __attribute__((always_inline)) {
      const uint8_t* tail = w + weights + of_scales * half;
#pragma GCC unroll 2
      for (int h = 0; h < HALVES; h++, tail += of_scales) {
        scale[h] = packed_scales<C, GROUP>(m, tail);
        bias[h] = C == Code::e2m1 ? scale[h] : eight_floats(m.type, tail + 2 * of_scales, 0);
      }
    };
    if (C == Code::nibbles) read_scales();
    const uint8_t* v = w + 32 * half;
    do {
      __m256i whole[T][HALVES];
#pragma GCC unroll 8
      for (int first = 0; first < STEPS; first += WORDS) {
        __m256i part[T][PLANES][HALVES];
#pragma GCC unroll 4
        for (int i = first; i < first + WORDS; i++) {
          if constexpr (AHEAD) _mm_prefetch(reinterpret_cast<const char*>(v + 64 * i + PACKED_AHEAD), _MM_HINT_T0);
#pragma GCC unroll 2
          for (int h = 0; h < HALVES; h++) {
            const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + 64 * i + 32 * h));
            __m256i u[2] = {_mm256_and_si256(both, low), _mm256_and_si256(_mm256_srli_epi16(both, 4), low)};
            if constexpr (C == Code::e2m1)
              for (auto& n : u) n = _mm256_shuffle_epi8(values, n);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++)
#pragma GCC unroll 2
              for (int p = 0; p < PLANES; p++)
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++) {
                  int32_t four;
                  memcpy(&four, tokens[t].integers + offset + 4 * ((i * PLANES + p) * 2 + j), 4);
                  const __m256i y = _mm256_maddubs_epi16(u[j], _mm256_set1_epi32(four));
                  __m256i& to = part[t][p][h];
                  to = i == first && j == 0 ? y : _mm256_add_epi16(to, y);
                  asm("" : "+x"(to));  // the compiler would add in another order, and run out of registers
                }
          }
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; t++)
#pragma GCC unroll 2
          for (int h = 0; h < HALVES; h++)
#pragma GCC unroll 2
            for (int p = 0; p < PLANES; p++) {
              const __m256i y = _mm256_madd_epi16(part[t][p][h], weight_of_plane[p]);
              whole[t][h] = first == 0 && p == 0 ? y : _mm256_add_epi32(whole[t][h], y);
              asm("" : "+x"(whole[t][h]));
            }
      }
      offset += GROUP * PLANES;
      v += 64 * STEPS;
      if (C == Code::e2m1) read_scales();  // late, where registers are free
#pragma GCC unroll 4
      for (int t = 0; t < T; t++)
#pragma GCC unroll 2
        for (int h = 0; h < HALVES; h++) {
          const __m256 factor = _mm256_mul_ps(scale[h], _mm256_set1_ps(tokens[t].factors[g]));
          sum[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[t][h]), factor, sum[t][h]);
          sum[t][h] = _mm256_fmadd_ps(bias[h], _mm256_set1_ps(tokens[t].offsets[g]), sum[t][h]);
        }
      g++;
    } while (C == Code::nibbles && v < w + weights);
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; t++)
#pragma GCC unroll 2
    for (int h = 0; h < HALVES; h++) {
      const int64_t first = (half + h) * HALF_PACK;
      __m256 y = sum[t][h];
      if constexpr (C == Code::e2m1 && GROUP == 16)
        y = _mm256_mul_ps(_mm256_mul_ps(y, _mm256_set1_ps(E4M3_RESTORE)), _mm256_set1_ps(tokens[t].restore));
      if (rows >= first + HALF_PACK) {
        _mm256_storeu_ps(out[t] + at + first, y);
        continue;
      }
      alignas(32) float lanes[HALF_PACK];
      _mm256_store_ps(lanes, y);
      for (int64_t r = first; r < rows; r++) out[t][at + r] = lanes[r - first];
    }
}

// The values of e2m1 are doubled and 12 more than they are: half of the scale, and minus 12 of such halves. For nvfp4 all
// of a token is made large by a power of two, so that it can be multiplied with scales that are too small.
inline void fold_offsets(GroupFactors& token, bool small_scales, int64_t groups, float* factors, float* offsets) {
  float by = .5f;
  if (small_scales) {
    uint32_t top = 0;
    for (int64_t g = 0; g < groups; g++) {
      const uint32_t bits = to_bits(token.factors[g]) & 0x7fffffff;
      if (bits < 0x7f800000u) top = bits > top ? bits : top;
    }
    const int exponent = int(top >> 23) - 127 < -60 ? -60 : int(top >> 23) - 127;
    by = from_bits(uint32_t(127 + 59 - exponent) << 23);
    token.restore = from_bits(uint32_t(127 + exponent) << 23);
  }
  for (int64_t g = 0; g < groups; g++) {
    factors[g] = token.factors[g] * by;
    offsets[g] = token.offsets[g] * by * -12.f;
  }
  token.factors = factors;
  token.offsets = offsets;
}

template <Code C, int PLANES, int GROUP>
void packed_tiles(const Matrix& m, int64_t begin, int64_t end, const Activations& a, const int32_t* tokens,
                  int count, float* const* out, float* scratch) {
  const int64_t bytes = bytes_of(a.layout, m.width), groups = groups_of(a.layout, m.width);
  GroupFactors of[TOKENS];
  for (int j = 0; j < count; j++) {
    of[j] = {a.quantized + tokens[j] * bytes, a.scales + tokens[j] * groups, a.sums + tokens[j] * groups, 1.f};
    if (C == Code::e2m1)
      fold_offsets(of[j], GROUP == 16, groups, scratch + 2 * j * groups, scratch + (2 * j + 1) * groups);
  }
  for (int64_t row = begin; row < end; row += ROWS_PER_PACK) {
    const uint8_t* w = m.weight + row * m.weight_stride;
    const int64_t rows = end - row < ROWS_PER_PACK ? end - row : ROWS_PER_PACK;
    for_token_tiles(count, [&](int j, auto size) {
      // The sums of one token and sixteen rows stay in registers, or those of four tokens and eight.
      constexpr int HALVES = size() == 1 ? 2 : 1;
      const auto first = j == 0 ? packed_tile<C, PLANES, GROUP, size(), HALVES, true>
                                : packed_tile<C, PLANES, GROUP, size(), HALVES, false>;
      first(m, w, of + j, out + j, row - begin, rows, 0);
      if constexpr (HALVES == 1)
        packed_tile<C, PLANES, GROUP, size(), 1, false>(m, w, of + j, out + j, row - begin, rows, 1);
    });
  }
}

int64_t packed_scratch(const Matrix& m, Layout l) { return is_e2m1(m) ? 2 * TOKENS * groups_of(l, m.width) : 0; }

void multiply_packed(const Matrix& m, int64_t first, int64_t last, const Activations& a, const int32_t* tokens,
                     int count, float* const* out, float* scratch) {
  const bool one = m.activations == 8, small = a.layout.group == 32;
  using enum Code;
  const auto run = m.format == Format::nvfp4   ? (one ? packed_tiles<e2m1, 1, 16> : packed_tiles<e2m1, 2, 16>)
                   : m.format == Format::mxfp4 ? (one ? packed_tiles<e2m1, 1, 32> : packed_tiles<e2m1, 2, 32>)
                   : one                       ? packed_tiles<nibbles, 1, 32>
                   : small                     ? packed_tiles<nibbles, 2, 32>
                                               : packed_tiles<nibbles, 2, 64>;
  run(m, first, last, a, tokens, count, out, scratch);
}

// So that the upper byte of the rounded sum stays a signed byte: 127 * 256 + 127.
constexpr float MAX_QUANTIZED = 32639.f;

// One token's values for a packed matrix.
void prepare_packed(Layout l, int64_t width, const float* x, uint8_t* to, float* scales, float* sums) {
  const bool one = l.interleave == Interleave::int8_quads_even;
  const int64_t groups = width / l.group;
  for (int64_t g = 0; g < groups; g++, x += l.group) {
    const GroupScale of(largest_bits(x, l.group), one ? 127.f : MAX_QUANTIZED);
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < l.group; i += 8, to += one ? 8 : 16) {
      const __m256i q = of.finite ? _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(of.inverse)))
                                  : _mm256_setzero_si256();
      sum = _mm256_add_epi32(sum, q);
      const __m256i upper = one ? q : _mm256_srai_epi32(_mm256_add_epi32(q, _mm256_set1_epi32(128)), 8);
      const __m256i lower = _mm256_sub_epi32(q, _mm256_slli_epi32(upper, 8));
      const __m256i words = _mm256_packs_epi32(upper, lower), all = _mm256_packs_epi16(words, words);
      // Of values 0 to 3, the upper bytes and the lower; the same of values 4 to 7.
      const __m128i b = _mm_unpacklo_epi64(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
      const __m128i places = _mm_setr_epi8(0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15);
      const __m128i dealt = _mm_shuffle_epi8(b, places);
      if (one)
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), dealt);
      else
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), dealt);
    }
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
    int32_t whole = 0;
    for (const int32_t lane : lanes) whole += lane;
    scales[g] = of.scale;
    sums[g] = float(whole) * of.scale;
  }
  for (int64_t g = groups; g < groups_of(l, width); g++) scales[g] = sums[g] = 0.f;
}

}  // namespace
}  // namespace cenacle
