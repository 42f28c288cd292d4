// The kernels for AVX-512 with VNNI.
//
// Quantised weights stay bytes without a sign: `vpdpbusd` multiplies 64 of them with signed bytes. An
// activation of 16 bits is 256 upper + lower, two such bytes, so a group costs one pass over the upper
// bytes, a shift by eight and a pass over the lower ones in the same register: exact integers, which one
// multiplication by (weight scale x activation scale) a group makes floats.
// Nibbles are split into the even and the odd values of each 128, and activations are dealt out that way
// once a token. 2-, 3-, 5- and 6-bit rows are spread to bytes first.
// Affine biases cost nothing in the loop: bias x (sum of the group's activations) is added at the end.
// One row is read at a time, and its lines are asked for well ahead: several rows at once, each a stream
// of its own, reached a third of the speed (see docs/LOG.md).
#include <immintrin.h>

#include "decode.inc.h"

namespace cenacle {
namespace {

constexpr int ROWS = 16;     // rows whose weights stay in the first-level cache while tokens pass
constexpr int AHEAD = 8192;  // bytes

// GCC drops calls of functions that only prefetch, unless they are inlined at once.
[[gnu::always_inline]] inline void ask_ahead(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p + AHEAD), _MM_HINT_T1);
}

inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : __mmask16((1u << n) - 1); }

// ---- float weights ----------------------------------------------------------------------------

template <Float F>
inline __m512 load(const uint8_t* p, int64_t i, __mmask16 some) {
  if constexpr (F == Float::f32) return _mm512_maskz_loadu_ps(some, p + 4 * i);
  const __m256i h = _mm256_maskz_loadu_epi16(some, p + 2 * i);
  if constexpr (F == Float::f16) return _mm512_cvtph_ps(h);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

// R rows with T tokens; two sums for each, so that additions need not wait for one another.
template <Float F, int R, int T>
inline void dense_tile(const uint8_t* w, int64_t stride, int64_t width, const float* const* x,
                       float* const* out, int64_t row) {
  __m512 sum[2][R][T] = {};
  const auto step = [&](int64_t i, int part, __mmask16 some) __attribute__((always_inline)) {
    __m512 v[T];
    for (int t = 0; t < T; t++) v[t] = _mm512_maskz_loadu_ps(some, x[t] + i);
    for (int r = 0; r < R; r++) {
      const __m512 u = load<F>(w + r * stride, i, some);
      for (int t = 0; t < T; t++) sum[part][r][t] = _mm512_fmadd_ps(u, v[t], sum[part][r][t]);
    }
  };
  int64_t i = 0;
  for (; i + 32 <= width; i += 32) {
    if constexpr (T == 1)
      for (int b = 0; b < 32 * (F == Float::f32 ? 4 : 2); b += 64)
        ask_ahead(w + i * (F == Float::f32 ? 4 : 2) + b);
    step(i, 0, 0xffff);
    step(i + 16, 1, 0xffff);
  }
  for (int part = 0; i < width; i += 16, part++) step(i, part, first(width - i));
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++)
      out[t][row + r] = _mm512_reduce_add_ps(_mm512_add_ps(sum[0][r][t], sum[1][r][t]));
}

template <Float F, int T>
inline void dense_rows(const uint8_t* w, int64_t stride, int64_t width, int64_t row, int64_t rows,
                       const float* const* x, float* const* out) {
  int64_t r = 0;
  if constexpr (T > 1)
    for (; r + 4 <= rows; r += 4)
      dense_tile<F, 4, T>(w + r * stride, stride, width, x, out, row + r);
  for (; r < rows; r++)
    dense_tile<F, 1, T>(w + r * stride, stride, width, x, out, row + r);
}

template <Float F>
void dense(const Matrix& m, int64_t begin, int64_t end, const Activations& a, const int32_t* tokens,
           int count, float* const* out) {
  for (int64_t row = begin; row < end; row += ROWS) {
    const int64_t n = end - row < ROWS ? end - row : ROWS;
    const uint8_t* w = m.weight + row * m.weight_stride;
    for (int j = 0; j < count;) {
      const int some = count - j >= 3 ? 3 : 1;
      const float* x[3];
      for (int t = 0; t < some; t++) x[t] = a.plain + int64_t(tokens[j + t]) * a.width;
      const auto run = some == 3 ? dense_rows<F, 3> : dense_rows<F, 1>;
      run(w, m.weight_stride, m.width, row - begin, n, x, out + j);
      j += some;
    }
  }
}

// ---- integers ---------------------------------------------------------------------------------

enum class Code { nibbles, bytes, e2m1 };

