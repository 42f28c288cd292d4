"""."""

from __future__ import annotations

import re
from dataclasses import dataclass

from . import architecture
from .architecture import Family
from .slicing import ExpertSlice


@dataclass(frozen=True)
class ExpertTensorView:
    """How to look at a checkpoint's tensor, [items, ...], and what of which axis (0: all)."""

    shape: tuple[int, ...]
    axis: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def cut(self) -> tuple[int, ...]:
        """The shape of what is seen of all items."""
        wide = sum(b - a for a, b in self.ranges)
        return tuple(wide if i == self.axis and i else n for i, n in enumerate(self.shape))


_PROJECTION = re.compile(
    r".*\.(?P<name>gate_up_proj|input_linear|gate_proj|up_proj|down_proj|output_linear"
    r"|w1|w2|w3|v1|fc1|fc2)(?:[._](?P<leaf>weight|scales|biases|bias|blocks))?"
)


_FUSED = ("gate_up_proj", "input_linear")


_DOWN = ("down_proj", "output_linear", "w2", "fc2")


def expert_tensor_views(
    shapes: dict[str, tuple[int, ...]], slices: dict[int, ExpertSlice], count: int, family: Family
) -> dict[str, ExpertTensorView]:
    """How to cut the tensors that hold experts as they are in the checkpoint.

    Args:
        shapes: of all tensors, by name.
        slices: this rank's, by layer.
        count: number of experts.

    Returns:
        One for every such tensor; nothing at all if one of them is not understood.
    """
    found: dict[str, tuple[ExpertSlice, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        layer = architecture.layer_index(name)
        if layer not in slices:
            continue
        if architecture.EXPERT_TENSOR.fullmatch(name):
            found[name] = slices[layer], (1, *shape)
        elif architecture.STACKED_TENSOR.fullmatch(name) and shape and shape[0] % count == 0:
            per = () if shape[0] == count else (shape[0] // count,)
            found[name] = slices[layer], (count, *per, *shape[1:])
    transposed = _transposed(found)
    seen = {name: _view(name, *of, family, transposed) for name, of in found.items()}
    return {} if None in seen.values() else {n: v for n, v in seen.items() if v is not None}


def _transposed(found: dict[str, tuple[ExpertSlice, tuple[int, ...]]]) -> bool | None:
    """Whether fused gate and up projections are [experts, in, out]; None: shapes do not tell."""
    for name, (part, shape) in found.items():
        match = _PROJECTION.fullmatch(name)
        if match and match["name"] in _FUSED and match["leaf"] is None and len(shape) == 3:
            normal = shape[1:] == (2 * part.width, part.model_width)
            turned = shape[1:] == (part.model_width, 2 * part.width)
            return turned if normal != turned else None
    return None


def _view(
    name: str, part: ExpertSlice, shape: tuple[int, ...], family: Family, transposed: bool | None
) -> ExpertTensorView | None:
    """See `views`; None: not understood."""
    match = _PROJECTION.fullmatch(name)
    if match is None:
        return ExpertTensorView(shape, 0, ()) if len(shape) == 1 else None
    fused, down, leaf = match["name"] in _FUSED, match["name"] in _DOWN, match["leaf"]
    if leaf == "bias":
        if down:
            return ExpertTensorView(shape, 0, ())
        axis = 1
    else:
        if len(shape) < 3:
            return None
        width = part.width * (2 if fused else 1)
        other = shape[1:] == (part.model_width, width)
        given = shape[1:] == (width, part.model_width)
        turned = down  # as a linear layer has it: [out, in]
        if leaf is None and not other and not given:
            return None
        if leaf is None and other != given:
            turned = other
        elif leaf is None:  # square
            if transposed is None:
                return None
            turned = transposed != down
        axis = 2 if turned else 1
    start, stop, units = part.part
    length = shape[axis] // (2 if fused else 1)
    if start * length % units or stop * length % units:
        return None
    a, b = start * length // units, stop * length // units
    if not fused:
        return ExpertTensorView(shape, axis, ((a, b),))
    if family.interleaved:
        return ExpertTensorView(shape, axis, ((2 * a, 2 * b),))
    return ExpertTensorView(shape, axis, ((a, b), (length + a, length + b)))
