"""Byte ranges of a file: spans, and columns of rows too short for a read each.

Owns: adding and subtracting spans, taking columns out of rows.
Does not know: what files hold, where they are.
Next: `slicing.required_ranges` makes them, `cluster/download` fetches them.
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
"""The file, in a folder with parts of a model's files, that lists which parts are there."""


def is_partial(folder: Path) -> bool:
    """Whether a model's folder has only parts of its files."""
    return (folder / JOURNAL).exists()


class ColumnRange(NamedTuple):
    """Some columns of rows: of every `row_bytes` bytes from `start` to `stop` those in `columns`.

    Args:
        start, stop: bytes of the file; a whole number of rows.
        row_bytes: length of a row.
        columns: [start, stop) within a row, ascending and apart.
    """

    start: int
    stop: int
    row_bytes: int
    columns: tuple[Span, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return (self.stop - self.start) // self.row_bytes * sum(b - a for a, b in self.columns)

    def covers_columns_of(self, other: ColumnRange) -> bool:
        """Whether another range's columns are among these, in whatever rows."""
        return (
            self.row_bytes == other.row_bytes
            and (self.start - other.start) % self.row_bytes == 0
            and not subtract_spans(other.columns, self.columns)
        )

    def extract(self, rows: bytes) -> bytes:
        """The columns, row after row, of the bytes from start to stop."""
        lines = np.frombuffer(rows, np.uint8).reshape(-1, self.row_bytes)
        return np.concatenate([lines[:, a:b] for a, b in self.columns], axis=1).tobytes()

    def spans(self) -> Iterator[Span]:
        """Where the bytes of `extract` belong in the file, in its order."""
        for row in range(self.start, self.stop, self.row_bytes):
            for a, b in self.columns:
                yield row + a, row + b

    def split(self, max_bytes: int) -> Iterator[ColumnRange]:
        """The same in ranges over at most `max_bytes` bytes of the file, at least one row each."""
        step = max(1, max_bytes // self.row_bytes) * self.row_bytes
        for start in range(self.start, self.stop, step):
            yield self._replace(start=start, stop=min(start + step, self.stop))


ByteRange = Span | ColumnRange


def append_range(ranges: list[ByteRange], added: ByteRange) -> None:
    """Append a range that lies behind all others; neighbors of one kind are merged."""
    last = ranges[-1] if ranges else None
    if added[0] == added[1]:
        return
    if isinstance(added, ColumnRange):
        if isinstance(last, ColumnRange) and last.stop == added.start and last[2:] == added[2:]:
            ranges[-1] = last._replace(stop=added.stop)
            return
    elif last is not None and not isinstance(last, ColumnRange) and last[1] == added[0]:
        ranges[-1] = (last[0], added[1])
        return
    ranges.append(added)


def byte_range_from_json(data: Any) -> ByteRange:
    """Read what was written as JSON.

    Raises:
        TypeError, ValueError: it is something else.
    """
    start, stop, *rest = data
    if not rest:
        return int(start), int(stop)
    row_bytes, columns = rest
    pairs = tuple((int(a), int(b)) for a, b in columns)
    return ColumnRange(int(start), int(stop), int(row_bytes), pairs)


def is_valid(byte_range: ByteRange) -> bool:
    """Whether a range that came from elsewhere makes sense, in a file that is long enough."""
    start, stop, *_ = byte_range
    if not 0 <= start < stop:
        return False
    if not isinstance(byte_range, ColumnRange):
        return True
    borders = [n for pair in byte_range.columns for n in pair]
    return bool(
        byte_range.row_bytes > 0
        and not (stop - start) % byte_range.row_bytes
        and borders
        and borders == sorted(set(borders))
        and borders[0] >= 0
        and borders[-1] <= byte_range.row_bytes
    )


def total_bytes(ranges: Iterable[ByteRange]) -> int:
    """Bytes in all; those that are in two ranges count twice."""
    return sum(r.nbytes if isinstance(r, ColumnRange) else r[1] - r[0] for r in ranges)


def covering_spans(ranges: Iterable[ByteRange]) -> list[Span]:
    """The spans in which all ranges lie, ascending and apart."""
    return merge_spans((r[0], r[1]) for r in ranges)


def merge_spans(spans: Iterable[Span]) -> list[Span]:
    """The same bytes, ascending, each once, neighbors merged."""
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def subtract_spans(spans: Iterable[Span], others: Sequence[Span]) -> list[Span]:
    """What of `spans` is in none of `others`, which are ascending and apart."""
    left = []
    for start, stop in merge_spans(spans):
        at = start
        for index in range(bisect_right(others, start, key=lambda span: span[1]), len(others)):
            a, b = others[index]
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