template <Code C>
constexpr int UNIT = C == Code::bytes ? 64 : 128;  // weights in a vector

// One scale for each of a vector's groups, from the group `g` on.
template <int GROUPS>
inline __m512 spread(const float* scales) {
  if constexpr (GROUPS == 1) return _mm512_set1_ps(*scales);
  const __m512i pick = GROUPS == 2
      ? _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
      : _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_ps(pick, _mm512_castps128_ps512(_mm_loadu_ps(scales)));
}

// Adds R rows times T tokens to `sum`. `factor[r][t]` holds a number for every group of `FINE` weights.
template <Code C, int FINE, int R, int T>
inline void tile(const uint8_t* const* w, int64_t width, const uint8_t* const* x,
                 const float* const (*factor)[T], __m512 (*sum)[T]) {
  constexpr int GROUPS = UNIT<C> / FINE;
  const __m512i low = _mm512_set1_epi8(15);
  // Twice the value plus 12: not negative.
  const __m512i values = _mm512_broadcast_i32x4(
      _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  constexpr int SHARE = C == Code::bytes ? 1 : 2;  // weights in a byte
  __m512 local[R][T];  // the compiler keeps these in registers, and `sum` not
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) local[r][t] = sum[r][t];
  // `at`: bytes of a row; the activations take 2 SHARE as many.
  const auto step = [&](int64_t at, int64_t g, __mmask8 some) __attribute__((always_inline)) {
    __m512i v[R], odd[R];
    for (int r = 0; r < R; r++) {
      v[r] = some == 0xff ? _mm512_loadu_si512(w[r] + at) : _mm512_maskz_loadu_epi64(some, w[r] + at);
      if constexpr (T == 1) ask_ahead(w[r] + at);
      if constexpr (C != Code::bytes) {
        odd[r] = _mm512_and_si512(_mm512_srli_epi16(v[r], 4), low);
        v[r] = _mm512_and_si512(v[r], low);
      }
      if constexpr (C == Code::e2m1) {
        odd[r] = _mm512_shuffle_epi8(values, odd[r]);
        v[r] = _mm512_shuffle_epi8(values, v[r]);
      }
    }
    for (int t = 0; t < T; t++) {
      const uint8_t* p = x[t] + at * (2 * SHARE);
      __m512i part[R];
      for (int r = 0; r < R; r++) part[r] = _mm512_setzero_si512();
      for (int plane = 0; plane < 2; plane++) {
        const __m512i even = _mm512_loadu_si512(p + 64 * SHARE * plane);
        for (int r = 0; r < R; r++) {
          if (plane) part[r] = _mm512_slli_epi32(part[r], 8);
          part[r] = _mm512_dpbusd_epi32(part[r], v[r], even);
        }
        if constexpr (C != Code::bytes) {
          const __m512i other = _mm512_loadu_si512(p + 64 * SHARE * plane + 64);
          for (int r = 0; r < R; r++) part[r] = _mm512_dpbusd_epi32(part[r], odd[r], other);
        }
      }
      for (int r = 0; r < R; r++)
        local[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[r]),
                                      spread<GROUPS>(factor[r][t] + g), local[r][t]);
    }
  };
  const int64_t bytes = width / SHARE, whole = bytes / 64 * 64;
  int64_t at = 0, g = 0;
  for (; at < whole; at += 64, g += GROUPS) step(at, g, 0xff);
  if (at < bytes) step(at, g, __mmask8((1u << (bytes - whole) / 8) - 1));
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) sum[r][t] = local[r][t];
}

enum class Scale { f32, bf16, f16, e8m0 };

// Scales and biases of sixteen groups of a row, from `g` on, or of as many as there are.
template <Scale S>
inline void sixteen(const uint8_t* scales, const uint8_t* biases, int64_t g, int64_t groups,
                    __m512& scale, __m512& bias) {
  const __mmask16 some = first(groups - g);
  if constexpr (S == Scale::e8m0) {
    const __m512i e = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, scales + g));
    const __m512i least = _mm512_maskz_set1_epi32(_mm512_cmpeq_epi32_mask(e, _mm512_setzero_si512()),
                                                  0x400000);
    scale = _mm512_maskz_mul_ps(
        some, _mm512_castsi512_ps(_mm512_or_si512(_mm512_slli_epi32(e, 23), least)),
        _mm512_set1_ps(.5f));
    bias = _mm512_mul_ps(scale, _mm512_set1_ps(-12.f));
  } else {
    scale = load<Float(S)>(scales, g, some);
    bias = load<Float(S)>(biases, g, some);
  }
}

