"""Reading parts of a tensor: which bytes they are, and reading each byte at most once.

Owns: `TensorPiece`, what a rank reads of one tensor, as byte ranges and as an array.
Does not know: plans, modules, why a piece is wanted.
Invariant: memory is the result plus `BLOCK_BYTES` or one row. Neighboring ranges with less than
`MIN_GAP_BYTES` between them are read with what lies between: a disk reads whole pages anyway.
Next: `slicing.py` lists the pieces of a rank, `loader.py` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from .byte_ranges import ByteRange, ColumnRange, Span
from .tensor_info import DTYPES, TensorInfo

BLOCK_BYTES = 1 << 20  # read at a time of rows of which only some columns are wanted
MIN_GAP_BYTES = 8192  # two pages: a smaller gap is not worth another read


@dataclass(frozen=True)
class TensorView:
    """A tensor as [items, ...], and what is wanted of an item.

    Args:
        shape: as many elements as the tensor has.
        axis: along which the items are sliced; 0: not at all.
        ranges: [start, stop) along `axis`, ascending.
    """

    shape: tuple[int, ...]
    axis: int = 0
    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def sliced_shape(self) -> tuple[int, ...]:
        """The shape of what is wanted of all items."""
        width = sum(b - a for a, b in self.ranges)
        return tuple(width if i == self.axis and i else n for i, n in enumerate(self.shape))


@dataclass(frozen=True)
class TensorPiece:
    """What is read of one tensor of a checkpoint.

    Args:
        tensor: where its bytes are.
        view: how to look at it; None: all of it is read, by MLX, when it is evaluated.
        items: indices along the view's first axis, ascending.
    """

    tensor: TensorInfo
    view: TensorView | None = None
    items: tuple[int, ...] = (0,)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is read."""
        if self.view is None:
            return self.tensor.shape
        return (len(self.items), *self.view.sliced_shape[1:])

    def byte_ranges(self, column_gap_bytes: int) -> Iterator[ByteRange]:
        """The bytes of the tensor's file, ascending.

        Args:
            column_gap_bytes: pieces of a row with so many bytes between them, or fewer, are given
                as columns, because there may be millions of them.
        """
        rows = _Rows.of(self)
        for first, count in _runs(self.items):
            start = self.tensor.start + first * rows.item_bytes
            stop = start + count * rows.item_bytes
            if rows.max_gap == 0:
                yield start, stop
            elif rows.max_gap <= column_gap_bytes and rows.row_bytes <= BLOCK_BYTES:
                yield ColumnRange(start, stop, rows.row_bytes, rows.columns)
            else:
                for row in range(start, stop, rows.row_bytes):
                    yield from ((row + a, row + b) for a, b in rows.columns)


@dataclass(frozen=True)
class _Rows:
    """A piece's items as rows of bytes, of which some columns are wanted."""

    item_bytes: int
    rows_per_item: int
    row_bytes: int
    columns: tuple[Span, ...]

    @classmethod
    def of(cls, piece: TensorPiece) -> _Rows:
        view = piece.view or TensorView((1,))
        item_bytes = (piece.tensor.stop - piece.tensor.start) // view.shape[0]
        if not view.axis:
            return cls(item_bytes, 1, item_bytes, ((0, item_bytes),))
        rows_per_item = math.prod(view.shape[1 : view.axis])
        row_bytes = item_bytes // rows_per_item
        unit = row_bytes // view.shape[view.axis]
        columns = tuple((a * unit, b * unit) for a, b in view.ranges)
        return cls(item_bytes, rows_per_item, row_bytes, columns)

    @property
    def max_gap(self) -> int:
        """Most bytes between two neighboring pieces, the last of a row and the next row's too."""
        first_of_next_row = (self.row_bytes + self.columns[0][0], 0)
        return max(a - b for (_, b), (a, _) in pairwise([*self.columns, first_of_next_row]))


def read_piece(piece: TensorPiece) -> mx.array:
    """Read a piece: [items, ...].

    Raises:
        CheckpointError: the file ended or could not be read.
    """
    return _to_array(piece, _gather(piece), piece.shape)


