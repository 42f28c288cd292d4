// Norms, rotation and blocked attention in vectors of the compiler's own (GCC's and Clang's
// `vector_size`): included by each instruction set's file, which names the table `OPS`.
//
// Scores and weighted values are both products of a few rows with a block of 64 keys that stays in the
// cache; the softmax is taken block by block (Milakov and Gimelshein, arXiv:1805.02867). Few rows (one
// token) multiply keys where they lie, four heads of a group together; many are worth a transposed copy of
// the block, in float32.
#include <float.h>

#ifdef __F16C__
#include <immintrin.h>
#endif

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

typedef float Loose __attribute__((vector_size(4 * W), aligned(4), may_alias));
inline V load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }
typedef float V4 __attribute__((vector_size(16)));

// Floats of 16 bits, as keys and values are kept.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
typedef uint16_t H __attribute__((vector_size(2 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
inline V load(const Bf16* p) {
  H h;
  memcpy(&h, p, sizeof h);
  return (V)(__builtin_convertvector(h, U) << 16);
}
inline V load(const F16* p) {
#ifdef __F16C__
  return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else  // see `f16`
  H h;
  memcpy(&h, p, sizeof h);
  const U u = __builtin_convertvector(h, U);
  const U special = (U)((u & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (V)((U)((V)((u & 0x7fffu) << 13) * 0x1p112f) | special | (u & 0x8000u) << 16);
#endif
}

// 2 W numbers, in the order that is cheapest: as they are, but those of bfloat16 at even places, then at odd
// ones. `deal` and `gather` bring floats into that order and back.
template <class T>
inline void load_pair(const T* p, V& a, V& b) {
  a = load(p);
  b = load(p + W);
}
inline void load_pair(const Bf16* p, V& a, V& b) {
  U u;
  memcpy(&u, p, sizeof u);
  a = (V)(u << 16);
  b = (V)(u & 0xffff0000u);
}
template <class T>
inline void deal(V&, V&) {}
template <class T>
inline void gather(V&, V&) {}
template <>
inline void deal<Bf16>(V& a, V& b) {
  const V x = a, y = b;
#ifdef __AVX2__
  a = __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14);
  b = __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  a = __builtin_shufflevector(x, y, 0, 2, 4, 6);
  b = __builtin_shufflevector(x, y, 1, 3, 5, 7);
#endif
}
template <>
inline void gather<Bf16>(V& a, V& b) {
  const V x = a, y = b;
#ifdef __AVX2__
  a = __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
  b = __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  a = __builtin_shufflevector(x, y, 0, 4, 1, 5);
  b = __builtin_shufflevector(x, y, 2, 6, 3, 7);
#endif
}

inline float one(const float* p) { return *p; }
inline float one(const Bf16* p) { return bf16(p->bits); }
inline float one(const F16* p) { return f16(p->bits); }

inline V4 fold(V v) {
  V4 s[W / 4];
  memcpy(s, &v, sizeof v);
  if constexpr (W == 8) s[0] += s[W / 4 - 1];
  return s[0];
}

// The sums of four vectors' elements.
inline V4 totals(V4 a, V4 b, V4 c, V4 d) {
  const V4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const V4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

inline float total(V v) {
  V4 s = fold(v);
  s += __builtin_shufflevector(s, s, 2, 3, 0, 1);
  return s[0] + s[1];
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

// to[j][0 .. columns) = from[j][0 .. width), zero beyond.
template <class T>
void widen(const T* from, int64_t stride, int64_t keys, int64_t width, int64_t columns, float* to) {
  for (int64_t j = 0; j < keys; j++, from += stride, to += columns) {
    int64_t i = 0;
    for (; i + W <= width; i += W) store(to + i, load(from + i));
    for (; i < width; i++) to[i] = one(from + i);
    for (; i < columns; i++) to[i] = 0.f;
  }
}

// One token reads keys and values from memory: while a block's keys are multiplied its values are
// fetched, and meanwhile the next block's keys.
inline void fetch(const void* from, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(from) + b);
}

// scores[r][0], scores[r][1] = q[r] . k[0], q[r] . k[1]; queries are dealt. Not inlined: among other loops the compiler has
// too few registers for these sums.
template <int R, class T>
__attribute__((noinline)) void dots(const float* q, int64_t width, const T* k0, const T* k1, float* scores) {
  V sum[R][2] = {};
  int64_t i = 0;
  for (; i + 2 * W <= width; i += 2 * W) {
    V b0, b1, c0, c1;
    load_pair(k0 + i, b0, c0);
    load_pair(k1 + i, b1, c1);
    for (int r = 0; r < R; r++) {
      const V a = load(q + r * width + i), next = load(q + r * width + i + W);
      sum[r][0] += a * b0;
      sum[r][1] += a * b1;
      sum[r][0] += next * c0;
      sum[r][1] += next * c1;
    }
  }
  for (int r = 0; r < R; r += 2) {
    const int next = r + 1 < R ? r + 1 : r;
    const V4 s = totals(fold(sum[r][0]), fold(sum[r][1]), fold(sum[next][0]), fold(sum[next][1]));
    memcpy(scores + r * KEYS_AT_ONCE, &s, 8);
    if (next != r) memcpy(scores + next * KEYS_AT_ONCE, reinterpret_cast<const char*>(&s) + 8, 8);
  }
  for (; i < width; i++)
    for (int r = 0; r < R; r++) {
      scores[r * KEYS_AT_ONCE] += q[r * width + i] * one(k0 + i);
      scores[r * KEYS_AT_ONCE + 1] += q[r * width + i] * one(k1 + i);
    }
}

// Scores of a block's keys, where few rows make a copy of the keys not worth it.
template <class T>
void score_few(const float* q, int64_t rows, int64_t width, const T* k, int64_t stride, int64_t keys,
               const T* v, int64_t v_stride, int64_t v_width, float* scores) {
  for (int64_t j = 0; j < keys; j += 2) {
    const T* k0 = k + j * stride;
    const T* k1 = j + 1 < keys ? k0 + stride : k0;
    fetch(v + j * v_stride, v_width * sizeof(T));
    fetch(v + (j + 1) * v_stride, v_width * sizeof(T));
    for (int64_t r = 0; r < rows; r += 4) {
      const float* from = q + r * width;
      float* to = scores + r * KEYS_AT_ONCE + j;
      switch (rows - r) {
        case 1: dots<1>(from, width, k0, k1, to); break;
        case 2: dots<2>(from, width, k0, k1, to); break;
        case 3: dots<3>(from, width, k0, k1, to); break;
        default: dots<4>(from, width, k0, k1, to); break;
      }
    }
  }
}

// out[r] += sum_j p[r][j] v[j]; a block's sums of some columns stay in registers.
template <int R, class T>
__attribute__((noinline)) void weigh(const float* p, const T* v, int64_t stride, int64_t keys, int64_t columns, float* out) {
  V sum[R][2];
  for (int r = 0; r < R; r++) {
    for (int j = 0; j < 2; j++) sum[r][j] = load(out + r * columns + j * W);
    deal<T>(sum[r][0], sum[r][1]);
  }
  for (int64_t j = 0; j < keys; j++, v += stride) {
    V a, b;
    load_pair(v, a, b);
    for (int r = 0; r < R; r++) {
      const float by = p[r * KEYS_AT_ONCE + j];
      sum[r][0] += by * a;
      sum[r][1] += by * b;
    }
  }
  for (int r = 0; r < R; r++) {
    gather<T>(sum[r][0], sum[r][1]);
    for (int j = 0; j < 2; j++) store(out + r * columns + j * W, sum[r][j]);
  }
}

template <class T, class K>
void weigh_few(const float* p, int64_t rows, const T* v, int64_t stride, int64_t keys, int64_t columns,
               const K* next_k, int64_t k_stride, int64_t width, float* out) {
  constexpr int64_t LINE = 64 / sizeof(K);
  for (int64_t i = 0, line = 0; i < columns; i += 2 * W) {
    // As much of the next keys as of these columns.
    for (; line < width && line * columns <= i * width; line += LINE)
      for (int64_t j = 0; j < KEYS_AT_ONCE; j++) __builtin_prefetch(next_k + j * k_stride + line);
    for (int64_t r = 0; r < rows; r += 4) {
      const float* from = p + r * KEYS_AT_ONCE;
      float* to = out + r * columns + i;
      switch (rows - r) {
        case 1: weigh<1>(from, v + i, stride, keys, columns, to); break;
        case 2: weigh<2>(from, v + i, stride, keys, columns, to); break;
        case 3: weigh<3>(from, v + i, stride, keys, columns, to); break;
        default: weigh<4>(from, v + i, stride, keys, columns, to); break;
      }
    }
  }
}

// How many of a block's keys a row may see. Blocks of all or none, most of them, cost no more than this:
// a window or padding is nothing but a length.
inline int64_t count(const uint8_t* allowed, int64_t stride, int64_t n) {
  if (stride == 0) return *allowed ? n : 0;
  int64_t sum = 0;
  if (stride == 1) {
    int small = 0;
    for (int64_t j = 0; j < n; j++) small += allowed[j];
    return small;
  }
  for (int64_t j = 0; j < n; j++) sum += allowed[j * stride];
  return sum;
}

template <class T>
void attend_to(const Attention& a, int64_t batch, int64_t kv_head, int64_t first_row, int64_t rows,
            int64_t first_key, int64_t last_key, float* out, float* top, float* sum, float* scratch) {
  constexpr int N = KEYS_AT_ONCE;
  const int64_t width = a.width, columns = padded(a.v_width), group = a.group();
  float* q = scratch;                                   // [rows, width], scaled
  float* scores = q + ROWS_AT_ONCE * width;             // [rows, N]
  float* transposed = scores + ROWS_AT_ONCE * N;        // [width, N]
  float* copied = transposed + N * width;               // [N, columns or width]
  const T* keys = static_cast<const T*>(a.k) + batch * a.k_strides[0] + kv_head * a.k_strides[1];
  const T* values = static_cast<const T*>(a.v) + batch * a.v_strides[0] + kv_head * a.v_strides[1];
  int64_t seen_keys[ROWS_AT_ONCE];  // of a block, by each row
  const int64_t before = a.keys > a.length ? a.keys - a.length : 0;
  const bool few = rows <= 16 || width % 4;

  for (int64_t r = 0; r < rows; r++) {
    const int64_t head = kv_head * group + (first_row + r) % group, at = (first_row + r) / group;
    const float* from = a.q + batch * a.q_strides[0] + head * a.q_strides[1] + at * a.q_strides[2];
    for (int64_t i = 0; i < width; i++) q[r * width + i] = from[i] * a.scale;
    for (int64_t i = 0; few && i + 2 * W <= width; i += 2 * W) {
      float* at = q + r * width + i;
      V x = load(at), y = load(at + W);
      deal<T>(x, y);
      store(at, x);
      store(at + W, y);
    }
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
      int64_t any = 0;
      for (int64_t r = 0; r < rows; r++) {
        const int64_t head = kv_head * group + (first_row + r) % group, at = (first_row + r) / group;
        if (r && !a.mask_strides[1] && (first_row + r) % group)
          seen_keys[r] = seen_keys[r - 1];
        else
          seen_keys[r] = count(a.allowed + batch * a.mask_strides[0] + head * a.mask_strides[1] +
                                   at * a.mask_strides[2] + begin * a.mask_strides[3],
                               a.mask_strides[3], n);
        any |= seen_keys[r];
      }
      if (!any) continue;
    }
    const T *k = keys + begin * a.k_strides[2], *v = values + begin * a.v_strides[2];
    if (few) {
      score_few(q, rows, width, k, a.k_strides[2], n, v, a.v_strides[2], a.v_width, scores);
    } else if constexpr (sizeof(T) == 4) {
      transpose(k, a.k_strides[2], n, width, transposed);
      multiply(q, width, transposed, N, width, rows, N, scores, N, false);
    } else {
      widen(k, a.k_strides[2], n, width, width, copied);
      transpose(copied, width, n, width, transposed);
      multiply(q, width, transposed, N, width, rows, N, scores, N, false);
    }
    for (int64_t r = 0; r < rows; r++) {
      const int64_t head = kv_head * group + (first_row + r) % group, at = (first_row + r) / group;
      float* s = scores + r * N;
      const int64_t offset = batch * a.mask_strides[0] + head * a.mask_strides[1] +
                             at * a.mask_strides[2] + begin * a.mask_strides[3];
      if (a.cap != 0.f)
        for (int64_t j = 0; j < n; j++) s[j] = a.cap - 2 * a.cap / (exponential(2 / a.cap * s[j]) + 1);
      if (a.allowed && seen_keys[r] != n)
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
    const T* next_k = k + N * a.k_strides[2];
    if (columns == a.v_width && few) {
      weigh_few(scores, rows, v, a.v_strides[2], n, columns, next_k, a.k_strides[2], width, out);
      continue;
    }
    const float* wide = copied;
    int64_t stride = columns;
    if constexpr (sizeof(T) == 4)
      if (columns == a.v_width) wide = v, stride = a.v_strides[2];
    if (wide == copied) widen(v, a.v_strides[2], n, a.v_width, columns, copied);
    if (few)
      weigh_few(scores, rows, wide, stride, n, columns, next_k, a.k_strides[2], width, out);
    else
      multiply(scores, N, wide, stride, n, rows, columns, out, columns, true);
  }
}

void attend(const Attention& a, int64_t batch, int64_t kv_head, int64_t first_row, int64_t rows,
            int64_t first_key, int64_t last_key, float* out, float* top, float* sum, float* scratch) {
  const auto as = [&](auto kind) {
    attend_to<decltype(kind)>(a, batch, kv_head, first_row, rows, first_key, last_key, out, top, sum, scratch);
  };
  if (a.type == Float::f32) return as(float{});
  a.type == Float::bf16 ? as(Bf16{}) : as(F16{});
}

}  // namespace

extern const Ops OPS;
const Ops OPS = {rms_norm, layer_norm, log_sum_exp, rotate, attend};

}  // namespace cenacle
