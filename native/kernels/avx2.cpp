// The kernels for AVX2, FMA and F16C (x86-64-v3).
//
// Weights of 4 bits are packed, sixteen rows side by side: packed_avx2.inc.h. Those of 8 bits, and of 2, 3, 5 and 6,
// which are spread to bytes first, are multiplied row by row with activations of 16 bits: `vpmaddwd` sums pairs
// into 32 bits, and one multiplication by (weight scale x activation scale) a group makes them floats. A lane
// of 16 bits holds two weights; activations are dealt out that way once a token, so that weights need no shuffles.
// Affine biases cost nothing in the loop: bias x (sum of the group's activations) is added at the end.
// Values of e4m3 are multiplied as floats: e4m3_avx2.inc.h.
#include <immintrin.h>

#include "kernels/quantized_tile.inc.h"
#include "kernels/x86.inc.h"

namespace cenacle {
namespace {

inline float total(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Of the largest magnitude of `n` values.
inline uint32_t largest_bits(const float* x, int n) {
  __m256i most = _mm256_setzero_si256();
  for (int i = 0; i < n; i += 8) {
    const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + i));
    most = _mm256_max_epi32(most, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), most);
  uint32_t top = 0;
  for (const uint32_t lane : lanes) top = lane > top ? lane : top;
  return top;
}

// ---- float weights ----------------------------------------------------------------------------

template <Float F>
inline __m256 load(const uint8_t* p, int64_t i) {
  if constexpr (F == Float::f32) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(p) + i);
  } else {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2 * i));
    if constexpr (F == Float::f16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
}

// R rows with T tokens; two sums for each, so that additions need not wait for one another.
template <Float F, int R, int T>
inline void dense_tile(const uint8_t* w, int64_t stride, int64_t width, const float* const* x,
                       float* const* out, int64_t row) {
  constexpr int bytes = F == Float::f32 ? 4 : 2;
  __m256 sum[2][R][T];
  for (auto& part : sum)
    for (auto& r : part)
      for (auto& t : r) t = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) {
    if constexpr (T == 1)
      if (i * bytes % 64 == 0) prefetch_ahead(w + i * bytes);
    for (int part = 0; part < 2; part++) {
      __m256 v[T];
      for (int t = 0; t < T; t++) v[t] = _mm256_loadu_ps(x[t] + i + 8 * part);
      for (int r = 0; r < R; r++) {
        const __m256 u = load<F>(w + r * stride, i + 8 * part);
        for (int t = 0; t < T; t++) sum[part][r][t] = _mm256_fmadd_ps(u, v[t], sum[part][r][t]);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) {
      float s = total(_mm256_add_ps(sum[0][r][t], sum[1][r][t]));
      for (int64_t j = i; j < width; j++) s = fmaf(at(F, w + r * stride, j), x[t][j], s);
      out[t][row + r] = s;
    }
}

struct Tile {
  static constexpr int rows = 2;
  template <Float F, int R, int T>
  static void run(const uint8_t* w, int64_t stride, int64_t width, const float* const* x, float* const* out,
                  int64_t row) {
    dense_tile<F, R, T>(w, stride, width, x, out, row);
  }
};

// ---- bytes ------------------------------------------------------------------------------------

// sum + a . b, of pairs of 16 bits.
inline __m256i add_products(__m256i sum, __m256i a, __m256i b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}

// T tokens with one row of bytes. `scale[t]` holds a factor for every group of `GROUP` weights.
template <int GROUP, int T>
inline void bytes_tile(const uint8_t* w, int64_t width, const int16_t* const* x, const float* const* scale, __m256* sum) {
  const __m256i low = _mm256_set1_epi16(0xff);
  for (int t = 0; t < T; t++) sum[t] = _mm256_setzero_ps();
  for (int64_t i = 0, g = 0; i < width; i += GROUP, g++) {
    __m256i part[T];
    for (int h = 0; h < GROUP / 32; h++) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i + 32 * h));
      if constexpr (T == 1) prefetch_ahead(w + i + 32 * h);
      const __m256i even = _mm256_and_si256(v, low), odd = _mm256_srli_epi16(v, 8);
      for (int t = 0; t < T; t++) {
        const auto* p = reinterpret_cast<const __m256i*>(x[t] + i + 32 * h);
        const __m256i s = h ? add_products(part[t], even, _mm256_loadu_si256(p))
                            : _mm256_madd_epi16(even, _mm256_loadu_si256(p));
        part[t] = add_products(s, odd, _mm256_loadu_si256(p + 1));
      }
    }
    for (int t = 0; t < T; t++)
      sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part[t]), _mm256_broadcast_ss(scale[t] + g), sum[t]);
  }
}

inline __m256 eight_floats(Float type, const uint8_t* p, int64_t i) {
  if (type == Float::f32) return load<Float::f32>(p, i);
  return type == Float::bf16 ? load<Float::bf16>(p, i) : load<Float::f16>(p, i);
}

