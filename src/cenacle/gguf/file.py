"""The header of a GGUF file: metadata, and where each tensor's bytes are.

Owns: reading it, and checking it against the file.
Does not know: what tensors are for, how blocks are decoded (`blocks.py`).
Invariant: a tensor of an opened file lies inside it and has as many bytes as its type and shape
need. Nothing is read beyond the header, and nothing is allocated that the file has no bytes for.
Next: `blocks.py`; `demo/cut_experts.py` reads the tensors of one family.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .blocks import BLOCK_TYPES, TYPE_NAMES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 256 << 20  # the largest known vocabularies have 20 MB
MAX_DIMENSIONS = 4
MAX_TENSORS = 1 << 20
MAX_ALIGNMENT = 1 << 20

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i"},
    **{6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"},
}
_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

Metadata = dict[str, Any]
"""Values by key: numbers, booleans, strings, and lists of one of these."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: bytes [start, stop).

    Args:
        type: such as "Q4_K".
        shape: in rows, the innermost axis last; in weights.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class GgufFile:
    """A file whose header has been checked.

    Args:
        metadata: its own; of split files the first one's is the model's.
        tensors: in the file's order.
        header_bytes: where the first tensor may begin.
    """

    path: Path
    metadata: Metadata
    tensors: tuple[GgufTensor, ...]
    header_bytes: int

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read the header; no tensors.

        Raises:
            CheckpointError: the file is not GGUF, is damaged or truncated, or has tensors of types
                that cannot be read.
        """
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                return _read_file(_Cursor(path, file, size))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def split_files(path: Path) -> list[Path]:
    """All files of the model of which `path` is one, in order; a file that is not split is alone.

    Raises:
        CheckpointError: one of them is missing.
    """
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    names = [f"{match['stem']}-{i:05}-of-{match['count']}.gguf" for i in range(1, count + 1)]
    files = [path.with_name(name) for name in names]
    missing = [file.name for file in files if not file.exists()]
    if missing or not files:
        raise CheckpointError(
            f"{path}: expected {count} files of one model, {len(missing)} are missing, the first "
            f"is {missing[0] if missing else 'all'}; download it too"
        )
    return files


class _Cursor:
    """A position in a header, with the sentences for what is wrong there."""

    def __init__(self, path: Path, file: BufferedReader, size: int) -> None:
        self.path, self.file, self.size, self.position = path, file, size, 0

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}; download it again")

    def read(self, count: int) -> bytes:
        limit = min(self.size, MAX_HEADER_BYTES)
        data = self.file.read(count) if count <= limit - self.position else b""
        if len(data) != count:
            raise self.error(
                f"the header is damaged or the file is truncated: expected {count} more bytes at "
                f"byte {self.position} of {self.size}"
            )
        self.position += count
        return data

    def scalar(self, kind: int) -> Any:
        code = f"<{_SCALARS[kind]}"
        return struct.unpack(code, self.read(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.read(self.scalar(10)).decode(errors="replace")  # some vocabularies have bytes

    def value(self) -> Any:
        kind = self.scalar(4)
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(kind)
        if kind != _ARRAY:
            raise self.error(f"the header is damaged: expected a type of 0 to 12, got {kind}")
        item, count = self.scalar(4), self.scalar(10)
        if item != _STRING and item not in _SCALARS:
            raise self.error(f"the header is damaged: expected a list of values, got type {item}")
        item_bytes = 8 if item == _STRING else struct.calcsize(f"<{_SCALARS[item]}")
        if count > (self.size - self.position) // item_bytes:
            raise self.error(
                f"the header is damaged: a list of {count} items does not fit in the file"
            )
        if item == _STRING:
            return [self.string() for _ in range(count)]
        return list(struct.unpack(f"<{count}{_SCALARS[item]}", self.read(count * item_bytes)))


def _read_file(cursor: _Cursor) -> GgufFile:
    if cursor.size < 24 or cursor.read(4) != MAGIC:
        raise cursor.error("this is no GGUF file: it does not begin with 'GGUF'")
    version = cursor.scalar(4)
    if version not in VERSIONS:
        big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        reason = "it is big-endian" if big_endian else f"it has version {version}"
        raise CheckpointError(
            f"{cursor.path}: expected GGUF version 2 or 3, little-endian, but {reason}; "
            "use a current copy of the model"
        )
    tensor_count, value_count = cursor.scalar(10), cursor.scalar(10)
    if tensor_count > MAX_TENSORS or value_count > MAX_TENSORS:
        raise cursor.error(
            f"the header is damaged: {tensor_count} tensors and {value_count} values"
        )
    metadata: Metadata = {}
    for _ in range(value_count):
        key = cursor.string()
        if key in metadata:
            raise cursor.error(f"the header is damaged: {key!r:.100} is listed twice")
        metadata[key] = cursor.value()
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT:
        raise cursor.error(f"expected an alignment of 1 to {MAX_ALIGNMENT}, got {alignment!r:.100}")
    entries = [_read_entry(cursor) for _ in range(tensor_count)]
    begin = -(-cursor.position // alignment) * alignment
    tensors = tuple(_place_tensor(cursor, begin, entry, alignment) for entry in entries)
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise cursor.error("the header is damaged: two tensors have one name")
    _check_apart(cursor, tensors)
    return GgufFile(cursor.path, metadata, tensors, min(begin, cursor.size))


_Entry = tuple[str, tuple[int, ...], int, int]


def _read_entry(cursor: _Cursor) -> _Entry:
    name, dimensions = cursor.string(), cursor.scalar(4)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.error(
            f"tensor {name!r:.100}: expected 1 to {MAX_DIMENSIONS} dimensions, got {dimensions}"
        )
    shape = tuple(cursor.scalar(10) for _ in range(dimensions))[::-1]
    return name, shape, cursor.scalar(4), cursor.scalar(10)


def _place_tensor(cursor: _Cursor, begin: int, entry: _Entry, alignment: int) -> GgufTensor:
    name, shape, kind, offset = entry
    type_name = TYPE_NAMES.get(kind)
    if type_name not in BLOCK_TYPES:
        known = ", ".join(BLOCK_TYPES)
        raise CheckpointError(
            f"{cursor.path}: tensor {name:.100} is of type {type_name or kind}, which cannot be "
            f"read; expected one of {known}; use another quantization of the model"
        )
    block = BLOCK_TYPES[type_name]
    if min(shape) < 1 or shape[-1] % block.weights:
        raise cursor.error(
            f"tensor {name:.100} of {type_name}: expected rows of a multiple of {block.weights} "
            f"weights, got {list(shape)}"
        )
    start = begin + offset
    stop = start + math.prod(shape) // block.weights * block.nbytes
    if offset % alignment or stop > cursor.size:
        raise cursor.error(
            f"the file is truncated or its header is damaged: tensor {name:.100} of {type_name} "
            f"{list(shape)} is at bytes {start} to {stop}, the file has {cursor.size}"
        )
    return GgufTensor(name, type_name, shape, start, stop)


def _check_apart(cursor: _Cursor, tensors: Sequence[GgufTensor]) -> None:
    end = 0
    for tensor in sorted(tensors, key=lambda t: t.start):
        if tensor.start < end:
            raise cursor.error(
                f"the header is damaged: tensor {tensor.name:.100} begins inside another one"
            )
        end = tensor.stop
