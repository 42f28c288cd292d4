"""What a user should know of the formats that a rank holds its weights in.

Owns: the sentences.
Does not know: how formats are read or computed.
Next: `ranks/worker.py` reports them at the start.
"""

from __future__ import annotations

from collections import Counter

import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from .fp8_layers import MODE
from .gguf_checkpoint import GgufIndex
from .quantized_layers import QuantizedLayers

_QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)


def describe_formats(
    model: nn.Module,
    stored: QuantizedLayers,
    gguf: GgufIndex | None = None,
    *,
    uses_native_kernels: bool,
) -> list[str]:
    """Sentences about weights that are rounded, or that take more memory or time than they need.

    Args:
        model: loaded, and native where the kernels can compute it.
        stored: the quantized layers of the checkpoint.
        gguf: of a GGUF model.
        uses_native_kernels: whether plain MLX is the exception.
    """
    notices = []
    rounded = Counter(
        (layer.kind, layer.dtype, layer.error) for layer in stored.layers.values() if layer.error
    )
    for (kind, dtype, error), count in rounded.items():
        notices.append(
            f"{count} matrices of the checkpoint ({kind}) are held as "
            f"{str(dtype).removeprefix('mlx.core.')}, which rounds each weight by at most "
            f"{100 * error:.2g} %"
        )
    if blocks := sum(layer.held == MODE for layer in stored.layers.values()):
        notices.append(
            f"{blocks} matrices of the checkpoint (block fp8) stay 8 bits in memory, exactly"
            + ("" if uses_native_kernels else "; plain MLX widens each of them whenever it is used")
        )
    rounded_types = gguf.count_rounded() if gguf is not None else {}
    for kind, count in rounded_types.items():
        notices.append(
            f"{count} tensors of the GGUF file ({kind}) are held as 8 bits in groups of 32, which "
            f"rounds each weight by at most 1/510 of its group's range"
        )
    if unpacked := getattr(model, "unpacked", ()):
        notices.append(
            f"{len(unpacked)} quantized layers are held as floats, because this family's "
            f"conversion changes their columns: {unpacked[0]}, ..."
        )
    if uses_native_kernels:
        plain = Counter(
            f"{getattr(layer, 'mode', 'affine')}, {layer.bits} bits"
            for _, layer in model.named_modules()
            if isinstance(layer, _QUANTIZED) and getattr(layer, "_weights", None) is None
        )
        for form, count in plain.items():
            notices.append(
                f"{count} quantized layers ({form}) have no native kernels: they run on plain MLX, "
                f"which takes 18 to 150 times as long on a CPU"
            )
    return notices
