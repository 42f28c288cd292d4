"""GGUF's block formats, and the same weights in MLX's layouts.

Owns: `BLOCK_TYPES`, and `to_mlx_layout`.
Does not know: files, tensors' names, MLX.
Types that are affine in groups of 32 become MLX's affine layout without loss; scales and biases are
float32, because a K-quant's are products of two numbers. Q6_K, Q3_K and Q2_K have a scale for every
16 weights, for which MLX has no layout: they become 8 bits in groups of 32, and the error is at
most a 510th of a group's range, an eighth of the step of Q6_K or less.
Invariant: `to_mlx_layout` needs memory for its result and 4 MB.
Next: `file.py`; the witness in the tests is the package gguf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

GROUP = 32
_CHUNK_WEIGHTS = 1 << 17  # decoded at a time: a weight takes up to 24 bytes on the way

# https://github.com/ggml-org/ggml/blob/master/include/ggml.h, enum ggml_type
TYPE_NAMES = {
    **{0: "F32", 1: "F16", 30: "BF16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0"},
    **{9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"},
    **{16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S"},
    **{22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    **{29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0"},
}

Affine = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Weights as unsigned integers [blocks, weights], and scales and biases [blocks, groups]."""


@dataclass(frozen=True)
class BlockType:
    """One of GGUF's types.

    Args:
        weights, nbytes: of a block.
        bits: of a weight in MLX's layout; 0: it is not quantized.
        mode: MLX's.
        decode: blocks [blocks, nbytes] as integers, scales and biases; None: not affine.
        is_exact: whether MLX's layout has the same weights.
    """

    weights: int
    nbytes: int
    bits: int = 0
    mode: str = "affine"
    decode: Callable[[np.ndarray], Affine] | None = None
    is_exact: bool = True


def to_mlx_layout(type_name: str, blocks: np.ndarray) -> dict[str, np.ndarray]:
    """Blocks as parameters of MLX's quantized layers.

    Args:
        type_name: a quantized type of `BLOCK_TYPES`.
        blocks: uint8 [..., blocks of a row, bytes of a block].

    Returns:
        "weight" uint32 [..., words of a row], "scales" [..., groups of a row] and, if
        affine, "biases".
    """
    kind = BLOCK_TYPES[type_name]
    rows = blocks.shape[:-2]
    flat = blocks.reshape(-1, kind.nbytes)
    groups, words = kind.weights // GROUP, kind.weights * kind.bits // 32
    weight = np.empty((len(flat), words), np.uint32)
    step = _CHUNK_WEIGHTS // kind.weights
    chunks = [slice(i, i + step) for i in range(0, len(flat), step)]
    if kind.mode == "mxfp4":
        for chunk in chunks:
            weight[chunk] = _pack(_nibbles(flat[chunk, 1:]), 4)
        parameters = {"weight": weight, "scales": np.ascontiguousarray(flat[:, :1])}
    else:
        assert kind.decode is not None
        scales, biases = (np.empty((len(flat), groups), np.float32) for _ in range(2))
        # Damaged scales become what they may: whoever loads them looks at the result.
        with np.errstate(invalid="ignore", over="ignore"):
            for chunk in chunks:
                q, scales[chunk], biases[chunk] = kind.decode(flat[chunk])
                weight[chunk] = _pack(q, kind.bits)
        parameters = {"weight": weight, "scales": scales, "biases": biases}
    row_blocks = blocks.shape[-2]
    return {n: a.reshape(*rows, row_blocks * a.shape[1]) for n, a in parameters.items()}


def _pack(q: np.ndarray, bits: int) -> np.ndarray:
    """[rows, weights] -> uint32 [rows, words]: MLX's stream of bits, the first weight lowest."""
    if bits == 8:
        return np.ascontiguousarray(q).view("<u4")
    if bits == 4:
        return np.ascontiguousarray(q[:, ::2] | q[:, 1::2] << 4).view("<u4")
    eights = q.reshape(len(q), -1, 8).astype(np.uint64)
    shifted = (eights << np.arange(0, 8 * bits, bits, dtype=np.uint64)).sum(-1, dtype=np.uint64)
    stream = shifted.astype("<u8").view(np.uint8).reshape(len(q), -1, 8)[..., :bits]
    return np.ascontiguousarray(stream).reshape(len(q), -1).view("<u4")