// The processor does not see these streams coming between the rows of weights.
[[gnu::always_inline]] inline void scales_ahead(const Matrix& m, int64_t row) {
  const int64_t at = (row + 16) * m.scale_stride;
  for (int64_t b = 0; b < m.scale_stride; b += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(m.scales + at + b), _MM_HINT_T0);
    if (m.biases) _mm_prefetch(reinterpret_cast<const char*>(m.biases + at + b), _MM_HINT_T0);
  }
}

// Both for whole rows, one for each `fine` weights, padded with zeros.
template <Scale S>
void scales_of(const Matrix& m, int64_t row, int64_t rows, int fine, int64_t groups, float* scale,
               float* bias) {
  const int64_t n = m.width / m.group;
  const bool twice = m.group > fine;  // 128 weights a scale, 64 activations
  for (int64_t r = row; r < row + rows; r++, scale += groups, bias += groups) {
    const uint8_t *from_s = m.scales + r * m.scale_stride, *from_b = m.biases + r * m.scale_stride;
    scales_ahead(m, r);
    __m512 s, b;
    if (!twice) {
      for (int64_t g = 0; g < groups; g += 16) {
        sixteen<S>(from_s, from_b, g, n, s, b);
        _mm512_storeu_ps(scale + g, s);
        _mm512_storeu_ps(bias + g, b);
      }
      continue;
    }
    for (int64_t g = 0; g < groups; g += 16) {
      sixteen<S>(from_s, from_b, g / 2, g / 2 + 8 < n ? g / 2 + 8 : n, s, b);
      const __m512i pick = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
      _mm512_storeu_ps(scale + g, _mm512_permutexvar_ps(pick, s));
      _mm512_storeu_ps(bias + g, _mm512_permutexvar_ps(pick, b));
    }
  }
}

