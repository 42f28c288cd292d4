// A layer's attention for one new token of each of several streams, over raw pointers and as one job.
//
// Owns: the order of its tasks. Does not know: MLX, how a cache keeps its keys. Next: primitives/streams.cpp.
#pragma once

#include <array>
#include <functional>

#include "layers/layers.h"

namespace cenacle {

struct StreamStep {
  std::array<Linear, 3> layers;       // of queries, keys and values
  const Linear* output;               // null: the result is what the heads saw
  int64_t width;                      // of a head
  std::array<const float*, 2> norms;  // [width], of each head's queries and keys, or null
  std::array<float, 2> eps;
  Rope rope;                          // its rates, offsets and settings
  Frame frame;                        // `add` only with an output
};

// A new key and a new value [width] into a stream's cache. Called by any thread, for each head of each stream once.
using AppendHead = std::function<void(int64_t stream, int64_t head, const float* key, const float* value)>;

// x [streams, in] -> out [streams, rows of the output, or heads * width]. Of `each`, one for each stream, queries and output
// are set here; its keys are what `append` wrote into. The bits are those of the same operations one by one.
void attend_streams(const Kernels&, const Ops&, const StreamStep&, Attention* each, int64_t streams, const AppendHead& append,
                    const float* x, float* out);

}  // namespace cenacle
