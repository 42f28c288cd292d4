"""Layers whose weights are e4m3 with a float for each group, which MLX has no layout for.

Owns: what block-FP8 checkpoints need to stay 8 bits in memory: the layers, and `widen`.
Does not know: checkpoints, ranks.
How: the native kernels compute with the codes (their mode "fp8"). Plain MLX widens a matrix for
each use, and of experts those that were chosen.
Invariant: "weight" is uint32 [..., out, in / 4], four codes a word, "scales" floats
[..., out, in / group_size]; there are no biases.
Next: `loader.py`, which installs them.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from . import architecture

MODE = "fp8"
GROUPS = (128, 64, 32)
"""Sizes of groups that the kernels have, the largest first."""


def widen(words: mx.array, scales: mx.array, dtype: mx.Dtype) -> mx.array:
    """Codes in words [..., out, in / 4] times their groups' scales, as floats [..., out, in]."""
    values = mx.from_fp8(words.view(mx.uint8), mx.float32)
    grouped = values.reshape(*scales.shape, -1) * scales.astype(mx.float32)[..., None]
    return grouped.reshape(values.shape).astype(dtype)


class Fp8Linear(nn.QuantizedLinear):
    """A linear layer. x [..., in] -> [..., out]."""

    def __call__(self, x: mx.array) -> mx.array:
        """See `nn.Linear`."""
        y = x @ widen(self["weight"], self["scales"], x.dtype).T
        return y + self["bias"] if "bias" in self else y


class Fp8SwitchLinear(QuantizedSwitchLinear):
    """A stack of them, one for each expert. x [..., 1, in], ids [...] -> [..., 1, out]."""

    def __call__(self, x: mx.array, ids: mx.array, sorted_indices: bool = False) -> mx.array:  # noqa: ARG002
        """As mlx-lm's; the order of the ids makes no difference here."""
        chosen = np.asarray(ids)
        x = mx.broadcast_to(x, (*chosen.shape, *x.shape[-2:])).reshape(-1, x.shape[-1])
        out = mx.zeros((x.shape[0], self["weight"].shape[1]), x.dtype)
        for expert in map(int, np.unique(chosen)):
            rows = mx.array(np.flatnonzero(chosen == expert))
            weight = widen(self["weight"][expert], self["scales"][expert], x.dtype)
            y = x[rows] @ weight.T
            out[rows] = y + self["bias"][expert] if "bias" in self else y
        return out.reshape(*chosen.shape, 1, -1)


_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.QuantizedLinear: Fp8Linear,
    QuantizedSwitchLinear: Fp8SwitchLinear,
}


def install_fp8_layers(model: nn.Module, parameters: Iterable[tuple[str, mx.array]]) -> None:
    """Make the layers whose `parameters` are of this layout compute with it, in place.

    mlx-lm takes them for affine layers, but for the biases that they lack.
    """
    types = {name: array.dtype for name, array in parameters}
    for name, dtype in types.items():
        path, _, leaf = name.rpartition(".")
        if leaf != "scales" or dtype == mx.uint8 or f"{path}.biases" in types:
            continue
        layer = architecture.get_module(model, path)
        if (kind := _LAYERS.get(type(layer))) is not None and layer.bits == 8:
            layer.pop("biases", None)
            layer.mode = MODE
            layer.__class__ = kind