def _nibbles(data: np.ndarray) -> np.ndarray:
    """[blocks, 16 n] -> [blocks, 32 n]: of every 16 bytes the low halves, then the high ones."""
    parts = data.reshape(len(data), -1, 16)
    return np.concatenate([parts & 15, parts >> 4], axis=2).reshape(len(data), -1)


def _bits_of(data: np.ndarray) -> np.ndarray:
    return np.unpackbits(np.ascontiguousarray(data), axis=1, bitorder="little")


def _half(data: np.ndarray) -> np.ndarray:
    """[blocks, 2] -> float32 [blocks, 1]."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _centered(q: np.ndarray, scales: np.ndarray, zero: int) -> Affine:
    return q, scales, scales * np.float32(-zero)


def _decode_q4_0(b: np.ndarray) -> Affine:
    return _centered(_nibbles(b[:, 2:]), _half(b[:, :2]), 8)


def _decode_q4_1(b: np.ndarray) -> Affine:
    return _nibbles(b[:, 4:]), _half(b[:, :2]), _half(b[:, 2:4])


def _decode_q5_0(b: np.ndarray) -> Affine:
    q = _nibbles(b[:, 6:]) | _bits_of(b[:, 2:6]) << 4
    return _centered(q, _half(b[:, :2]), 16)


def _decode_q5_1(b: np.ndarray) -> Affine:
    q = _nibbles(b[:, 8:]) | _bits_of(b[:, 4:8]) << 4
    return q, _half(b[:, :2]), _half(b[:, 2:4])


def _decode_q8_0(b: np.ndarray) -> Affine:
    return _centered(b[:, 2:] ^ 128, _half(b[:, :2]), 128)


def _k_scales(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases of Q4_K and Q5_K: 16 numbers of 6 bits, times two halves."""
    low, high, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = np.concatenate([low & 63, (rest & 15) | (low >> 2 & 48)], axis=1)
    minimum = np.concatenate([high & 63, (rest >> 4) | (high >> 2 & 48)], axis=1)
    return _half(b[:, :2]) * scale, -_half(b[:, 2:4]) * minimum


def _paired_nibbles(data: np.ndarray, width: int) -> np.ndarray:
    """Of every `width` bytes the low halves, then the high ones."""
    parts = data.reshape(len(data), -1, width)
    return np.concatenate([parts & 15, parts >> 4], axis=2).reshape(len(data), -1)


