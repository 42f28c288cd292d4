// The kernels for AVX2, FMA and F16C (x86-64-v3).
//
// 4- and 8-bit weights are multiplied as integers with activations of 16 bits: `vpmaddwd` sums pairs
// into 32 bits, and one multiplication by (weight scale x activation scale) a group makes them floats.
// The nibbles of a 16-bit lane are taken apart by shifts alone, which leaves value 4 j + i in lane j of
// vector i; activations are dealt out that way once a token, so that weights need no shuffles.
// Affine biases cost nothing in the loop: bias x (sum of the group's activations) is added at the end.
// 2-, 3-, 5- and 6-bit rows, and rows of 4 bits that do not fill vectors, are spread to bytes first; such
// rows of nvfp4 to floats. Values of e4m3 are multiplied as floats: e4m3_avx2.inc.h.
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

// ---- 4 and 8 bits -----------------------------------------------------------------------------

// sum + a . b, of pairs of 16 bits.
inline __m256i add_products(__m256i sum, __m256i a, __m256i b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}

// T tokens with one row. `scale[t]` holds a factor for every group of `GROUP` weights.
template <Code C, int GROUP, int T>
inline void quantized_tile(const uint8_t* w, int64_t width, const int16_t* const* x,
                       const float* const* scale, __m256* sum) {
  constexpr int unit = C == Code::bytes ? GROUP : 64;  // weights in one round
  constexpr int GROUPS = unit / GROUP;                 // in a vector of nibbles, side by side
  const __m256i low = _mm256_set1_epi16(C == Code::bytes ? 0xff : 0xf);
  const __m256i split = GROUPS == 4 ? _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)
                                    : _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  for (int t = 0; t < T; t++) sum[t] = _mm256_setzero_ps();
  for (int64_t i = 0, g = 0; i < width; i += unit, g += GROUPS) {
    __m256i part[T];
    if constexpr (C == Code::bytes) {
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
    } else {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i / 2));
      if constexpr (T == 1) prefetch_ahead(w + i / 2);
      __m256i n[4] = {_mm256_and_si256(v, low), _mm256_and_si256(_mm256_srli_epi16(v, 4), low),
                      _mm256_and_si256(_mm256_srli_epi16(v, 8), low), _mm256_srli_epi16(v, 12)};
      if constexpr (C == Code::e2m1) {
        // Twice the value plus 12: not negative, so that the upper byte of a lane is zero.
        const __m256i table = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
        const __m256i zero = _mm256_set1_epi16(int16_t(0x8000));
        for (auto& q : n) q = _mm256_shuffle_epi8(table, _mm256_or_si256(q, zero));
      }
      for (int t = 0; t < T; t++) {
        const auto* p = reinterpret_cast<const __m256i*>(x[t] + i);
        const __m256i s = add_products(_mm256_madd_epi16(n[0], _mm256_loadu_si256(p)), n[1],
                                       _mm256_loadu_si256(p + 1));
        const __m256i u = add_products(_mm256_madd_epi16(n[2], _mm256_loadu_si256(p + 2)), n[3],
                                       _mm256_loadu_si256(p + 3));
        part[t] = _mm256_add_epi32(s, u);
      }
    }
    for (int t = 0; t < T; t++) {
      __m256 f;
      if constexpr (GROUPS == 4) {
        f = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(scale[t] + g)), split);
      } else if constexpr (GROUPS == 2) {
        const __m256d two = _mm256_broadcast_sd(reinterpret_cast<const double*>(scale[t] + g));
        f = _mm256_permutevar_ps(_mm256_castpd_ps(two), split);
      } else {
        f = _mm256_broadcast_ss(scale[t] + g);
      }
      sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part[t]), f, sum[t]);
    }
  }
}

// Sixteen codes of e4m3 as half floats: the sign, a zero, the other seven bits. Their exponents are then 8
// too small. The processor converts these to float, subnormal or not.
inline __m256i halves_of(__m128i codes) {
  return _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7), _mm256_set1_epi16(int16_t(0xbf80)));
}
constexpr float HALVES = 256.f;

