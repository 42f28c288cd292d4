"""Quantized layers whose rows have a scale of their own, beside the scales of groups.

Owns: the layers that NVFP4 checkpoints need. MLX's own scale of a whole tensor works on GPUs only,
and for experts only.
Does not know: checkpoints, ranks.
Invariant: `output_scale` [..., out] multiplies what the quantized matrix makes; a bias comes after.
Next: `loader.py`, which installs them.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from . import architecture
from .families import OUTPUT_SCALE


class ScaledQuantizedLinear(nn.QuantizedLinear):
    """`nn.QuantizedLinear` with a scale per row. x [..., in] -> [..., out]."""

    def __call__(self, x: mx.array) -> mx.array:
        """See `nn.QuantizedLinear`."""
        y = mx.quantized_matmul(
            x,
            self["weight"],
            scales=self["scales"],
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        y = (y * self[OUTPUT_SCALE]).astype(x.dtype)
        return y + self["bias"] if "bias" in self else y


class ScaledQuantizedSwitchLinear(QuantizedSwitchLinear):
    """mlx-lm's `QuantizedSwitchLinear` with a scale per row of each expert."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x [..., 1, in], indices [...] -> [..., 1, out]."""
        y = mx.gather_qmm(
            x,
            self["weight"],
            self["scales"],
            rhs_indices=indices,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=sorted_indices,
        )
        y = (y * mx.expand_dims(self[OUTPUT_SCALE][indices], -2)).astype(x.dtype)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


SCALED: dict[type[nn.Module], type[nn.Module]] = {
    nn.QuantizedLinear: ScaledQuantizedLinear,
    QuantizedSwitchLinear: ScaledQuantizedSwitchLinear,
}


def install_output_scales(model: nn.Module, parameters: Iterable[tuple[str, mx.array]]) -> None:
    """Make the layers that `parameters` name an `output_scale` of take it, in place."""
    for name, array in parameters:
        path, _, leaf = name.rpartition(".")
        if leaf == OUTPUT_SCALE:
            layer = architecture.get_module(model, path)
            layer[OUTPUT_SCALE] = array
            layer.__class__ = SCALED[type(layer)]
