"""Which models can have `StreamCaches`: those whose every layer only attends to what it keeps.

Owns: finding that out, and marking the model.
Does not know: how such caches work.
Invariant: a model that is not marked keeps mlx-lm's batch caches.
Next: `stream_caches.py`; `kv_dtype.find_plain_attention` is the same probe as for 16-bit caches.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from .kv_dtype import find_plain_attention

_INSTALLED = "_has_stream_caches"


def install_stream_caches(model: nn.Module) -> bool:
    """Have a model's streams keep caches of their own, if it can. The model has native layers,
    and `install_kv_dtype` comes after, whose classes hide caches from the probe.

    Returns:
        Whether it can.
    """
    can = can_have_stream_caches(model)
    set_stream_caches(model, on=can)
    return can


def can_have_stream_caches(model: nn.Module) -> bool:
    """See the module; the model is called, lazily, as by `find_plain_attention`.

    Not where layers attend to what another layer's cache returned (gemma4): these arrays stand for
    the caches in one call of attention alone.
    """
    caches = make_prompt_cache(model)
    return (
        {type(cache) for cache in caches} <= {KVCache, RotatingKVCache}
        and len(caches) == len(model.layers)
        and len(find_plain_attention(model)) == len(caches)
        and _has_plain_masks(model)
    )


def set_stream_caches(model: nn.Module, *, on: bool) -> None:
    """Mark a model."""
    object.__setattr__(model, _INSTALLED, on)


def has_stream_caches(model: nn.Module) -> bool:
    """Whether they were installed."""
    return getattr(model, _INSTALLED, False)


class _MaskProbe:
    """Notes what masks are made of a cache."""

    def __init__(self, cache: Any) -> None:
        self.__dict__.update(cache=cache, is_plain=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)

    def make_mask(self, *args: Any, **keywords: Any) -> Any:
        """See `KVCache`."""
        has_window = keywords.get("window_size") is not None
        if keywords.get("return_array") or (has_window and type(self.cache) is KVCache):
            self.__dict__["is_plain"] = False
        return self.cache.make_mask(*args, **keywords)


def _has_plain_masks(model: nn.Module) -> bool:
    """Whether every mask is causal, or its cache's own window."""
    probes = [_MaskProbe(cache) for cache in make_prompt_cache(model)]
    model(mx.zeros((1, 2), dtype=mx.int32), cache=probes)
    return all(probe.is_plain for probe in probes)