inline __m256 eight_floats(Float type, const uint8_t* p, int64_t i) {
  if (type == Float::f32) return load<Float::f32>(p, i);
  return type == Float::bf16 ? load<Float::bf16>(p, i) : load<Float::f16>(p, i);
}

// Eight scales of e8m0.
inline __m256 powers_of_two(const uint8_t* p) {
  const __m256i e = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(e, 23), _mm256_set1_epi32(0x400000)));
}

inline __m256 eight_scales(const Matrix& m, const uint8_t* scales, int64_t g) {
  if (m.format == Format::affine || m.format == Format::fp8) return eight_floats(m.type, scales, g);
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales + g));
  if (m.format == Format::nvfp4)
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(halves_of(bytes))), _mm256_set1_ps(HALVES));
  return powers_of_two(scales + g);
}

// Scales and biases of a row as floats, one for each `group_size` weights.
inline void row_scales(const Matrix& m, int64_t row, int group_size, int64_t groups, float* scale,
                       float* bias) {
  const Matrix r = m.from(row);
  const int64_t n = m.width / m.group;
  // Values of e2m1 are doubled, and 12 more than they are.
  const float factor = is_e2m1(m) ? .5f : 1.f;
  int64_t g = 0;
  for (; g + 8 <= n; g += 8) {
    const __m256 s = _mm256_mul_ps(eight_scales(m, r.scales, g), _mm256_set1_ps(factor));
    _mm256_storeu_ps(scale + g, s);
    _mm256_storeu_ps(bias + g, r.biases ? eight_floats(m.type, r.biases, g) : _mm256_mul_ps(s, _mm256_set1_ps(-12.f)));
  }
  for (; g < n; g++) {
    scale[g] = scale_at(m, r.scales, g) * factor;
    bias[g] = r.biases ? at(m.type, r.biases, g) : -12.f * scale[g];
  }
  spread_scales(m, group_size, groups, scale, bias);
}

template <Code C, int GROUP, int T>
inline void quantized_rows(const uint8_t* w, int64_t stride, int64_t width, int64_t at, int64_t rows,
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
    quantized_tile<C, GROUP, T>(w + r * stride, width, x, factor, sum);
    for (int t = 0; t < T; t++) out[t][at + r] = total(_mm256_add_ps(sum[t], bias[t]));
  }
}

// The bytes of a row of fewer bits, or of e2m1: twice the value plus 12.
inline void bytes_of_row(const Matrix& m, int64_t row, uint8_t* to) {
  if (m.format != Format::mxfp4) return expand_row(m, row, to);
  const uint8_t* from = m.weight + row * m.weight_stride;
  const uint8_t values[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
  for (int64_t i = 0; i < m.width; i += 2) {
    to[i] = values[from[i / 2] & 15];
    to[i + 1] = values[from[i / 2] >> 4];
  }
}

inline bool expands_rows(const Matrix& m, Layout l) { return l.interleave == Interleave::int16x2 && m.bits != 8; }

template <Code C, int GROUP>
void multiply_quantized(const Matrix& m, int64_t first, int64_t last, const Activations& a,
           const int32_t* tokens, int count, float* const* out, float* scratch) {
  const int64_t groups = groups_of(a.layout, m.width);
  float *scales = scratch, *biases = scales + ROWS * groups, *rest = biases + ROWS * groups;
  auto* bytes = reinterpret_cast<uint8_t*>(rest + 4 * groups);
  for (int64_t row = first; row < last; row += ROWS) {
    const int64_t n = last - row < ROWS ? last - row : ROWS;
    const uint8_t* w = m.weight + row * m.weight_stride;
    int64_t stride = m.weight_stride;
    for (int64_t r = 0; r < n; r++)
      row_scales(m, row + r, GROUP, groups, scales + r * groups, biases + r * groups);
    if (C == Code::bytes && expands_rows(m, a.layout)) {
      for (int64_t r = 0; r < n; r++) bytes_of_row(m, row + r, bytes + r * m.width);
      w = bytes, stride = m.width;
    }
    for_token_tiles(count, [&](int j, auto size) {
      quantized_rows<C, GROUP, size()>(w, stride, m.width, row - first, n, groups, scales, biases, a,
                                       tokens + j, out + j, rest);
    });
  }
}

}  // namespace
}  // namespace cenacle

