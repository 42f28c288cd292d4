"""Native blocks: whole attention modules and MoE blocks as one graph node each.

Owns: which of mlx-lm's classes compute exactly attention with plain rotary positions, a block
with a softmax router, or a layer of both, and computing these with the native extension.
Does not know: ranks, plans, how kernels work.
Why: a token of a small model is hundreds of operations of a few microseconds, and MLX's overhead
per operation is as long: some forty per layer become fourteen, and two where streams have caches
of their own: then a layer's norms and additions are part of its attention and of its block.
Invariant: as with `native_layers`, an object keeps its attributes and parameters and changes its
class. A class is listed here if its code is that of its neighbors, line by line; an object with an
unusual part is left alone.
Next: `native/primitives/qkv.cpp`, `streams.cpp` and `experts.cpp`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import (
    Klear,
    dots1,
    ernie4_5_moe,
    granitemoe,
    jamba,
    llama,
    mellum,
    mixtral,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from mlx_lm.models.base import scaled_dot_product_attention

from .. import native
from .architecture import StackedDbrx
from .native_layers import LINEARS, Gate
from .stream_caches import StreamCaches

# Attention: q, k and v projections, a norm of each head or none, rotary positions, the cache,
# softmax(q k^T) v, the output projection.
_ATTENTION: tuple[type[nn.Module], ...] = (
    Klear.KlearAttention,
    dots1.Dots1Attention,
    ernie4_5_moe.Attention,
    granitemoe.GraniteMoeAttention,
    mellum.Attention,
    mixtral.MixtralAttention,
    phimoe.Attention,
    qwen2_moe.Attention,
    qwen3_moe.Attention,
    llama.Attention,  # these three in draft models
    qwen2.Attention,
    qwen3.Attention,
)

# Blocks that are nothing but the weighted sum of the k experts with the largest router softmax:
# names of the router and of k, and whether the weights are divided by their sum (or the attribute
# that says so).
_BLOCKS: dict[type[nn.Module], tuple[str, str, str | bool]] = {
    StackedDbrx: ("router", "top_k", True),
    jamba.JambaSparseMoeBlock: ("router", "num_experts_per_tok", False),  # see zoo_repairs.py
    mixtral.MixtralSparseMoeBlock: ("gate", "num_experts_per_tok", True),
    qwen3_moe.Qwen3MoeSparseMoeBlock: ("gate", "top_k", "norm_topk_prob"),
}

# Layers of h = x + attention(norm(x)) and h + block(norm(h)): the name of the block.
_LAYERS: dict[type[nn.Module], str] = {
    Klear.KlearDecoderLayer: "mlp",
    dots1.Dots1DecoderLayer: "mlp",
    ernie4_5_moe.Ernie4_5_DecoderLayer: "mlp",
    mellum.MellumDecoderLayer: "mlp",
    mixtral.MixtralDecoderLayer: "block_sparse_moe",
    qwen2_moe.Qwen2MoeDecoderLayer: "mlp",
    qwen3_moe.Qwen3MoeDecoderLayer: "mlp",
}


class NativeAttention(nn.Module):
    """Attention with plain rotary positions. x [batch, length, width] -> the same."""

    _kv_dtype: mx.Dtype | None = None  # see kv_dtype.py

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """As mlx-lm's."""
        dtype = self._kv_dtype
        if isinstance(cache, StreamCaches):
            out = cache.attend_next(self._attend_streams, x, dtype or mx.float32)
            if out is not None:
                return out if self._has_output else self.o_proj(out)
        if cache is None:
            queries, keys, values = self._qkv(x, offset=0)
        else:
            queries, keys, values = self._qkv(x, offset=cache.offset)
            if dtype is not None:
                keys, values = keys.astype(dtype), values.astype(dtype)
            keys, values = cache.update_and_fetch(keys, values)
            if isinstance(cache, StreamCaches):
                out = cache.attend(
                    queries, lambda q, k, v, mask: self._attend(q, k, v, self.scale, mask)
                )
                return self.o_proj(out)
            if hasattr(cache, "bits"):
                out = scaled_dot_product_attention(queries, keys, values, cache, self.scale, mask)
                return self.o_proj(out.swapaxes(1, 2).flatten(2))
        return self.o_proj(self._attend(queries, keys, values, self.scale, mask))

    def add_next(self, x: mx.array, cache: StreamCaches) -> mx.array | None:
        """x + the attention of its norm, for one new token of each stream, x [streams, 1, width].

        Returns:
            None: some stream needs more than one node does, and nothing was done.
        """
        out = cache.attend_next(self._add_streams, x, self._kv_dtype or mx.float32)
        return out if out is None or self._has_output else x + self.o_proj(out)


