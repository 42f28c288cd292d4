"""A folder of sparse files: a node's part of a checkpoint.

Owns: which byte ranges are present, writing more, and finding damage.
Does not know: where bytes come from, which are wanted.
How: files keep their names and sizes, but only what was asked for is written: the rest are holes
that take no disk. So the loader, which reads by byte range, need not know. Beside the files
`ranges.jsonl` has a line for every complete range, with its SHA-256.
Invariant: a range is recorded after it is on the disk, so whatever ends the program, what is
recorded is there.
Next: `download.py` fills it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import CheckpointError
from ...model.byte_ranges import (
    JOURNAL,
    ByteRange,
    ColumnRange,
    Span,
    byte_range_from_json,
    merge_spans,
    subtract_spans,
)
from .source import CONNECTIONS, SourceInterrupted

PAGE_BYTES = 4096  # of a disk


@dataclass
class SparseStore:
    """A folder of files with holes, and the ranges that are present.

    Args:
        folder: created if need be.
    """

    folder: Path
    sizes: dict[str, int] = field(default_factory=dict)
    _present: dict[str, list[tuple[ByteRange, str]]] = field(default_factory=dict)
    _journal_read: tuple[int, int] = (0, 0)  # the journal's inode, and how far it was read
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot create it ({error.strerror})") from error
        self.refresh()

    def refresh(self) -> None:
        """Read what another process has recorded meanwhile."""
        journal = self.folder / JOURNAL
        with self._lock, suppress(FileNotFoundError), journal.open("rb") as f:
            inode = os.fstat(f.fileno()).st_ino
            if inode != self._journal_read[0]:
                self.sizes.clear()
                self._present.clear()
                self._journal_read = (inode, 0)
            f.seek(self._journal_read[1])
            lines, _, _ = f.read().rpartition(b"\n")  # the last may be half a line
            self._journal_read = (inode, self._journal_read[1] + len(lines))
            for line in lines.splitlines():
                with suppress(ValueError, KeyError, TypeError):  # one that was cut off
                    self._read_entry(json.loads(line))

    def _read_entry(self, entry: dict[str, Any]) -> None:
        if "size" in entry:
            self.sizes[entry["file"]] = entry["size"]
            return
        byte_range = byte_range_from_json(entry["range"])
        self._present.setdefault(entry["file"], []).append((byte_range, entry["sha256"]))

    def present_spans(self, file: str) -> list[Span]:
        """The spans of which every byte is present, ascending, neighbors merged."""
        present = self._present.get(file, ())
        return merge_spans((r[0], r[1]) for r, _ in present if not isinstance(r, ColumnRange))

    def create_file(self, file: str, size: int) -> None:
        """Create a file of holes, unless it exists.

        Raises:
            CheckpointError: it exists in another size (the source has changed), or its name leads
                out of the folder.
        """
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise CheckpointError(f"{self.folder}: {file} is not a valid file name")
        known = self.sizes.get(file)
        if known is not None and known != size:
            raise CheckpointError(
                f"{self.folder / file}: the source now has {size} bytes where it had {known}; "
                f"remove the folder to download the new model"
            )
        path = self.folder / file
        if known is None or not path.exists():
            with self._explain_disk_errors():
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("ab") as f:
                    f.truncate(size)
            if known is None:
                self.sizes[file] = size
                self._append_journal([{"file": file, "size": size}])

    def write(self, file: str, start: int, pieces: Iterator[bytes], stop: int) -> str:
        """Write a span, which `mark_present` has to record; returns its SHA-256.

        Raises:
            CheckpointError: the disk is full or cannot be written.
            SourceInterrupted: the pieces end too early.
        """
        digest, at = hashlib.sha256(), start
        with self._explain_disk_errors(), (self.folder / file).open("r+b") as f:
            f.seek(start)
            for piece in pieces:
                f.write(piece)
                digest.update(piece)
                at += len(piece)
            if at < stop:
                raise SourceInterrupted(f"{file} ended at byte {at}, expected {stop}")
        return digest.hexdigest()

    def write_columns(self, file: str, columns: ColumnRange, data: bytes) -> str:
        """The same for the bytes of `columns.extract`."""
        if len(data) != columns.nbytes:
            raise SourceInterrupted(
                f"{file}: expected {columns.nbytes} bytes of columns, got {len(data)}"
            )
        at, view = 0, memoryview(data)
        with self._explain_disk_errors(), (self.folder / file).open("r+b", buffering=0) as f:
            for start, stop in columns.spans():
                os.pwrite(f.fileno(), view[at : at + stop - start], start)
                at += stop - start
        return hashlib.sha256(data).hexdigest()

    def mark_present(self, file: str, written: Sequence[tuple[ByteRange, str]]) -> None:
        """Record written ranges of a file with their SHA-256, after they are on the disk."""
        if not written:
            return
        with self._explain_disk_errors():
            with (self.folder / file).open("r+b") as f:
                os.fsync(f.fileno())
            self._append_journal([_journal_entry(file, *pair) for pair in written])
        self._present.setdefault(file, []).extend(written)

    @contextmanager
    def _explain_disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CheckpointError(
                    f"{self.folder}: the disk is full; free some space and try again. "
                    f"Downloaded data is kept"
                ) from error
            raise CheckpointError(
                f"{self.folder}: cannot write ({error.strerror}); try again when this is fixed. "
                f"Downloaded data is kept"
            ) from error

    def _append_journal(self, entries: Sequence[dict[str, Any]]) -> None:
        # The newline ends a line that was cut off before.
        text = "".join(f"{json.dumps(entry)}\n" for entry in entries)
        with self._lock, (self.folder / JOURNAL).open("a") as f:
            f.write(f"\n{text}")

    def find_damaged(self) -> dict[str, list[ByteRange]]:
        """Ranges whose bytes no longer match their SHA-256. Reads everything."""
        present = [(file, *pair) for file, pairs in self._present.items() for pair in pairs]
        damaged: dict[str, list[ByteRange]] = {}
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            intact = pool.map(lambda entry: self._is_intact(*entry), present)
            for (file, byte_range, _), is_intact in zip(present, intact, strict=True):
                if not is_intact:
                    damaged.setdefault(file, []).append(byte_range)
        return damaged

    def _is_intact(self, file: str, byte_range: ByteRange, sha256: str) -> bool:
        start, stop, *_ = byte_range
        try:
            with (self.folder / file).open("rb") as f:
                f.seek(start)
                data = f.read(stop - start)
        except FileNotFoundError:
            return False
        if len(data) < stop - start:
            return False
        data = byte_range.extract(data) if isinstance(byte_range, ColumnRange) else data
        return hashlib.sha256(data).hexdigest() == sha256

    def mark_missing(self, ranges: Mapping[str, Sequence[ByteRange]]) -> None:
        """Record that ranges are missing: exactly those that were marked present."""
        for file, missing in ranges.items():
            self._present[file] = [p for p in self._present[file] if p[0] not in missing]
        self._rewrite_journal()

    def mark_file_missing(self, file: str) -> None:
        """Record that nothing of a file is present."""
        self._present[file] = []
        self._rewrite_journal()

    def _rewrite_journal(self) -> None:
        entries: list[dict[str, Any]] = [{"file": f, "size": n} for f, n in self.sizes.items()]
        entries += [
            _journal_entry(f, *pair) for f, pairs in self._present.items() for pair in pairs
        ]
        replacement = self.folder / f"{JOURNAL}.new"
        replacement.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        replacement.replace(self.folder / JOURNAL)

    def missing(self, required: Mapping[str, Sequence[ByteRange]]) -> dict[str, list[ByteRange]]:
        """What of `required` is not present, by file."""
        missing: dict[str, list[ByteRange]] = {}
        for file, ranges in required.items():
            present = self.present_spans(file)
            spans = [(r[0], r[1]) for r in ranges if not isinstance(r, ColumnRange)]
            gaps: list[ByteRange] = [*subtract_spans(spans, present)]
            columns = [r for r in ranges if isinstance(r, ColumnRange)]
            if columns:
                gaps += self._missing_columns(file, columns, present)
            if gaps:
                missing[file] = gaps
        return missing

    def _missing_columns(
        self, file: str, required: Sequence[ColumnRange], present: list[Span]
    ) -> Iterator[ColumnRange]:
        by_grid: dict[tuple[int, int], list[ColumnRange]] = {}
        for done, _ in self._present.get(file, ()):
            if isinstance(done, ColumnRange):
                by_grid.setdefault(_grid(done), []).append(done)
        for columns in required:
            same = [c for c in by_grid.get(_grid(columns), ()) if c.covers_columns_of(columns)]
            present_spans = merge_spans([*present, *((c.start, c.stop) for c in same)])
            for start, stop in subtract_spans([(columns.start, columns.stop)], present_spans):
                before = (start - columns.start) % columns.row_bytes
                after = (columns.stop - stop) % columns.row_bytes
                yield columns._replace(start=start - before, stop=stop + after)

    def matches_checksum(self, file: str, sha256: str) -> bool | None:
        """Whether a complete file has the SHA-256 of its source; None: it is not complete."""
        if self.present_spans(file) != [(0, self.sizes[file])]:
            return None
        with (self.folder / file).open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest() == sha256


def _grid(columns: ColumnRange) -> tuple[int, int]:
    """The length of rows, and where they begin."""
    return columns.row_bytes, columns.start % columns.row_bytes


def _journal_entry(file: str, byte_range: ByteRange, sha256: str) -> dict[str, Any]:
    return {"file": file, "range": byte_range, "sha256": sha256}
