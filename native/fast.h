// What the module's two halves know of each other: primitives.cpp and fast.cpp.
#pragma once

#include <nanobind/nanobind.h>

#include "ops.h"

namespace cenacle {

// The operations that go with the kernels in use.
const Ops& ops();

// Adds rms_norm, layer_norm, rope, scaled_dot_product_attention and
// logsumexp to the module.
void define_fast(nanobind::module_& m);

}  // namespace cenacle
