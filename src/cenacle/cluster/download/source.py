"""."""

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
"""Called with bytes that are here and bytes in all."""


CHUNK_BYTES = 16 << 20  # of one request, and of one hash: what a break costs at most


READ_BYTES = 1 << 20


CONNECTIONS = 4


MAX_ATTEMPTS = 6


FIRST_RETRY_DELAY_S = 0.5  # doubled after every failure that brought nothing


class SourceInterrupted(CenacleError):
    """A source broke off, or is not there now: to be tried again."""


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: bytes, and its SHA-256 where the source says it."""

    size: int
    sha256: str | None = None


class Source(Protocol):
    """Where files can be had."""

    name: str

    def files(self) -> Mapping[str, SourceFile]:
        """What there is.

        Raises:
            CheckpointError: there is no such checkpoint.
            Interrupted: the source cannot be reached.
        """
        ...

    def read(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes [start, stop) in pieces.

        Raises:
            CheckpointError: the source gives something else.
            Interrupted: it broke off.
        """
        ...

    def columns(self, file: str, strip: ColumnRange) -> bytes:
        """What `strip.take` gives of a file; raises as `read`."""
        ...


def retry(work: Callable[[], T]) -> T:
    """Do it again after a while if the source breaks off.

    Raises:
        CheckpointError: it does so too often.
    """
    pause = FIRST_RETRY_DELAY_S
    for _ in range(MAX_ATTEMPTS - 1):
        with suppress(SourceInterrupted):
            return work()
        time.sleep(pause)
        pause *= 2
    try:
        return work()
    except SourceInterrupted as error:
        raise CheckpointError(
            f"{error}; given up after {MAX_ATTEMPTS} attempts. What has come is kept: ask again"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [repr(error)])[0]
