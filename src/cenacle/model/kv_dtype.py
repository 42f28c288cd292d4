"""KV caches of 16 bits beside native layers, which compute in float32.

Owns: which data type keys and values are kept in, which attention modules can read it, and making
these round what they hand to their caches. Caches stay mlx-lm's own, so they are batched, cut and
written as always.
Does not know: requests, quantized caches.
Invariant: only attention that gives a cache's keys and values to the native kernel as they are is
changed (a probe finds it): whatever else computes with them (latent attention) keeps float32.
Next: `native/ops/ops.inc.h`, which reads them; `expert_parallel.parallelize` comes before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from .native_blocks import NativeAttention

_PROBED = (KVCache, RotatingKVCache)


def install_kv_dtype(model: nn.Module, dtype: str) -> int:
    """Make a model with native layers keep keys and values in a data type, in place.

    Args:
        model: loaded, with native layers.
        dtype: "float32", "float16" or "bfloat16".

    Returns:
        The number of attention modules that do; 0 for float32.
    """
    if dtype == "float32":
        return 0
    modules = find_plain_attention(model)
    for module in modules:
        module._kv_dtype = getattr(mx, dtype)
        if not isinstance(module, NativeAttention):
            module.__class__ = _rounding(type(module))
    return len(modules)


def find_plain_attention(model: nn.Module) -> list[nn.Module]:
    """The modules that only attend to what is in their caches.

    The model is called twice, lazily: nothing is computed. A module counts if each time its cache
    is mlx-lm's plain or rotating one, and what the cache returns goes to attention.
    Meanwhile attention is another function in this process: models in other threads must wait.
    """
    found = {id(m): m for _, m in model.named_modules() if isinstance(m, NativeAttention)}
    caches = make_prompt_cache(model)
    if not any(type(c) in _PROBED for c in caches):
        return list(found.values())
    other: dict[int, nn.Module] = {}
    for length in (2, 1):
        probes = [_Probe(c) if type(c) in _PROBED else c for c in caches]
        with _recorded_attention() as attended:
            model(mx.zeros((1, length), dtype=mx.int32), cache=probes)
        for probe in probes:
            if isinstance(probe, _Probe) and probe.owner is not None:
                if all(id(a) in attended for a in probe.returned):
                    other[id(probe.owner)] = probe.owner
                else:
                    other.pop(id(probe.owner), None)
    return [*(found | other).values()]


@contextmanager
def _recorded_attention() -> Iterator[dict[int, mx.array]]:
    """Keys and values that attention was called with, by their identity."""
    attended: dict[int, mx.array] = {}
    attend = mx.fast.scaled_dot_product_attention

    def record(q: mx.array, k: mx.array, v: mx.array, **keywords: Any) -> mx.array:
        attended.update({id(k): k, id(v): v})
        return attend(q, k, v, **keywords)

    mx.fast.scaled_dot_product_attention = record
    try:
        yield attended
    finally:
        mx.fast.scaled_dot_product_attention = attend


class _Delegate:
    """Stands for a cache."""

    def __init__(self, cache: Any) -> None:
        self.__dict__["_cache"] = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._cache, name, value)


class _Probe(_Delegate):
    """Notes who uses a cache, and what it returned."""

    def __init__(self, cache: Any) -> None:
        super().__init__(cache)
        self.__dict__.update(owner=None, returned=())

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        owner = sys._getframe(1).f_locals.get("self")
        returned = self._cache.update_and_fetch(keys, values)
        self.__dict__.update(owner=owner if isinstance(owner, nn.Module) else None)
        self.__dict__.update(returned=returned)
        return returned


class _Rounded(_Delegate):
    """Rounds what a cache is given."""

    def __init__(self, cache: Any, dtype: mx.Dtype) -> None:
        super().__init__(cache)
        self.__dict__["_dtype"] = dtype

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        return self._cache.update_and_fetch(keys.astype(self._dtype), values.astype(self._dtype))


@cache
def _rounding(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of attention whose caches keep its `_kv_dtype`."""

    def call(self: Any, *args: Any, **keywords: Any) -> Any:
        def wrap(value: Any) -> Any:
            return _Rounded(value, self._kv_dtype) if hasattr(value, "update_and_fetch") else value

        return kind.__call__(
            self, *map(wrap, args), **{name: wrap(value) for name, value in keywords.items()}
        )

    return type(kind.__name__, (kind,), {"__call__": call})
