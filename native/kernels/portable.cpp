// The kernels in plain C++: what every other set is compared with, and what runs where none fits.
// A row is decoded to float once and multiplied with every token; sixteen partial sums let the
// compiler use whatever vectors the processor's baseline has.
#include "kernels/decode.inc.h"

namespace cenacle {
namespace {

constexpr int LANES = 16;

float dot(const float* w, const float* x, int64_t n) {
  float part[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int j = 0; j < LANES; j++) part[j] += w[i + j] * x[i + j];
  for (int width = LANES / 2; width; width /= 2)
    for (int j = 0; j < width; j++) part[j] += part[j + width];
  float sum = part[0];
  for (; i < n; i++) sum += w[i] * x[i];
  return sum;
}

bool packs(const Matrix&) { return false; }

Layout choose(const Matrix&) { return {Interleave::none, 0}; }

void prepare(Layout, int64_t, const float*, uint8_t*, float*, float*) {}

int64_t scratch(const Matrix& m) { return m.width; }

void multiply(const Matrix& m, int64_t first, int64_t last, const Activations& a,
              const int32_t* tokens, int count, float* const* out, float* scratch) {
  for (int64_t row = first; row < last; row++) {
    decode_row(m, row, scratch);
    for (int j = 0; j < count; j++)
      out[j][row - first] = dot(scratch, a.plain + int64_t(tokens[j]) * m.width, m.width);
  }
}

}  // namespace

const Kernels portable = {"portable", packs, choose, prepare, scratch, multiply, activate};

}  // namespace cenacle
