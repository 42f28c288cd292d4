"""Native layers: installed in a loaded model once.

Owns: which layers of an mlx-lm model the kernels can compute, and making them do it.
Does not know: families, ranks, files.
How: a layer keeps its object, attributes and parameters and changes its class for a subclass that
computes natively, so whatever mlx-lm does with it (tied heads, attribute access) still works.
Invariant: a model with native layers computes in float32 throughout; what the kernels do not
support stays as it is and gets float32 inputs. Weights are checked once, here: they must not be
replaced afterwards.
Next: `expert_parallel.NativeExperts`, the experts; `native/primitives/`, what is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import (
    activations,
    deepseek_v41,
    gear,
    gemma4_text,
    kimi_k3,
    step3p5,
    switch_layers,
)

from .. import native
from .fp8_layers import Fp8Linear
from .scaled_layers import OUTPUT_SCALE, ScaledQuantizedLinear
from .stream_caches import dispatching

Activation = tuple[int, float, float]
"""The code of an activation (`Activation` in native/kernels/kernels.h) and its two constants."""


@dataclass(frozen=True)
class Gate:
    """A softmax router.

    Args:
        weights: of its linear layer, as the extension has them.
        k: experts of a token.
        normalized: whether their weights are divided by their sum.
    """

    weights: Any
    k: int
    normalized: bool


def activation_code(experts: nn.Module) -> Activation | None:
    """The activation between an expert's matrices; None: the kernels do not support it."""
    act = experts.activation
    gated: dict[type, Activation] = {
        switch_layers.SwiGLU: (0, 0.0, 0.0),
        gemma4_text.GeGLU: (2, 0.0, 0.0),
    }
    if "fc1" in experts:
        if type(act) is nn.ReLU2:
            return 9, 0.0, 0.0
        kinds = {"precise": 6, "tanh": 6, "none": 7, "fast": 8}
        return (kinds[act._approx], 0.0, 0.0) if type(act) is nn.GELU else None
    if type(act) in gated:
        return gated[type(act)]
    if type(act) is activations.SwigluOAI:
        return 1, float(act._alpha), float(act._limit)
    if type(act) is deepseek_v41.DeepseekV41SwiGLU:
        return (3, float(act.limit), 0.0) if act.limit > 0 else (0, 0.0, 0.0)
    if type(act) is step3p5.ClampedSwiGLU:
        return 4, float(act.limit), 0.0
    if type(act) is kimi_k3.SiTU:
        return 5, float(act.beta), float(act.linear_beta or 0.0)
    return None


def native_weights(layer: nn.Module) -> Any | None:
    """A linear layer's matrices, or a stack of them, for the kernels; None: unsupported.

    Strided weights and biases that are not float32 are replaced in the layer, not kept twice. Where
    the kernels keep a packed copy, the layer's arrays become lazy arrays that unpack it.
    """
    weights = getattr(layer, "_weights", None)
    if weights is not None:
        return weights
    for name in ("weight", "scales", "biases"):
        if layer.get(name) is not None:
            layer[name] = mx.contiguous(layer[name])
    for name in ("bias", OUTPUT_SCALE):
        if name in layer:
            layer[name] = mx.contiguous(layer[name].astype(mx.float32))
    if layer.get("global_scale") is not None:  # MLX's own: for GPUs only
        return None
    try:
        weights = native.extension().Weights(
            layer.weight,
            layer.get("scales"),
            layer.get("biases"),
            layer.get("bias"),
            bits=getattr(layer, "bits", 0),
            group_size=getattr(layer, "group_size", 0),
            mode=getattr(layer, "mode", ""),
            output_scale=layer.get(OUTPUT_SCALE),
        )
    except ValueError:  # a format without kernels, or a NaN in it
        return None
    for name, array in zip(("weight", "scales", "biases"), weights.arrays(), strict=False):
        layer[name] = array
    layer._weights = weights  # not an array, so `parameters` does not list it
    return weights


class NativeLinear(nn.Linear):
    """`nn.Linear` by the native kernels. x [..., in] -> float32 [..., out]."""

    def __call__(self, x: mx.array) -> mx.array:
        """See `nn.Linear`."""
        return self._linear(x, self._weights)


