// The kernels for 64-bit ARM with dot products (ARMv8.2 `sdot`: Graviton 2, Ampere Altra, Cortex-A76,
// Apple chips under Linux). Checked under emulation; never run, nor timed, on such a processor.
//
// 4- and 8-bit weights are multiplied as integers with activations of 16 bits. `sdot` takes 8 bits, so
// an activation is 256 x upper + lower, both signed, and each weight is multiplied twice: exact, and
// one multiplication by (weight scale x activation scale) a group makes the sum a float.
// A block of 32 activations is 64 bytes: [upper 32][lower 32], for 4-bit weights the values at even
// places before those at odd ones, as the low and high nibbles of 16 bytes come apart.
// Weights of 8 bits are made signed by subtracting 128, which the group's bias gives back.
// Everything else is multiplied as float, e4m3 as it is read; 2-, 3-, 5- and 6-bit rows, and rows of nvfp4 that
// do not fill blocks, are decoded first.
#include <arm_neon.h>

#include "kernels/quantized_tile.inc.h"

namespace cenacle {
namespace {

constexpr int AHEAD = 1024;         // bytes
constexpr float MAX_QUANTIZED = 0x7f7f;      // the largest integer of which both halves fit in a signed byte

// ---- float weights ----------------------------------------------------------------------------

template <Float F>
inline float32x4_t load(const uint8_t* p, int64_t i) {
  if constexpr (F == Float::f32) {
    return vld1q_f32(reinterpret_cast<const float*>(p) + i);
  } else {
    const uint16x4_t h = vld1_u16(reinterpret_cast<const uint16_t*>(p) + i);
    if constexpr (F == Float::f16) return vcvt_f32_f16(vreinterpret_f16_u16(h));
    return vreinterpretq_f32_u32(vshll_n_u16(h, 16));
  }
}

template <Float F, int R, int T>
inline void dense_tile(const uint8_t* w, int64_t stride, int64_t width, const float* const* x,
                       float* const* out, int64_t row) {
  float32x4_t sum[R][T][2];
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) sum[r][t][0] = sum[r][t][1] = vdupq_n_f32(0.f);
  int64_t i = 0;
  for (; i + 8 <= width; i += 8) {
    for (int h = 0; h < 2; h++) {
      float32x4_t v[T];
      for (int t = 0; t < T; t++) v[t] = vld1q_f32(x[t] + i + 4 * h);
      for (int r = 0; r < R; r++) {
        const float32x4_t u = load<F>(w + r * stride, i + 4 * h);
        for (int t = 0; t < T; t++) sum[r][t][h] = vfmaq_f32(sum[r][t][h], u, v[t]);
      }
    }
    if constexpr (T == 1)  // the same place of the rows that come next
      for (int r = 0; r < R; r++)
        __builtin_prefetch(w + (r + R) * stride + i * (F == Float::f32 ? 4 : 2));
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) {
      float s = vaddvq_f32(vaddq_f32(sum[r][t][0], sum[r][t][1]));
      for (int64_t j = i; j < width; j++) s = fmaf(at(F, w + r * stride, j), x[t][j], s);
      out[t][row + r] = s;
    }
}

template <Float F, int T>
inline void dense_rows(const uint8_t* w, int64_t stride, int64_t width, int64_t row, int64_t rows,
                       const float* const* x, float* const* out) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    dense_tile<F, 4, T>(w + r * stride, stride, width, x, out, row + r);
  for (; r < rows; r++)
    dense_tile<F, 1, T>(w + r * stride, stride, width, x, out, row + r);
}

template <Float F>
void dense(const uint8_t* w, int64_t stride, int64_t width, int64_t rows, int64_t row,
           const Activations& a, const int32_t* tokens, int count, float* const* out) {
  const auto of = [&](int j) { return a.plain + int64_t(tokens[j]) * a.width; };
  for (int64_t block = 0; block < rows; block += ROWS) {
    const int64_t n = rows - block < ROWS ? rows - block : ROWS;
    const uint8_t* from = w + block * stride;
    int j = 0;
    for (; j + 2 <= count; j += 2) {
      const float* x[2] = {of(j), of(j + 1)};
      dense_rows<F, 2>(from, stride, width, row + block, n, x, out + j);
    }
    for (; j < count; j++) {
      const float* x[1] = {of(j)};
      dense_rows<F, 1>(from, stride, width, row + block, n, x, out + j);
    }
  }
}

// ---- 4 and 8 bits -----------------------------------------------------------------------------

