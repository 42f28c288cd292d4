"""The KV caches of one sequence: their size, their prefixes, their form on disk.

Owns: `measure_footprint`, the bytes of a model's caches by length; `SequenceCache`, the caches of
one sequence, which can be truncated at checkpoints, or anywhere, and written in pages in the format
of mlx-lm's prompt cache files.
Does not know: requests, steps, ranks, which caches are kept (`scheduler/prefix_index.py`).
Invariant: the model computes nothing here; a truncated cache shares no array that is written in
place.
Next: `engine/batch.py`, which fills the caches.
"""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_reduce
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)

from ...errors import InputError
from ...scheduler.prefix_index import CacheFootprint

MAX_OPEN_FILES = 32
GROWTH_LENGTHS = (256, 512)  # beyond the windows of the families with caches of their own kind
NOT_TRUNCATABLE = (RotatingKVCache, ChunkedKVCache, ArraysCache)  # they overwrite old positions


@dataclass
class SequenceCache:
    """The caches of one sequence.

    Args:
        caches: one per layer.
        checkpoints: position -> copies of the `NOT_TRUNCATABLE` caches at that position, in the
            order of `flatten_caches`.
    """

    caches: list[Any]
    checkpoints: dict[int, list[Any]] = field(default_factory=dict)

    def checkpoint(self, position: int) -> None:
        """Copy what cannot be truncated, as it is now."""
        self.checkpoints[position] = _copy_not_truncatable(self.caches)

    def truncate(self, tokens: int) -> SequenceCache:
        """A copy with only the first tokens; this one is left unchanged.

        Args:
            tokens: at most as many as there are; a checkpoint, if there are `NOT_TRUNCATABLE`
                caches.
        """
        checkpoints = {p: copies for p, copies in self.checkpoints.items() if p <= tokens}
        copies = (_copy(c) for c in checkpoints.get(tokens, ()))
        caches = _slice_caches(self.caches, copies, 0, tokens, lambda a: a)
        return SequenceCache(caches, checkpoints)

    def to_page(self, begin: int, end: int, metadata: Mapping[str, str]) -> io.BytesIO:
        """A file's content with what the positions [begin, end) added to the caches.

        Args:
            begin, end: `end` is a checkpoint, if there are `NOT_TRUNCATABLE` caches.
            metadata: saved in the file's header.
        """
        copies = iter(self.checkpoints.get(end, ()))
        caches = _slice_caches(self.caches, copies, begin, end, mx.contiguous)
        content = io.BytesIO()
        save_prompt_cache(content, caches, dict(metadata))  # type: ignore[arg-type]  # or any file
        return content

    @classmethod
    def from_pages(cls, pages: Iterable[tuple[int, Path]]) -> SequenceCache:
        """Read contiguous pages.

        Args:
            pages: the end and the file of each.
        """
        loaded: list[list[Any]] = []
        checkpoints = {}
        for end, path in pages:
            loaded.append(load_prompt_cache(str(path)))
            exact = any(isinstance(c, NOT_TRUNCATABLE) for c in flatten_caches(loaded[-1]))
            if exact or len(loaded) % MAX_OPEN_FILES == 0:
                mx.eval([c.state for caches in loaded[-MAX_OPEN_FILES:] for c in caches])
            if exact:
                checkpoints[end] = _copy_not_truncatable(loaded[-1])
        caches = [_concatenate(parts) for parts in zip(*loaded, strict=True)]
        return cls(caches, checkpoints).synchronize()

    def synchronize(self) -> SequenceCache:
        """Compute all arrays, so that they no longer refer to another sequence's."""
        mx.eval([c.state for c in self.caches])
        return self


def flatten_caches(caches: list[Any]) -> Iterator[Any]:
    """The caches, those inside lists in their places."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from flatten_caches(list(cache.caches))
        else:
            yield cache


def has_exact_ends(caches: list[Any]) -> bool:
    """Whether some of a sequence's caches can be used again only as they are."""
    return any(isinstance(cache, NOT_TRUNCATABLE) for cache in flatten_caches(caches))


def _slice_caches(
    caches: list[Any],
    copies: Iterator[Any],
    begin: int,
    end: int,
    convert: Callable[[mx.array], mx.array],
) -> list[Any]:
    """Positions [begin, end) of each cache; `copies` replace those that cannot be truncated."""

    def slice_cache(cache: Any) -> Any:
        if isinstance(cache, CacheList):
            return CacheList(*(slice_cache(c) for c in cache.caches))
        if isinstance(cache, NOT_TRUNCATABLE):
            return next(copies)
        piece = copy.copy(cache)
        if cache.keys is not None:
            piece.keys, piece.values = tree_map(
                lambda a: convert(a[..., begin:end, :]), (cache.keys, cache.values)
            )
            piece.offset = end - begin
        return piece

    return [slice_cache(c) for c in caches]


