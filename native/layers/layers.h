// A linear layer and a Mixture-of-Experts feed-forward over raw pointers.
//
// Owns: dividing rows among threads and tokens into blocks, and the order of work in an expert block.
// Does not know: MLX, instruction sets. Next: primitives.cpp, which puts these into MLX's graph.
#pragma once

#include <functional>
#include <vector>

#include "kernels/repack.h"
#include "ops/ops.h"

namespace cenacle {

struct Linear {
  Matrix matrix;           // of all experts, stacked
  const float* bias;       // [experts, rows] or null
  int64_t rows;            // of one expert
  int64_t experts = 1;
  const float* output_scale = nullptr;  // [experts, rows] or null

  int64_t apart() const { return matrix.packed ? padded_rows(rows) : rows; }
  // What multiplication made of rows [first, first + n) of an expert becomes an output: scale * y + bias.
  void finish(int64_t expert, int64_t first, int64_t n, float* const* out, int count) const {
    const int64_t at = expert * rows + first;
    for (int j = 0; j < count; j++) {
      if (output_scale)
        for (int64_t r = 0; r < n; r++) out[j][r] *= output_scale[at + r];
      if (bias)
        for (int64_t r = 0; r < n; r++) out[j][r] += bias[at + r];
    }
  }

  Matrix of(int64_t expert) const { return matrix.from(expert * apart()); }
};

// out[t] = scale * W x[t] + bias, x [tokens, width], out [tokens, rows].
void linear(const Kernels&, const Linear&, const float* x, int64_t tokens, float* out);

struct Experts {
  std::vector<Linear> in;  // gate and up, or one
  Linear down;
  Activation act;
  float a, b;
};

// out[t, j] = expert rows[t, j] of x[t]; zero where rows[t, j] < 0. x [tokens, width], rows [tokens, k].
void experts(const Kernels&, const Experts&, const float* x, const int32_t* rows, int64_t tokens,
             int64_t k, float* out);

// out[t] = sum over j of weights[t, j] times that, in the order of j. out [tokens, width].
void experts_sum(const Kernels&, const Experts&, const float* x, const int32_t* rows, const float* weights,
                 int64_t tokens, int64_t k, float* out);

// What stands around a block's matrices: f(rms_norm(x)) for f(x) if there is a `norm` [width], and x + that if `add`.
struct Frame {
  const float* norm = nullptr;
  float eps = 0;
  bool add = false;
};

// Scores [tokens, experts of the gate] -> weights [tokens, k], and which row each choice is, or -1.
using Choose = std::function<std::vector<int32_t>(const float* scores, float* weights)>;

// The weighted sum of the experts that are chosen by a gate's scores. x, out [tokens, width].
void moe(const Kernels&, const Ops&, const Linear& gate, const Experts&, const Frame&, const Choose&, const float* x,
         int64_t tokens, int64_t k, float* out);

}  // namespace cenacle
