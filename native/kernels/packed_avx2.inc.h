// Packed matrices (repack.h) of four and eight bits for AVX2: included by avx2.cpp.
//
// A vector of words holds a word of each of eight rows: eight weights of four bits or four of eight. Shifts and masks make
// pairs of 16 bits of them, `vpmaddwd` multiplies these with a pair of activations that all rows share, and its
// sums of 32 bits are exact. So a group costs one conversion for eight rows and no sums over lanes. Activations of 8 bits
// are multiplied by `vpmaddubsw`, twice as many at once, and their sums of 16 bits are joined before they overflow.
// Weights are unpacked for up to four tokens at once, and an activation is loaded for sixteen rows.
#pragma once

#include <immintrin.h>

#include "kernels/e4m3_avx2.inc.h"

namespace cenacle {
namespace {

constexpr int64_t HALF_PACK = ROWS_PER_PACK / 2;  // rows of a vector
// How far ahead lines are asked for, in bytes.
constexpr int64_t PACKED_AHEAD = 4096;
constexpr int TILE_TOKENS = 4;  // the sums of sixteen rows with as many stay in registers

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

// What words of weights become for activations of BYTES bytes, piece after piece: a vector for each.
template <Code C, int BYTES>
constexpr int PIECES = C == Code::bytes ? 2 : BYTES == 2 ? 4 : 2;
// The activations that piece `n` is multiplied with.
template <Code C, int BYTES>
constexpr int place(int n) { return C == Code::e2m1 && BYTES == 2 ? (n & 1) << 1 | n >> 1 : n; }

// Piece `n`, called in order: `words` is what is left, so that few registers are needed at a time.
template <Code C, int BYTES>
inline __m256i next_piece(__m256i& words, __m256i& bytes, int n) {
  const __m256i low = _mm256_set1_epi16(C == Code::nibbles && BYTES == 2 ? 15 : 255);
  constexpr int LAST = PIECES<C, BYTES> - 1;
  if constexpr (C == Code::bytes || (C == Code::nibbles && BYTES == 2)) {
    if (n == LAST) return C == Code::bytes ? _mm256_srli_epi16(words, 8) : words;
    const __m256i u = _mm256_and_si256(words, low);
    if constexpr (C == Code::nibbles) words = _mm256_srli_epi16(words, 4);
    return u;
  }
  if (n == 0 || BYTES == 1 || n == 2) {
    bytes = _mm256_and_si256(n ? _mm256_srli_epi16(words, 4) : words, _mm256_set1_epi8(15));
    if constexpr (C == Code::e2m1) {
      // Twice the value plus 12: not negative.
      const __m256i values = _mm256_broadcastsi128_si256(
          _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
      bytes = _mm256_shuffle_epi8(values, bytes);
    }
  }
  if constexpr (BYTES == 1) return bytes;
  return n % 2 ? _mm256_srli_epi16(bytes, 8) : _mm256_and_si256(bytes, low);
}

// Words of a group, and as many as 16 bits can hold products of: 2 x 15 x 127 or 2 x 24 x 127 for each of two quads.
template <Code C>
constexpr int words_of_group(int group) { return group / (C == Code::bytes ? 4 : 8); }
template <Code C, int BYTES>
constexpr int joined_words(int words) { return BYTES == 2 ? words : C == Code::e2m1 ? 2 : 4; }

// Sizes of a group of weights of sixteen rows, known early where they can be.
template <Code C, int GROUP>
inline int64_t group_weights(const Matrix& m) { return C == Code::e2m1 ? ROWS_PER_PACK * GROUP / 2 : packed_weights(m); }
template <Code C, int GROUP>
inline int64_t group_bytes(const Matrix& m) {
  return C == Code::e2m1 ? ROWS_PER_PACK * GROUP / 2 + ROWS_PER_PACK : packed_group(m);
}

// Eight sums of a token, from row `first` of a tile on, of which `rows` are wanted.
template <Code C, int GROUP>
inline void store_sums(__m256 y, float restore, float* out, int64_t first, int64_t rows) {
  if constexpr (C == Code::e2m1 && GROUP == 16)
    y = _mm256_mul_ps(_mm256_mul_ps(y, _mm256_set1_ps(E4M3_RESTORE)), _mm256_set1_ps(restore));
  if (rows >= first + HALF_PACK) return _mm256_storeu_ps(out + first, y);
  alignas(32) float lanes[HALF_PACK];
  _mm256_store_ps(lanes, y);
  for (int64_t r = first; r < rows; r++) out[r] = lanes[r - first];
}

// Sixteen rows, of which `rows` are wanted, with T tokens of BYTES bytes a value, where they lie, and GROUP values a scale.
// AHEAD: asks for the lines of rows to come. The compiler keeps sums in registers only where all loops over them are
// unrolled.
template <Code C, int BYTES, int GROUP, int T, bool AHEAD>
[[gnu::noinline]] void packed_tile(const Matrix& m, const uint8_t* w, const GroupFactors* tokens, float* const* out,
                                   int64_t at, int64_t rows) {
  constexpr int WORDS = words_of_group<C>(GROUP), JOINED = joined_words<C, BYTES>(WORDS), N = PIECES<C, BYTES>;
  __m256 sum[T][2];
#pragma GCC unroll 4
  for (int t = 0; t < T; t++)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) sum[t][h] = _mm256_setzero_ps();
  const int64_t of_scales = HALF_PACK * scale_bytes(m);
  const int64_t weights = group_weights<C, GROUP>(m), all = group_bytes<C, GROUP>(m);
  int64_t g = 0, offset = 0;  // in the activations
  const uint8_t* const end = w + m.width / m.group * all;
  for (; w < end; w += all) {
    const uint8_t* v = w;
    do {
      __m256i whole[T][2];
#pragma GCC unroll 4
      for (int first = 0; first < WORDS; first += JOINED) {
        __m256i part[T][2];
#pragma GCC unroll 16
        for (int i = first; i < first + JOINED; i++) {
          if constexpr (AHEAD) _mm_prefetch(reinterpret_cast<const char*>(v + 64 * i + PACKED_AHEAD), _MM_HINT_T0);
          __m256i words[2], bytes[2], u[2];
#pragma GCC unroll 2
          for (int h = 0; h < 2; h++)
            words[h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + 64 * i + 32 * h));
#pragma GCC unroll 4
          for (int n = 0; n < N; n++) {
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) u[h] = next_piece<C, BYTES>(words[h], bytes[h], n);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
              int32_t piece;
              memcpy(&piece, tokens[t].integers + offset + 4 * (i * N + place<C, BYTES>(n)), 4);
#pragma GCC unroll 2
              for (int h = 0; h < 2; h++) {
                __m256i& to = part[t][h];
                const __m256i y = BYTES == 2 ? _mm256_madd_epi16(u[h], _mm256_set1_epi32(piece))
                                             : _mm256_maddubs_epi16(u[h], _mm256_set1_epi32(piece));
                to = i == first && n == 0 ? y : BYTES == 2 ? _mm256_add_epi32(to, y) : _mm256_add_epi16(to, y);
                asm("" : "+x"(to));  // the compiler would add in another order, and run out of registers
              }
            }
          }
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; t++)
#pragma GCC unroll 2
          for (int h = 0; h < 2; h++) {
            const __m256i y = BYTES == 2 ? part[t][h] : _mm256_madd_epi16(part[t][h], _mm256_set1_epi16(1));
            whole[t][h] = first == 0 ? y : _mm256_add_epi32(whole[t][h], y);
          }
      }
      offset += GROUP * BYTES;
      v += 64 * WORDS;
      const uint8_t* tail = w + weights;
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++, tail += of_scales) {
        const __m256 scale = packed_scales<C, GROUP>(m, tail);
        const __m256 bias = C == Code::e2m1 ? scale : eight_floats(m.type, tail + 2 * of_scales, 0);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
          const __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(tokens[t].factors[g]));
          sum[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[t][h]), factor, sum[t][h]);
          sum[t][h] = _mm256_fmadd_ps(bias, _mm256_set1_ps(tokens[t].offsets[g]), sum[t][h]);
        }
      }
      g++;
    } while (C != Code::e2m1 && v < w + weights);
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; t++)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++)
      if (rows > h * HALF_PACK) store_sums<C, GROUP>(sum[t][h], tokens[t].restore, out[t] + at, h * HALF_PACK, rows);
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

