"""A node's part of a checkpoint, from the hub or from another node: only the bytes that it reads.

Owns: which ranges are here, fetching those that are not, resuming, and noticing damage.
Does not know: plans (it is given spans of bytes), how nodes talk.
How: files keep their names and sizes, but only what was asked for is written: the rest are holes
that take no disk. So the loader, which reads by byte range, needs to know nothing of it. Beside
them `ranges.jsonl` has a line for every range that is complete, with its hash.
Invariant: a range is noted after it is on the disk, so whatever ends the program, what is noted is
there; a source that changes its files, or gives other bytes than it says, is refused.
Next: `model/weights.py` (`spans_of`) says what a rank needs.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import CenacleError, CheckpointError
from ..plan import human

Span = tuple[int, int]
"""Bytes [start, stop) of a file."""

Progress = Callable[[int, int], None]
"""Called with bytes that are here and bytes in all."""

JOURNAL = "ranges.jsonl"
CHUNK_BYTES = 16 << 20  # of one request, and of one hash: what a break costs at most
PIECE_BYTES = 1 << 20
CONNECTIONS = 4
TRIES = 6
FIRST_PAUSE_S = 0.5  # doubled after every failure that brought nothing
SMALL_BYTES = 64 << 20  # files that are no weights are fetched whole, up to this
HEADER_BYTES = 1 << 20  # first guess at the length of a safetensors header


class Interrupted(CenacleError):
    """A source broke off, or is not there now: to be tried again."""


@dataclass(frozen=True)
class File:
    """A file of a source: bytes, and its SHA-256 where the source says it."""

    size: int
    sha256: str | None = None


class Source(Protocol):
    """Where files can be had."""

    name: str

    def files(self) -> Mapping[str, File]:
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


class Hub:
    """A repository of the Hugging Face hub (or of what answers like it, by HF_ENDPOINT).

    Args:
        repo: "org/name".
        revision: branch, tag or commit; None: the main one.
        deadline_s: longest silence of the server.
    """

    def __init__(self, repo: str, revision: str | None = None, deadline_s: float = 30.0) -> None:
        self.name, self.revision, self._deadline_s = repo, revision, deadline_s
        self._commit: str | None = None

    def files(self) -> Mapping[str, File]:
        """See `Source`; those that mlx-lm would fetch."""
        from fnmatch import fnmatch

        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
        from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

        try:
            info = HfApi().model_info(self.name, revision=self.revision, files_metadata=True)
        except RepositoryNotFoundError as error:
            raise CheckpointError(f"{self.name}: the hub has no such repository") from error
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise Interrupted(
                f"{self.name}: the hub does not answer: {_first_line(error)}"
            ) from error
        self._commit = info.sha
        return {
            s.rfilename: File(s.size or 0, s.lfs.sha256 if s.lfs is not None else None)
            for s in info.siblings or ()
            if any(fnmatch(s.rfilename, p) for p in DEFAULT_ALLOW_PATTERNS)
        }

    def read(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """See `Source`."""
        import httpx
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        if self._commit is None:
            self.files()  # all of a part is of one commit
        url = hf_hub_url(self.name, file, revision=self._commit)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
        try:
            with httpx.stream(
                "GET", url, headers=headers, follow_redirects=True, timeout=self._deadline_s
            ) as answer:
                if answer.status_code in (408, 425, 429) or answer.status_code >= 500:
                    raise Interrupted(f"{self.name}: the hub answers {answer.status_code}")
                whole = answer.status_code == 200 and start == 0
                if answer.status_code != 206 and not whole:
                    raise CheckpointError(
                        f"{self.name}: asked for a part of {file} the hub answers "
                        f"{answer.status_code}, expected 206"
                    )
                left = stop - start
                for piece in answer.iter_bytes(PIECE_BYTES):
                    yield piece[:left]
                    left -= len(piece)
                    if left <= 0:
                        return
        except httpx.HTTPError as error:
            raise Interrupted(f"{self.name}: {_first_line(error)}") from error


class Folder:
    """A checkpoint's folder on this machine, whole or a part: what another node is given.

    Args:
        path: where it is.
    """

    def __init__(self, path: Path) -> None:
        self.name, self._path = str(path), path
        self._store = Store(path) if (path / JOURNAL).exists() else None

    def files(self) -> Mapping[str, File]:
        """See `Source`."""
        if self._store is not None:
            return {name: File(size) for name, size in self._store.sizes.items()}
        if not self._path.is_dir():
            raise CheckpointError(f"{self._path}: no such folder")
        return {p.name: File(p.stat().st_size) for p in sorted(self._path.iterdir()) if p.is_file()}

    def has(self, file: str, start: int, stop: int) -> bool:
        """Whether all of a range is here."""
        if self._store is not None:
            return not _without([(start, stop)], self._store.spans(file))
        path = self._path / file
        return path.is_file() and stop <= path.stat().st_size

    def read(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """See `Source`."""
        if not self.has(file, start, stop):
            raise CheckpointError(f"{self.name} does not have bytes {start} to {stop} of {file}")
        with (self._path / file).open("rb") as f:
            f.seek(start)
            while start < stop:
                piece = f.read(min(PIECE_BYTES, stop - start))
                if not piece:
                    raise CheckpointError(f"{self._path / file}: the file ended at byte {start}")
                yield piece
                start += len(piece)


@dataclass
class Store:
    """A folder of files with holes, and what is known to be in them.

    Args:
        folder: made if need be.
    """

    folder: Path
    sizes: dict[str, int] = field(default_factory=dict)
    _done: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = self.folder / JOURNAL
        for line in journal.read_text().splitlines() if journal.exists() else ():
            with suppress(ValueError, KeyError, TypeError):  # the last line may have been cut off
                noted = json.loads(line)
                if "size" in noted:
                    self.sizes[noted["file"]] = noted["size"]
                else:
                    span = (noted["start"], noted["stop"], noted["sha256"])
                    self._done.setdefault(noted["file"], []).append(span)

    def spans(self, file: str) -> list[Span]:
        """The ranges that are here, ascending, neighbours joined."""
        return _joined([(a, b) for a, b, _ in self._done.get(file, ())])

    def make(self, file: str, size: int) -> None:
        """A file of holes.

        Raises:
            CheckpointError: it is here in another size: the source has changed.
        """
        known = self.sizes.get(file)
        if known is not None and known != size:
            raise CheckpointError(
                f"{self.folder / file}: the source now has {size} bytes where it had {known}; "
                f"remove the folder to fetch the new model"
            )
        if known is None:
            path = self.folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as f:
                f.truncate(size)
            self.sizes[file] = size
            self._note({"file": file, "size": size})

    def write(self, file: str, start: int, pieces: Iterator[bytes], stop: int) -> None:
        """Write a range and note it.

        Raises:
            CheckpointError: the disk is full.
            Interrupted: the pieces end too early.
        """
        digest, at = hashlib.sha256(), start
        try:
            with (self.folder / file).open("r+b") as f:
                f.seek(start)
                for piece in pieces:
                    f.write(piece)
                    digest.update(piece)
                    at += len(piece)
                if at < stop:
                    raise Interrupted(f"{file} ended at byte {at}, expected {stop}")
                f.flush()
                os.fsync(f.fileno())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CheckpointError(
                    f"{self.folder}: the disk is full; free some space and ask again, what is "
                    f"here is kept"
                ) from error
            raise
        self._done.setdefault(file, []).append((start, stop, digest.hexdigest()))
        self._note({"file": file, "start": start, "stop": stop, "sha256": digest.hexdigest()})

    def _note(self, line: dict[str, Any]) -> None:
        with self._lock, (self.folder / JOURNAL).open("a") as f:
            f.write(json.dumps(line) + "\n")

    def damaged(self) -> dict[str, list[Span]]:
        """Ranges whose bytes are no longer those that were fetched. Reads everything."""
        found: dict[str, list[Span]] = {}
        for file, spans in self._done.items():
            with (self.folder / file).open("rb") as f:
                for start, stop, digest in spans:
                    f.seek(start)
                    if hashlib.sha256(f.read(stop - start)).hexdigest() != digest:
                        found.setdefault(file, []).append((start, stop))
        return found

    def forget(self, spans: Mapping[str, Sequence[Span]]) -> None:
        """Take ranges for missing from now on."""
        for file, wrong in spans.items():
            self._done[file] = [d for d in self._done[file] if (d[0], d[1]) not in wrong]
        lines = [{"file": f, "size": n} for f, n in self.sizes.items()]
        lines += [
            {"file": f, "start": a, "stop": b, "sha256": h}
            for f, done in self._done.items()
            for a, b, h in done
        ]
        beside = self.folder / f"{JOURNAL}.new"
        beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
        beside.replace(self.folder / JOURNAL)

    def missing(self, spans: Mapping[str, Sequence[Span]]) -> dict[str, list[Span]]:
        """What of the spans is not here."""
        left = {file: _without(list(wanted), self.spans(file)) for file, wanted in spans.items()}
        return {file: gaps for file, gaps in left.items() if gaps}

    def complete(self, file: str, sha256: str) -> bool | None:
        """Whether a file that is here whole has the hash that its source gives; None: it is not."""
        if self.spans(file) != [(0, self.sizes[file])]:
            return None
        with (self.folder / file).open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest() == sha256


def skeleton(source: Source, folder: Path) -> Store:
    """A checkpoint's small files and the headers of its weights: enough to describe and plan it.

    Raises:
        CheckpointError: it is no checkpoint, the disk is full, or the source cannot be reached.
    """
    store, listed = Store(folder), _patiently(source.name, source.files)
    weights = [f for f in listed if f.endswith(".safetensors")]
    if not weights:
        raise CheckpointError(f"{source.name} has no weights: expected files named *.safetensors")
    wanted: dict[str, list[Span]] = {}
    for file, what in listed.items():
        store.make(file, what.size)
        if file in weights:
            wanted[file] = [(0, min(what.size, HEADER_BYTES))]
        elif 0 < what.size <= SMALL_BYTES:
            wanted[file] = [(0, what.size)]
    fetch([source], store, wanted)
    longer = {f: [(0, header)] for f in weights if (header := _header_end(store, f)) > HEADER_BYTES}
    fetch([source], store, longer)
    return store


def _header_end(store: Store, file: str) -> int:
    with (store.folder / file).open("rb") as f:
        head = f.read(8)
    end = 8 + struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    return int(min(end, store.sizes[file]))


def fetch(
    sources: Sequence[Source],
    store: Store,
    spans: Mapping[str, Sequence[Span]],
    progress: Progress = lambda *_: None,
) -> int:
    """Make the spans be here, from the first source that has them.

    Args:
        sources: in the order in which they are asked; for each chunk of a span the first that can.
        spans: of files that `skeleton` has made.

    Returns:
        Bytes that were fetched.

    Raises:
        CheckpointError: no source has them, the disk is full, or what came is damaged. What has
            come is kept; the same call goes on from there.
    """
    missing = store.missing(spans)
    todo = [
        (file, at, min(at + CHUNK_BYTES, stop))
        for file, gaps in missing.items()
        for start, stop in gaps
        for at in range(start, stop, CHUNK_BYTES)
    ]
    need = sum(b - a for _, a, b in todo)
    total = sum(b - a for wanted in spans.values() for a, b in _joined(list(wanted)))
    free = shutil.disk_usage(store.folder).free
    if need > free:
        raise CheckpointError(
            f"{store.folder}: {human(need)} are to be fetched, {human(free)} are free on this "
            f"disk; free {human(need - free)}, or use more nodes"
        )
    done = total - need
    progress(done, total)
    lock, stop = threading.Lock(), threading.Event()

    def one(chunk: tuple[str, int, int]) -> None:
        nonlocal done
        if stop.is_set():
            return
        try:
            _chunk(sources, store, *chunk)
        except BaseException:
            stop.set()
            raise
        with lock:
            done += chunk[2] - chunk[1]
            progress(done, total)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for future in [pool.submit(one, chunk) for chunk in todo]:
            future.result()
    for source in sources:
        if isinstance(source, Hub) and need:
            _check(source, store, spans)
    return need


def _chunk(sources: Sequence[Source], store: Store, file: str, start: int, stop: int) -> None:
    refused: CenacleError | None = None
    for source in sources:

        def write(source: Source = source) -> None:
            store.write(file, start, source.read(file, start, stop), stop)

        try:
            _patiently(source.name, write)
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError):  # the disk, not the source
                raise
            refused = error
        else:
            return
    raise refused or CheckpointError(f"{file}: there is no source to fetch it from")


def _patiently(name: str, work: Callable[[], Any]) -> Any:
    """Do it again after a while if the source breaks off.

    Raises:
        CheckpointError: it does so too often.
    """
    pause = FIRST_PAUSE_S
    for left in reversed(range(TRIES)):
        try:
            return work()
        except Interrupted as error:
            if not left:
                raise CheckpointError(
                    f"{error}; given up after {TRIES} attempts. What has come is kept: ask again"
                ) from error
            time.sleep(pause)
            pause *= 2
    raise AssertionError(name)


def _check(source: Hub, store: Store, spans: Mapping[str, Sequence[Span]]) -> None:
    """Files that are here whole must have the hashes that the hub gives."""
    for file, what in _patiently(source.name, source.files).items():
        if file in spans and what.sha256 and store.complete(file, what.sha256) is False:
            store.forget({file: [(a, b) for a, b, _ in store._done[file]]})
            raise CheckpointError(
                f"{store.folder / file}: its SHA-256 is not the one that {source.name} gives: it "
                f"was damaged on the way; ask again, the file is fetched anew"
            )


def _joined(spans: list[Span]) -> list[Span]:
    out: list[Span] = []
    for start, stop in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return out


def _without(wanted: list[Span], have: list[Span]) -> list[Span]:
    """What of `wanted` is in none of `have`, which are ascending and apart."""
    left = []
    for start, stop in _joined(wanted):
        at = start
        for a, b in have:
            if b <= at or a >= stop:
                continue
            if a > at:
                left.append((at, a))
            at = max(at, b)
        if at < stop:
            left.append((at, stop))
    return left


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0]


__all__ = ["File", "Folder", "Hub", "Interrupted", "Source", "Store", "fetch", "skeleton"]
