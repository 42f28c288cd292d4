"""The sizes of KV caches, and the index of those that can be reused.

Owns: `CacheFootprint`, bytes of caches by length; `PrefixIndex`, the caches available for reuse.
Does not know: MLX, files, steps. The ranks hold the caches (`engine/cache/kv_cache.py`). This is
the only index, so no two ranks can disagree about how much of a prompt is cached.
Invariant: what `find` returns is on every rank, with at least as many tokens as it says, and was
computed for the same owner: what is cached tells others what a prompt was.
Next: `scheduler.py`, which looks up each request that it admits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CACHE_STEP = 256  # positions by which mlx-lm's caches grow


@dataclass(frozen=True)
class CacheFootprint:
    """Bytes that one rank keeps for a sequence.

    Args:
        bytes_per_token: in layers that keep all positions.
        fixed_bytes: independent of the length (state-space layers).
        windows: (maximum positions, bytes of each) of layers with a window.
        needs_checkpoints: some layers are of the last two kinds; their caches cannot be truncated
            anywhere, only reset to a checkpoint.
        reusable: caches can be taken out of the running batch and used again.
    """

    bytes_per_token: int
    fixed_bytes: int = 0
    windows: tuple[tuple[int, int], ...] = ()
    needs_checkpoints: bool = False
    reusable: bool = False

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint: all that cannot be truncated."""
        return self.fixed_bytes + sum(positions * size for positions, size in self.windows)

    def total_bytes(self, lengths: Sequence[int]) -> int:
        """Of sequences that run together: mlx-lm pads a batch to the longest."""
        if not lengths:
            return 0
        longest = -(-max(lengths) // CACHE_STEP) * CACHE_STEP
        windows = sum(min(longest, positions) * size for positions, size in self.windows)
        return len(lengths) * (self.fixed_bytes + windows + longest * self.bytes_per_token)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CacheFootprint:
        """Read the output of `asdict`, from JSON."""
        windows = tuple((positions, size) for positions, size in data["windows"])
        return cls(**{**data, "windows": windows})

    @classmethod
    def maximum(cls, footprints: Iterable[CacheFootprint]) -> CacheFootprint:
        """Enough for each of the ranks, which differ if the trunk is sharded."""
        ranks = list(footprints)
        windows: dict[int, int] = {}
        for rank in ranks:
            for positions, size in rank.windows:
                windows[positions] = max(windows.get(positions, 0), size)
        return cls(
            max(f.bytes_per_token for f in ranks),
            max(f.fixed_bytes for f in ranks),
            tuple(sorted(windows.items())),
            any(f.needs_checkpoints for f in ranks),
            all(f.reusable for f in ranks),
        )


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Tokens as four bytes each, for fast comparison; for a prompt its `cache_tokens`."""
    return b"".join(t.to_bytes(4, "little") for t in tokens)


def common_prefix_length(a: bytes, b: bytes) -> int:
    """Number of tokens that two packed sequences have in common at their beginnings.

    Of an image all tokens or none: they say only together which one it is.
    """
    low, high = 0, min(len(a), len(b)) // 4
    while low < high:
        middle = (low + high + 1) // 2
        if a[4 * low : 4 * middle] == b[4 * low : 4 * middle]:
            low = middle
        else:
            high = middle - 1
    if _is_image_token(a, low) or _is_image_token(b, low):
        while low and _is_image_token(a, low - 1):
            low -= 1
    return low


def _is_image_token(tokens: bytes, index: int) -> bool:
    return 4 * index < len(tokens) and tokens[4 * index + 3] >= 0x80


@dataclass
class CacheEntry:
    """A cache that the ranks have, or will have.

    Args:
        name: by which steps refer to it.
        tokens: packed; while the prompt is being processed, all of it.
        length: how many of the tokens are in the cache.
        checkpoints: positions to which it can be reset; None: it can be truncated anywhere.
        size_bytes: on the rank where it is largest; 0 while its request runs (counted there).
        last_use: number of the last use.
        growing: its prompt is still being processed.
        from_disk: read from disk and not used since.
        owner: whose requests may use it.
    """

    name: str
    tokens: bytes
    length: int = 0
    checkpoints: set[int] | None = None
    size_bytes: int = 0
    last_use: int = 0
    growing: bool = False
    from_disk: bool = False
    owner: str = ""

    def usable_tokens(self, tokens: bytes, length: int | None = None) -> int:
        """How many of the tokens this saves computing; never all of them.

        Args:
            tokens: packed.
            length: of this cache, if not the present one.
        """
        length = self.length if length is None else length
        limit = min(common_prefix_length(self.tokens, tokens), length, len(tokens) // 4 - 1)
        if self.checkpoints is None:
            return limit
        return max((c for c in self.checkpoints if c <= limit), default=0)


@dataclass
class PrefixIndex:
    """The index.

    Args:
        min_tokens: shorter caches are not worth reusing.
    """

    min_tokens: int = 16
    entries: dict[str, CacheEntry] = field(default_factory=dict)
    _uses: int = 0

    def find(self, tokens: bytes, owner: str = "") -> tuple[CacheEntry | None, int]:
        """The owner's entry with the longest usable prefix of the tokens, and its length."""
        best, best_length = None, self.min_tokens - 1
        for entry in self.entries.values():
            if entry.owner == owner and (length := entry.usable_tokens(tokens)) > best_length:
                best, best_length = entry, length
        return (best, best_length) if best is not None else (None, 0)

    def being_computed(self, tokens: bytes, owner: str = "") -> int:
        """How many of the tokens will be cached once the owner's prompts in progress are
        processed."""
        growing = (e for e in self.entries.values() if e.growing and e.owner == owner)
        return max((e.usable_tokens(tokens, len(e.tokens) // 4 - 1) for e in growing), default=0)

    def touch(self, entry: CacheEntry) -> None:
        """Mark an entry as just used."""
        self._uses += 1
        entry.last_use = self._uses

    def least_recently_used(self) -> list[CacheEntry]:
        """Entries of ended requests, longest unused first."""
        ended = (e for e in self.entries.values() if e.size_bytes)
        return sorted(ended, key=lambda e: e.last_use)