template <Code C, int BYTES, int GROUP>
void packed_tiles(const Matrix& m, int64_t begin, int64_t end, const Activations& a, const int32_t* tokens,
                  int count, float* const* out, float* scratch) {
  const int64_t bytes = bytes_of(a.layout, m.width), groups = groups_of(a.layout, m.width);
  GroupFactors of[TOKENS];
  for (int j = 0; j < count; j++) {
    of[j] = {a.quantized + tokens[j] * bytes, a.scales + tokens[j] * groups, a.sums + tokens[j] * groups, 1.f};
    if (C == Code::e2m1)
      fold_offsets(of[j], GROUP == 16, groups, scratch + 2 * j * groups, scratch + (2 * j + 1) * groups);
  }
  const int tiles = (count + TILE_TOKENS - 1) / TILE_TOKENS;
  for (int64_t row = begin; row < end; row += ROWS_PER_PACK)
    for (int i = 0, j = 0; i < tiles; i++) {
      const int some = (count - j + tiles - i - 1) / (tiles - i);  // tiles of about the same size
      const auto run = [&](auto size) {
        const auto tile = i == 0 ? packed_tile<C, BYTES, GROUP, size(), true> : packed_tile<C, BYTES, GROUP, size(), false>;
        tile(m, m.weight + row * m.weight_stride, of + j, out + j, row - begin, end - row);
      };
      switch (some) {
        case 1: run(std::integral_constant<int, 1>()); break;
        case 2: run(std::integral_constant<int, 2>()); break;
        case 3: run(std::integral_constant<int, 3>()); break;
        default: run(std::integral_constant<int, TILE_TOKENS>()); break;
      }
      j += some;
    }
}

