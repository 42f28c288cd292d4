"""What prompts' caches cost, and which of them the ranks still have.

Owns: `Footprint`, bytes of caches by length; `Prefixes`, the index of those to be used again.
Does not know: MLX, files, steps. The ranks keep the caches (`cache.py`); this is the one index, at
the front, so that no two ranks can disagree about how much of a prompt is cached.
Invariant: what `find` names is on every rank, for as many tokens as it says.
Next: `scheduler.py`, which asks it when it admits a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ROUND = 256  # positions by which mlx-lm's caches grow


@dataclass(frozen=True)
class CacheFootprint:
    """Bytes that one rank keeps for a sequence.

    Args:
        per_token: for each position, in layers that keep all of them.
        fixed: whatever the length (state-space layers).
        windows: positions that are kept at most, and bytes for each, of layers with a window.
        exact: there are layers of the last two kinds, whose caches cannot be cut where one likes.
        keeps: whether caches can be taken out of the running batch and used again.
    """

    per_token: int
    fixed: int = 0
    windows: tuple[tuple[int, int], ...] = ()
    exact: bool = False
    keeps: bool = False

    @property
    def state(self) -> int:
        """Bytes of one mark: all that cannot be cut."""
        return self.fixed + sum(most * size for most, size in self.windows)

    def bytes(self, lengths: Sequence[int]) -> int:
        """Of sequences that run together: mlx-lm pads all of a batch to the longest."""
        if not lengths:
            return 0
        longest = -(-max(lengths) // ROUND) * ROUND
        windows = sum(min(longest, most) * size for most, size in self.windows)
        return len(lengths) * (self.fixed + windows + longest * self.per_token)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> CacheFootprint:
        """Read what `asdict` gave, from JSON."""
        windows = tuple((most, size) for most, size in data["windows"])
        return cls(**{**data, "windows": windows})

    @classmethod
    def largest(cls, ranks: Iterable[CacheFootprint]) -> CacheFootprint:
        """What is enough on each of the ranks (they differ where the trunk is sharded)."""
        every = list(ranks)
        windows: dict[int, int] = {}
        for one in every:
            for most, size in one.windows:
                windows[most] = max(windows.get(most, 0), size)
        return cls(
            max(f.per_token for f in every),
            max(f.fixed for f in every),
            tuple(sorted(windows.items())),
            any(f.exact for f in every),
            all(f.keeps for f in every),
        )


def packed(tokens: Iterable[int]) -> bytes:
    """Tokens in a form that is compared quickly: four bytes each."""
    return b"".join(t.to_bytes(4, "little") for t in tokens)


def common(a: bytes, b: bytes) -> int:
    """How many tokens two packed sequences have in common at their beginnings."""
    low, high = 0, min(len(a), len(b)) // 4
    while low < high:
        middle = (low + high + 1) // 2
        if a[4 * low : 4 * middle] == b[4 * low : 4 * middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass
class CacheEntry:
    """A cache that the ranks have, or will have.

    Args:
        name: by which steps speak of it.
        tokens: packed; of a prompt that is being processed all of them.
        done: how many of the tokens are in the cache.
        cuts: where it can be cut, None: anywhere.
        size: bytes on the rank where it is largest; 0 while its request runs (counted elsewhere).
        used: number of the last use.
        growing: its prompt is being processed: there will be more.
        read: from disk, and not used since.
    """

    name: str
    tokens: bytes
    done: int = 0
    cuts: set[int] | None = None
    size: int = 0
    used: int = 0
    growing: bool = False
    read: bool = False

    def usable(self, tokens: bytes, done: int | None = None) -> int:
        """How many of the tokens need not be computed with this: never all of them."""
        done = self.done if done is None else done
        most = min(common(self.tokens, tokens), done, len(tokens) // 4 - 1)
        if self.cuts is None:
            return most
        return max((cut for cut in self.cuts if cut <= most), default=0)


@dataclass
class PrefixIndex:
    """The index.

    Args:
        least: caches of fewer tokens are not worth the while.
    """

    least: int = 16
    entries: dict[str, CacheEntry] = field(default_factory=dict)
    _uses: int = 0

    def find(self, tokens: bytes) -> tuple[CacheEntry | None, int]:
        """The entry that has most of the tokens, and how many of them."""
        best, most = None, self.least - 1
        for entry in self.entries.values():
            if (count := entry.usable(tokens)) > most:
                best, most = entry, count
        return (best, most) if best is not None else (None, 0)

    def coming(self, tokens: bytes) -> int:
        """How many of the tokens will be there when the prompts under way have been processed."""
        growing = (e for e in self.entries.values() if e.growing)
        return max((e.usable(tokens, len(e.tokens) // 4 - 1) for e in growing), default=0)

    def touch(self, entry: CacheEntry) -> None:
        """It was used now."""
        self._uses += 1
        entry.used = self._uses

    def oldest(self) -> list[CacheEntry]:
        """Entries that are kept (those of running requests are not), longest unused first."""
        return sorted((e for e in self.entries.values() if e.size), key=lambda e: e.used)
