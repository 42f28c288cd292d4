// Norms, rotation and blocked attention in vectors of the compiler's own (GCC's and Clang's
// `vector_size`): included by each instruction set's file, which names the table `OPS`.
//
// Scores and weighted values are both products of a few rows with a block of 64 keys that stays in the
// cache; the softmax is taken block by block (Milakov and Gimelshein, arXiv:1805.02867). Few rows (one
// token) multiply keys where they lie; many are worth a transposed copy of the block.
#include <float.h>

#include "kernels/decode.inc.h"
#include "ops/ops.h"

namespace cenacle {
namespace {

#ifdef __AVX2__
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float V __attribute__((vector_size(4 * W)));

inline V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }
typedef float V4 __attribute__((vector_size(16)));

inline float total(V v) {
  V4 s[W / 4];
  memcpy(s, &v, sizeof v);
  if constexpr (W == 8) s[0] += s[W / 4 - 1];
  s[0] += __builtin_shufflevector(s[0], s[0], 2, 3, 0, 1);
  return s[0][0] + s[0][1];
}

// Four partial sums, so that additions do not wait for each other.
template <class Term>
inline float sum_of(int64_t n, Term term) {
  V part[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; j++) part[j] += term(i + j * W, V{});
  for (; i + W <= n; i += W) part[0] += term(i, V{});
  float sum = total((part[0] + part[1]) + (part[2] + part[3]));
  for (; i < n; i++) sum += term(i, 0.f);
  return sum;
}
inline V get(const float* p, int64_t i, V) { return load(p + i); }
inline float get(const float* p, int64_t i, float) { return p[i]; }

void rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t width, float* out) {
  for (int64_t r = 0; r < rows; r++, x += width, out += width) {
    const float squares = sum_of(width, [&](int64_t i, auto kind) {
      const auto v = get(x, i, kind);
      return v * v;
    });
    const float factor = 1.f / sqrtf(squares / float(width) + eps);
    if (weight)
      for (int64_t i = 0; i < width; i++) out[i] = x[i] * factor * weight[i];
    else
      for (int64_t i = 0; i < width; i++) out[i] = x[i] * factor;
  }
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t rows,
                int64_t width, float* out) {
  for (int64_t r = 0; r < rows; r++, x += width, out += width) {
    const float mean = sum_of(width, [&](int64_t i, auto kind) { return get(x, i, kind); }) / float(width);
    const float squares = sum_of(width, [&](int64_t i, auto kind) {
      const auto v = get(x, i, kind) - mean;
      return v * v;
    });
    const float factor = 1.f / sqrtf(squares / float(width) + eps);
    for (int64_t i = 0; i < width; i++) out[i] = (x[i] - mean) * factor;
    if (weight)
      for (int64_t i = 0; i < width; i++) out[i] *= weight[i];
    if (bias)
      for (int64_t i = 0; i < width; i++) out[i] += bias[i];
  }
}

inline float highest_of(const float* s, int64_t n, float least) {
  V most = V{} + least;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const V v = load(s + i);
    most = v < most ? most : v;
  }
  float highest = least;
  for (int j = 0; j < W; j++) highest = most[j] < highest ? highest : most[j];
  for (; i < n; i++) highest = s[i] < highest ? highest : s[i];
  return highest;
}

float log_sum_exp(const float* x, int64_t n) {
  const float highest = highest_of(x, n, -HUGE_VALF);
  if (highest == -HUGE_VALF || highest == HUGE_VALF) return highest;
  float sum = 0;
  for (int64_t begin = 0; begin < n; begin += KEYS_AT_ONCE) {
    float part[KEYS_AT_ONCE] = {};
    const int64_t some = n - begin < KEYS_AT_ONCE ? n - begin : KEYS_AT_ONCE;
    for (int64_t i = 0; i < some; i++) part[i] = exponential(x[begin + i] - highest);
    sum += sum_of(KEYS_AT_ONCE, [&](int64_t i, auto kind) { return get(part, i, kind); });
  }
  return highest + logf(sum);
}

