"""How a checkpoint's own tensors hold experts, guessed from names and shapes.

Owns: which axis of an expert tensor is the hidden width, in every format of the hub.
Does not know: files, plans, ranks.
Invariant: all tensors of a model are understood, or none is: then they are sliced after mlx-lm's
conversion.
Next: `slicing.py`, which makes pieces of the views.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .families import EXPERT_TENSOR, STACKED_TENSOR, Family, layer_index
from .quantized_layers import QuantizedLayers
from .tensor_reader import TensorView
from .tensor_slice import COLUMNS, ROWS, TensorSlice, UnitRange, scale_range

_PROJECTION = re.compile(
    r".*\.(?P<name>gate_up_proj|input_linear|gate_proj|up_proj|down_proj|output_linear"
    r"|w13|w1|w2|w3|v1|fc1|fc2)(?:[._](?P<leaf>weight|scales?|biases|bias|blocks))?(?:\.scale)?"
)
_FUSED = ("gate_up_proj", "input_linear", "w13")
_DOWN = ("down_proj", "output_linear", "w2", "fc2")


@dataclass(frozen=True)
class ExpertSlice:
    """A rank's slice of a layer's experts.

    Args:
        units: of the hidden width.
        width: hidden width of a whole expert.
        model_width: features that experts take and give.
    """

    units: UnitRange
    width: int
    model_width: int


def expert_tensor_views(
    shapes: Mapping[str, tuple[int, ...]],
    slices: Mapping[int, ExpertSlice],
    count: int,
    family: Family,
    quantized: QuantizedLayers,
) -> dict[str, TensorView]:
    """How to slice the tensors that hold experts as they are in the checkpoint.

    Args:
        shapes: of all tensors, by name.
        slices: a rank's, by layer.
        count: number of experts.
        quantized: layers in other formats than MLX's own, which know how their tensors lie.

    Returns:
        A view of every such tensor; empty if one of them is not understood.
    """
    expert_tensors: dict[str, tuple[ExpertSlice, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        layer = layer_index(name)
        if layer is None or layer not in slices:
            continue
        if EXPERT_TENSOR.fullmatch(name):
            expert_tensors[name] = slices[layer], (1, *shape)
        elif STACKED_TENSOR.fullmatch(name) and shape and shape[0] % count == 0:
            rows = () if shape[0] == count else (shape[0] // count,)
            expert_tensors[name] = slices[layer], (count, *rows, *shape[1:])
    transposed = _is_transposed(expert_tensors)
    views = {}
    for name, (part, shape) in expert_tensors.items():
        view: TensorView | None
        if name in quantized.roles:
            stored, role = quantized.roles[name]
            sliced = quantized_slice(stored.path, part)
            view = None
            if sliced is not None and EXPERT_TENSOR.fullmatch(name):
                view = stored.view(role, sliced.axis, *sliced.ranges[0])
        else:
            view = _expert_view(name, part, shape, family, transposed)
        if view is None:
            return {}
        views[name] = view
    return views


def quantized_slice(path: str, part: ExpertSlice) -> TensorSlice | None:
    """A rank's slice of one expert's layer; None: the name does not tell which layer it is."""
    match = _PROJECTION.fullmatch(f"{path}.weight")
    if match is None or match["name"] in _FUSED:
        return None
    axis = COLUMNS if match["name"] in _DOWN else ROWS
    return TensorSlice(axis, scale_range(part.units, part.width), part.width)


def _is_transposed(
    expert_tensors: Mapping[str, tuple[ExpertSlice, tuple[int, ...]]],
) -> bool | None:
    """Whether fused gate and up projections are [experts, in, out]; None: shapes do not tell."""
    for name, (part, shape) in expert_tensors.items():
        match = _PROJECTION.fullmatch(name)
        if match and match["name"] in _FUSED and match["leaf"] is None and len(shape) == 3:
            normal = shape[1:] == (2 * part.width, part.model_width)
            transposed = shape[1:] == (part.model_width, 2 * part.width)
            return transposed if normal != transposed else None
    return None


def _expert_view(
    name: str,
    part: ExpertSlice,
    shape: tuple[int, ...],
    family: Family,
    transposed: bool | None,
) -> TensorView | None:
    """The view of one tensor; None: not understood."""
    match = _PROJECTION.fullmatch(name)
    if match is None:
        return TensorView(shape) if len(shape) == 1 else None
    is_fused, is_down, leaf = match["name"] in _FUSED, match["name"] in _DOWN, match["leaf"]
    if leaf == "bias":
        if is_down:
            return TensorView(shape)
        axis = 1
    else:
        width = part.width * (2 if is_fused else 1)
        width_axis = _width_axis(shape, (width, part.model_width), is_down, leaf, transposed)
        if width_axis is None:
            return None
        axis = width_axis
    start, stop, units = part.units
    length = shape[axis] // (2 if is_fused else 1)
    if start * length % units or stop * length % units:
        return None
    a, b = start * length // units, stop * length // units
    if not is_fused:
        return TensorView(shape, axis, ((a, b),))
    if family.interleaved_gate_up:
        return TensorView(shape, axis, ((2 * a, 2 * b),))
    return TensorView(shape, axis, ((a, b), (length + a, length + b)))


def _width_axis(
    shape: tuple[int, ...],
    widths: tuple[int, int],
    is_down: bool,
    leaf: str | None,
    transposed: bool | None,
) -> int | None:
    """Which axis of a matrix per expert is the hidden width; None: shapes do not tell.

    Args:
        widths: (hidden width, model width).
    """
    if len(shape) < 3:
        return None
    if leaf is not None:  # as in a linear layer: [out, in]
        return 2 if is_down else 1
    hidden_first = shape[1:] == widths
    hidden_last = shape[1:] == widths[::-1]
    if hidden_first != hidden_last:
        return 2 if hidden_last else 1
    if not hidden_first or transposed is None:  # neither, or square
        return None
    return 2 if transposed != is_down else 1