// Eight scales of e8m0.
inline __m256 powers_of_two(const uint8_t* p) {
  const __m256i e = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(e, 23), _mm256_set1_epi32(0x400000)));
}

// Scales and biases of a row as floats, one for each `group_size` weights.
inline void row_scales(const Matrix& m, int64_t row, int group_size, int64_t groups, float* scale,
                       float* bias) {
  const Matrix r = m.from(row);
  const int64_t n = m.width / m.group;
  int64_t g = 0;
  for (; g + 8 <= n; g += 8) {
    _mm256_storeu_ps(scale + g, eight_floats(m.type, r.scales, g));
    _mm256_storeu_ps(bias + g, eight_floats(m.type, r.biases, g));
  }
  for (; g < n; g++) scale[g] = at(m.type, r.scales, g), bias[g] = at(m.type, r.biases, g);
  spread_scales(m, group_size, groups, scale, bias);
}

template <int GROUP, int T>
inline void bytes_rows(const uint8_t* w, int64_t stride, int64_t width, int64_t at, int64_t rows,
                       int64_t groups, const float* scales, const float* biases,
                       const Activations& a, const int32_t* tokens, float* const* out,
                       float* scratch) {
  const int16_t* x[T];
  const float *xs[T], *xb[T];
  float* factor[T];
  for (int t = 0; t < T; t++) {
    x[t] = reinterpret_cast<const int16_t*>(a.quantized) + int64_t(tokens[t]) * a.width;
    xs[t] = a.scales + int64_t(tokens[t]) * groups;
    xb[t] = a.sums + int64_t(tokens[t]) * groups;
    factor[t] = scratch + t * groups;
  }
  for (int64_t r = 0; r < rows; r++) {
    __m256 bias[T], sum[T];
    for (int t = 0; t < T; t++) bias[t] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; g += 8) {
      const __m256 s = _mm256_loadu_ps(scales + r * groups + g);
      const __m256 b = _mm256_loadu_ps(biases + r * groups + g);
      for (int t = 0; t < T; t++) {
        _mm256_storeu_ps(factor[t] + g, _mm256_mul_ps(s, _mm256_loadu_ps(xs[t] + g)));
        bias[t] = _mm256_fmadd_ps(b, _mm256_loadu_ps(xb[t] + g), bias[t]);
      }
    }
    bytes_tile<GROUP, T>(w + r * stride, width, x, factor, sum);
    for (int t = 0; t < T; t++) out[t][at + r] = total(_mm256_add_ps(sum[t], bias[t]));
  }
}

// One row of 8 bits with one token, whose factors are made without a stop in memory for scales and biases. The same bits.
template <int GROUP>
inline float bytes_row_alone(const Matrix& m, int64_t row, int64_t groups, const Activations& a, int32_t token,
                             float* factor) {
  const Matrix r = m.from(row);
  const int64_t n = m.width / GROUP, small = scale_bytes(m);
  const float *xs = a.scales + token * groups, *xb = a.sums + token * groups;
  __m256 bias = _mm256_setzero_ps(), sum[1];
  const auto eight = [&](int64_t g, __m256 s, __m256 b) {
    _mm256_storeu_ps(factor + g, _mm256_mul_ps(s, _mm256_loadu_ps(xs + g)));
    bias = _mm256_fmadd_ps(b, _mm256_loadu_ps(xb + g), bias);
  };
  int64_t g = 0;
  for (; g + 8 <= n; g += 8) {
    const uint8_t *s = r.scales + g * small, *b = r.biases + g * small;
    _mm_prefetch(reinterpret_cast<const char*>(s + 4 * m.scale_stride), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(b + 4 * m.scale_stride), _MM_HINT_T0);
    eight(g, eight_floats(m.type, s, 0), eight_floats(m.type, b, 0));
  }
  if (g < n) {
    alignas(32) float s[8] = {}, b[8] = {};
    for (int64_t i = g; i < n; i++) s[i - g] = at(m.type, r.scales, i), b[i - g] = at(m.type, r.biases, i);
    eight(g, _mm256_load_ps(s), _mm256_load_ps(b));
  }
  const int16_t* x[1] = {reinterpret_cast<const int16_t*>(a.quantized) + int64_t(token) * a.width};
  const float* factors[1] = {factor};
  bytes_tile<GROUP, 1>(r.weight, m.width, x, factors, sum);
  return total(_mm256_add_ps(sum[0], bias));
}

