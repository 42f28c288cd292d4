// The AVX2 kernels with AVX-512's `vpdpwssd` on 256-bit vectors, which adds what it multiplies: the same
// integers, so the same bits.
#define CENACLE_VNNI
#include "kernels_avx2.cpp"