// T tokens with one row. `scale[t]` holds a factor for every group of `GROUP` weights.
template <Code C, int GROUP, int T>
inline void quantized_tile(const uint8_t* w, int64_t width, const int8_t* const* x,
                       const float* const* scale, float32x4_t* sum) {
  // Twice the values of mxfp4's codes.
  alignas(16) static constexpr int8_t kTwice[16] = {0, 1,  2,  3,  4,  6,  8,  12,
                                                    0, -1, -2, -3, -4, -6, -8, -12};
  constexpr int BLOCK = GROUP < 32 ? 32 : GROUP, GROUPS = BLOCK / GROUP;  // groups side by side
  const int8x16_t table = vld1q_s8(kTwice);
  const uint8x16_t low = vdupq_n_u8(0xf), half = vdupq_n_u8(0x80);
  for (int t = 0; t < T; t++) sum[t] = vdupq_n_f32(0.f);
  for (int64_t i = 0, g = 0; i < width; i += BLOCK, g += GROUPS) {
    int32x4_t upper[T], lower[T];
    for (int t = 0; t < T; t++) upper[t] = lower[t] = vdupq_n_s32(0);
    for (int64_t j = i; j < i + BLOCK; j += 32) {
      int8x16_t n[2];
      if constexpr (C == Code::bytes) {
        for (int h = 0; h < 2; h++)
          n[h] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + j + 16 * h), half));
        __builtin_prefetch(w + j + AHEAD);
      } else {
        const uint8x16_t v = vld1q_u8(w + j / 2);
        __builtin_prefetch(w + j / 2 + AHEAD);
        const uint8x16_t codes[2] = {vandq_u8(v, low), vshrq_n_u8(v, 4)};
        for (int h = 0; h < 2; h++)
          n[h] = C == Code::e2m1 ? vqtbl1q_s8(table, codes[h]) : vreinterpretq_s8_u8(codes[h]);
      }
      for (int t = 0; t < T; t++) {
        const int8_t* p = x[t] + 2 * j;
        upper[t] = vdotq_s32(vdotq_s32(upper[t], n[0], vld1q_s8(p)), n[1], vld1q_s8(p + 16));
        lower[t] = vdotq_s32(vdotq_s32(lower[t], n[0], vld1q_s8(p + 32)), n[1], vld1q_s8(p + 48));
      }
    }
    for (int t = 0; t < T; t++) {
      const int32x4_t part = vaddq_s32(vshlq_n_s32(upper[t], 8), lower[t]);
      if constexpr (GROUPS == 2) {
        const float32x4_t f = vcombine_f32(vdup_n_f32(scale[t][g]), vdup_n_f32(scale[t][g + 1]));
        sum[t] = vfmaq_f32(sum[t], vcvtq_f32_s32(part), f);
      } else {
        sum[t] = vfmaq_n_f32(sum[t], vcvtq_f32_s32(part), scale[t][g]);
      }
    }
  }
}

template <Float F>
inline void four(const Matrix& r, int64_t g, float* scale, float* bias) {
  vst1q_f32(scale + g, load<F>(r.scales, g));
  vst1q_f32(bias + g, load<F>(r.biases, g));
}

// Scales and biases of a row as floats, one for each `group_size` weights.
inline void row_scales(const Matrix& m, int64_t row, int group_size, int64_t groups, float* scale,
                       float* bias) {
  const Matrix r = m.from(row);
  const int64_t n = m.width / m.group;
  if (m.format != Format::affine) {
    const float factor = is_e2m1(m) ? .5f : 1.f;  // values of e2m1 are doubled
    for (int64_t g = 0; g < n; g++) {
      scale[g] = factor * scale_at(m, r.scales, g);
      bias[g] = 0.f;
    }
  } else {
    int64_t g = 0;
    for (; g + 4 <= n; g += 4) {
      if (m.type == Float::f32) four<Float::f32>(r, g, scale, bias);
      else if (m.type == Float::bf16) four<Float::bf16>(r, g, scale, bias);
      else four<Float::f16>(r, g, scale, bias);
    }
    for (; g < n; g++) {
      scale[g] = at(m.type, r.scales, g);
      bias[g] = at(m.type, r.biases, g);
    }
    if (m.bits == 8)
      for (g = 0; g < n; g++) bias[g] = fmaf(128.f, scale[g], bias[g]);
  }
  spread_scales(m, group_size, groups, scale, bias);
}

