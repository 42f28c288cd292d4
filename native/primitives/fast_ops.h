// What the module's two halves know of each other: primitives.cpp and fast.cpp.
#pragma once

#include <nanobind/nanobind.h>

#include "mlx/array.h"
#include "ops/ops.h"

namespace cenacle {

// The operations that go with the kernels in use.
const Ops& ops();

// What positions are multiplied with, [half]: powers of the base. Kept.
const mlx::core::array& rates_of(float base, int half);

// Of `rows` of `n` scores the k largest, the best first: their ids, and their part of the softmax of all, or of the k.
void route(const float* scores, int64_t rows, int64_t n, int k, bool normalized, uint32_t* ids, float* weights);

// Adds rms_norm, layer_norm, rope, scaled_dot_product_attention and
// logsumexp to the module, and attend and route.
void define_fast(nanobind::module_& m);

}  // namespace cenacle
