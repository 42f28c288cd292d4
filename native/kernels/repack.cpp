#include "kernels/repack.h"

#include <cstring>

namespace cenacle {
namespace {

// Calls `each(row's bytes, their place in the packed rows, how many)` for all that belongs to a row.
template <class Each>
void walk(const Matrix& m, int64_t row, const uint8_t* packed, uint8_t* weight, uint8_t* scales,
          uint8_t* biases, Each&& each) {
  const int size = scale_bytes(m), word = word_bytes(m);
  const int64_t group = packed_group(m), words = packed_weights(m) / ROWS_PER_PACK / word;
  auto* from = const_cast<uint8_t*>(packed) + row / ROWS_PER_PACK * m.width / m.group * group;
  for (int64_t g = 0; g < m.width / m.group; g++, from += group) {
    for (int64_t i = 0; i < words; i++, weight += word)
      each(weight, from + word * (i * ROWS_PER_PACK + row % ROWS_PER_PACK), word);
    uint8_t* tail = from + packed_weights(m) + size * (row % ROWS_PER_PACK);
    each(scales, tail, size);
    scales += size;
    if (m.format != Format::affine) continue;
    each(biases, tail + size * ROWS_PER_PACK, size);
    biases += size;
  }
}

}  // namespace

Matrix packed(const Matrix& plain, const uint8_t* to) {
  Matrix m = plain;
  m.packed = true;
  m.weight = to;
  m.scales = m.biases = nullptr;
  m.scale_stride = 0;
  m.weight_stride = packed_group(plain) / ROWS_PER_PACK * (plain.width / plain.group);
  return m;
}

void pack(const Matrix& plain, uint8_t* to) {
  const int64_t rows = padded_rows(plain.rows), stride = packed(plain, nullptr).weight_stride;
  if (rows > plain.rows) std::memset(to + (rows - ROWS_PER_PACK) * stride, 0, ROWS_PER_PACK * stride);
  for (int64_t row = 0; row < plain.rows; row++) {
    const Matrix r = plain.from(row);
    walk(plain, row, to, const_cast<uint8_t*>(r.weight), const_cast<uint8_t*>(r.scales),
         const_cast<uint8_t*>(r.biases),
         [](const uint8_t* row, uint8_t* packed, int n) { std::memcpy(packed, row, n); });
  }
}

void unpack(const Matrix& m, int64_t first, int64_t rows, uint8_t* weight, uint8_t* scales,
            uint8_t* biases) {
  const int64_t groups = m.width / m.group;
  const int64_t wide = m.width * m.bits / 8;
  const int64_t small = groups * scale_bytes(m);
  for (int64_t i = 0; i < rows; i++)
    walk(m, first + i, m.weight, weight + i * wide, scales + i * small,
         biases ? biases + i * small : nullptr,
         [](uint8_t* row, const uint8_t* packed, int n) { std::memcpy(row, packed, n); });
}

}  // namespace cenacle
