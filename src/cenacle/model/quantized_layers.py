"""Quantized layers of published checkpoints: how their tensors lie, and what MLX holds of them.

Owns: `StoredLayer`: which entries of its tensors hold which features, and `decode`, which makes
MLX's layout of them.
Does not know: families, ranks, how a format is recognized (`format_recognition.py`).
Where MLX has a layout that holds a format exactly (affine, mxfp4, mxfp8, nvfp4), that is used, or
our own for FP8 in blocks; else 16-bit floats (`StoredLayer.error`). The formats, as their writers
define them:
- fp8 (DeepSeek, Qwen, compressed-tensors float-quantized, ModelOpt): e4m3 [out, in] times a scale
  per tensor, per row or per block; with power-of-two scales (ue8m0, mxfp8) it is MLX's mxfp8, and
  so it is with a scale of the tensor or of rows, which is kept apart (`scaled_layers.py`). Blocks
  with other scales become groups of rows, a float each (`fp8_layers.py`).
- int (compressed-tensors pack-quantized and int-quantized): (q - zero) * scale. MLX's affine layout
  is q * scale + bias with bias = -zero * scale, which float32 holds without rounding.
- nvfp4 (compressed-tensors, ModelOpt): e2m1 times an e4m3 scale per 16 times a scale per tensor.
- mxfp4: e2m1 times an e8m0 scale per 32.
- AWQ (gemm) and GPTQ: as int, [in, out], packed along out (AWQ) or in (GPTQ).
Invariant: features [a, b) of a layer's rows or columns are decoded from the entries that `view`
names and nothing else, so a rank reads what it holds.
Next: `loader.py`, which reads the views; `scaled_layers.py`, the layers with a scale of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from .fp8_layers import widen
from .tensor_info import TensorInfo
from .tensor_reader import TensorPiece, TensorView, read_piece
from .tensor_slice import ROWS

# Nibble i of an AWQ word is output column _AWQ_ORDER[i] of eight (AutoAWQ's gemm kernels).
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BF16_ERROR = 2.0**-8  # of rounding to 8 significant bits
F16_ERROR = 2.0**-11
FLOAT_SCALES = "float_scales"
"""The part of fp8's layout that a layer has as its scales."""

Check = tuple[str, mx.array]
"""What is wrong where the array, a boolean, is false. Read with the weights, not before."""


