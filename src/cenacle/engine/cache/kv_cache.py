"""Caches of keys, values and states: what they take, and their beginnings, used again.

Owns: `footprint`, the bytes of a model's caches by length; `Sequence`, the caches of one sequence,
which can be cut where it was marked, or anywhere, and written in pages and read again, in the form
of mlx-lm's own files of caches.
Does not know: requests, steps, ranks. Which caches are kept, and how much of which is used, is the
front's to say (`prefixes.py`).
Invariant: nothing is computed by the model here; a cut shares no array that is written in place.
Next: `batches.py`, which fills them.
"""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)

from ...errors import InputError
from ...scheduler.prefix_index import CacheFootprint

OPEN = 32  # files that are read at once
EXACT = (RotatingKVCache, ChunkedKVCache, ArraysCache)  # cannot be cut: they forget


@dataclass
class SequenceCache:
    """The caches of one sequence.

    Args:
        caches: one for each layer.
        marks: those of `EXACT` kinds as they were at some positions, in the order of `leaves`.
    """

    caches: list[Any]
    marks: dict[int, list[Any]] = field(default_factory=dict)

    def mark(self, position: int) -> None:
        """Keep what cannot be cut, as it is now."""
        self.marks[position] = [_copy(c) for c in leaves(self.caches) if isinstance(c, EXACT)]

    def cut(self, tokens: int) -> SequenceCache:
        """The first tokens' caches, for another sequence to go on with.

        Args:
            tokens: at most as many as there are; with `EXACT` kinds a position with a mark.
        """
        marks = {p: m for p, m in self.marks.items() if p <= tokens}
        kept = iter(marks.get(tokens, ()))

        def beginning(cache: Any) -> Any:
            if isinstance(cache, CacheList):
                return CacheList(*(beginning(c) for c in cache.caches))
            if isinstance(cache, EXACT):
                return _copy(next(kept))
            part = copy.copy(cache)
            if cache.keys is not None:
                part.keys, part.values = tree_map(
                    lambda a: a[..., :tokens, :], (cache.keys, cache.values)
                )
                part.offset = tokens
            return part

        return SequenceCache([beginning(c) for c in self.caches], marks)

    def page(self, begin: int, end: int, about: Mapping[str, str]) -> io.BytesIO:
        """A file's content: what these positions added to the caches.

        Args:
            begin, end: positions; with `EXACT` kinds there is a mark at `end`.
            about: goes with it.
        """
        kept = iter(self.marks.get(end, ()))

        def part(cache: Any) -> Any:
            if isinstance(cache, CacheList):
                return CacheList(*(part(c) for c in cache.caches))
            if isinstance(cache, EXACT):
                return next(kept)
            piece = copy.copy(cache)
            if cache.keys is not None:
                piece.keys, piece.values = tree_map(
                    lambda a: mx.contiguous(a[..., begin:end, :]), (cache.keys, cache.values)
                )
                piece.offset = end - begin
            return piece

        content = io.BytesIO()
        parts = [part(c) for c in self.caches]
        save_prompt_cache(content, parts, dict(about))  # type: ignore[arg-type]  # or any file
        return content

    @classmethod
    def read(cls, pages: Iterable[tuple[int, Path]]) -> SequenceCache:
        """Caches of pages that follow one another.

        Args:
            pages: where each ends, and its file.
        """

        def whole(parts: tuple[Any, ...]) -> Any:
            last = parts[-1]
            if isinstance(last, CacheList):
                lists = (p.caches for p in parts)
                return CacheList(*(whole(inner) for inner in zip(*lists, strict=True)))
            if not isinstance(last, EXACT) and last.keys is not None:
                last.keys = mx.concatenate([p.keys for p in parts], axis=-2)
                last.values = mx.concatenate([p.values for p in parts], axis=-2)
                last.offset = sum(p.offset for p in parts)
            return last

        each: list[list[Any]] = []
        marks = {}
        for end, path in pages:
            each.append(load_prompt_cache(str(path)))
            if len(each) % OPEN == 0 or any(isinstance(c, EXACT) for c in leaves(each[-1])):
                mx.eval([c.state for caches in each[-OPEN:] for c in caches])
            if exact := [_copy(c) for c in leaves(each[-1]) if isinstance(c, EXACT)]:
                marks[end] = exact
        return cls([whole(parts) for parts in zip(*each, strict=True)], marks).settle()

    def settle(self) -> SequenceCache:
        """Compute what it refers to, so that it holds no other sequence's arrays."""
        mx.eval([c.state for c in self.caches])
        return self


def _copy(cache: Any) -> Any:
    """A cache whose arrays are other objects: writing into one leaves the other as it is."""
    other = copy.copy(cache)
    if isinstance(cache, ArraysCache):
        other.cache = [None if a is None else a[...] for a in cache.cache]
    elif cache.keys is not None:
        other.keys, other.values = cache.keys[...], cache.values[...]
    return other


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
) -> CacheFootprint:
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
        exact |= isinstance(cache, EXACT)
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
    return CacheFootprint(per_token, fixed, tuple(sorted(windows.items())), exact, keeps)


def can_go_back(model: nn.Module) -> bool:
    """Whether this model's caches can forget their last tokens at any time.

    A state has no last token, and a cache that rotates has overwritten what it would return to.
    """

    def plain(cache: Any) -> bool:
        inner = getattr(cache, "caches", None)
        if inner is not None:
            return all(map(plain, inner))
        return bool(cache.is_trimmable()) and not hasattr(cache, "max_size")

    return all(map(plain, make_prompt_cache(model)))


def can_merge(model: nn.Module) -> bool:
    """Whether mlx-lm can merge this model's caches into a batch."""

    def merges(cache: Any) -> bool:
        inner = getattr(cache, "caches", None)
        return all(map(merges, inner)) if inner is not None else hasattr(cache, "merge")

    return all(map(merges, make_prompt_cache(model)))