void rotate(const float* x, const float* cosines, const float* sines, int64_t half, bool traditional,
            float* out) {
  for (int64_t i = 0; i < half; i++) {
    const int64_t first = traditional ? 2 * i : i, second = traditional ? 2 * i + 1 : i + half;
    const float a = x[first], b = x[second];
    out[first] = a * cosines[i] - b * sines[i];
    out[second] = a * sines[i] + b * cosines[i];
  }
}

// c[r][0 .. 2W) (+)= sum_i a[r][i] b[i][0 .. 2W)
template <int R>
inline void block(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t n, float* c,
                  int64_t ldc, bool add) {
  V sum[R][2];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 2; j++) sum[r][j] = add ? load(c + r * ldc + j * W) : V{};
  for (int64_t i = 0; i < n; i++) {
    const V b0 = load(b + i * ldb), b1 = load(b + i * ldb + W);
    for (int r = 0; r < R; r++) {
      sum[r][0] += a[r * lda + i] * b0;
      sum[r][1] += a[r * lda + i] * b1;
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 2; j++) store(c + r * ldc + j * W, sum[r][j]);
}

// c [rows, columns] (+)= a [rows, n] b [n, columns]; columns is a multiple of 16.
void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t n, int64_t rows,
              int64_t columns, float* c, int64_t ldc, bool add) {
  for (int64_t j = 0; j < columns; j += 2 * W)
    for (int64_t r = 0; r < rows; r += 6) {
      const float* from = a + r * lda;
      float* to = c + r * ldc + j;
      switch (rows - r) {
        case 1: block<1>(from, lda, b + j, ldb, n, to, ldc, add); break;
        case 2: block<2>(from, lda, b + j, ldb, n, to, ldc, add); break;
        case 3: block<3>(from, lda, b + j, ldb, n, to, ldc, add); break;
        case 4: block<4>(from, lda, b + j, ldb, n, to, ldc, add); break;
        case 5: block<5>(from, lda, b + j, ldb, n, to, ldc, add); break;
        default: block<6>(from, lda, b + j, ldb, n, to, ldc, add); break;
      }
    }
}

