"""Caches of keys, values and states: what they take.

Owns: `footprint`, the bytes of a model's caches by length.
Does not know: requests, steps, ranks.
Invariant: nothing here is computed by the model: shapes are enough.
Next: `prefixes.py`, what the front makes of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_reduce
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from ..errors import InputError
from .prefixes import Footprint


def leaves(caches: list[Any]) -> Iterator[Any]:
    """The caches, those of lists in their places."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from leaves(list(cache.caches))
        else:
            yield cache


def footprint(
    model: nn.Module,
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    *,
    keeps: bool = False,
) -> Footprint:
    """What a sequence's caches take on this rank.

    Args:
        model: loaded; it is shown one token, of which nothing is computed.
        max_kv_size, kv_bits, kv_group_size: as `engine.Options`.
        keeps: see `Footprint`.

    Raises:
        InputError: its cache cannot be quantised as asked.
    """
    caches = make_prompt_cache(model, max_kv_size)
    model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
    try:
        maybe_quantize_kv_cache(caches, 0, kv_group_size, kv_bits)
    except (ValueError, NotImplementedError) as error:
        raise InputError(
            f"kv_bits: this model's cache cannot be quantised to {kv_bits} bits in "
            f"groups of {kv_group_size}: {error}",
            "kv_bits",
        ) from error
    per_token = fixed = 0
    windows: Counter[int] = Counter()
    exact = False
    for cache in leaves(caches):
        exact |= isinstance(cache, RotatingKVCache | ChunkedKVCache | ArraysCache)
        if isinstance(cache, ArraysCache):
            fixed += cache.nbytes
            continue
        if cache.keys is None:
            continue  # of a layer that uses none
        arrays = (cache.keys, cache.values)
        size = tree_reduce(lambda total, a: total + a.nbytes // a.shape[2], arrays, 0)
        if isinstance(cache, RotatingKVCache):
            windows[cache.max_size] += size
        elif isinstance(cache, ChunkedKVCache):
            windows[cache.chunk_size] += size
        else:
            per_token += size
    return Footprint(per_token, fixed, tuple(sorted(windows.items())), exact, keeps)
