// What a layer computes beside its matrices: norms, rotary positions, attention; over raw pointers.
//
// Owns: the description of these operations, dividing them among threads, and putting parts of an
// attention together. Does not know: MLX, models.
// Invariant: a result does not depend on the number of threads: work is divided by its shape alone.
// Next: ops.inc.h, the loops, compiled once for each instruction set; fast.cpp, which puts these into
// MLX's graph.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace cenacle {

// softmax(scale q k^T + mask) v. Queries [batch, heads, length, width], keys [batch, kv_heads, keys,
// width], values [.., v_width]; strides are in elements, the last dimension's is 1.
struct Attention {
  const float* q;
  const void *k, *v;
  Float type;                      // of keys and values
  int64_t q_strides[3], k_strides[3], v_strides[3];
  int64_t batch, heads, kv_heads, length, keys, width, v_width;
  float scale;
  float cap;                       // scores s become cap tanh(s / cap), unless 0
  bool causal;                     // the last query sees every key
  const uint8_t* allowed;          // bool [batch, heads, length, keys] by strides, or null
  const float* added;              // the same, added to the scores, or null
  int64_t mask_strides[4];
  const float* sinks;              // [heads], a score without a value, or null
  float* out;                      // [batch, length, heads, v_width]

  // Queries of one key head are numbered position by position, so that neighbors see the same keys.
  int64_t group() const { return heads / kv_heads; }
  int64_t rows() const { return group() * length; }
};

constexpr int ROWS_AT_ONCE = 64, KEYS_AT_ONCE = 64;
constexpr int64_t KEYS_OF_PART = 512;  // of few rows over many keys, for one thread
constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

struct Ops {
  // x, out [rows, width]; weight and bias [width] or null.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t rows, int64_t width,
                   float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t rows,
                     int64_t width, float* out);
  float (*log_sum_exp)(const float* x, int64_t n);
  // One vector's first 2 * half values, turned; cosines and sines [half].
  void (*rotate)(const float* x, const float* cosines, const float* sines, int64_t half,
                 bool traditional, float* out);
  // Some rows of one key head over some of its keys: out[r] = sum_j exp(s_rj - top[r]) v_j, sum[r] the
  // same of 1. out is [rows, padded(v_width)]. A score that is masked is the least float, as in MLX.
  void (*attend)(const Attention&, int64_t batch, int64_t kv_head, int64_t first_row, int64_t rows,
                 int64_t first_key, int64_t last_key, float* out, float* top, float* sum,
                 float* scratch);
};

// Floats of scratch memory that `attend` wants.
constexpr int64_t attend_scratch(const Attention& a) {
  const int64_t wider = a.width > padded(a.v_width) ? a.width : padded(a.v_width);
  return ROWS_AT_ONCE * (a.width + KEYS_AT_ONCE) + KEYS_AT_ONCE * (a.width + wider);
}

void rms_norm(const Ops&, const float* x, const float* weight, float eps, int64_t rows, int64_t width,
              float* out);
void layer_norm(const Ops&, const float* x, const float* weight, const float* bias, float eps,
                int64_t rows, int64_t width, float* out);

// x [batch, heads, length, width] by strides, the last is 1; out contiguous. Position t of batch b is
// (offsets[b * offset_stride] + t) * scale; rates [dims / 2] are what it is multiplied with.
struct Rope {
  const float* x;
  int64_t strides[3];
  int64_t batch, heads, length, width, dims;
  bool traditional;
  float scale;
  const float* rates;
  int64_t rate_stride;  // elements
  bool reciprocal;      // the rates are one over these
  const int64_t* offsets;
  int64_t offset_stride;
  float* out;
};
void rope(const Ops&, const Rope&);

// The cosines [half] and sines [half] that it turns by, for each position of each of the batch's offsets, one after the other.
// They are the calling thread's until its next call; the same ones are not made again, as all layers of a token ask for them.
const float* rope_table(const Rope&);

// `count` of them at once, such as several streams'.
void attention(const Ops&, const Attention*, int64_t count = 1);

// One key head's part of it, by the calling thread: of up to ROWS_AT_ONCE rows and KEYS_OF_PART keys. The same bits.
void attend_head(const Ops&, const Attention&, int64_t batch, int64_t kv_head);

extern const Ops ops_portable;
#ifdef CENACLE_AVX2
extern const Ops ops_avx2;
#endif

}  // namespace cenacle