// The four vectors' totals.
inline __m128 totals(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Rows [0, 4) with T tokens, R rows at a time.
template <Code C, int FINE, int R, int T>
inline void four_rows(const uint8_t* const* w, int64_t width, int64_t groups, const float* scales,
                      const float* biases, const Activations& a, const int32_t* tokens,
                      float* const* out, int64_t at, int rows, float* memory) {
  const uint8_t* x[T];
  const float* factor[4][T];
  __m512 sum[4][T];
  const int64_t bytes = bytes_of(a.layout, width);
  for (int t = 0; t < T; t++) {
    x[t] = a.fixed + int64_t(tokens[t]) * bytes;
    const float *xs = a.scales + int64_t(tokens[t]) * groups, *xb = a.sums + int64_t(tokens[t]) * groups;
    for (int r = 0; r < 4; r++) {
      float* to = memory + (r * T + t) * groups;
      factor[r][t] = to;
      sum[r][t] = _mm512_setzero_ps();
      for (int64_t g = 0; g < groups; g += 16) {
        const __m512 s = _mm512_loadu_ps(scales + r * groups + g);
        const __m512 b = _mm512_loadu_ps(biases + r * groups + g);
        _mm512_storeu_ps(to + g, _mm512_mul_ps(s, _mm512_loadu_ps(xs + g)));
        sum[r][t] = _mm512_fmadd_ps(b, _mm512_loadu_ps(xb + g), sum[r][t]);
      }
    }
  }
  for (int r = 0; r < 4; r += R) tile<C, FINE, R, T>(w + r, width, x, factor + r, sum + r);
  for (int t = 0; t < T; t++) {
    const __m128 y = totals(sum[0][t], sum[1][t], sum[2][t], sum[3][t]);
    _mm_mask_storeu_ps(out[t] + at, __mmask8((1u << rows) - 1), y);
  }
}

// The bytes of a row of 2, 3, 5 or 6 bits.
template <int BITS>
inline void spread_bits(const uint8_t* from, int64_t n, uint8_t* to) {
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

inline void spread_row(const Matrix& m, int64_t row, uint8_t* to) {
  const uint8_t* from = m.weight + row * m.weight_stride;
  switch (m.bits) {
    case 2: return spread_bits<2>(from, m.width, to);
    case 3: return spread_bits<3>(from, m.width, to);
    case 5: return spread_bits<5>(from, m.width, to);
    default: return spread_bits<6>(from, m.width, to);
  }
}

inline bool packed(const Matrix& m) { return m.bits != 4 && m.bits != 8; }

// One token, with scales straight from the weights: what memory gives binds, and every store less counts.
template <Code C, int FINE, Scale S>
void one_token(const Matrix& m, int64_t begin, int64_t end, const Activations& a, int32_t token,
               float* out, float* memory, uint8_t* spread) {
  const int64_t groups = groups_of(a.layout, m.width), n = m.width / m.group;
  const uint8_t* x[1] = {a.fixed + int64_t(token) * bytes_of(a.layout, m.width)};
  const float *xs = a.scales + int64_t(token) * groups, *xb = a.sums + int64_t(token) * groups;
  for (int64_t row = begin; row < end; row += 4) {
    const int rows = int(end - row < 4 ? end - row : 4);
    __m512 sum[4][1] = {};
    const float* factor[4][1];
    for (int r = 0; r < rows; r++) {
      const uint8_t* from_s = m.scales + (row + r) * m.scale_stride;
      const uint8_t* from_b = m.biases + (row + r) * m.scale_stride;
      float* to = memory + r * groups;
      factor[r][0] = to;
      for (int64_t g = 0; g < groups; g += 16) {
        __m512 s, b;
        sixteen<S>(from_s, from_b, g, n, s, b);
        _mm512_storeu_ps(to + g, _mm512_mul_ps(s, _mm512_loadu_ps(xs + g)));
        sum[r][0] = _mm512_fmadd_ps(b, _mm512_loadu_ps(xb + g), sum[r][0]);
      }
      scales_ahead(m, row + r);
    }
    for (int r = 0; r < rows; r++) {
      const uint8_t* w[1] = {m.weight + (row + r) * m.weight_stride};
      if (C == Code::bytes && packed(m)) {
        spread_row(m, row + r, spread);
        w[0] = spread;
      }
      tile<C, FINE, 1, 1>(w, m.width, x, factor + r, sum + r);
    }
    _mm_mask_storeu_ps(out + row - begin, __mmask8((1u << rows) - 1),
                       totals(sum[0][0], sum[1][0], sum[2][0], sum[3][0]));
  }
}

template <Code C, int FINE>
void fixed(const Matrix& m, int64_t begin, int64_t end, const Activations& a, const int32_t* tokens,
           int count, float* const* out, float* scratch) {
  const int64_t groups = groups_of(a.layout, m.width);
  const auto scales_of = m.format == Format::mxfp4 ? cenacle::scales_of<Scale::e8m0>
                         : m.type == Float::f32    ? cenacle::scales_of<Scale::f32>
                         : m.type == Float::bf16   ? cenacle::scales_of<Scale::bf16>
                                                   : cenacle::scales_of<Scale::f16>;
  float *scales = scratch, *biases = scales + ROWS * groups, *memory = biases + ROWS * groups;
  auto* spread = reinterpret_cast<uint8_t*>(memory + 16 * groups + 16);
  if (count == 1 && m.group <= 64) {
    const auto run = m.format == Format::mxfp4 ? one_token<C, FINE, Scale::e8m0>
                     : m.type == Float::f32    ? one_token<C, FINE, Scale::f32>
                     : m.type == Float::bf16   ? one_token<C, FINE, Scale::bf16>
                                               : one_token<C, FINE, Scale::f16>;
    return run(m, begin, end, a, tokens[0], out[0], memory, spread);
  }
  // With few tokens memory binds: it is read row by row.
  const int64_t block = count <= 4 ? 4 : ROWS;
  for (int64_t row = begin; row < end; row += block) {
    const int64_t n = end - row < block ? end - row : block;
    const uint8_t* w[ROWS];
    scales_of(m, row, n, FINE, groups, scales, biases);
    for (int64_t r = 0; r < (n + 3) / 4 * 4; r++) {
      const int64_t real = r < n ? r : n - 1;  // rows that are not there: any, with scales of old
      w[r] = m.weight + (row + real) * m.weight_stride;
      if (C == Code::bytes && packed(m)) {
        if (r < n) spread_row(m, row + r, spread + r * m.width);
        w[r] = spread + real * m.width;
      }
    }
    for (int j = 0; j < count;) {
      const int some = count - j >= 4 ? 4 : count - j >= 2 ? 2 : 1;
      const auto run = some == 4   ? (block == 4 ? four_rows<C, FINE, 1, 4> : four_rows<C, FINE, 2, 4>)
                       : some == 2 ? four_rows<C, FINE, 1, 2>
                                   : four_rows<C, FINE, 1, 1>;
      for (int64_t r = 0; r < n; r += 4)
        run(w + r, m.width, groups, scales + r * groups, biases + r * groups, a, tokens + j, out + j,
            row + r - begin, int(n - r < 4 ? n - r : 4), memory);
      j += some;
    }
  }
}

// ---- the table --------------------------------------------------------------------------------

Layout choose(const Matrix& m) {
  if (m.format == Format::dense) return {Deal::none, 0};
  return {m.bits == 4 ? Deal::even_planes : Deal::planes, m.group > 64 ? 64 : m.group};
}

// A group that holds an infinity or a NaN becomes NaN as a whole.
void prepare(Layout l, int64_t width, const float* x, uint8_t* fixed, float* scales, float* sums) {
  const int fine = l.fine, pieces = fine / 16;
  const int64_t groups = width / fine, padded = groups_of(l, width);
  const int64_t bytes = bytes_of(l, width);
  const bool halves = l.deal == Deal::even_planes;
  const int64_t unit = halves ? 128 : 64;
  if (width % unit) memset(fixed + bytes - 2 * unit, 0, 2 * unit);
  // So that the upper byte of the rounded sum stays a signed byte: 127 * 256 + 127.
  constexpr float most = 32639.f;
  for (int64_t g = 0; g < groups; g++) {
    const float* v = x + g * fine;
    __m512i top = _mm512_setzero_si512();
    for (int i = 0; i < pieces; i++)
      top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_castps_si512(_mm512_loadu_ps(v + 16 * i)),
                                                   _mm512_set1_epi32(0x7fffffff)));
    const uint32_t greatest = _mm512_reduce_max_epu32(top);
    const bool finite = greatest < 0x7f800000u;
    // Below this the reciprocal overflows; such values are nothing beside any others.
    const float largest = finite && from_bits(greatest) > 1e-30f ? from_bits(greatest) : 0.f;
    const __m512 factor = _mm512_set1_ps(largest > 0.f ? most / largest : 0.f);
    __m512i total = _mm512_setzero_si512();
    alignas(64) int8_t upper[64], lower[64];
    for (int i = 0; i < pieces; i++) {
      const __m512i q = finite ? _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(v + 16 * i), factor))
                               : _mm512_setzero_si512();
      total = _mm512_add_epi32(total, q);
      const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
      const __m512i rest = _mm512_sub_epi32(q, _mm512_slli_epi32(h, 8));
      _mm_store_si128(reinterpret_cast<__m128i*>(upper + 16 * i), _mm512_cvtepi32_epi8(h));
      _mm_store_si128(reinterpret_cast<__m128i*>(lower + 16 * i), _mm512_cvtepi32_epi8(rest));
    }
    scales[g] = finite ? largest / most : NAN;
    sums[g] = float(_mm512_reduce_add_epi32(total)) * scales[g];
    const int64_t in = g * fine % unit;
    uint8_t* to = fixed + g * fine / unit * (2 * unit);
    if (!halves) {
      memcpy(to + in, upper, fine);
      memcpy(to + 64 + in, lower, fine);
      continue;
    }
    const auto deal = [&](const int8_t* from, uint8_t* even, uint8_t* odd) {
      const __m512i b = _mm512_load_si512(from);
      const __mmask32 some = fine == 64 ? 0xffffffffu : 0xffffu;
      _mm256_mask_storeu_epi8(even, some, _mm512_cvtepi16_epi8(b));
      _mm256_mask_storeu_epi8(odd, some, _mm512_cvtepi16_epi8(_mm512_srli_epi16(b, 8)));
    };
    deal(upper, to + in / 2, to + 64 + in / 2);
    deal(lower, to + 128 + in / 2, to + 192 + in / 2);
  }
  for (int64_t g = groups; g < padded; g++) scales[g] = sums[g] = 0.f;
}

