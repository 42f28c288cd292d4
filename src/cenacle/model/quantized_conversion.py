"""mlx-lm's conversion of a checkpoint, for layers that stay quantized.

Owns: `LoadedLayer`, a quantized layer as a rank read it; `convert_quantized`.
Does not know: families, formats.
How: a family's `sanitize` in mlx-lm knows floats only: it stacks, splits and renames tensors named
"weight". Such a step treats rows alike, whatever a row holds. So the conversion runs once with
floats (lazily, they are not made), and once for each part of the quantized layout, packed words or
scales, in the place of the floats. Where the parts come out with the shapes of a quantized layer of
the model, they are used; where the family mixes columns (MLA's absorbed projections), the floats
are.
Next: `loader.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from . import architecture
from .families import EXPERT_TENSOR
from .fp8_layers import GROUPS
from .quantized_layers import FLOAT_SCALES, Check, StoredLayer
from .scaled_layers import OUTPUT_SCALE
from .tensor_slice import TensorSlice

Tensors = dict[str, mx.array]
_PARTS = ("weight", "scales", FLOAT_SCALES, "biases", OUTPUT_SCALE)
_BITS_AND_GROUPS = {(4, 16), (4, 32), (8, 32)}  # of layouts with scales of 8 bits


@dataclass
class LoadedLayer:
    """A quantized layer, or the rank's part of it.

    Args:
        stored: what the checkpoint has.
        parts: what MLX holds, see `StoredLayer.decode`; lazy.
        checks: what must be true of the values that were read.
    """

    stored: StoredLayer
    parts: Tensors
    checks: list[Check] = field(default_factory=list)
    _slice: TensorSlice | None = None

    @property
    def nbytes(self) -> int:
        """Of its parts."""
        return sum(array.nbytes for array in self.parts.values())

    def placeholder(self, part: str) -> mx.array:
        """What takes the place of the layer's floats in a conversion of `part`."""
        if self.stored.held == "dense" or part not in self.parts:
            return self.stored.dequantize(self.parts)
        array = self.parts[part]
        return array[..., None] if part == OUTPUT_SCALE else array

    def read_slice(self, part: TensorSlice) -> None:
        """Read a slice instead of the whole layer."""
        if self._slice is None:
            self.checks.clear()
            self.parts = self.stored.read(part.axis, part.ranges, self.checks)
            self._slice = part


@dataclass(frozen=True)
class Converted:
    """A converted checkpoint.

    Args:
        tensors: by the model's names.
        unpacked: paths of layers that are floats though MLX has a layout for their format.
    """

    tensors: Tensors
    unpacked: tuple[str, ...] = ()


def convert_quantized(
    model: nn.Module,
    tensors: Tensors,
    layers: Mapping[str, LoadedLayer],
    convert: Callable[[Tensors], Tensors],
    cut: Callable[[str, mx.array, LoadedLayer | None], mx.array],
) -> Converted:
    """Convert a checkpoint's tensors to a model's.

    Args:
        model: not quantized, with the shapes of what the rank holds.
        tensors: all but the quantized layers'.
        layers: by path in the checkpoint.
        convert: mlx-lm's conversion.
        cut: takes the rank's part of a converted tensor, given the layer whose floats or part it
            still is.
    """
    owners: dict[int, tuple[mx.array, LoadedLayer]] = {}

    def run(part: str, kept: Iterable[str]) -> Tensors:
        weights = {}
        for path, layer in layers.items():
            array = layer.placeholder(part if path in kept else "dense")
            weights[f"{path}.weight"] = array
            owners[id(array)] = array, layer  # the array too: an id is reused after it
        return convert(tensors | weights)

    def finish(name: str, array: mx.array) -> mx.array:
        owner = owners.get(id(array))
        return cut(name, array, owner[1] if owner is not None else None)

    dense = run("dense", ())
    packed = _run_parts(layers, run)
    result: Tensors = {}
    unpacked = []
    for name, array in dense.items():
        path, _, leaf = name.rpartition(".")
        words = packed["weight"].get(name) if leaf == "weight" and packed else None
        if words is None or words.dtype != mx.uint32:
            result[name] = finish(name, array)
            continue
        parts = {part: made[name] for part, made in packed.items() if name in made}
        quantized = _finish_parts(model, path, parts, finish)
        if quantized is None:
            unpacked.append(path)
            result[name] = finish(name, array)
        else:
            result |= quantized
    return Converted(result, tuple(unpacked))


def _run_parts(
    layers: Mapping[str, LoadedLayer], run: Callable[[str, Iterable[str]], Tensors]
) -> dict[str, Tensors]:
    """The conversions of each part; of experts alone, or none, where the rest cannot be."""
    kept = {path for path, layer in layers.items() if layer.stored.held != "dense"}
    experts = {path for path in kept if EXPERT_TENSOR.fullmatch(f"{path}.weight")}
    for chosen in (kept, experts):
        parts = [p for p in _PARTS if any(p in layers[path].parts for path in chosen)]
        try:
            return {part: run(part, chosen) for part in parts}
        except Exception:  # a family's own arithmetic, or different formats in a stack
            continue
    return {}


def _finish_parts(
    model: nn.Module, path: str, parts: Tensors, finish: Callable[[str, mx.array], mx.array]
) -> Tensors | None:
    """The parameters of a quantized layer; None: the model has no such layer there."""
    try:
        layer = architecture.get_module(model, path)
    except (AttributeError, KeyError, IndexError):
        return None
    if not hasattr(layer, "to_quantized") or "weight" not in layer:
        return None
    scale = parts.pop(OUTPUT_SCALE, None)
    if scale is not None and scale.shape[-1] == 1:
        if type(layer) not in (nn.Linear, SwitchLinear):
            return None
        parts[OUTPUT_SCALE] = scale[..., 0]
    floats = parts.pop(FLOAT_SCALES, None)
    # Where another layer has this part, it is floats like the others: one for each input.
    inputs = 4 * parts["weight"].shape[-1]
    if floats is not None and inputs in {group * floats.shape[-1] for group in GROUPS}:
        if type(layer) not in (nn.Linear, SwitchLinear):
            return None
        parts = {"weight": parts["weight"], FLOAT_SCALES: floats}
    elif "scales" not in parts:
        return None
    elif parts["scales"].dtype == mx.uint8:
        parts.pop("biases", None)
    elif "biases" not in parts or parts["biases"].shape != parts["scales"].shape:
        return None
    finished = {part: finish(f"{path}.{part}", array) for part, array in parts.items()}
    if FLOAT_SCALES in finished:
        finished["scales"] = finished.pop(FLOAT_SCALES)
    *rows, inputs = layer.weight.shape
    words, scales = finished["weight"], finished["scales"]
    if list(words.shape[:-1]) != rows or list(scales.shape[:-1]) != rows:
        return None
    if inputs % scales.shape[-1] or words.shape[-1] * 32 % inputs:
        return None
    size = words.shape[-1] * 32 // inputs, inputs // scales.shape[-1]
    if scales.dtype == mx.uint8 and size not in _BITS_AND_GROUPS:
        return None
    return {f"{path}.{part}": array for part, array in finished.items()}