def read_bytes(piece: TensorPiece) -> np.ndarray:
    """Read a piece's bytes: uint8, in order.

    Raises:
        CheckpointError: see `read_piece`.
    """
    return _gather(piece).reshape(-1)


def read_together(pieces: Sequence[TensorPiece]) -> mx.array:
    """Read the same piece of several tensors: [tensors, ...].

    In one array, because it is freed as a whole when experts have been stacked; many small arrays
    would stay with the process.

    Raises:
        CheckpointError: the tensors differ in type, or see `read_piece`.
    """
    first = pieces[0]
    if len({p.tensor.dtype for p in pieces}) > 1:
        raise CheckpointError(
            f"{first.tensor.file}: expected one type for {first.tensor.name} and the same tensor "
            f"of other experts, got {sorted({p.tensor.dtype for p in pieces})}"
        )
    data = np.concatenate([_gather(p) for p in pieces])
    return _to_array(first, data, (len(pieces), *first.shape[1:]))


def _to_array(piece: TensorPiece, data: np.ndarray, shape: Sequence[int]) -> mx.array:
    _, carrier, dtype = DTYPES[piece.tensor.dtype]
    array = mx.array(data.reshape(-1).view(carrier).reshape(shape))
    return array.view(dtype) if carrier is np.uint16 and dtype == mx.bfloat16 else array


def _gather(piece: TensorPiece) -> np.ndarray:
    """The bytes of a piece, [rows, bytes of a row's columns]."""
    rows = _Rows.of(piece)
    width = sum(b - a for a, b in rows.columns)
    out = np.empty((len(piece.items) * rows.rows_per_item, width), dtype=np.uint8)
    done = 0
    with piece.tensor.file.open("rb", buffering=0) as file:
        for first, count in _runs(piece.items):
            start, n = piece.tensor.start + first * rows.item_bytes, count * rows.rows_per_item
            into = out[done : done + n]
            if rows.max_gap == 0:
                _read_into(file, piece, start, into)
            elif rows.max_gap >= MIN_GAP_BYTES:
                _read_columns(file, piece, start, rows, into)
            else:
                _read_blocks(file, piece, start, rows, into)
            done += n
    return out


def _read_columns(
    file: FileIO, piece: TensorPiece, start: int, rows: _Rows, into: np.ndarray
) -> None:
    """Read only the columns: the gaps between them are wide."""
    for i in range(len(into)):
        at = 0
        for a, b in rows.columns:
            _read_into(file, piece, start + i * rows.row_bytes + a, into[i, at : at + b - a])
            at += b - a


def _read_blocks(
    file: FileIO, piece: TensorPiece, start: int, rows: _Rows, into: np.ndarray
) -> None:
    """Read blocks of rows and copy the columns out of them."""
    low, high = rows.columns[0][0], rows.columns[-1][1]
    row_bytes = rows.row_bytes
    step = max(1, BLOCK_BYTES // row_bytes)
    block = np.empty(step * row_bytes, dtype=np.uint8)
    for i in range(0, len(into), step):
        n = min(step, len(into) - i)
        _read_into(
            file, piece, start + i * row_bytes + low, block[low : (n - 1) * row_bytes + high]
        )
        lines, at = block[: n * row_bytes].reshape(n, row_bytes), 0
        for a, b in rows.columns:
            into[i : i + n, at : at + b - a] = lines[:, a:b]
            at += b - a


def _read_into(file: FileIO, piece: TensorPiece, start: int, into: np.ndarray) -> None:
    file.seek(start)
    view = memoryview(into.reshape(-1).data)
    while view:
        count = file.readinto(view)
        if not count:
            raise CheckpointError(
                f"{piece.tensor.file}: the file ended inside {piece.tensor.name}; download it again"
            )
        view = view[count:]


def _runs(numbers: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Neighboring ascending numbers as (first, count)."""
    first = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[first], i - first
            first = i
