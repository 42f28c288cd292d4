// The kernels for AVX-512 with VNNI.
//
// Matrices of 4 and 8 bits are packed, sixteen rows side by side: packed_vnni.inc.h. Rows of 2, 3, 5 and 6
// bits are spread to bytes without a sign one by one: `vpdpbusd` multiplies 64 of them with signed bytes. An
// activation of 16 bits is 256 upper + lower, two such bytes, so a group costs one pass over the upper
// bytes, a shift by eight and a pass over the lower ones in the same register: exact integers, which one
// multiplication by (weight scale x activation scale) a group makes floats.
// Affine biases cost nothing in the loop: bias x (sum of the group's activations) is added at the end.
#include <immintrin.h>

#include "kernels/e4m3_vnni.inc.h"
#include "kernels/x86.inc.h"

namespace cenacle {
namespace {

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
        prefetch_ahead(w + i * (F == Float::f32 ? 4 : 2) + b);
    step(i, 0, 0xffff);
    step(i + 16, 1, 0xffff);
  }
  for (int part = 0; i < width; i += 16, part++) step(i, part, first(width - i));
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++)
      out[t][row + r] = _mm512_reduce_add_ps(_mm512_add_ps(sum[0][r][t], sum[1][r][t]));
}

struct Tile {
  static constexpr int rows = 4;
  template <Float F, int R, int T>
  static void run(const uint8_t* w, int64_t stride, int64_t width, const float* const* x, float* const* out,
                  int64_t row) {
    dense_tile<F, R, T>(w, stride, width, x, out, row);
  }
};

// ---- integers ---------------------------------------------------------------------------------

constexpr int UNIT = 64;  // weights in a vector

// One scale for each of a vector's groups, from the group `g` on.
template <int GROUPS>
inline __m512 spread(const float* scales) {
  if constexpr (GROUPS == 1) return _mm512_set1_ps(*scales);
  const __m512i pick = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  return _mm512_permutexvar_ps(pick, _mm512_castps128_ps512(_mm_loadu_ps(scales)));
}

// Adds a row times T tokens to `sum`. `factor[t]` holds a number for every group of `GROUP` weights.
template <int GROUP, int T>
inline void tile(const uint8_t* w, int64_t width, const uint8_t* const* x, const float* const* factor,
                 __m512* sum) {
  constexpr int GROUPS = UNIT / GROUP;
  __m512 local[T];  // the compiler keeps these in registers, and `sum` not
  for (int t = 0; t < T; t++) local[t] = sum[t];
  const auto step = [&](int64_t at, int64_t g, __mmask8 some) __attribute__((always_inline)) {
    const __m512i v =
        some == 0xff ? _mm512_loadu_si512(w + at) : _mm512_maskz_loadu_epi64(some, w + at);
    for (int t = 0; t < T; t++) {
      const uint8_t* p = x[t] + 2 * at;
      __m512i part = _mm512_dpbusd_epi32(_mm512_setzero_si512(), v, _mm512_loadu_si512(p));
      part = _mm512_dpbusd_epi32(_mm512_slli_epi32(part, 8), v, _mm512_loadu_si512(p + 64));
      local[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part), spread<GROUPS>(factor[t] + g), local[t]);
    }
  };
  const int64_t whole = width / UNIT * UNIT;
  int64_t at = 0, g = 0;
  for (; at < whole; at += UNIT, g += GROUPS) step(at, g, 0xff);
  if (at < width) step(at, g, __mmask8((1u << (width - whole) / 8) - 1));
  for (int t = 0; t < T; t++) sum[t] = local[t];
}

// The processor does not see these streams coming between the rows of weights.
[[gnu::always_inline]] inline void scales_ahead(const Matrix& m, int64_t row) {
  const int64_t at = (row + 16) * m.scale_stride;
  for (int64_t b = 0; b < m.scale_stride; b += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(m.scales + at + b), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(m.biases + at + b), _MM_HINT_T0);
  }
}

