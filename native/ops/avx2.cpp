// Norms, rotation and attention for AVX2 and FMA (x86-64-v3).
#define OPS ops_avx2
#include "ops/ops.inc.h"
