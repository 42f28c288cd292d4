"""KV caches of several sequences that end at different places.

Owns: `RaggedKVCache`, one layer's; making them of sequences' caches and sequences' caches of them.
States have no end; mlx-lm's own class holds those of several sequences.
Does not know: requests, drafts.
Why: a pass that verifies drafts of several sequences leaves each with another number of tokens.
mlx-lm's batch caches end at one place and pad on the left, so that all their content would move
after every such pass. Here every sequence begins at the first place and is written behind its own
end; a mask hides what is behind that.
Invariant: the first `lengths[i]` places of row i are what that sequence's own cache would hold.
Next: `speculative/group.py`, which runs the model with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList, KVCache, make_prompt_cache

from ...model.request_caches import RequestCaches
from .kv_cache import flatten_caches


class RaggedKVCache:
    """One layer's cache of several sequences, in the form that mlx-lm's models call.

    Args:
        lengths: tokens of each sequence.
        keys, values: [sequences, heads, places, width]; None: nothing yet.
    """

    step = 256

    def __init__(
        self,
        lengths: Sequence[int],
        keys: mx.array | None = None,
        values: mx.array | None = None,
    ) -> None:
        self.lengths = list(lengths)
        self.keys, self.values = keys, values

    @classmethod
    def merge(cls, caches: Sequence[KVCache]) -> RaggedKVCache:
        """Of sequences' own caches, which are left unchanged."""
        lengths = [cache.size() for cache in caches]
        merged = cls(lengths)
        filled = [cache for cache in caches if cache.keys is not None]
        if not filled:
            return merged
        places = -(-(max(lengths) + 1) // cls.step) * cls.step
        merged.keys = _join([c.keys for c in caches], lengths, places)
        merged.values = _join([c.values for c in caches], lengths, places)
        return merged

    @property
    def offset(self) -> mx.array:
        """Tokens of each sequence, [sequences]."""
        return mx.array(self.lengths)

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None]:
        """All arrays."""
        return self.keys, self.values

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in self.state if a is not None)

    def size(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def empty(self) -> bool:
        """Whether nothing was computed yet."""
        return self.keys is None

    def is_trimmable(self) -> bool:
        """They can drop their last tokens."""
        return True

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append to every sequence, [sequences, heads, length, width] each; returns all places."""
        count = keys.shape[2]
        end = max(self.lengths) + count
        self.keys, self.values = (
            self._room(self.keys, keys, end),
            self._room(self.values, values, end),
        )
        if len(set(self.lengths)) == 1:
            begin = self.lengths[0]
            self.keys[..., begin:end, :] = keys
            self.values[..., begin:end, :] = values
        else:
            for row, begin in enumerate(self.lengths):
                places = (slice(row, row + 1), slice(None), slice(begin, begin + count))
                self.keys[places] = keys[row : row + 1]
                self.values[places] = values[row : row + 1]
        self.lengths = [length + count for length in self.lengths]
        return self.keys[..., :end, :], self.values[..., :end, :]

    def _room(self, kept: mx.array | None, new: mx.array, end: int) -> mx.array:
        places = 0 if kept is None else kept.shape[2]
        if kept is not None and places >= end:
            return kept
        missing = -(-(end - places) // self.step) * self.step
        zeros = mx.zeros((new.shape[0], new.shape[1], missing, new.shape[3]), new.dtype)
        return zeros if kept is None else mx.concatenate([kept, zeros], axis=2)

    def make_mask(
        self,
        N: int,  # mlx-lm's name
        return_array: bool = False,  # noqa: ARG002
        window_size: int | None = None,
    ) -> mx.array:
        """Which places each of the next tokens sees, [sequences, 1, N, places]."""
        places = mx.arange(max(self.lengths) + N)
        own = self.offset[:, None] + mx.arange(N)
        mask = places <= own[..., None]
        if window_size is not None:
            mask = mask & (places > own[..., None] - window_size)
        return mask[:, None]

    def trim(self, count: int) -> int:
        """Drop the last tokens of every sequence."""
        self.drop([count] * len(self.lengths))
        return count

    def drop(self, counts: Sequence[int]) -> None:
        """Drop the last tokens of each sequence."""
        self.lengths = [n - count for n, count in zip(self.lengths, counts, strict=True)]

    def filter(self, rows: Sequence[int]) -> None:
        """Keep only some sequences."""
        self.lengths = [self.lengths[row] for row in rows]
        if self.keys is not None and self.values is not None:
            kept = mx.array(list(rows))
            self.keys, self.values = self.keys[kept], self.values[kept]

    def extract(self, row: int) -> KVCache:
        """A copy of one sequence's."""
        cache, length = KVCache(), self.lengths[row]
        if self.keys is not None and self.values is not None and length:
            cache.keys, cache.values = (
                mx.contiguous(a[row : row + 1, :, :length]) for a in (self.keys, self.values)
            )
            cache.offset = length
        return cache


def _join(arrays: Sequence[mx.array | None], lengths: Sequence[int], places: int) -> mx.array:
    """Each padded behind its length; [sequences, heads, places, width]."""
    like = next(array for array in arrays if array is not None)
    empty = mx.zeros((1, like.shape[1], 0, like.shape[3]), like.dtype)
    rows = [
        mx.pad(
            empty if array is None else array[:, :, :length],
            [(0, 0), (0, 0), (0, places - length), (0, 0)],
        )
        for array, length in zip(arrays, lengths, strict=True)
    ]
    return mx.concatenate(rows)


def can_be_ragged(model: nn.Module) -> bool:
    """Whether all of a model's caches are mlx-lm's plain ones, states, or of one request each."""
    caches = flatten_caches(make_prompt_cache(model))
    return all(type(cache) is KVCache or _merges_itself(cache) for cache in caches)


def _merges_itself(cache: Any) -> bool:
    return isinstance(cache, RequestCaches) or type(cache).__name__ == "ArraysCache"  # of both zoos


def merge_ragged(sequences: Sequence[Sequence[Any]]) -> list[Any]:
    """The caches of a model for several sequences, of each sequence's, which stay unchanged."""
    return [_merge_layer(layer) for layer in zip(*sequences, strict=True)]


def _merge_layer(caches: Sequence[Any]) -> Any:
    if isinstance(caches[0], CacheList):
        inner = zip(*(c.caches for c in caches), strict=True)
        return CacheList(*(_merge_layer(layer) for layer in inner))
    if _merges_itself(caches[0]):
        return type(caches[0]).merge(caches)
    return RaggedKVCache.merge(caches)


def extract_sequence(caches: Iterable[Any], row: int) -> list[Any]:
    """A copy of one sequence's caches."""
    return [cache.extract(row) for cache in caches]


def clear_sequence(caches: list[Any], row: int, empty: Sequence[Any]) -> None:
    """Let a sequence begin anew, in place.

    Args:
        empty: caches of one sequence.
    """
    for cache, new in zip(flatten_caches(caches), flatten_caches(list(empty)), strict=True):
        if isinstance(cache, RequestCaches):
            cache.rows[row] = new.rows[0]
        else:
            cache.drop([n if r == row else 0 for r, n in enumerate(cache.lengths)])


def keep_sequences(caches: list[Any], rows: Sequence[int]) -> None:
    """Keep only some sequences, in place."""
    for cache in flatten_caches(caches):
        cache.filter(rows)