// Scales and biases of whole rows, one for each `group_size` weights, padded with zeros.
template <Float F>
void scales_of(const Matrix& m, int64_t row, int64_t rows, int group_size, int64_t groups, float* scale,
               float* bias) {
  const int64_t n = m.width / m.group;
  const int times = m.group / group_size;  // 2: 128 weights a scale, 64 activations
  const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  for (int64_t r = row; r < row + rows; r++, scale += groups, bias += groups) {
    const uint8_t *from_s = m.scales + r * m.scale_stride, *from_b = m.biases + r * m.scale_stride;
    scales_ahead(m, r);
    for (int64_t g = 0; g < groups; g += 16) {
      const int64_t at = g / times;
      const __mmask16 some = at < n ? first(n - at) : 0;
      __m512 s = load<F>(from_s, at, some), b = load<F>(from_b, at, some);
      if (times == 2) {
        s = _mm512_permutexvar_ps(twice, s);
        b = _mm512_permutexvar_ps(twice, b);
      }
      _mm512_storeu_ps(scale + g, s);
      _mm512_storeu_ps(bias + g, b);
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

// Rows [0, 4) with T tokens. Not inlined: three of them in one loop spill registers.
template <int GROUP, int T>
[[gnu::noinline]] void four_rows(const uint8_t* w, int64_t width, int64_t groups, const float* scales,
                      const float* biases, const Activations& a, const int32_t* tokens,
                      float* const* out, int64_t at, int rows, float* memory) {
  const uint8_t* x[T];
  const float* factor[4][T];
  __m512 sum[4][T];
  const int64_t bytes = bytes_of(a.layout, width);
  for (int t = 0; t < T; t++) {
    x[t] = a.quantized + int64_t(tokens[t]) * bytes;
    const float *xs = a.scales + int64_t(tokens[t]) * groups, *xb = a.sums + int64_t(tokens[t]) * groups;
    for (int r = 0; r < 4; r++) {
      float* to = memory + (r * T + t) * groups;
      factor[r][t] = to;
      sum[r][t] = _mm512_setzero_ps();
      for (int64_t g = 0; r < rows && g < groups; g += 16) {
        const __m512 s = _mm512_loadu_ps(scales + r * groups + g);
        const __m512 b = _mm512_loadu_ps(biases + r * groups + g);
        _mm512_storeu_ps(to + g, _mm512_mul_ps(s, _mm512_loadu_ps(xs + g)));
        sum[r][t] = _mm512_fmadd_ps(b, _mm512_loadu_ps(xb + g), sum[r][t]);
      }
    }
  }
  for (int r = 0; r < rows; r++) tile<GROUP, T>(w + r * width, width, x, factor[r], sum[r]);
  for (int t = 0; t < T; t++) {
    const __m128 y = totals(sum[0][t], sum[1][t], sum[2][t], sum[3][t]);
    _mm_mask_storeu_ps(out[t] + at, __mmask8((1u << rows) - 1), y);
  }
}

// Rows that are spread to bytes.
template <int GROUP>
void expanded_rows(const Matrix& m, int64_t begin, int64_t end, const Activations& a, const int32_t* tokens,
                 int count, float* const* out, float* scratch) {
  const int64_t groups = groups_of(a.layout, m.width);
  const auto scales_of = m.type == Float::f32    ? cenacle::scales_of<Float::f32>
                         : m.type == Float::bf16 ? cenacle::scales_of<Float::bf16>
                                                 : cenacle::scales_of<Float::f16>;
  float *scales = scratch, *biases = scales + ROWS * groups, *memory = biases + ROWS * groups;
  auto* bytes = reinterpret_cast<uint8_t*>(memory + 16 * groups + 16);
  // With few tokens memory binds: it is read row by row.
  const int64_t block = count <= 4 ? 4 : ROWS;
  for (int64_t row = begin; row < end; row += block) {
    const int64_t n = end - row < block ? end - row : block;
    scales_of(m, row, n, GROUP, groups, scales, biases);
    for (int64_t r = 0; r < n; r++) expand_row(m, row + r, bytes + r * m.width);
    for_token_tiles(count, [&](int j, auto size) {
      for (int64_t r = 0; r < n; r += 4)
        four_rows<GROUP, size()>(bytes + r * m.width, m.width, groups, scales + r * groups,
                                 biases + r * groups, a, tokens + j, out + j, row + r - begin,
                                 int(n - r < 4 ? n - r : 4), memory);
    });
  }
}

// ---- the table --------------------------------------------------------------------------------

bool packs(const Matrix& m) { return m.format != Format::dense && (m.bits == 4 || m.bits == 8); }

Layout choose(const Matrix& m) {
  if (m.format == Format::dense) return {Interleave::none, 0};
  if (is_e4m3(m)) return {Interleave::none, 0};
  const int group_size = m.group > 64 ? 64 : m.group;
  if (!m.packed) return {Interleave::byte_planes, group_size};
  if (m.activations == 8)
    return {m.bits == 4 ? Interleave::int8_quads_even : Interleave::int8_quads, m.group < 32 ? m.group : 32};
  return {m.bits == 4 ? Interleave::byte_quads_even : Interleave::byte_quads, group_size};
}

void prepare(Layout l, int64_t width, const float* x, uint8_t* quantized, float* scales, float* sums) {
  if (l.interleave != Interleave::byte_planes) return prepare_packed(l, width, x, quantized, scales, sums);
  const int group_size = l.group;
  const int64_t groups = width / group_size, padded = groups_of(l, width), bytes = bytes_of(l, width);
  if (width % 64) memset(quantized + bytes - 128, 0, 128);
  for (int64_t g = 0; g < groups; g++) {
    const Quantizer steps = quantizer_of(x + g * group_size, group_size, MAX_QUANTIZED);
    __m512i total = _mm512_setzero_si512();
    uint8_t* to = quantized + g * group_size / 64 * 128 + g * group_size % 64;
    for (int i = 0; i < group_size; i += 16) {
      const __m512i q = steps.of(x + g * group_size + i);
      total = _mm512_add_epi32(total, q);
      const Bytes b = bytes_of(q);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), b.upper);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i + 64), b.lower);
    }
    scales[g] = steps.scale;
    sums[g] = float(_mm512_reduce_add_epi32(total)) * scales[g];
  }
  for (int64_t g = groups; g < padded; g++) scales[g] = sums[g] = 0.f;
}

int64_t scratch(const Matrix& m) {
  const Layout l = choose(m);
  if (l.interleave != Interleave::byte_planes) return 0;
  return (2 * ROWS + 16) * groups_of(l, m.width) + 16 + ROWS * m.width / 4 + 16;
}

void multiply(const Matrix& m, int64_t first, int64_t last, const Activations& a,
              const int32_t* tokens, int count, float* const* out, float* scratch) {
  if (m.format == Format::dense) return dense<Tile>(m, first, last, a, tokens, count, out);
  if (is_e4m3(m)) return multiply_e4m3(m, first, last, a, tokens, count, out);
  if (m.packed) return multiply_packed(m, first, last, a, tokens, count, out);
  const auto run = a.layout.group == 32 ? expanded_rows<32> : expanded_rows<64>;
  run(m, first, last, a, tokens, count, out, scratch);
}

}  // namespace

const Kernels vnni = {"vnni", packs, choose, prepare, scratch, multiply, activate};

}  // namespace cenacle