template <Code C, int GROUP, int T>
inline void quantized_rows(const Matrix& m, int64_t first, int64_t row, int64_t rows, int64_t groups,
                       const float* scales, const float* biases, const Activations& a,
                       const int32_t* tokens, float* const* out, float* scratch) {
  const int8_t* x[T];
  const float *xs[T], *xb[T];
  float* factor[T];
  for (int t = 0; t < T; t++) {
    x[t] = reinterpret_cast<const int8_t*>(a.quantized + tokens[t] * bytes_of(a.layout, a.width));
    xs[t] = a.scales + int64_t(tokens[t]) * groups;
    xb[t] = a.sums + int64_t(tokens[t]) * groups;
    factor[t] = scratch + t * groups;
  }
  for (int64_t r = 0; r < rows; r++) {
    float32x4_t bias[T], sum[T];
    for (int t = 0; t < T; t++) bias[t] = vdupq_n_f32(0.f);
    for (int64_t g = 0; g < groups; g += 4) {
      const float32x4_t s = vld1q_f32(scales + r * groups + g);
      const float32x4_t b = vld1q_f32(biases + r * groups + g);
      for (int t = 0; t < T; t++) {
        vst1q_f32(factor[t] + g, vmulq_f32(s, vld1q_f32(xs[t] + g)));
        bias[t] = vfmaq_f32(bias[t], b, vld1q_f32(xb[t] + g));
      }
    }
    const uint8_t* w = m.weight + (row + r) * m.weight_stride;
    quantized_tile<C, GROUP, T>(w, m.width, x, factor, sum);
    for (int t = 0; t < T; t++)
      out[t][row + r - first] = vaddvq_f32(vaddq_f32(sum[t], bias[t]));
  }
}

template <Code C, int GROUP>
void multiply_quantized(const Matrix& m, int64_t first, int64_t last, const Activations& a,
           const int32_t* tokens, int count, float* const* out, float* scratch) {
  const int64_t groups = groups_of(a.layout, m.width);
  float *scales = scratch, *biases = scales + ROWS * groups, *rest = biases + ROWS * groups;
  for (int64_t row = first; row < last; row += ROWS) {
    const int64_t n = last - row < ROWS ? last - row : ROWS;
    for (int64_t r = 0; r < n; r++)
      row_scales(m, row + r, GROUP, groups, scales + r * groups, biases + r * groups);
    for_token_tiles(count, [&](int j, auto size) {
      quantized_rows<C, GROUP, size()>(m, first, row, n, groups, scales, biases, a, tokens + j, out + j,
                                       rest);
    });
  }
}

// ---- e4m3 -------------------------------------------------------------------------------------

// T tokens with one row. `scale` holds a factor for every `group` weights. A code becomes a half float by shifts: the
// sign, a zero, the other seven bits; its exponent is then 8 too small. No value is lost in conversion.
template <int T>
inline void e4m3_tile(const uint8_t* w, int64_t width, int group, const float* scale, const float* const* x,
                      float32x4_t* sum) {
  const uint16x8_t digits = vdupq_n_u16(0xbf80);
  for (int t = 0; t < T; t++) sum[t] = vdupq_n_f32(0.f);
  for (int64_t i = 0, end = group; i < width; i += 32) {
    if (i == end) end += group, scale++;
    float32x4_t part[T][2];
    for (int t = 0; t < T; t++) part[t][0] = part[t][1] = vdupq_n_f32(0.f);
    __builtin_prefetch(w + i + AHEAD);
    for (int64_t j = i; j < i + 32; j += 8) {
      const int16x8_t v = vshll_n_s8(vld1_s8(reinterpret_cast<const int8_t*>(w) + j), 7);
      const float16x8_t h = vreinterpretq_f16_u16(vandq_u16(vreinterpretq_u16_s16(v), digits));
      const float32x4_t u = vcvt_f32_f16(vget_low_f16(h)), z = vcvt_f32_f16(vget_high_f16(h));
      for (int t = 0; t < T; t++) {
        part[t][0] = vfmaq_f32(part[t][0], u, vld1q_f32(x[t] + j));
        part[t][1] = vfmaq_f32(part[t][1], z, vld1q_f32(x[t] + j + 4));
      }
    }
    for (int t = 0; t < T; t++)
      sum[t] = vfmaq_n_f32(sum[t], vaddq_f32(part[t][0], part[t][1]), *scale);
  }
}

void multiply_e4m3(const Matrix& m, int64_t first, int64_t last, const Activations& a, const int32_t* tokens,
                   int count, float* const* out, float* scratch) {
  const int64_t groups = m.width / m.group;
  float *scales = scratch, *unused = scales + ROWS * groups;
  for (int64_t row = first; row < last; row += ROWS) {
    const int64_t n = last - row < ROWS ? last - row : ROWS;
    const uint8_t* w = m.weight + row * m.weight_stride;
    for (int64_t r = 0; r < n; r++) row_scales(m, row + r, m.group, groups, scales + r * groups, unused);
    for_token_tiles(count, [&](int j, auto size) {
      const float* x[size()];
      float32x4_t sum[size()];
      for (int t = 0; t < size(); t++) x[t] = a.plain + int64_t(tokens[j + t]) * a.width;
      for (int64_t r = 0; r < n; r++) {
        e4m3_tile<size()>(w + r * m.weight_stride, m.width, m.group, scales + r * groups, x, sum);
        for (int t = 0; t < size(); t++) out[j + t][row - first + r] = vaddvq_f32(sum[t]) * 256.f;
      }
    });
  }
}