def _concatenate(parts: tuple[Any, ...]) -> Any:
    last = parts[-1]
    if isinstance(last, CacheList):
        inner = zip(*(p.caches for p in parts), strict=True)
        return CacheList(*(_concatenate(pieces) for pieces in inner))
    if not isinstance(last, NOT_TRUNCATABLE) and last.keys is not None:
        last.keys = mx.concatenate([p.keys for p in parts], axis=-2)
        last.values = mx.concatenate([p.values for p in parts], axis=-2)
        last.offset = sum(p.offset for p in parts)
    return last


def _copy_not_truncatable(caches: list[Any]) -> list[Any]:
    return [_copy(c) for c in flatten_caches(caches) if isinstance(c, NOT_TRUNCATABLE)]


def _copy(cache: Any) -> Any:
    """A cache with array objects of its own: writing into one leaves the other unchanged."""
    other = copy.copy(cache)
    if isinstance(cache, ArraysCache):
        other.cache = [None if a is None else a[...] for a in cache.cache]
    elif cache.keys is not None:
        other.keys, other.values = cache.keys[...], cache.values[...]
    return other


def measure_footprint(
    model: nn.Module,
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    *,
    reusable: bool = False,
) -> CacheFootprint:
    """What a sequence's caches take on this rank.

    Args:
        model: loaded; it is called with one token, lazily.
        max_kv_size, kv_bits, kv_group_size: see `EngineOptions`.
        reusable: see `CacheFootprint`.

    Raises:
        InputError: the cache cannot be quantized in this way.
    """
    caches = make_prompt_cache(model, max_kv_size)
    model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
    try:
        maybe_quantize_kv_cache(caches, 0, kv_group_size, kv_bits)
    except (ValueError, NotImplementedError) as error:
        raise InputError(
            f"kv_bits: this model's KV cache cannot be quantized to {kv_bits} bits in groups of "
            f"{kv_group_size}: {error}",
            "kv_bits",
        ) from error
    bytes_per_token = fixed_bytes = 0
    windows: Counter[int] = Counter()
    needs_checkpoints = False
    for cache in flatten_caches(caches):
        needs_checkpoints |= isinstance(cache, NOT_TRUNCATABLE)
        if isinstance(cache, ArraysCache):
            fixed_bytes += cache.nbytes
            continue
        if _is_own_kind(cache):
            continue
        if cache.keys is None:
            continue  # a layer without a cache
        arrays = (cache.keys, cache.values)
        size = tree_reduce(lambda total, a: total + a.nbytes // a.shape[2], arrays, 0)
        if isinstance(cache, RotatingKVCache):
            windows[cache.max_size] += size
        elif isinstance(cache, ChunkedKVCache):
            windows[cache.chunk_size] += size
        else:
            bytes_per_token += size
    own_kinds = [i for i, cache in enumerate(flatten_caches(caches)) if _is_own_kind(cache)]
    if own_kinds:
        needs_checkpoints = True
        growth_bytes, constant_bytes = _measure_growth(model, own_kinds)
        bytes_per_token, fixed_bytes = bytes_per_token + growth_bytes, fixed_bytes + constant_bytes
    return CacheFootprint(
        bytes_per_token, fixed_bytes, tuple(sorted(windows.items())), needs_checkpoints, reusable
    )


def _is_own_kind(cache: Any) -> bool:
    own_keys = isinstance(getattr(cache, "keys", []), list)  # one for each layer: deepseek_v41
    return not isinstance(cache, ArraysCache) and own_keys


def _measure_growth(model: nn.Module, indices: list[int]) -> tuple[int, int]:
    """Bytes per token, rounded up, and constant bytes of caches that tell only their size."""

    def total_bytes(tokens: int) -> int:
        caches = make_prompt_cache(model)
        model(mx.zeros((1, tokens), dtype=mx.int32), cache=caches)
        flat = list(flatten_caches(caches))
        states = [flat[i].state for i in indices]
        return tree_reduce(lambda total, array: total + getattr(array, "nbytes", 0), states, 0)

    short, long = GROWTH_LENGTHS
    short_bytes, long_bytes = total_bytes(short), total_bytes(long)
    per_token = -(-(long_bytes - short_bytes) // (long - short))
    return per_token, max(0, short_bytes - short * per_token)


def can_trim(model: nn.Module) -> bool:
    """Whether this model's caches can drop their last tokens at any time.

    A state-space layer keeps no single tokens, and a rotating cache has overwritten older ones.
    """
    return _all_caches(model, lambda c: bool(c.is_trimmable()) and not hasattr(c, "max_size"))


def can_merge(model: nn.Module) -> bool:
    """Whether mlx-lm can merge this model's caches into a batch."""
    return _all_caches(model, lambda c: hasattr(c, "merge"))


def can_reuse(model: nn.Module) -> bool:
    """Whether a sequence's caches can be copied and written, for other requests: mlx-lm's can."""
    return _all_caches(model, lambda c: type(c).__module__ == KVCache.__module__)


def _all_caches(model: nn.Module, condition: Callable[[Any], bool]) -> bool:
    return all(map(condition, flatten_caches(make_prompt_cache(model))))