def _bit_planes(data: np.ndarray, width: int, bits: int) -> np.ndarray:
    """Of every `width` bytes the lowest `bits` of each, then the next ones."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = data.reshape(len(data), -1, 1, width) >> shifts & (2**bits - 1)
    return parts.reshape(len(data), -1)


def _decode_q4_k(b: np.ndarray) -> Affine:
    return _paired_nibbles(b[:, 16:], 32), *_k_scales(b)


def _decode_q5_k(b: np.ndarray) -> Affine:
    q = _paired_nibbles(b[:, 48:], 32) | _bit_planes(b[:, 16:48], 32, 1) << 4
    return q, *_k_scales(b)


def _to_8_bits(values: np.ndarray) -> Affine:
    """Float32 [blocks, weights] in groups of 32."""
    grouped = values.reshape(len(values), -1, GROUP)
    low = grouped.min(axis=2)
    scales = ((grouped.max(axis=2) - low) / np.float32(255)).astype(np.float32)
    steps = np.where(scales == 0, np.float32(1), scales)
    q = np.rint((grouped - low[..., None]) / steps[..., None])
    q = np.nan_to_num(np.clip(q, 0, 255)).astype(np.uint8)
    return q.reshape(len(values), -1), scales, low


def _decode_q6_k(b: np.ndarray) -> Affine:
    q = _paired_nibbles(b[:, :128], 64) | _bit_planes(b[:, 128:192], 32, 2) << 4
    scales = _half(b[:, 208:]) * np.ascontiguousarray(b[:, 192:208]).view(np.int8)
    values = (q.astype(np.float32) - 32).reshape(len(b), 16, 16) * scales[..., None]
    return _to_8_bits(values.reshape(len(b), -1))


def _decode_q3_k(b: np.ndarray) -> Affine:
    low = b[:, 96:104]
    low = np.concatenate([low & 15, low >> 4], axis=1)
    scale = low | _bit_planes(b[:, 104:108], 4, 2) << 4
    scales = _half(b[:, 108:]) * (scale.astype(np.float32) - 32)
    q = _bit_planes(b[:, 32:96], 32, 2) | _bit_planes(b[:, :32], 32, 1) << 2
    values = (q.astype(np.float32) - 4).reshape(len(b), 16, 16) * scales[..., None]
    return _to_8_bits(values.reshape(len(b), -1))


def _decode_q2_k(b: np.ndarray) -> Affine:
    scales, minima = _half(b[:, 80:82]) * (b[:, :16] & 15), _half(b[:, 82:]) * (b[:, :16] >> 4)
    q = _bit_planes(b[:, 16:80], 32, 2).reshape(len(b), 16, 16).astype(np.float32)
    values = q * scales[..., None] - minima[..., None]
    return _to_8_bits(values.reshape(len(b), -1))


_IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16
)
_IQ4_BYTES = (_IQ4 + 128).astype(np.uint8)


def _decode_iq4_nl(b: np.ndarray) -> Affine:
    return _centered(_IQ4_BYTES[_nibbles(b[:, 2:])], _half(b[:, :2]), 128)


def _decode_iq4_xs(b: np.ndarray) -> Affine:
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = (b[:, 4:8, None] >> np.array([0, 4], np.uint8) & 15).reshape(len(b), 8)
    scales = _half(b[:, :2]) * ((low | high << 4).astype(np.float32) - 32)
    return _centered(_IQ4_BYTES[_nibbles(b[:, 8:])], scales, 128)


BLOCK_TYPES: dict[str, BlockType] = {
    "F32": BlockType(1, 4),
    "F16": BlockType(1, 2),
    "BF16": BlockType(1, 2),
    "Q4_0": BlockType(32, 18, 4, decode=_decode_q4_0),
    "Q4_1": BlockType(32, 20, 4, decode=_decode_q4_1),
    "Q5_0": BlockType(32, 22, 5, decode=_decode_q5_0),
    "Q5_1": BlockType(32, 24, 5, decode=_decode_q5_1),
    "Q8_0": BlockType(32, 34, 8, decode=_decode_q8_0),
    "Q4_K": BlockType(256, 144, 4, decode=_decode_q4_k),
    "Q5_K": BlockType(256, 176, 5, decode=_decode_q5_k),
    "Q6_K": BlockType(256, 210, 8, decode=_decode_q6_k, is_exact=False),
    "Q3_K": BlockType(256, 110, 8, decode=_decode_q3_k, is_exact=False),
    "Q2_K": BlockType(256, 84, 8, decode=_decode_q2_k, is_exact=False),
    "IQ4_NL": BlockType(32, 18, 8, decode=_decode_iq4_nl),
    "IQ4_XS": BlockType(256, 136, 8, decode=_decode_iq4_xs),
    "MXFP4": BlockType(32, 17, 4, "mxfp4"),
}
UNQUANTIZED = {"F32", "F16", "BF16"}


def row_shape(type_name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A quantized tensor's shape in weights as [..., blocks of a row, bytes of a block]."""
    kind = BLOCK_TYPES[type_name]
    return (*shape[:-1], shape[-1] // kind.weights, kind.nbytes)