class NativeQuantizedLinear(nn.QuantizedLinear):
    """`nn.QuantizedLinear` by the native kernels. x [..., in] -> float32 [..., out]."""

    def __call__(self, x: mx.array) -> mx.array:
        """See `nn.QuantizedLinear`."""
        return self._linear(x, self._weights)


class NativeEmbedding(nn.Embedding):
    """`nn.Embedding` that gives float32, and is a linear layer by the native kernels."""

    def __call__(self, x: mx.array) -> mx.array:
        """ids [...] -> float32 [..., width]."""
        return self._embed(x, self._weights)

    def as_linear(self, x: mx.array) -> mx.array:
        """See `nn.Embedding`."""
        return self._linear(x, self._weights)


class NativeQuantizedEmbedding(nn.QuantizedEmbedding):
    """`nn.QuantizedEmbedding` that gives float32, and is a linear layer by the native kernels."""

    def __call__(self, x: mx.array) -> mx.array:
        """ids [...] -> float32 [..., width]."""
        return self._embed(x, self._weights)

    def as_linear(self, x: mx.array) -> mx.array:
        """See `nn.QuantizedEmbedding`."""
        return self._linear(x, self._weights)


_NATIVE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: NativeLinear,
    nn.QuantizedLinear: NativeQuantizedLinear,
    ScaledQuantizedLinear: NativeQuantizedLinear,
    Fp8Linear: NativeQuantizedLinear,
    nn.Embedding: NativeEmbedding,
    nn.QuantizedEmbedding: NativeQuantizedEmbedding,
}
LINEARS = (NativeLinear, NativeQuantizedLinear)
_STACKED = (switch_layers.SwitchLinear, switch_layers.QuantizedSwitchLinear)


def is_supported() -> bool:
    """Whether native layers can be used: the extension is available and MLX runs on the CPU."""
    return native.is_available() and mx.default_device().type == mx.DeviceType.cpu


_OPERATIONS = {
    "rms_norm": mx.fast,
    "layer_norm": mx.fast,
    "rope": mx.fast,
    "scaled_dot_product_attention": mx.fast,
    "logsumexp": mx,
}
_SOFTCAP = gear._softcap_attention
_MLX = {name: getattr(module, name) for name, module in _OPERATIONS.items()}


def install_operations(use_native: bool) -> None:
    """Set norms, rotary positions, attention and logsumexp of this process: native, or MLX's own.

    mlx-lm's families all call them as functions of `mx.fast`, so that is where they are replaced;
    the native ones have the same arguments and pass on to MLX what they do not support. MLX's CPU
    backend has no kernels for these: it composes them of small operations, three quarters of a
    token's graph. Its logsumexp, which mlx-lm applies to all logits, is not vectorized.
    """
    for name, module in _OPERATIONS.items():
        setattr(module, name, getattr(native.extension(), name) if use_native else _MLX[name])
    if use_native:
        mx.fast.scaled_dot_product_attention = dispatching(mx.fast.scaled_dot_product_attention)
    gear._softcap_attention = native.extension().attend_capped if use_native else _SOFTCAP


def install_native_layers(
    model: nn.Module,
    keep: tuple[type[nn.Module], ...] = (),
    read: Callable[[nn.Module], None] = lambda _: None,
) -> None:
    """Make a loaded model compute natively where it can, in place; experts are left alone.

    Args:
        keep: layers that stay as they are, whatever their types.
        read: called with each layer before its weights are used.
    """
    extension = native.extension()
    installed: set[int] = set()
    for _, layer in model.named_modules():
        kind = _NATIVE.get(type(layer))
        if kind is None or id(layer) in installed:
            continue
        read(layer)
        if native_weights(layer) is None:
            continue
        layer._linear, layer._embed = extension.linear, extension.embed
        layer.__class__ = kind
        installed.add(id(layer))
    extension.trim()
    for _, layer in model.named_modules():
        if id(layer) not in installed and not isinstance(layer, (*_STACKED, *keep)):
            _to_float32(layer)


def _to_float32(layer: nn.Module) -> None:
    """Convert what stays on plain MLX: MLX is ten times slower on mixed types."""
    for name, value in list(layer.items()):
        if isinstance(value, mx.array) and value.dtype in (mx.bfloat16, mx.float16):
            layer[name] = value.astype(mx.float32)
            mx.eval(layer[name])
