// What the sets for x86-64 have in common: included by each of them, after its own loads and tiles.
#pragma once

#include <immintrin.h>

#include "kernels/decode.inc.h"

namespace cenacle {
namespace {

constexpr int AHEAD = 8192;  // bytes

// GCC drops calls of functions that only prefetch, unless they are inlined at once.
[[gnu::always_inline]] inline void prefetch_ahead(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p + AHEAD), _MM_HINT_T1);
}

// Float weights: `Tile::run<F, R, T>` multiplies R rows with T tokens, R being 1 or Tile::rows.
template <class Tile, Float F, int T>
void dense_rows(const uint8_t* w, int64_t stride, int64_t width, int64_t row, int64_t rows,
                const float* const* x, float* const* out) {
  int64_t r = 0;
  if constexpr (T > 1)
    for (; r + Tile::rows <= rows; r += Tile::rows)
      Tile::template run<F, Tile::rows, T>(w + r * stride, stride, width, x, out, row + r);
  for (; r < rows; r++) Tile::template run<F, 1, T>(w + r * stride, stride, width, x, out, row + r);
}

template <class Tile, Float F>
void dense_of(const Matrix& m, int64_t begin, int64_t end, const Activations& a, const int32_t* tokens,
              int count, float* const* out) {
  constexpr int64_t block = 16;  // rows whose weights stay in the first-level cache while tokens pass
  for (int64_t row = begin; row < end; row += block) {
    const int64_t n = end - row < block ? end - row : block;
    const uint8_t* w = m.weight + row * m.weight_stride;
    for (int j = 0; j < count;) {
      const int some = count - j >= 3 ? 3 : 1;
      const float* x[3];
      for (int t = 0; t < some; t++) x[t] = a.plain + int64_t(tokens[j + t]) * a.width;
      const auto run = some == 3 ? dense_rows<Tile, F, 3> : dense_rows<Tile, F, 1>;
      run(w, m.weight_stride, m.width, row - begin, n, x, out + j);
      j += some;
    }
  }
}

template <class Tile>
void dense(const Matrix& m, int64_t begin, int64_t end, const Activations& a, const int32_t* tokens,
           int count, float* const* out) {
  const auto run = m.type == Float::f32    ? dense_of<Tile, Float::f32>
                   : m.type == Float::bf16 ? dense_of<Tile, Float::bf16>
                                           : dense_of<Tile, Float::f16>;
  run(m, begin, end, a, tokens, count, out);
}

// The bytes of a row of fewer bits.
template <int BITS>
inline void expand_bits(const uint8_t* from, int64_t n, uint8_t* to) {
  constexpr uint64_t mask = 0x0101010101010101u * ((1u << BITS) - 1);
  int64_t i = 0;
  // Eight bytes are read of which BITS are wanted, where the row has as many.
  for (; i + 64 <= n; i += 8, from += BITS) {
    uint64_t word;
    memcpy(&word, from, 8);
    word = _pdep_u64(word, mask);
    memcpy(to + i, &word, 8);
  }
  for (; i < n; i += 8, from += BITS) {
    uint64_t word = 0;
    memcpy(&word, from, BITS);
    word = _pdep_u64(word, mask);
    memcpy(to + i, &word, 8);
  }
}

inline void expand_row(const Matrix& m, int64_t row, uint8_t* to) {
  const uint8_t* from = m.weight + row * m.weight_stride;
  switch (m.bits) {
    case 2: return expand_bits<2>(from, m.width, to);
    case 3: return expand_bits<3>(from, m.width, to);
    case 4: return expand_bits<4>(from, m.width, to);
    case 5: return expand_bits<5>(from, m.width, to);
    default: return expand_bits<6>(from, m.width, to);
  }
}

}  // namespace
}  // namespace cenacle