@dataclass(frozen=True)
class AxisLayout:
    """An axis of a tensor that lists features: `entries` for every `features` of them."""

    axis: int
    features: int = 1
    entries: int = 1

    @classmethod
    def packed(cls, axis: int, bits: int) -> AxisLayout:
        """An axis of 32-bit words with integers of so many bits."""
        return cls(axis, 32 // bits) if 32 % bits == 0 else cls(axis, 32, bits)

    def entries_of(self, start: int, stop: int) -> tuple[int, int]:
        """The entries that have features [start, stop), and perhaps more around them."""
        return (
            start // self.features * self.entries,
            -(-stop // self.features) * self.entries,
        )


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a layer.

    Args:
        info: where it is.
        rows, columns: which axis lists output and input features; None: none does.
    """

    info: TensorInfo
    rows: AxisLayout | None = None
    columns: AxisLayout | None = None


@dataclass(frozen=True)
class StoredLayer:
    """A quantized linear layer as the checkpoint has it.

    Args:
        path: the name of its tensors without the last part.
        kind: "fp8", "int", "int8", "nvfp4", "mxfp4", "awq" or "gptq".
        tensors: by the part that they play: "weight", "scale", "zero", "global_scale", "g_idx".
        outputs, inputs: features.
        held: the layout in memory: MLX's "affine", "mxfp4", "mxfp8" or "nvfp4", "fp8" or "dense".
        dtype: of a dense layer.
        bits, group_size: of the layout that is held.
        divide: the scale of the whole tensor divides.
        symmetric: zero points are the middle of the range, so biases need no more bits than scales.
        zero_offset: what is added to stored zero points.
        act_order: columns belong to groups in the order of g_idx.
    """

    path: str
    kind: str
    tensors: Mapping[str, StoredTensor]
    outputs: int
    inputs: int
    held: str
    dtype: mx.Dtype
    bits: int = 0
    group_size: int = 0
    divide: bool = False
    symmetric: bool = True
    zero_offset: int = 0
    act_order: bool = False

    @property
    def signature(self) -> object:
        """Equal for layers that can be decoded together."""
        types = tuple((role, t.info.dtype, t.info.shape) for role, t in self.tensors.items())
        return self.kind, self.outputs, self.inputs, self.bits, types

    @property
    def is_decoded_at_once(self) -> bool:
        """Whether decoding takes several times the bytes of the result."""
        return self.held == "dense" or self.kind == "awq"

    @property
    def description(self) -> str:
        """Its format and what is held of it."""
        name = f"{self.kind} {self.bits}-bit" if self.kind in ("int", "awq", "gptq") else self.kind
        scale = self.tensors["scale"].info.shape
        if self.kind == "fp8" and len(scale) == 2 and 1 < scale[0] < self.outputs:
            name = "block fp8"
        name += " with act-order" if self.act_order else ""
        if self.held == "dense":
            return f"{name} held as {str(self.dtype).removeprefix('mlx.core.')}"
        if self.held == "fp8":
            return f"{name} held as fp8 8-bit, groups of {self.group_size}"
        if self.held == "affine":
            return f"{name} held as affine {self.bits}-bit, groups of {self.group_size}"
        return f"{name} held as {self.held}" if self.held != name else name

    @property
    def error(self) -> float:
        """The largest relative error that holding a weight makes."""
        if self.held != "dense":
            return 0.0
        return {mx.bfloat16: BF16_ERROR, mx.float16: F16_ERROR}.get(self.dtype, 0.0)

    def view(self, role: str, axis: int, start: int, stop: int) -> TensorView:
        """What of a tensor holds features [start, stop) of `axis` (`ROWS` or `COLUMNS`)."""
        tensor = self.tensors[role]
        layout = tensor.rows if axis == ROWS else tensor.columns
        shape = (1, *tensor.info.shape)
        if layout is None:
            return TensorView(shape)
        return TensorView(shape, layout.axis + 1, (layout.entries_of(start, stop),))

    def read(
        self, axis: int, ranges: tuple[tuple[int, int], ...], checks: list[Check]
    ) -> dict[str, mx.array]:
        """Read and decode ranges of features of one axis; see `decode`."""
        parts = []
        for start, stop in ranges:
            arrays = {
                role: read_piece(TensorPiece(t.info, self.view(role, axis, start, stop)))[0]
                for role, t in self.tensors.items()
            }
            parts.append(self.decode(arrays, axis, (start, stop), checks))

        def join(name: str) -> mx.array:
            if len(parts) == 1 or (name == "output_scale" and axis != ROWS):
                return parts[0][name]
            return mx.concatenate([p[name] for p in parts], -1 if name == "output_scale" else axis)

        return {name: join(name) for name in parts[0]}

    def decode(
        self,
        arrays: Mapping[str, mx.array],
        axis: int,
        span: tuple[int, int],
        checks: list[Check],
    ) -> dict[str, mx.array]:
        """MLX's layout of what `view` names, lazily.

        Args:
            arrays: by role, [..., the tensor's axes].
            axis, span: the features that were read; the other axis is whole.
            checks: gets what must be true of the values.

        Returns:
            "weight" [..., out, in or packed words], "scales" and "biases" [..., out, groups], and
            "output_scale" [..., out]; only "weight" where it is held dense. What is held as fp8 has
            "float_scales" [..., out, groups].
        """
        rows = span if axis == ROWS else (0, self.outputs)
        columns = span if axis != ROWS else (0, self.inputs)
        decoder = _Decoder(self, arrays, rows, columns, checks)
        return getattr(decoder, _DECODERS[self.kind])()

    def dequantize(self, parts: Mapping[str, mx.array]) -> mx.array:
        """What `decode` made as floats [..., out, in], lazily."""
        if self.held == "dense":
            return parts["weight"]
        if self.held == "fp8":
            return widen(parts["weight"], parts[FLOAT_SCALES], self.dtype)
        scales, biases = parts["scales"], parts.get("biases")
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        weight = mx.dequantize(
            parts["weight"],
            scales,
            biases,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.held,
            dtype=mx.float32,
        )
        if "output_scale" in parts:
            weight = weight * parts["output_scale"][..., None]
        return weight.astype(self.dtype)


@dataclass(frozen=True)
class _Decoder:
    layer: StoredLayer
    arrays: Mapping[str, mx.array]
    rows: tuple[int, int]
    columns: tuple[int, int]
    checks: list[Check]

    def fp8(self) -> dict[str, mx.array]:
        layer, weight = self.layer, self.arrays["weight"]
        if layer.held == "mxfp8" and layer.tensors["scale"].columns is None:
            words = _as_words(weight)
            ones = mx.full(
                (*words.shape[:-1], words.shape[-1] * 4 // layer.group_size), 127, mx.uint8
            )
            scale = mx.broadcast_to(self._scale().astype(mx.float32)[..., 0], words.shape[:-1])
            return {"weight": words, "scales": ones, "output_scale": scale}
        if layer.held == "mxfp8":
            scales = self._spread("scale", self._exponents(), step=layer.group_size)
            return {"weight": _as_words(weight), "scales": scales}
        if layer.held == "fp8":
            scales = self._spread("scale", self._scale(), step=layer.group_size)
            return {"weight": _as_words(weight), FLOAT_SCALES: mx.contiguous(scales)}
        scale = self._spread("scale", self._scale())
        return {"weight": (mx.from_fp8(weight, mx.float32) * scale).astype(layer.dtype)}

    def fp4(self) -> dict[str, mx.array]:
        layer = self.layer
        scales, words = self.arrays["scale"], _as_words(self.arrays["weight"])
        parts = {"weight": words, "scales": scales}
        nan = 0x7F if layer.held == "nvfp4" else 0xFF
        self._check("a scale is not a number", (scales & nan) != nan)
        if "global_scale" in layer.tensors:
            scale = self._matrix("global_scale").astype(mx.float32)[..., 0]
            self._check("the scale of the tensor is not finite", mx.isfinite(scale))
            if layer.divide:
                self._check("the scale of the tensor is zero", scale != 0)
                scale = 1 / scale
            count = self.rows[1] - self.rows[0]
            parts["output_scale"] = mx.broadcast_to(scale, (*words.shape[:-2], count))
        return parts

    def int8(self) -> dict[str, mx.array]:
        words = _as_words(self.arrays["weight"].view(mx.uint8) ^ 0x80)
        zero = None
        if "zero" in self.arrays:
            zero = self._matrix("zero").astype(mx.float32) + 128
        return self._affine(words, self._scale(), zero)

    def packed_int(self) -> dict[str, mx.array]:
        zero = None
        if "zero" in self.arrays:
            packed = self._matrix("zero").view(mx.uint32).swapaxes(-1, -2)
            zero = self._rows_of(_unpack(packed, self.layer.bits), "zero").swapaxes(-1, -2)
        return self._affine(self.arrays["weight"].view(mx.uint32), self._scale(), zero)

    def awq(self) -> dict[str, mx.array]:
        def of_rows(transposed: mx.array, role: str) -> mx.array:
            return self._rows_of(transposed, role).swapaxes(-1, -2)

        words = of_rows(_repack_awq(self.arrays["weight"].view(mx.uint32)), "weight")
        zero = None
        if "zero" in self.arrays:
            nibbles = _unpack(self.arrays["zero"].view(mx.uint32), 4)
            order = mx.array(np.argsort(_AWQ_ORDER))
            columns = nibbles.reshape(*nibbles.shape[:-1], -1, 8)[..., order].flatten(-2)
            zero = of_rows(columns, "zero")
        return self._affine(mx.contiguous(words), self._scale().swapaxes(-1, -2), zero)

    def gptq(self) -> dict[str, mx.array]:
        layer = self.layer
        words = mx.contiguous(self.arrays["weight"].view(mx.uint32).swapaxes(-1, -2))
        zero = self._rows_of(_unpack(self.arrays["zero"].view(mx.uint32), layer.bits), "zero")
        zero = (zero + layer.zero_offset) & (2**layer.bits - 1)
        scale, zero = self._scale().swapaxes(-1, -2), zero.swapaxes(-1, -2)
        if "g_idx" not in self.arrays:
            return self._affine(words, scale, zero)
        index = self.arrays["g_idx"]
        if layer.act_order:
            count = scale.shape[-1]
            self._check("g_idx names a group that is not there", (index >= 0) & (index < count))
            index = mx.broadcast_to(index[..., None, :], (*words.shape[:-1], index.shape[-1]))
            index = mx.clip(index, 0, count - 1)
            values = _unpack(words, layer.bits).astype(mx.float32)
            values = values - mx.take_along_axis(zero.astype(mx.float32), index, axis=-1)
            spread = mx.take_along_axis(scale.astype(mx.float32), index, axis=-1)
            return {"weight": (values * spread).astype(layer.dtype)}
        layout = layer.tensors["scale"].columns
        assert layout is not None
        groups = np.arange(*self.columns) // layout.features
        self._check(
            "config.json says desc_act false, but g_idx has columns in another order",
            index == mx.array(groups),
        )
        return self._affine(words, scale, zero)

    def _affine(self, words: mx.array, scale: mx.array, zero: mx.array | None) -> dict[str, Any]:
        layer, middle = self.layer, 2 ** (self.layer.bits - 1)
        scales = self._spread("scale", scale, step=layer.group_size)
        if zero is None or layer.symmetric:
            if zero is not None:
                message = "config.json says symmetric, but zero points are not in the middle"
                self._check(message, zero == middle)
            return {"weight": words, "scales": scales, "biases": scales * -middle}
        scales = scales.astype(mx.float32)
        zeros = self._spread("scale", zero.astype(mx.float32), step=layer.group_size)
        return {"weight": words, "scales": scales, "biases": -zeros * scales}

    def _matrix(self, role: str) -> mx.array:
        """A tensor with as many axes as a matrix."""
        array, info = self.arrays[role], self.layer.tensors[role].info
        lead = array.shape[: array.ndim - len(info.shape)]
        shape = {0: (1, 1), 1: (-1, 1)}.get(len(info.shape), array.shape[len(lead) :])
        return array.reshape(*lead, *shape)

    def _scale(self) -> mx.array:
        scale = self._matrix("scale")
        if scale.dtype == mx.uint8:
            scale = (scale.astype(mx.uint32) << 23).view(mx.float32)
        self._check("a scale is not finite", mx.isfinite(scale))
        return scale

    def _exponents(self) -> mx.array:
        """Scales as biased exponents of two (e8m0)."""
        scale = self._matrix("scale")
        if scale.dtype == mx.uint8:
            self._check("a scale is not a number", scale != 0xFF)
            return scale
        bits = scale.astype(mx.float32).view(mx.uint32)
        exponents = bits >> 23  # with the sign
        is_power = ((bits & 0x7FFFFF) == 0) & (exponents > 0) & (exponents < 255)
        self._check("config.json says ue8m0, but a scale is not a power of two", is_power)
        return exponents.astype(mx.uint8)

    def _rows_of(self, unpacked: mx.array, role: str) -> mx.array:
        """The rank's output features, of the last axis: packed words may hold more."""
        layout = self.layer.tensors[role].rows
        assert layout is not None
        start = self.rows[0] % layout.features
        return unpacked[..., start : start + self.rows[1] - self.rows[0]]

    def _spread(self, role: str, array: mx.array, step: int = 1) -> mx.array:
        """A value for each output feature and each `step` input features."""
        tensor = self.layer.tensors[role]
        array = _repeat(array, -2, tensor.rows, self.rows, 1)
        return _repeat(array, -1, tensor.columns, self.columns, step)

    def _check(self, message: str, is_right: mx.array) -> None:
        self.checks.append((f"{self.layer.path}: {message}", mx.all(is_right)))


_DECODERS = {
    **{"fp8": "fp8", "nvfp4": "fp4", "mxfp4": "fp4", "int": "packed_int", "int8": "int8"},
    **{"awq": "awq", "gptq": "gptq"},
}


def _repeat(
    array: mx.array, axis: int, layout: AxisLayout | None, span: tuple[int, int], step: int
) -> mx.array:
    count = (span[1] - span[0]) // step
    if layout is None:
        shape = list(array.shape)
        shape[axis] = count
        return mx.broadcast_to(array, shape)
    first = layout.entries_of(*span)[0]
    index = (span[0] + np.arange(count) * step) // layout.features - first
    if array.shape[axis] == count and index[-1] == count - 1:
        return array
    return mx.take(array, mx.array(index), axis=axis)


def _as_words(array: mx.array) -> mx.array:
    return mx.contiguous(array).view(mx.uint32)


def _unpack(words: mx.array, bits: int) -> mx.array:
    """uint32 [..., n] -> integers [..., 32 n / bits], packed from the low bits on."""
    mask = 2**bits - 1
    if 32 % bits == 0:
        return ((words[..., None] >> mx.arange(0, 32, bits, mx.uint32)) & mask).flatten(-2)
    # 32 integers in `bits` words; some begin in one word and end in the next.
    words = words.reshape(*words.shape[:-1], -1, bits)
    starts = np.arange(32) * bits
    low = words[..., mx.array(starts // 32)] >> mx.array(starts % 32, mx.uint32)
    following = words[..., mx.array(np.minimum(starts // 32 + 1, bits - 1))]
    shift = mx.array(np.where(starts % 32, 32 - starts % 32, 31), mx.uint32)
    return ((low | (following << shift)) & mask).flatten(-2)


def _repack_awq(words: mx.array) -> mx.array:
    """Words of eight outputs [..., in, out / 8] -> words of eight inputs [..., in / 8, out].

    An output of each eight at a time: unpacked they would take eight times their bytes.
    """
    eights = words.reshape(*words.shape[:-2], -1, 8, words.shape[-1])
    shifts = mx.arange(0, 32, 4, mx.uint32)[:, None]
    outputs = [
        mx.sum(((eights >> (4 * int(nibble))) & 15) << shifts, axis=-2).astype(mx.uint32)
        for nibble in np.argsort(_AWQ_ORDER)
    ]
    return mx.stack(outputs, axis=-1).flatten(-2)


@dataclass(frozen=True)
class QuantizedLayers:
    """The quantized layers of a checkpoint.

    Args:
        layers: by path.
        roles: of every tensor of such a layer: its layer and the part that it plays.
        ignored: names of tensors that nothing needs.
    """

    layers: Mapping[str, StoredLayer] = field(default_factory=dict)
    roles: Mapping[str, tuple[StoredLayer, str]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    @property
    def description(self) -> str | None:
        """Their formats, the most frequent first; None: no such layers."""
        counts = Counter(layer.description for layer in self.layers.values())
        return "; ".join(text for text, _ in counts.most_common()) or None