// to[i][j] = from[j][i], where j < keys; zero for the other columns. width is a multiple of 4.
void transpose(const float* from, int64_t stride, int64_t keys, int64_t width, float* to) {
  for (int64_t j = 0; j < KEYS_AT_ONCE; j += 4)
    for (int64_t i = 0; i < width; i += 4) {
      V4 r[4];
      for (int k = 0; k < 4; k++) {
        if (j + k < keys)
          memcpy(&r[k], from + (j + k) * stride + i, sizeof r[k]);
        else
          r[k] = V4{};
      }
      const V4 a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5);
      const V4 b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
      const V4 c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
      const V4 d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
      r[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
      r[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
      r[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
      r[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
      for (int k = 0; k < 4; k++) memcpy(to + (i + k) * KEYS_AT_ONCE + j, &r[k], sizeof r[k]);
    }
}

// One token reads keys and values from memory: while a block's keys are multiplied its values are
// fetched, and meanwhile the next block's keys.
// scores[r][0], scores[r][1] = q[r] . k[0], q[r] . k[1]
template <int R>
inline void dots(const float* q, int64_t width, const float* k0, const float* k1, const float* next0,
                 const float* next1, float* scores) {
  V sum[R][2] = {};
  int64_t i = 0;
  for (; i + W <= width; i += W) {
    const V b0 = load(k0 + i), b1 = load(k1 + i);
    __builtin_prefetch(next0 + i);
    __builtin_prefetch(next1 + i);
    for (int r = 0; r < R; r++) {
      const V a = load(q + r * width + i);
      sum[r][0] += a * b0;
      sum[r][1] += a * b1;
    }
  }
  for (int r = 0; r < R; r++) {
    float s0 = total(sum[r][0]), s1 = total(sum[r][1]);
    for (int64_t j = i; j < width; j++) {
      s0 += q[r * width + j] * k0[j];
      s1 += q[r * width + j] * k1[j];
    }
    scores[r * KEYS_AT_ONCE] = s0;
    scores[r * KEYS_AT_ONCE + 1] = s1;
  }
}

// Scores of a block's keys, where few rows make a copy of the keys not worth it.
void score_few(const float* q, int64_t rows, int64_t width, const float* k, int64_t stride, int64_t keys,
               const float* v, int64_t v_stride, float* scores) {
  for (int64_t j = 0; j < keys; j += 2) {
    const float* k0 = k + j * stride;
    const float* k1 = j + 1 < keys ? k0 + stride : k0;
    const float *n0 = v + j * v_stride, *n1 = n0 + v_stride;
    for (int64_t r = 0; r < rows; r += 4) {
      const float* from = q + r * width;
      float* to = scores + r * KEYS_AT_ONCE + j;
      switch (rows - r) {
        case 1: dots<1>(from, width, k0, k1, n0, n1, to); break;
        case 2: dots<2>(from, width, k0, k1, n0, n1, to); break;
        case 3: dots<3>(from, width, k0, k1, n0, n1, to); break;
        default: dots<4>(from, width, k0, k1, n0, n1, to); break;
      }
    }
  }
}

// out[r] += p[r][0] v[0] + p[r][1] v[1], a row of values at a time: one token reads them from memory.
template <int R>
inline void weigh(const float* p, const float* v0, const float* v1, const float* next0,
                  const float* next1, int64_t columns, float* out) {
  float by[R][2];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 2; j++) by[r][j] = p[r * KEYS_AT_ONCE + j];
  for (int64_t i = 0; i < columns; i += W) {
    const V a = load(v0 + i), b = load(v1 + i);
    __builtin_prefetch(next0 + i);
    __builtin_prefetch(next1 + i);
    for (int r = 0; r < R; r++) {
      float* to = out + r * columns + i;
      store(to, load(to) + by[r][0] * a + by[r][1] * b);
    }
  }
}

void weigh_few(float* p, int64_t rows, const float* v, int64_t stride, int64_t keys, int64_t columns,
               const float* next_k, int64_t k_stride, float* out) {
  if (keys % 2)  // the last one is read twice and counts once
    for (int64_t r = 0; r < rows; r++) p[r * KEYS_AT_ONCE + keys] = 0.f;
  for (int64_t j = 0; j < keys; j += 2) {
    const float* v0 = v + j * stride;
    const float* v1 = j + 1 < keys ? v0 + stride : v0;
    const float *n0 = next_k + j * k_stride, *n1 = n0 + k_stride;
    for (int64_t r = 0; r < rows; r += 4) {
      const float* from = p + r * KEYS_AT_ONCE + j;
      float* to = out + r * columns;
      switch (rows - r) {
        case 1: weigh<1>(from, v0, v1, n0, n1, columns, to); break;
        case 2: weigh<2>(from, v0, v1, n0, n1, columns, to); break;
        case 3: weigh<3>(from, v0, v1, n0, n1, columns, to); break;
        default: weigh<4>(from, v0, v1, n0, n1, columns, to); break;
      }
    }
  }
}

void attend(const Attention& a, int64_t batch, int64_t kv_head, int64_t first_row, int64_t rows,
            int64_t first_key, int64_t last_key, float* out, float* top, float* sum, float* scratch) {
  constexpr int N = KEYS_AT_ONCE;
  const int64_t width = a.width, columns = padded(a.v_width), group = a.group();
  float* q = scratch;                                   // [rows, width], scaled
  float* scores = q + ROWS_AT_ONCE * width;             // [rows, N]
  float* transposed = scores + ROWS_AT_ONCE * N;        // [width, N]
  float* copied = transposed + N * width;               // [N, columns]
  const float* keys = a.k + batch * a.k_strides[0] + kv_head * a.k_strides[1];
  const float* values = a.v + batch * a.v_strides[0] + kv_head * a.v_strides[1];
  const int64_t before = a.keys > a.length ? a.keys - a.length : 0;

  for (int64_t r = 0; r < rows; r++) {
    const int64_t head = kv_head * group + (first_row + r) % group, at = (first_row + r) / group;
    const float* from = a.q + batch * a.q_strides[0] + head * a.q_strides[1] + at * a.q_strides[2];
    for (int64_t i = 0; i < width; i++) q[r * width + i] = from[i] * a.scale;
    const bool sunk = a.sinks && first_key == 0;
    top[r] = sunk ? a.sinks[head] : -HUGE_VALF;
    sum[r] = sunk ? 1.f : 0.f;
  }
  memset(out, 0, size_t(rows * columns) * sizeof(float));

  const int64_t seen = before + (first_row + rows - 1) / group + 1;  // by the last row
  const int64_t end = a.causal && seen < last_key ? seen : last_key;
  for (int64_t begin = first_key; begin < end; begin += N) {
    const int64_t n = end - begin < N ? end - begin : N;
    if (a.allowed) {
      bool any = false;
      for (int64_t r = 0; r < rows && !any; r++) {
        const int64_t head = kv_head * group + (first_row + r) % group, at = (first_row + r) / group;
        const uint8_t* m = a.allowed + batch * a.mask_strides[0] + head * a.mask_strides[1] +
                           at * a.mask_strides[2] + begin * a.mask_strides[3];
        for (int64_t j = 0; j < n; j++) any |= m[j * a.mask_strides[3]] != 0;
      }
      if (!any) continue;
    }
    const float* k = keys + begin * a.k_strides[2];
    const bool few = rows <= 16 || width % 4;
    if (few) {
      score_few(q, rows, width, k, a.k_strides[2], n, values + begin * a.v_strides[2], a.v_strides[2],
                scores);
    } else {
      transpose(k, a.k_strides[2], n, width, transposed);
      multiply(q, width, transposed, N, width, rows, N, scores, N, false);
    }
    for (int64_t r = 0; r < rows; r++) {
      const int64_t head = kv_head * group + (first_row + r) % group, at = (first_row + r) / group;
      float* s = scores + r * N;
      const int64_t offset = batch * a.mask_strides[0] + head * a.mask_strides[1] +
                             at * a.mask_strides[2] + begin * a.mask_strides[3];
      if (a.allowed)
        for (int64_t j = 0; j < n; j++)
          s[j] = a.allowed[offset + j * a.mask_strides[3]] ? s[j] : -FLT_MAX;
      if (a.added)
        for (int64_t j = 0; j < n; j++) s[j] += a.added[offset + j * a.mask_strides[3]];
      if (a.causal)
        for (int64_t j = before + at + 1 - begin; j < n; j++) s[j < 0 ? 0 : j] = -FLT_MAX;
      const float highest = highest_of(s, n, top[r]);
      if (highest == -HUGE_VALF) {  // nothing but forbidden keys so far
        memset(s, 0, size_t(n) * sizeof(float));
        continue;
      }
      for (int64_t j = 0; j < n; j++) s[j] = exponential(s[j] - highest);
      const float old = exponential(top[r] - highest);
      sum[r] = sum[r] * old + sum_of(n, [&](int64_t i, auto kind) { return get(s, i, kind); });
      top[r] = highest;
      if (old != 1.f)
        for (int64_t i = 0; i < columns; i++) out[r * columns + i] *= old;
    }
    const float* v = values + begin * a.v_strides[2];
    int64_t stride = a.v_strides[2];
    if (columns != a.v_width) {
      for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < columns; i++)
          copied[j * columns + i] = i < a.v_width ? v[j * stride + i] : 0.f;
      v = copied, stride = columns;
    }
    if (few)
      weigh_few(scores, rows, v, stride, n, columns, k + N * a.k_strides[2], a.k_strides[2], out);
    else
      multiply(scores, N, v, stride, n, rows, columns, out, columns, true);
  }
}

}  // namespace

extern const Ops OPS;
const Ops OPS = {rms_norm, layer_norm, log_sum_exp, rotate, attend};

}  // namespace cenacle
