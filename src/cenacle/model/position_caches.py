"""KV caches that know at which positions their tokens are.

Owns: the shift of a sequence, from places in its cache to positions for rotary embedding: an image
has more tokens than positions. It goes with the cache into mlx-lm's batch and out of it.
Does not know: images, models.
Invariant: outside of a batch caches are mlx-lm's own classes, with one attribute more, so that they
are kept and written as always.
Next: `engine/batch.py` sets the shift; `vision.py` reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache

_SHIFT = "position_shift"


def shift_of(caches: Sequence[Any] | None) -> int | mx.array | None:
    """What to add to the places of the next tokens, of one sequence or of each; None: nothing."""
    for cache in caches or ():
        if isinstance(cache, PositionBatchKVCache):
            return mx.array(cache.shifts) if any(cache.shifts) else None
        if type(cache) is KVCache:
            return getattr(cache, _SHIFT, 0) or None
    return None


def set_shift(caches: Iterable[Any], shift: int) -> None:
    """Set the shift of a sequence, in place."""
    for cache in caches:
        if type(cache) is KVCache:
            setattr(cache, _SHIFT, shift)
            return


def into_batch(caches: Sequence[Any], shift: int) -> list[Any]:
    """A sequence's caches as a batch merges them."""
    joined = list(caches)
    for index, cache in enumerate(joined):
        if type(cache) is KVCache:
            joined[index] = copy = PositionKVCache()
            copy.keys, copy.values, copy.offset = cache.keys, cache.values, cache.offset
            setattr(copy, _SHIFT, shift)
            break
    return joined


def out_of_batch(caches: Sequence[Any]) -> list[Any]:
    """The inverse of `into_batch`, for a sequence that the batch has not merged yet."""
    return [c.plain() if isinstance(c, PositionKVCache) else c for c in caches]


class PositionKVCache(KVCache):
    """One sequence's, on its way into a batch."""

    def plain(self) -> KVCache:
        """The same as mlx-lm's class."""
        cache = KVCache()
        cache.keys, cache.values, cache.offset = self.keys, self.values, self.offset
        setattr(cache, _SHIFT, getattr(self, _SHIFT))
        return cache

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> PositionBatchKVCache:
        """One for all sequences."""
        merged = KVCache.merge(caches)
        merged.__class__ = PositionBatchKVCache
        merged.shifts = [getattr(cache, _SHIFT) for cache in caches]
        return merged


class PositionBatchKVCache(BatchKVCache):
    """Of several sequences; `shifts` has one for each."""

    shifts: list[int]

    def filter(self, batch_indices: Any) -> None:
        """See `BatchKVCache`."""
        super().filter(batch_indices)
        self.shifts = [self.shifts[int(index)] for index in batch_indices]

    def extend(self, other: Any) -> None:
        """See `BatchKVCache`."""
        super().extend(other)
        self.shifts = [*self.shifts, *other.shifts]

    def extract(self, idx: int) -> Any:
        """See `BatchKVCache`."""
        cache = super().extract(idx)
        setattr(cache, _SHIFT, self.shifts[idx])
        return cache
