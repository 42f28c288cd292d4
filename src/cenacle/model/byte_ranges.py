"""Which bytes of a file: ranges, and columns of rows that are shorter than a read is worth.

Owns: adding and subtracting ranges, taking columns out of rows and putting them back.
Does not know: what files hold, where they are.
Next: `weights.wanted_of` makes them, `cluster/fetch.py` fetches them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Span = tuple[int, int]
"""Bytes [start, stop) of a file."""


JOURNAL = "ranges.jsonl"
"""The file, in a folder that has only parts of a model's files, that says which."""


def is_partial(folder: Path) -> bool:
    """Whether a model's folder is one of holes."""
    return (folder / JOURNAL).exists()


class ColumnRange(NamedTuple):
    """Some columns of rows: of every `period` bytes from `start` to `stop` those in `kept`.

    Args:
        start, stop: bytes of the file; a whole number of rows.
        period: bytes of a row.
        kept: [start, stop) within a row, ascending and apart.
    """

    start: int
    stop: int
    period: int
    kept: tuple[Span, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return (self.stop - self.start) // self.period * sum(b - a for a, b in self.kept)

    def has(self, other: ColumnRange) -> bool:
        """Whether another strip's columns are among these, in whatever rows."""
        return (
            self.period == other.period
            and (self.start - other.start) % self.period == 0
            and not subtract_spans(other.kept, self.kept)
        )

    def take(self, rows: bytes) -> bytes:
        """The columns, row after row, of the bytes from start to stop."""
        lines = np.frombuffer(rows, np.uint8).reshape(-1, self.period)
        return np.concatenate([lines[:, a:b] for a, b in self.kept], axis=1).tobytes()

    def pieces(self) -> Iterator[Span]:
        """Where what `take` gives belongs in the file, in its order."""
        for row in range(self.start, self.stop, self.period):
            for a, b in self.kept:
                yield row + a, row + b

    def steps(self, most: int) -> Iterator[ColumnRange]:
        """The same in parts of `most` bytes of the file at most, one row at least."""
        step = max(1, most // self.period) * self.period
        for start in range(self.start, self.stop, step):
            yield self._replace(start=start, stop=min(start + step, self.stop))


ByteRange = Span | ColumnRange


def append_range(wanted: list[ByteRange], more: ByteRange) -> None:
    """Put what lies behind all others into a list; neighbours of one kind become one."""
    last = wanted[-1] if wanted else None
    if more[0] == more[1]:
        return
    if isinstance(more, ColumnRange):
        if isinstance(last, ColumnRange) and last.stop == more.start and last[2:] == more[2:]:
            wanted[-1] = last._replace(stop=more.stop)
            return
    elif last is not None and not isinstance(last, ColumnRange) and last[1] == more[0]:
        wanted[-1] = (last[0], more[1])
        return
    wanted.append(more)


def byte_range_from_json(given: Any) -> ByteRange:
    """What was written as JSON.

    Raises:
        TypeError, ValueError: it is something else.
    """
    start, stop, *columns = given
    if not columns:
        return int(start), int(stop)
    period, kept = columns
    return ColumnRange(int(start), int(stop), int(period), tuple((int(a), int(b)) for a, b in kept))


def is_valid(wanted: ByteRange) -> bool:
    """Whether what was read from elsewhere makes sense, in a file that is long enough."""
    start, stop, *_ = wanted
    if not 0 <= start < stop:
        return False
    if not isinstance(wanted, ColumnRange):
        return True
    ends = [n for pair in wanted.kept for n in pair]
    return bool(
        wanted.period > 0
        and not (stop - start) % wanted.period
        and ends
        and ends == sorted(set(ends))
        and ends[0] >= 0
        and ends[-1] <= wanted.period
    )


def total_bytes(wanted: Iterable[ByteRange]) -> int:
    """Bytes in all; those that are wanted twice count twice."""
    return sum(w.nbytes if isinstance(w, ColumnRange) else w[1] - w[0] for w in wanted)


def covering_spans(wanted: Iterable[ByteRange]) -> list[Span]:
    """The ranges in which all of it lies, ascending and apart."""
    return merge_spans((w[0], w[1]) for w in wanted)


def merge_spans(spans: Iterable[Span]) -> list[Span]:
    """The same bytes, ascending, each once, neighbours as one."""
    out: list[Span] = []
    for start, stop in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return out


def subtract_spans(wanted: Iterable[Span], have: Sequence[Span]) -> list[Span]:
    """What of `wanted` is in none of `have`, which are ascending and apart."""
    left = []
    for start, stop in merge_spans(wanted):
        at = start
        for index in range(bisect_right(have, start, key=lambda span: span[1]), len(have)):
            a, b = have[index]
            if a >= stop:
                break
            if a > at:
                left.append((at, a))
            at = max(at, b)
        if at < stop:
            left.append((at, stop))
    return left


def intersect_spans(one: Iterable[Span], other: Iterable[Span]) -> list[Span]:
    """What is in both."""
    one = merge_spans(one)
    return subtract_spans(one, subtract_spans(one, merge_spans(other)))