template <int GROUP>
void multiply_bytes(const Matrix& m, int64_t first, int64_t last, const Activations& a,
           const int32_t* tokens, int count, float* const* out, float* scratch) {
  const int64_t groups = groups_of(a.layout, m.width);
  float *scales = scratch, *biases = scales + ROWS * groups, *rest = biases + ROWS * groups;
  auto* bytes = reinterpret_cast<uint8_t*>(rest + 4 * groups);
  if (count == 1 && m.group == GROUP && m.bits == 8) {
    for (int64_t row = first; row < last; row++)
      out[0][row - first] = bytes_row_alone<GROUP>(m, row, groups, a, tokens[0], rest);
    return;
  }
  for (int64_t row = first; row < last; row += ROWS) {
    const int64_t n = last - row < ROWS ? last - row : ROWS;
    const uint8_t* w = m.weight + row * m.weight_stride;
    int64_t stride = m.weight_stride;
    for (int64_t r = 0; r < n; r++)
      row_scales(m, row + r, GROUP, groups, scales + r * groups, biases + r * groups);
    if (m.bits != 8) {
      for (int64_t r = 0; r < n; r++) expand_row(m, row + r, bytes + r * m.width);
      w = bytes, stride = m.width;
    }
    for_token_tiles(count, [&](int j, auto size) {
      bytes_rows<GROUP, size()>(w, stride, m.width, row - first, n, groups, scales, biases, a,
                                       tokens + j, out + j, rest);
    });
  }
}

}  // namespace
}  // namespace cenacle

#include "kernels/packed_avx2.inc.h"

namespace cenacle {
namespace {

// ---- the table --------------------------------------------------------------------------------

bool packs(const Matrix& m) { return m.format == Format::affine ? m.bits == 4 || m.bits == 8 : is_e2m1(m); }

Layout choose(const Matrix& m) {
  if (m.format == Format::dense) return {Interleave::none, 0};
  if (is_e4m3(m)) return {Interleave::float_quads, int(m.width)};
  const int group_size = m.group > 64 ? 64 : m.group;
  if (!m.packed) return {Interleave::int16x2, group_size};
  if (m.bits == 8) return {Interleave::int16_pairs4, group_size};
  if (m.activations == 8) return {Interleave::int8_quads_even, m.group < 32 ? m.group : 32};
  return {Interleave::int16_pairs8, group_size};
}

void prepare(Layout l, int64_t width, const float* x, uint8_t* to, float* scales, float* sums) {
  if (l.interleave == Interleave::float_quads) return prepare_e4m3(width, x, to, scales, sums);
  if (l.interleave != Interleave::int16x2) return prepare_packed(l, width, x, to, scales, sums);
  const int group_size = l.group;
  auto* quantized = reinterpret_cast<int16_t*>(to);
  const int64_t groups = width / group_size, padded = groups_of(l, width);
  for (int64_t g = 0; g < groups; g++) {
    const float* v = x + g * group_size;
    const GroupScale of(largest_bits(v, group_size), 32767.f);
    const __m256 factor = _mm256_set1_ps(of.inverse);
    alignas(32) uint32_t lanes[8];
    __m256i sum = _mm256_setzero_si256();
    int16_t q[64];
    for (int i = 0; i < group_size; i += 8) {
      const __m256i n = of.finite ? _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(v + i), factor))
                               : _mm256_setzero_si256();
      sum = _mm256_add_epi32(sum, n);
      const __m128i h = _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), h);
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
    int32_t whole = 0;
    for (const uint32_t lane : lanes) whole += int32_t(lane);
    scales[g] = of.scale;
    sums[g] = float(whole) * scales[g];
    // Value 2 * lane + way of 32 goes to that lane of that way's vector.
    for (int i = 0; i < group_size; i++) {
      const int64_t place = g * group_size + i, in = place % 32;
      quantized[place - in + in % 2 * 16 + in / 2] = q[i];
    }
  }
  for (int64_t g = groups; g < padded; g++) scales[g] = sums[g] = 0.f;
}

int64_t scratch(const Matrix& m) {
  const Layout l = choose(m);
  if (is_e4m3(m)) return ROWS * (m.width / m.group);
  if (m.packed) return packed_scratch(m, l);
  if (l.interleave != Interleave::int16x2) return 0;
  return (2 * ROWS + 4) * groups_of(l, m.width) + (m.bits == 8 ? 0 : ROWS * m.width / 4);
}

void multiply(const Matrix& m, int64_t first, int64_t last, const Activations& a,
              const int32_t* tokens, int count, float* const* out, float* scratch) {
  if (m.format == Format::dense) return dense<Tile>(m, first, last, a, tokens, count, out);
  if (is_e4m3(m)) return multiply_e4m3(m, first, last, a, tokens, count, out, scratch);
  if (m.packed) return multiply_packed(m, first, last, a, tokens, count, out, scratch);
  const auto run = a.layout.group == 32 ? multiply_bytes<32> : multiply_bytes<64>;
  run(m, first, last, a, tokens, count, out, scratch);
}

}  // namespace

const Kernels avx2 = {"avx2", packs, choose, prepare, scratch, multiply, activate};

}  // namespace cenacle
