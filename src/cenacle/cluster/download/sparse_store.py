"""."""

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
from ...model.byte_ranges import JOURNAL, ByteRange, ColumnRange, Span, merge_spans, subtract_spans
from .source import CONNECTIONS, SourceInterrupted

PAGE_BYTES = 4096  # of a disk


@dataclass
class SparseStore:
    """A folder of files with holes, and what is known to be in them.

    Args:
        folder: made if need be.
    """

    folder: Path
    sizes: dict[str, int] = field(default_factory=dict)
    _done: dict[str, list[tuple[ByteRange, str]]] = field(default_factory=dict)
    _seen: tuple[int, int] = (0, 0)  # the journal's inode, and how far it was read
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be made ({error.strerror})") from error
        self.refresh()

    def refresh(self) -> None:
        """Take in what another has noted meanwhile."""
        journal = self.folder / JOURNAL
        with self._lock, suppress(FileNotFoundError), journal.open("rb") as f:
            about = os.fstat(f.fileno())
            if about.st_ino != self._seen[0]:
                self.sizes.clear()
                self._done.clear()
                self._seen = (about.st_ino, 0)
            f.seek(self._seen[1])
            lines, _, _ = f.read().rpartition(b"\n")  # the last may be half a line
            self._seen = (about.st_ino, self._seen[1] + len(lines))
            for line in lines.splitlines():
                with suppress(ValueError, KeyError, TypeError):  # one that was cut off
                    self._take_in(json.loads(line))

    def _take_in(self, noted: dict[str, Any]) -> None:
        if "size" in noted:
            self.sizes[noted["file"]] = noted["size"]
            return
        start, stop, span = noted["start"], noted["stop"], None
        if "period" in noted:
            kept = tuple((a, b) for a, b in noted["kept"])
            span = ColumnRange(start, stop, noted["period"], kept)
        self._done.setdefault(noted["file"], []).append((span or (start, stop), noted["sha256"]))

    def spans(self, file: str) -> list[Span]:
        """The ranges of which all is here, ascending, neighbours joined."""
        done = self._done.get(file, ())
        return merge_spans((s[0], s[1]) for s, _ in done if not isinstance(s, ColumnRange))

    def make(self, file: str, size: int) -> None:
        """A file of holes.

        Raises:
            CheckpointError: it is here in another size: the source has changed; or its name leads
                elsewhere.
        """
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise CheckpointError(f"{self.folder}: a file cannot be called {file}")
        known = self.sizes.get(file)
        if known is not None and known != size:
            raise CheckpointError(
                f"{self.folder / file}: the source now has {size} bytes where it had {known}; "
                f"remove the folder to fetch the new model"
            )
        if known is None or not (self.folder / file).exists():
            path = self.folder / file
            with self._room():
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("ab") as f:
                    f.truncate(size)
            if known is None:
                self.sizes[file] = size
                self._note([{"file": file, "size": size}])

    def write(self, file: str, start: int, pieces: Iterator[bytes], stop: int) -> str:
        """Write a range, which `keep` has to note; its SHA-256.

        Raises:
            CheckpointError: the disk is full, or cannot be written.
            Interrupted: the pieces end too early.
        """
        digest, at = hashlib.sha256(), start
        with self._room(), (self.folder / file).open("r+b") as f:
            f.seek(start)
            for piece in pieces:
                f.write(piece)
                digest.update(piece)
                at += len(piece)
            if at < stop:
                raise SourceInterrupted(f"{file} ended at byte {at}, expected {stop}")
        return digest.hexdigest()

    def write_columns(self, file: str, strip: ColumnRange, data: bytes) -> str:
        """The same for what `strip.take` gave."""
        if len(data) != strip.nbytes:
            raise SourceInterrupted(
                f"{file}: got {len(data)} bytes of columns, expected {strip.nbytes}"
            )
        at, view = 0, memoryview(data)
        with self._room(), (self.folder / file).open("r+b", buffering=0) as f:
            for start, stop in strip.pieces():
                os.pwrite(f.fileno(), view[at : at + stop - start], start)
                at += stop - start
        return hashlib.sha256(data).hexdigest()

    def keep(self, file: str, written: Sequence[tuple[ByteRange, str]]) -> None:
        """Note ranges of a file, when they are on the disk."""
        if not written:
            return
        with self._room():
            with (self.folder / file).open("r+b") as f:
                os.fsync(f.fileno())
            self._note([_line(file, *each) for each in written])
        self._done.setdefault(file, []).extend(written)

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CheckpointError(
                    f"{self.folder}: the disk is full; free some space and ask again, what is "
                    f"here is kept"
                ) from error
            raise CheckpointError(
                f"{self.folder}: cannot be written ({error.strerror}); ask again when it can, "
                f"what is here is kept"
            ) from error

    def _note(self, lines: Sequence[dict[str, Any]]) -> None:
        # A line that was cut off before is ended first.
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        with self._lock, (self.folder / JOURNAL).open("a") as f:
            f.write(f"\n{text}")

    def damaged(self) -> dict[str, list[ByteRange]]:
        """Ranges whose bytes are no longer those that were fetched. Reads everything."""

        def wrong(file: str, span: ByteRange, digest: str) -> bool:
            try:
                with (self.folder / file).open("rb") as f:
                    f.seek(span[0])
                    data = f.read(span[1] - span[0])
            except FileNotFoundError:
                return True
            if len(data) < span[1] - span[0]:
                return True
            data = span.take(data) if isinstance(span, ColumnRange) else data
            return hashlib.sha256(data).hexdigest() != digest

        done = [(file, *each) for file, spans in self._done.items() for each in spans]
        found: dict[str, list[ByteRange]] = {}
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for (file, span, _), bad in zip(done, pool.map(lambda d: wrong(*d), done), strict=True):
                if bad:
                    found.setdefault(file, []).append(span)
        return found

    def forget(self, spans: Mapping[str, Sequence[ByteRange]]) -> None:
        """Take ranges for missing from now on."""
        for file, wrong in spans.items():
            self._done[file] = [d for d in self._done[file] if d[0] not in wrong]
        lines: list[dict[str, Any]] = [{"file": f, "size": n} for f, n in self.sizes.items()]
        lines += [_line(f, *each) for f, done in self._done.items() for each in done]
        beside = self.folder / f"{JOURNAL}.new"
        beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
        beside.replace(self.folder / JOURNAL)

    def missing(self, wanted: Mapping[str, Sequence[ByteRange]]) -> dict[str, list[ByteRange]]:
        """What of it is not here."""
        found: dict[str, list[ByteRange]] = {}
        for file, each in wanted.items():
            whole = self.spans(file)
            gaps: list[ByteRange] = []
            gaps += subtract_spans(
                [(w[0], w[1]) for w in each if not isinstance(w, ColumnRange)], whole
            )
            strips = [w for w in each if isinstance(w, ColumnRange)]
            if strips:
                gaps += self._missing_columns(file, strips, whole)
            if gaps:
                found[file] = gaps
        return found

    def _missing_columns(
        self, file: str, strips: Sequence[ColumnRange], whole: list[Span]
    ) -> Iterator[ColumnRange]:
        here: dict[
            tuple[int, int], list[ColumnRange]
        ] = {}  # by length of rows, and where they begin
        for done, _ in self._done.get(file, ()):
            if isinstance(done, ColumnRange):
                here.setdefault((done.period, done.start % done.period), []).append(done)
        for strip in strips:
            same = here.get((strip.period, strip.start % strip.period), ())
            have = merge_spans([*whole, *((s.start, s.stop) for s in same if s.has(strip))])
            for start, stop in subtract_spans([(strip.start, strip.stop)], have):
                before, after = (start - strip.start) % strip.period, (strip.stop - stop)
                yield strip._replace(start=start - before, stop=stop + after % strip.period)

    def complete(self, file: str, sha256: str) -> bool | None:
        """Whether a file that is here whole has the hash that its source gives; None: it is not."""
        if self.spans(file) != [(0, self.sizes[file])]:
            return None
        with (self.folder / file).open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest() == sha256


def _line(file: str, span: ByteRange, digest: str) -> dict[str, Any]:
    line = {"file": file, "start": span[0], "stop": span[1], "sha256": digest}
    return (
        {**line, "period": span.period, "kept": span.kept}
        if isinstance(span, ColumnRange)
        else line
    )