class NativeLayer(nn.Module):
    """A layer whose norms and additions are part of its native blocks. x [batch, length, width] ->
    the same."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """As mlx-lm's."""
        h = None
        if self._has_attention and isinstance(cache, StreamCaches):
            h = self.self_attn.add_next(x, cache)
        if h is None:
            h = x + self.self_attn(self.input_layernorm(x), mask, cache)
        block, norm = self[self._block], self.post_attention_layernorm
        return block.add_to(h, norm) if self._has_block else h + block(norm(h))


class NativeBlock(nn.Module):
    """A softmax router and the weighted sum of its experts. x [..., width] -> the same."""

    def __call__(self, x: mx.array) -> mx.array:
        """As mlx-lm's."""
        if self._gate is not None:
            return self.switch_mlp.routed(x, self._gate)
        ids, weights = self._route(self[self._router](x))
        return self.switch_mlp.weighted(x, ids, weights)

    @property
    def has_gate(self) -> bool:
        """Whether the router is native too, and so part of the node."""
        return self._gate is not None

    def of_norm(self, x: mx.array, norm: nn.RMSNorm, *, add: bool) -> mx.array:
        """The same of norm(x), or x + that; only where `has_gate`."""
        return self.switch_mlp.routed(x, self._gate, norm, add=add)


def install_native_blocks(model: nn.Module) -> None:
    """Install native blocks in a model, in place, after `install_native_layers`."""
    extension = native.extension()
    layers = [layer for _, layer in model.named_modules() if type(layer) in _LAYERS]
    for _, layer in model.named_modules():
        if type(layer) in _ATTENTION and (settings := _qkv_settings(layer)) is not None:
            # Partials, because mlx would take a list or a dictionary for parameters.
            layer._qkv, layer._attend = partial(extension.qkv, **settings), extension.attend
            layer._has_output = isinstance(layer.o_proj, LINEARS)
            layer._make_streams = partial(
                extension.StreamAttention,
                **settings,
                attention_scale=layer.scale,
                output=layer.o_proj._weights if layer._has_output else None,
            )
            layer._attend_streams = layer._make_streams()
            layer.__class__ = NativeAttention
        elif type(layer) in _BLOCKS and hasattr(layer.switch_mlp, "weighted"):
            layer._router, top_k, by_sum = _BLOCKS[type(layer)]
            normalized = getattr(layer, by_sum) if isinstance(by_sum, str) else by_sum
            routing = getattr(layer, top_k), bool(normalized)
            layer._route, layer._gate = partial(_route, *routing), None
            if isinstance(layer[layer._router], LINEARS):
                layer._gate = Gate(layer[layer._router]._weights, *routing)
            layer.__class__ = NativeBlock
    for layer in layers:
        _install_layer(layer)


def _install_layer(layer: nn.Module) -> None:
    """Have a layer's native parts do its norms and additions, if it has such."""
    norms, attention = (layer.input_layernorm, layer.post_attention_layernorm), layer.self_attn
    if any(type(norm) is not nn.RMSNorm for norm in norms):
        return
    layer._block = _LAYERS[type(layer)]
    layer._has_block = getattr(layer[layer._block], "can_add", False)
    layer._has_attention = type(attention) is NativeAttention
    if layer._has_attention:
        attention._add_streams = attention._make_streams(
            input_norm=norms[0].weight, input_eps=norms[0].eps, add=attention._has_output
        )
    layer.__class__ = NativeLayer


def _route(k: int, normalized: bool, scores: mx.array) -> Any:
    return native.extension().route(scores, k, normalized)


def _qkv_settings(layer: nn.Module) -> dict[str, Any] | None:
    """The arguments of `qkv` for an attention module; None: it has an unusual part."""
    projections = [layer[n] for n in ("q_proj", "k_proj", "v_proj")]
    rope = layer.rope
    if type(rope) is not nn.RoPE or not all(isinstance(p, LINEARS) for p in projections):
        return None
    norms = [layer.get("q_norm"), layer.get("k_norm")]
    if any(n is not None and type(n) is not nn.RMSNorm for n in norms):
        return None
    heads = next(
        getattr(layer, n)
        for n in ("n_heads", "num_heads", "num_attention_heads")
        if hasattr(layer, n)
    )
    q, k, v = (p._weights for p in projections)
    width = projections[0].weight.shape[0] // heads
    return {
        "q": q,
        "k": k,
        "v": v,
        "width": width,
        "q_norm": norms[0] and norms[0].weight,
        "k_norm": norms[1] and norms[1].weight,
        "q_eps": norms[0].eps if norms[0] else 0.0,
        "k_eps": norms[1].eps if norms[1] else 0.0,
        "dims": rope.dims,
        "traditional": rope.traditional,
        "base": rope.base,
        "scale": rope.scale,
    }
