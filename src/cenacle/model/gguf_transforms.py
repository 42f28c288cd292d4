"""Tensors that llama.cpp's convert script rearranged, as mlx-lm's modules have them.

Owns: the way back, one function for each kind of rearrangement.
Does not know: GGUF's names, files, ranks.
Invariant: everything is lazy, and weights stay those of the file. What is quantized stays so where
whole rows, or whole groups of columns, move; only matrices that were transposed become floats.
Next: `gguf_families.py` says which tensors need which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import mlx.core as mx
import numpy as np

from ..core.model_config import Config
from ..gguf.blocks import GROUP

Array = TypeVar("Array", mx.array, np.ndarray)

Parts = dict[str, mx.array]
"""A tensor: "weight" alone, or a quantized one's "weight", "scales" and, if affine, "biases"."""

Transform = Callable[[Mapping[str, Parts], Config], Parts]
"""Called with a module's tensors by their last names, and the config of the language model.

Returns the module's parameters, by their names below the module's path.
"""


def restore_row_order(array: Array, heads: int) -> Array:
    """llama.cpp's order of a head's rows, pairs that rotate together, as the Hub's, two halves."""
    rows = len(array) // heads
    return array.reshape(heads, rows // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)


def split_pairs(heads_key: str) -> Transform:
    """A projection to heads: `restore_row_order`.

    Args:
        heads_key: of the config, where it has the number of heads.
    """

    def transform(sources: Mapping[str, Parts], config: Config) -> Parts:
        heads = config[heads_key]
        return name_parts(
            {leaf: _map(parts, restore_row_order, heads) for leaf, parts in sources.items()}
        )

    return transform


def name_parts(sources: Mapping[str, Parts]) -> Parts:
    """Parameters of a module whose tensors are as they were: "weight", "scales", "bias", ..."""
    named: Parts = {}
    for leaf, parts in sources.items():
        named |= parts if leaf == "weight" else {leaf: parts["weight"]}
    return named


def _map(parts: Parts, function: Callable[..., mx.array], *arguments: int) -> Parts:
    return {name: function(array, *arguments) for name, array in parts.items()}


def to_floats(parts: Parts) -> mx.array:
    """A tensor's weights, as floats."""
    if "scales" not in parts:
        return parts["weight"]
    mode = "affine" if "biases" in parts else "mxfp4"
    floats = mx.dequantize(
        parts["weight"],
        parts["scales"],
        parts.get("biases"),
        group_size=GROUP,
        bits=_bits(parts),
        mode=mode,
    )
    return floats.astype(mx.float32)


def _bits(parts: Parts) -> int:
    """Of a weight of a quantized tensor: a group of 32 has as many words."""
    return int(parts["weight"].shape[-1] // parts["scales"].shape[-1])


def _in_one_form(tensors: tuple[Parts, ...]) -> tuple[Parts, ...]:
    """Tensors that shall become one, all in the form of one of them that holds them exactly."""
    if len({(len(t), _bits(t) if "scales" in t else t["weight"].dtype) for t in tensors}) == 1:
        return tensors
    if all("biases" in parts for parts in tensors):
        return tuple(_widen(parts) for parts in tensors)
    return tuple({"weight": to_floats(parts).astype(mx.float32)} for parts in tensors)


def _widen(parts: Parts) -> Parts:
    """Affine weights as 8 bits each, with the same scales and biases: the same values."""
    bits, words = _bits(parts), parts["weight"]
    if bits == 8:
        return parts
    lead = words.shape[:-1]
    octets = words.view(mx.uint8).reshape(*lead, -1, bits).astype(mx.uint64)  # eight weights each
    stream = (octets << (8 * mx.arange(bits, dtype=mx.uint64))).sum(-1, keepdims=True)
    weights = (stream >> (bits * mx.arange(8, dtype=mx.uint64))) & (2**bits - 1)
    return parts | {"weight": weights.astype(mx.uint8).reshape(*lead, -1).view(mx.uint32)}


def join_latent_projection(sources: Mapping[str, Parts], _config: Config) -> Parts:
    """DeepSeek's projection of latents to heads, of which the file has two halves.

    k_b is [heads, latents, features], transposed; v_b is [heads, features, latents].
    """
    if "weight" in sources:  # as the Hub has it
        return name_parts(sources)
    keys, values = to_floats(sources["k_b"]).swapaxes(1, 2), to_floats(sources["v_b"])
    joined = mx.concatenate([keys, values.astype(keys.dtype)], axis=1)
    return {"weight": joined.reshape(-1, joined.shape[-1])}


def split_latent_projection(sources: Mapping[str, Parts], config: Config) -> Parts:
    """The two halves of DeepSeek's projection of latents to heads, of which the file has one.

    Values keep the file's form; keys are transposed and therefore floats.
    """
    heads, features = config["num_attention_heads"], config["qk_nope_head_dim"]
    parts = {n: a.reshape(heads, -1, a.shape[-1]) for n, a in sources["kv_b"].items()}
    keys = {name: array[:, :features] for name, array in parts.items()}
    values = {name: array[:, features:] for name, array in parts.items()}
    return {
        "embed_q.weight": to_floats(keys).swapaxes(1, 2),
        **{f"unembed_out.{name}": array for name, array in values.items()},
    }


def join_by_key_head(sources: Mapping[str, Parts], config: Config) -> Parts:
    """Qwen3-Next's projection to queries, keys, values and gates, of which the file has two.

    The file's rows are all queries, all keys, all values, and all gates; the module's are those of
    one key head after another.
    """
    if "weight" in sources:  # older files have it as the Hub does
        return name_parts(sources)
    heads = config["linear_num_key_heads"]
    key_width = heads * config["linear_key_head_dim"]
    mixed, gates = _in_one_form((sources["qkv"], sources["z"]))
    joined = {}
    for name, array in mixed.items():
        rows = (array[:key_width], array[key_width : 2 * key_width], array[2 * key_width :])
        by_head = [a.reshape(heads, -1, array.shape[-1]) for a in (*rows, gates[name])]
        joined[name] = mx.concatenate(by_head, axis=1).reshape(-1, array.shape[-1])
    return joined


def _restore_value_heads(array: mx.array, config: Config) -> mx.array:
    """Rows of value heads, every key head's first one before every second, by key head again."""
    key_heads, value_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    width = len(array) // value_heads
    tiled = array.reshape(value_heads // key_heads, key_heads, width, -1)
    return tiled.swapaxes(0, 1).reshape(array.shape)


def restore_value_rows(sources: Mapping[str, Parts], config: Config) -> Parts:
    """Qwen3.5's projections to value heads, and vectors with an entry for each."""
    return name_parts(
        {
            leaf: {name: _restore_value_heads(array, config) for name, array in parts.items()}
            for leaf, parts in sources.items()
        }
    )


def restore_value_tail(sources: Mapping[str, Parts], config: Config) -> Parts:
    """Qwen3.5's projection to queries, keys and values: only rows of values were moved."""
    start = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    return {
        name: mx.concatenate([array[:start], _restore_value_heads(array[start:], config)])
        for name, array in sources["weight"].items()
    }


def restore_value_columns(sources: Mapping[str, Parts], config: Config) -> Parts:
    """Qwen3.5's projection from value heads: its columns were moved, by heads."""
    key_heads, value_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    parts = sources["weight"]
    if any(array.shape[-1] % value_heads for array in parts.values()):
        parts = {"weight": to_floats(parts)}  # a group of columns has those of several heads

    def restore(array: mx.array) -> mx.array:
        tiled = array.reshape(len(array), value_heads // key_heads, key_heads, -1)
        return tiled.swapaxes(1, 2).reshape(array.shape)

    return {name: restore(array) for name, array in parts.items()}


def convolution_weight(sources: Mapping[str, Parts], _config: Config) -> Parts:
    """[channels, kernel] -> [channels, kernel, 1]."""
    return {"weight": sources["weight"]["weight"][..., None]}


def convolution_weight_by_value_head(sources: Mapping[str, Parts], config: Config) -> Parts:
    """As `convolution_weight`, with channels as `restore_value_tail` has rows."""
    return convolution_weight({"weight": restore_value_tail(sources, config)}, config)


def decay_logarithm(sources: Mapping[str, Parts], _config: Config) -> Parts:
    """-exp(A_log) -> A_log."""
    return {"A_log": mx.log(-sources["A_log"]["weight"].astype(mx.float32))}


def decay_logarithm_by_value_head(sources: Mapping[str, Parts], config: Config) -> Parts:
    """As `decay_logarithm`, with heads as `restore_value_rows` has them."""
    restored = restore_value_rows({"A_log": sources["A_log"]}, config)
    return decay_logarithm({"A_log": {"weight": restored["A_log"]}}, config)