int64_t packed_scratch(const Matrix& m, Layout l) { return is_e2m1(m) ? 2 * TOKENS * groups_of(l, m.width) : 0; }

void multiply_packed(const Matrix& m, int64_t first, int64_t last, const Activations& a, const int32_t* tokens,
                     int count, float* const* out, float* scratch) {
  const bool one = a.layout.interleave == Interleave::int8_quads_even, small = a.layout.group == 32;
  using enum Code;
  const auto run = m.format == Format::nvfp4   ? (one ? packed_tiles<e2m1, 1, 16> : packed_tiles<e2m1, 2, 16>)
                   : m.format == Format::mxfp4 ? (one ? packed_tiles<e2m1, 1, 32> : packed_tiles<e2m1, 2, 32>)
                   : m.bits == 8               ? (small ? packed_tiles<bytes, 2, 32> : packed_tiles<bytes, 2, 64>)
                   : one                       ? packed_tiles<nibbles, 1, 32>
                   : small                     ? packed_tiles<nibbles, 2, 32>
                                               : packed_tiles<nibbles, 2, 64>;
  run(m, first, last, a, tokens, count, out, scratch);
}

// One token's values for a packed matrix.
void prepare_packed(Layout l, int64_t width, const float* x, uint8_t* to, float* scales, float* sums) {
  const bool one = l.interleave == Interleave::int8_quads_even, quads = l.interleave == Interleave::int16_pairs4;
  const int64_t groups = width / l.group;
  for (int64_t g = 0; g < groups; g++, x += l.group) {
    const GroupScale of(largest_bits(x, l.group), one ? 127.f : 32767.f);
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < l.group; i += 8, to += one ? 8 : 16) {
      const __m256i q = of.finite ? _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(of.inverse)))
                                  : _mm256_setzero_si256();
      sum = _mm256_add_epi32(sum, q);
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
      if (one) {
        const __m128i places = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 0, 2, 4, 6, 1, 3, 5, 7);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(_mm_packs_epi16(words, words), places));
      } else {
        const __m128i dealt = quads ? _mm_shufflehi_epi16(_mm_shufflelo_epi16(words, 0xd8), 0xd8)
                                    : _mm_unpacklo_epi16(words, _mm_srli_si128(words, 8));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), dealt);
      }
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