#include "kernels/e4m3_avx2.inc.h"

namespace cenacle {
namespace {

// ---- the table --------------------------------------------------------------------------------

bool packs(const Matrix&) { return false; }

Layout choose(const Matrix& m) {
  const bool decodes = m.format == Format::nvfp4 && m.width % 64;
  if (m.format == Format::dense || decodes) return {Interleave::none, 0};
  if (is_e4m3(m)) return {Interleave::float_quads, int(m.width)};
  const int group_size = m.group > 64 ? 64 : m.group;
  return {m.bits == 4 && m.width % 64 == 0 ? Interleave::int16x4 : Interleave::int16x2, group_size};
}

void prepare(Layout l, int64_t width, const float* x, uint8_t* to, float* scales, float* sums) {
  if (l.interleave == Interleave::float_quads) return prepare_e4m3(width, x, to, scales, sums);
  const int group_size = l.group, ways = l.interleave == Interleave::int16x4 ? 4 : 2, unit = 16 * ways;
  auto* quantized = reinterpret_cast<int16_t*>(to);
  const int64_t groups = width / group_size, padded = groups_of(l, width);
  for (int64_t g = 0; g < groups; g++) {
    const float* v = x + g * group_size;
    __m256i most = _mm256_setzero_si256();
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    for (int i = 0; i < group_size; i += 8) {
      const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(v + i));
      most = _mm256_max_epi32(most, _mm256_and_si256(bits, magnitude));
    }
    alignas(32) uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), most);
    uint32_t top = 0;
    for (const uint32_t lane : lanes) top = lane > top ? lane : top;
    const GroupScale of(top, 32767.f);
    const __m256 factor = _mm256_set1_ps(of.inverse);
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
    // Value ways * lane + way of a unit goes to that lane of that way's vector.
    for (int i = 0; i < group_size; i++) {
      const int64_t place = g * group_size + i, in = place % unit;
      quantized[place - in + in % ways * 16 + in / ways] = q[i];
    }
  }
  for (int64_t g = groups; g < padded; g++) scales[g] = sums[g] = 0.f;
}

int64_t scratch(const Matrix& m) {
  const Layout l = choose(m);
  if (is_e4m3(m)) return ROWS * (m.width / m.group);
  if (m.format == Format::nvfp4 && l.interleave == Interleave::none) return DECODED_ROWS * m.width;
  if (l.interleave == Interleave::none) return 0;
  return (2 * ROWS + 4) * groups_of(l, m.width) + (expands_rows(m, l) ? ROWS * m.width / 4 : 0);
}

void multiply(const Matrix& m, int64_t first, int64_t last, const Activations& a,
              const int32_t* tokens, int count, float* const* out, float* scratch) {
  if (m.format == Format::dense) return dense<Tile>(m, first, last, a, tokens, count, out);
  if (is_e4m3(m)) return multiply_e4m3(m, first, last, a, tokens, count, out, scratch);
  if (a.layout.interleave == Interleave::none)
    return multiply_decoded(m, first, last, count, out, scratch, [&](const Matrix& floats, float* const* to) {
      dense<Tile>(floats, 0, floats.rows, a, tokens, count, to);
    });
  const bool small = a.layout.group == 32, bytes = a.layout.interleave == Interleave::int16x2;
  const auto run = bytes ? (small ? multiply_quantized<Code::bytes, 32> : multiply_quantized<Code::bytes, 64>)
                   : is_e2m1(m) ? (small ? multiply_quantized<Code::e2m1, 32> : multiply_quantized<Code::e2m1, 16>)
                       : (small ? multiply_quantized<Code::nibbles, 32> : multiply_quantized<Code::nibbles, 64>);
  run(m, first, last, a, tokens, count, out, scratch);
}

}  // namespace

const Kernels avx2 = {"avx2", packs, choose, prepare, scratch, multiply, activate};

}  // namespace cenacle
