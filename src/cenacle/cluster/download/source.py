"""Where a model's files come from: the interface of all sources, and retrying.

Owns: `Source`, how large requests are, when a source is given up.
Does not know: which bytes are wanted, where they go.
Next: `hub.py`, `local_folder.py` and `task.HeadSource` are sources; `download.py` reads them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ...errors import CenacleError, CheckpointError
from ...model.byte_ranges import ColumnRange

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""Called with bytes that are present and bytes in all."""

CHUNK_BYTES = 16 << 20  # of one request, and of one checksum: what an interruption costs at most
READ_BYTES = 1 << 20
CONNECTIONS = 4
MAX_ATTEMPTS = 6
FIRST_RETRY_DELAY_S = 0.5  # doubled after every failure


class SourceInterrupted(CenacleError):
    """A source broke off or is unreachable now: try again."""


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: its size in bytes, and its SHA-256 where the source states it."""

    size: int
    sha256: str | None = None


class Source(Protocol):
    """Where files can be had."""

    name: str

    def files(self) -> Mapping[str, SourceFile]:
        """All files by name.

        Raises:
            CheckpointError: there is no such checkpoint.
            SourceInterrupted: the source cannot be reached.
        """
        ...

    def read(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes [start, stop) of a file in pieces.

        Raises:
            CheckpointError: the source does not have them.
            SourceInterrupted: it broke off.
        """
        ...

    def read_columns(self, file: str, columns: ColumnRange) -> bytes:
        """The bytes of some columns of a file, as `ColumnRange.extract`; raises as `read`."""
        ...


def retry(work: Callable[[], T]) -> T:
    """Call `work` again, with exponential back-off, while it raises `SourceInterrupted`.

    Raises:
        CheckpointError: it failed `MAX_ATTEMPTS` times.
    """
    delay_s = FIRST_RETRY_DELAY_S
    for _ in range(MAX_ATTEMPTS - 1):
        with suppress(SourceInterrupted):
            return work()
        time.sleep(delay_s)
        delay_s *= 2
    try:
        return work()
    except SourceInterrupted as error:
        raise CheckpointError(
            f"{error}; gave up after {MAX_ATTEMPTS} attempts. Downloaded data is kept; try again"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [repr(error)])[0]
