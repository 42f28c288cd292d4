// Sixteen rows of a quantized matrix side by side.
//
// Owns: the layout, and getting into it and out of it. Does not know: instruction sets, MLX.
// Of sixteen rows, for each group of weights in turn: the rows' words of 32 bits (of 8 or 4 weights), the
// sixteen first ones, the second ones, ...; the sixteen scales; the sixteen biases. So a vector of words
// belongs to sixteen outputs, which need no sum over lanes at the end; a group costs one conversion for
// sixteen rows; and a matrix is one stream, which the processor's own prefetcher keeps up with.
// Rows that are missing from the last sixteen are zeros. Of values of e4m3 the words have 16 bits: two weights
// become two vectors of half floats, whose lanes are rows.
#pragma once

#include "kernels/kernels.h"

namespace cenacle {

constexpr int64_t ROWS_PER_PACK = 16;

// Bytes that lie together of one row.
constexpr int word_bytes(const Matrix& m) { return is_e4m3(m) ? 2 : 4; }
// Bytes of a group of sixteen rows: of weights, and with scales and biases.
constexpr int64_t packed_weights(const Matrix& m) { return ROWS_PER_PACK * m.group * m.bits / 8; }
constexpr int64_t packed_group(const Matrix& m) {
  return packed_weights(m) + ROWS_PER_PACK * scale_bytes(m) * (m.format == Format::affine ? 2 : 1);
}
constexpr int64_t padded_rows(int64_t rows) { return (rows + ROWS_PER_PACK - 1) / ROWS_PER_PACK * ROWS_PER_PACK; }

// The description of the matrix that `pack` makes of `plain`, at `to`; 0: how large it will be.
Matrix packed(const Matrix& plain, const uint8_t* to);
inline int64_t packed_bytes(const Matrix& plain) {
  return padded_rows(plain.rows) * packed(plain, nullptr).weight_stride;
}
void pack(const Matrix& plain, uint8_t* to);
// `rows` of a packed matrix as they were, from row `first` on.
void unpack(const Matrix& m, int64_t first, int64_t rows, uint8_t* weight, uint8_t* scales, uint8_t* biases);

}  // namespace cenacle
