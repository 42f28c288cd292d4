"""A slice of one layer's parameters, and how finely a layer can be sliced.

Owns: `TensorSlice`, which rows or columns of a linear layer's parameters a rank holds.
Does not know: files, plans, ranks.
A linear layer's output features are rows, its input features columns.
Invariant: a slice ends at a border of quantization groups, or is refused. An output bias is not
sliced: all ranks but the first have zeros there (`expert_parallel.parallelize`).
Next: `slicing.py`, which slices a whole model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..errors import CheckpointError

UnitRange = tuple[int, int, int]
"""[start, stop) of so many equal units: (start, stop, units)."""

ROWS, COLUMNS = -2, -1
UNSLICED = ("bias", "global_scale", "output_scale")  # of a layer that is sliced by columns
_MLP_LAYERS = {"gate_proj", "up_proj", "down_proj"}


@dataclass(frozen=True)
class TensorSlice:
    """Which part of a layer's parameters a rank holds.

    Args:
        axis: `ROWS` (output features) or `COLUMNS` (input features).
        ranges: [start, stop) in features.
        size: features of the whole layer along the axis.
    """

    axis: int
    ranges: tuple[tuple[int, int], ...]
    size: int

    def axis_of(self, name: str, ndim: int) -> int | None:
        """The axis, from 0, along which parameter `name` is sliced; None: it stays whole.

        Raises:
            CheckpointError: a parameter of an unknown format.
        """
        if name in ("weight", "scales", "float_scales", "biases"):
            return max(ndim + self.axis, 0)
        if name in ("bias", "output_scale"):
            return ndim - 1 if self.axis == ROWS else None
        if name == "global_scale":
            return None
        raise CheckpointError(
            f"a parameter named {name} cannot be sliced; use --placement whole --trunk replicated"
        )

    def ranges_in(self, length: int) -> list[tuple[int, int]]:
        """The ranges in an axis of `length`, which packs or groups the features.

        Raises:
            CheckpointError: a border is inside a packed word or a group.
        """
        if any(n * length % self.size for pair in self.ranges for n in pair):
            raise CheckpointError(
                f"features {list(self.ranges)} of {self.size} are not at borders of an axis of "
                f"{length}; use --placement whole --trunk replicated"
            )
        return [(a * length // self.size, b * length // self.size) for a, b in self.ranges]

    def apply(self, array: mx.array, name: str) -> mx.array:
        """The rank's part of a parameter, lazily."""
        axis = self.axis_of(name, array.ndim)
        if axis is None:
            return array
        before = (slice(None),) * axis
        pieces = [array[(*before, slice(a, b))] for a, b in self.ranges_in(array.shape[axis])]
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=axis)


def scale_range(units: UnitRange, size: int) -> tuple[tuple[int, int], ...]:
    """A range in units as the `ranges` of an axis of `size` features."""
    start, stop, count = units
    return ((start * size // count, stop * size // count),)


def feature_counts(linear: nn.Module) -> tuple[int, int]:
    """Output and input features of a linear layer, quantized or not, stacked or not."""
    if "scales" in linear:
        return linear.weight.shape[-2], linear.scales.shape[-1] * linear.group_size
    return linear.weight.shape[-2], linear.weight.shape[-1]


def input_units(linear: nn.Module) -> int:
    """Into how many pieces the inputs can be divided: quantization groups, or a few features."""
    _, inputs = feature_counts(linear)
    if "scales" in linear:
        return int(linear.scales.shape[-1])
    return inputs // math.gcd(inputs, 16 if inputs >= 256 else 4)


def unsliced_bytes(linear: nn.Module) -> int:
    """Bytes of a layer sliced by columns that every rank holds."""
    return sum(linear[n].nbytes for n in UNSLICED if n in linear)


def is_mlp(module: nn.Module) -> bool:
    """Whether a module is down(act(up)) or down(act(gate) * up) and nothing more."""
    children = module.children()
    linears = {n for n, c in children.items() if isinstance(c, nn.Linear | nn.QuantizedLinear)}
    return linears in (_MLP_LAYERS, _MLP_LAYERS - {"gate_proj"}) and (
        set(children) <= linears | {"activation"}
    )


def slice_mlp(path: str, module: nn.Module, units: UnitRange) -> dict[str, TensorSlice]:
    """The slices of an MLP (a dense layer, or shared experts) by hidden width, by layers' paths."""
    width = feature_counts(module.down_proj)[1]
    ranges = scale_range(units, width)
    return {
        f"{path}.{n}": TensorSlice(COLUMNS if n == "down_proj" else ROWS, ranges, width)
        for n in sorted(_MLP_LAYERS)
        if n in module
    }
