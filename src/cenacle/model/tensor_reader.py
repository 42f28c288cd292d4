"""."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from io import FileIO
from itertools import pairwise

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from . import tensor_layout
from .checkpoint import DTYPES, TensorInfo

BLOCK_BYTES = 1 << 20  # bytes read at a time of rows of which only columns are wanted


MIN_GAP_BYTES = 8192  # bytes; two pages: less is not worth another read


def read_ranges(
    tensor: TensorInfo,
    shape: tuple[int, ...],
    wanted: list[int],
    axis: int,
    ranges: Sequence[tuple[int, int]],
) -> mx.array:
    """Read the `ranges` along one axis of some items of a tensor, no byte twice.

    Memory: the result, and `_BLOCK` bytes or one row more. Neighbouring pieces with less than
    `_GAP` bytes between them are read with what lies between: a disk reads whole pages anyway.

    Args:
        shape: how to look at the tensor; as many elements as it has.
        wanted: indices along the first axis, ascending.
        axis: which axis is cut; 0: none, and `ranges` are ignored.
        ranges: [start, stop) along `axis`, ascending.

    Raises:
        CheckpointError: the file ended or could not be read.
    """
    cut = tensor_layout.ExpertTensorView(shape, axis, tuple(ranges)).cut
    data = gather_bytes(tensor, shape, wanted, axis, ranges)
    return to_array(tensor, data, [len(wanted), *cut[1:]])


def to_array(tensor: TensorInfo, data: np.ndarray, shape: Sequence[int]) -> mx.array:
    """Bytes of a tensor's type as an array."""
    _, carrier, dtype = DTYPES[tensor.dtype]
    array = mx.array(data.reshape(-1).view(carrier).reshape(shape))
    return array.view(dtype) if carrier is np.uint16 and dtype == mx.bfloat16 else array


def gather_bytes(
    tensor: TensorInfo,
    shape: tuple[int, ...],
    wanted: list[int],
    axis: int,
    ranges: Sequence[tuple[int, int]],
) -> np.ndarray:
    """The bytes of `read_parts`, [rows, bytes of a row]."""
    item = (tensor.stop - tensor.start) // shape[0]
    across = math.prod(shape[1:axis]) if axis else 1
    row = item // across
    each = row // shape[axis] if axis else row
    pieces = [(a * each, b * each) for a, b in ranges] if axis else [(0, row)]
    width = sum(b - a for a, b in pieces)
    gaps = [a - b for (_, b), (a, _) in pairwise([*pieces, (row + pieces[0][0], 0)])]
    out = np.empty((len(wanted) * across, width), dtype=np.uint8)
    with tensor.file.open("rb", buffering=0) as f:
        at = 0
        for first, count in runs(wanted):
            begin, rows = tensor.start + first * item, count * across
            if len(pieces) == 1 and gaps == [0]:
                _read_into(f, tensor, begin, out[at : at + rows])
            elif max(gaps) >= MIN_GAP_BYTES:
                for i in range(rows):
                    to = 0
                    for a, b in pieces:
                        _read_into(f, tensor, begin + i * row + a, out[at + i, to : to + b - a])
                        to += b - a
            else:
                low, high = pieces[0][0], pieces[-1][1]
                step = max(1, BLOCK_BYTES // row)
                block = np.empty(step * row, dtype=np.uint8)
                for i in range(0, rows, step):
                    some = min(step, rows - i)
                    _read_into(
                        f, tensor, begin + i * row + low, block[low : (some - 1) * row + high]
                    )
                    lines, to = block[: some * row].reshape(some, row), 0
                    for a, b in pieces:
                        out[at + i : at + i + some, to : to + b - a] = lines[:, a:b]
                        to += b - a
            at += rows
    return out


def _read_into(f: FileIO, tensor: TensorInfo, start: int, into: np.ndarray) -> None:
    f.seek(start)
    view = memoryview(into.reshape(-1).data)
    while view:
        got = f.readinto(view)
        if not got:
            raise CheckpointError(
                f"{tensor.file}: the file ended inside {tensor.name}; fetch it again"
            )
        view = view[got:]


def runs(numbers: list[int]) -> Iterable[tuple[int, int]]:
    """Neighbouring ascending numbers as (first, count)."""
    first = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[first], i - first
            first = i