// ---- the table --------------------------------------------------------------------------------

bool packs(const Matrix&) { return false; }

Layout choose(const Matrix& m) {
  if (m.format == Format::dense || (m.format == Format::nvfp4 && m.width % 32)) return {Interleave::none, 0};
  const int group_size = m.group > 64 ? 64 : m.group;
  if (m.bits == 8 && m.format == Format::affine) return {Interleave::byte_planes32, group_size};
  return m.bits == 4 ? Layout{Interleave::byte_planes32_even, group_size} : Layout{Interleave::none, 0};
}

void prepare(Layout l, int64_t width, const float* x, uint8_t* quantized, float* scales, float* sums) {
  const int group_size = l.group, ways = l.interleave == Interleave::byte_planes32_even ? 2 : 1;
  const int64_t groups = width / group_size, padded = groups_of(l, width);
  auto* to = reinterpret_cast<int8_t*>(quantized);
  for (int64_t g = 0; g < groups; g++) {
    const float* v = x + g * group_size;
    uint32x4_t most = vdupq_n_u32(0);
    for (int i = 0; i < group_size; i += 4)
      most = vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(v + i)),
                                       vdupq_n_u32(0x7fffffff)));
    const uint32_t top = vmaxvq_u32(most);
    const GroupScale of(top, MAX_QUANTIZED);
    int32_t whole = 0;
    int32_t q[64];
    for (int i = 0; i < group_size; i += 4)
      vst1q_s32(q + i, of.finite ? vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(v + i), of.inverse)) : vdupq_n_s32(0));
    for (int i = 0; i < group_size; i++) {
      const auto lower = static_cast<int8_t>(q[i]);
      const int64_t at = g * group_size + i, in = at % 32;
      int8_t* place = to + 2 * (at - in) + in % ways * (32 / ways) + in / ways;
      place[0] = static_cast<int8_t>((q[i] - lower) >> 8);
      place[32] = lower;
      whole += q[i];
    }
    scales[g] = of.scale;
    sums[g] = float(whole) * scales[g];
  }
  for (int64_t g = groups; g < padded; g++) scales[g] = sums[g] = 0.f;
}

int64_t scratch(const Matrix& m) {
  const Layout l = choose(m);
  if (is_e4m3(m)) return (ROWS + 1) * (m.width / m.group);
  return l.interleave != Interleave::none ? (2 * ROWS + 4) * groups_of(l, m.width) : DECODED_ROWS * m.width;
}

void multiply(const Matrix& m, int64_t first, int64_t last, const Activations& a,
              const int32_t* tokens, int count, float* const* out, float* scratch) {
  if (m.format == Format::dense) {
    const uint8_t* w = m.weight + first * m.weight_stride;
    const auto run = m.type == Float::f32    ? dense<Float::f32>
                     : m.type == Float::bf16 ? dense<Float::bf16>
                                             : dense<Float::f16>;
    run(w, m.weight_stride, m.width, last - first, 0, a, tokens, count, out);
    return;
  }
  if (is_e4m3(m)) return multiply_e4m3(m, first, last, a, tokens, count, out, scratch);
  if (a.layout.interleave == Interleave::none)
    return multiply_decoded(m, first, last, count, out, scratch, [&](const Matrix& floats, float* const* to) {
      dense<Float::f32>(floats.weight, floats.weight_stride, m.width, floats.rows, 0, a, tokens, count, to);
    });
  const bool small = a.layout.group == 32;
  const auto run = is_e2m1(m) ? (small ? multiply_quantized<Code::e2m1, 32> : multiply_quantized<Code::e2m1, 16>)
                   : m.bits == 8 ? (small ? multiply_quantized<Code::bytes, 32> : multiply_quantized<Code::bytes, 64>)
                                 : (small ? multiply_quantized<Code::nibbles, 32> : multiply_quantized<Code::nibbles, 64>);
  run(m, first, last, a, tokens, count, out, scratch);
}

}  // namespace

const Kernels neon = {"neon", packs, choose, prepare, scratch, multiply, activate};

}  // namespace cenacle