int64_t scratch(const Matrix& m) {
  const Layout l = choose(m);
  if (l.deal == Deal::none) return 0;
  const int64_t spread = packed(m) ? ROWS * m.width / 4 + 16 : 0;
  return (2 * ROWS + 16) * groups_of(l, m.width) + 16 + spread;
}

void multiply(const Matrix& m, int64_t first, int64_t last, const Activations& a,
              const int32_t* tokens, int count, float* const* out, float* scratch) {
  if (m.format == Format::dense) {
    const auto run = m.type == Float::f32    ? dense<Float::f32>
                     : m.type == Float::bf16 ? dense<Float::bf16>
                                             : dense<Float::f16>;
    run(m, first, last, a, tokens, count, out);
    return;
  }
  const bool small = a.layout.fine == 32;
  const auto run = m.format == Format::mxfp4 ? fixed<Code::e2m1, 32>
                   : m.bits == 4 ? (small ? fixed<Code::nibbles, 32> : fixed<Code::nibbles, 64>)
                                 : (small ? fixed<Code::bytes, 32> : fixed<Code::bytes, 64>);
  run(m, first, last, a, tokens, count, out, scratch);
}

}  // namespace

const Kernels vnni = {"vnni", choose, prepare, scratch, multiply, activate};

}  // namespace cenacle
