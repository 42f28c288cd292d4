"""A node's part of a checkpoint, from the hub or from another node: only the bytes that it reads.

Owns: which ranges are here, fetching those that are not, resuming, and noticing damage.
Does not know: plans (it is given ranges of bytes), how nodes talk.
How: files keep their names and sizes, but only what was asked for is written: the rest are holes
that take no disk. So the loader, which reads by byte range, needs to know nothing of it. Beside
them `ranges.jsonl` has a line for every range that is complete, with its hash.
Invariant: a range is noted after it is on the disk, so whatever ends the program, what is noted is
there; a source that changes its files, or gives other bytes than it says, is refused.
Next: `model/weights.py` (`wanted_of`) says what a rank needs; `parts.py`, where it is kept.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from ...core.plan import human
from ...errors import CenacleError, CheckpointError
from ...model.byte_ranges import JOURNAL, Span, Strip, Wanted, joined, size, without

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with bytes that are here and bytes in all."""

CHUNK_BYTES = 16 << 20  # of one request, and of one hash: what a break costs at most
PIECE_BYTES = 1 << 20
PAGE_BYTES = 4096  # of a disk
CONNECTIONS = 4
TRIES = 6
FIRST_PAUSE_S = 0.5  # doubled after every failure that brought nothing
SMALL_BYTES = 64 << 20  # files that are no weights are fetched whole, up to this
HEADER_BYTES = 1 << 16  # first guess at the length of a safetensors header


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

    def columns(self, file: str, strip: Strip) -> bytes:
        """What `strip.take` gives of a file; raises as `read`."""
        ...


class Hub:
    """A repository of the Hugging Face hub (or of what answers like it, by HF_ENDPOINT).

    Args:
        repo: "org/name".
        revision: branch, tag or commit; None: the main one.
        deadline_s: longest silence of the server.
    """

    def __init__(self, repo: str, revision: str | None = None, deadline_s: float = 30.0) -> None:
        import httpx

        self.name, self.revision, self._deadline_s = repo, revision, deadline_s
        self._client = httpx.Client(follow_redirects=True, timeout=deadline_s)
        self._commit = revision if revision and re.fullmatch("[0-9a-f]{40}", revision) else None

    def close(self) -> None:
        """End its connections."""
        self._client.close()

    def files(self) -> Mapping[str, File]:
        """See `Source`; those that mlx-lm would fetch."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = HfApi().model_info(
                self.name,
                revision=self.revision,
                files_metadata=True,
                timeout=self._deadline_s,
            )
        except RepositoryNotFoundError as error:
            raise CheckpointError(f"{self.name}: the hub has no such repository") from error
        except Exception as error:  # whichever library it speaks through has errors of its own
            raise Interrupted(
                f"{self.name}: the hub does not answer: {_first_line(error)}"
            ) from error
        self._commit = info.sha
        return {
            s.rfilename: File(s.size or 0, s.lfs.sha256 if s.lfs is not None else None)
            for s in info.siblings or ()
            if _of_a_model(s.rfilename)
        }

    @property
    def commit(self) -> str:
        """What all is read of.

        Raises:
            CheckpointError: see `files`; or the hub does not answer for long.
        """
        if self._commit is None:
            _patiently(self.files)
        return str(self._commit)

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
            with self._client.stream("GET", url, headers=headers) as answer:
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
                    if left <= 0 and whole:
                        return
        except httpx.HTTPError as error:
            raise Interrupted(f"{self.name}: {_first_line(error)}") from error

    def columns(self, file: str, strip: Strip) -> bytes:
        """See `Source`; all of the rows are read."""
        return strip.take(b"".join(self.read(file, strip.start, strip.stop)))


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
        found = [p for p in sorted(self._path.iterdir()) if p.is_file() and _of_a_model(p.name)]
        return {p.name: File(p.stat().st_size) for p in found}

    def has(self, file: str, start: int, stop: int) -> bool:
        """Whether all of a range is here by now."""
        if self._store is not None:
            self._store.refresh()
            return not self._store.missing({file: [(start, stop)]})
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

    def columns(self, file: str, strip: Strip) -> bytes:
        """See `Source`."""
        return strip.take(b"".join(self.read(file, strip.start, strip.stop)))


@dataclass
class Store:
    """A folder of files with holes, and what is known to be in them.

    Args:
        folder: made if need be.
    """

    folder: Path
    sizes: dict[str, int] = field(default_factory=dict)
    _done: dict[str, list[tuple[Wanted, str]]] = field(default_factory=dict)
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
            span = Strip(start, stop, noted["period"], kept)
        self._done.setdefault(noted["file"], []).append((span or (start, stop), noted["sha256"]))

    def spans(self, file: str) -> list[Span]:
        """The ranges of which all is here, ascending, neighbours joined."""
        done = self._done.get(file, ())
        return joined((s[0], s[1]) for s, _ in done if not isinstance(s, Strip))

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
                raise Interrupted(f"{file} ended at byte {at}, expected {stop}")
        return digest.hexdigest()

    def write_columns(self, file: str, strip: Strip, data: bytes) -> str:
        """The same for what `strip.take` gave."""
        if len(data) != strip.nbytes:
            raise Interrupted(f"{file}: got {len(data)} bytes of columns, expected {strip.nbytes}")
        at, view = 0, memoryview(data)
        with self._room(), (self.folder / file).open("r+b", buffering=0) as f:
            for start, stop in strip.pieces():
                os.pwrite(f.fileno(), view[at : at + stop - start], start)
                at += stop - start
        return hashlib.sha256(data).hexdigest()

    def keep(self, file: str, written: Sequence[tuple[Wanted, str]]) -> None:
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

    def damaged(self) -> dict[str, list[Wanted]]:
        """Ranges whose bytes are no longer those that were fetched. Reads everything."""

        def wrong(file: str, span: Wanted, digest: str) -> bool:
            try:
                with (self.folder / file).open("rb") as f:
                    f.seek(span[0])
                    data = f.read(span[1] - span[0])
            except FileNotFoundError:
                return True
            if len(data) < span[1] - span[0]:
                return True
            data = span.take(data) if isinstance(span, Strip) else data
            return hashlib.sha256(data).hexdigest() != digest

        done = [(file, *each) for file, spans in self._done.items() for each in spans]
        found: dict[str, list[Wanted]] = {}
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for (file, span, _), bad in zip(done, pool.map(lambda d: wrong(*d), done), strict=True):
                if bad:
                    found.setdefault(file, []).append(span)
        return found

    def forget(self, spans: Mapping[str, Sequence[Wanted]]) -> None:
        """Take ranges for missing from now on."""
        for file, wrong in spans.items():
            self._done[file] = [d for d in self._done[file] if d[0] not in wrong]
        lines: list[dict[str, Any]] = [{"file": f, "size": n} for f, n in self.sizes.items()]
        lines += [_line(f, *each) for f, done in self._done.items() for each in done]
        beside = self.folder / f"{JOURNAL}.new"
        beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
        beside.replace(self.folder / JOURNAL)

    def missing(self, wanted: Mapping[str, Sequence[Wanted]]) -> dict[str, list[Wanted]]:
        """What of it is not here."""
        found: dict[str, list[Wanted]] = {}
        for file, each in wanted.items():
            whole = self.spans(file)
            gaps: list[Wanted] = []
            gaps += without([(w[0], w[1]) for w in each if not isinstance(w, Strip)], whole)
            strips = [w for w in each if isinstance(w, Strip)]
            if strips:
                gaps += self._missing_columns(file, strips, whole)
            if gaps:
                found[file] = gaps
        return found

    def _missing_columns(
        self, file: str, strips: Sequence[Strip], whole: list[Span]
    ) -> Iterator[Strip]:
        here: dict[tuple[int, int], list[Strip]] = {}  # by length of rows, and where they begin
        for done, _ in self._done.get(file, ()):
            if isinstance(done, Strip):
                here.setdefault((done.period, done.start % done.period), []).append(done)
        for strip in strips:
            same = here.get((strip.period, strip.start % strip.period), ())
            have = joined([*whole, *((s.start, s.stop) for s in same if s.has(strip))])
            for start, stop in without([(strip.start, strip.stop)], have):
                before, after = (start - strip.start) % strip.period, (strip.stop - stop)
                yield strip._replace(start=start - before, stop=stop + after % strip.period)

    def complete(self, file: str, sha256: str) -> bool | None:
        """Whether a file that is here whole has the hash that its source gives; None: it is not."""
        if self.spans(file) != [(0, self.sizes[file])]:
            return None
        with (self.folder / file).open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest() == sha256


def _line(file: str, span: Wanted, digest: str) -> dict[str, Any]:
    line = {"file": file, "start": span[0], "stop": span[1], "sha256": digest}
    return {**line, "period": span.period, "kept": span.kept} if isinstance(span, Strip) else line


def skeleton(source: Source, folder: Path) -> Store:
    """A checkpoint's small files and the headers of its weights: enough to describe and plan it.

    Raises:
        CheckpointError: it is no checkpoint, the disk is full, or the source cannot be reached.
    """
    store, listed = Store(folder), _patiently(source.files)
    weights = [f for f in listed if f.endswith(".safetensors")]
    if not weights:
        raise CheckpointError(f"{source.name} has no weights: expected files named *.safetensors")
    wanted: dict[str, list[Wanted]] = {}
    for file, what in listed.items():
        store.make(file, what.size)
        if file in weights:
            wanted[file] = [(0, min(what.size, HEADER_BYTES))]
        elif 0 < what.size <= SMALL_BYTES:
            wanted[file] = [(0, what.size)]
    fetch([source], store, wanted)
    longer: dict[str, list[Wanted]] = {
        f: [(0, header)] for f in weights if (header := _header_end(store, f)) > HEADER_BYTES
    }
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
    wanted: Mapping[str, Sequence[Wanted]],
    progress: Progress = lambda *_: None,
) -> int:
    """Make it be here, from the first source that has it.

    Args:
        sources: in the order in which they are asked; for each chunk of a range the first that can.
            One that has been given up is not asked again, unless it is the last.
        wanted: of files that `skeleton` has made.

    Returns:
        Bytes that were fetched.

    Raises:
        CheckpointError: no source has them, the disk is full, or what came is damaged. What has
            come is kept; the same call goes on from there.
    """
    missing = store.missing(wanted)
    todo = [(file, some) for file, gaps in missing.items() for some in _batches(gaps)]
    need = size(w for gaps in missing.values() for w in gaps)
    total = size(w for each in wanted.values() for w in each)
    check_room(store, missing)
    done = total - need
    progress(done, total)
    lock, stop = threading.Lock(), threading.Event()
    asked = list(sources)

    def one(file: str, some: Sequence[Wanted]) -> None:
        nonlocal done
        if stop.is_set():
            return
        try:
            _batch(asked, store, file, some)
            with lock:
                done += size(some)
                progress(done, total)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for future in [pool.submit(one, *each) for each in todo]:
            future.result()
    for source in asked:
        if isinstance(source, Hub) and need:
            _check(source, store, wanted)
    return need


def _batches(gaps: Iterable[Wanted]) -> Iterator[list[Wanted]]:
    """In chunks; so many together as are put onto the disk at once."""
    batch: list[Wanted] = []
    for chunk in _chunks(gaps):
        if batch and size(batch) + size([chunk]) > CHUNK_BYTES:
            yield batch
            batch = []
        batch.append(chunk)
    if batch:
        yield batch


def _chunks(gaps: Iterable[Wanted]) -> Iterator[Wanted]:
    for gap in gaps:
        if isinstance(gap, Strip):
            yield from gap.steps(CHUNK_BYTES)
            continue
        for at in range(gap[0], gap[1], CHUNK_BYTES):
            yield at, min(at + CHUNK_BYTES, gap[1])


def check_room(store: Store, missing: Mapping[str, Sequence[Wanted]]) -> None:
    """Whether the disk has room for what is missing.

    Raises:
        CheckpointError: not all of it.
    """
    need = sum(_disk_bytes(w) for gaps in missing.values() for w in gaps)
    free = shutil.disk_usage(store.folder).free
    if need > free:
        raise CheckpointError(
            f"{store.folder}: {human(need)} are to be fetched, {human(free)} are free on this "
            f"disk; free {human(need - free)}, or use more nodes. What is here is kept"
        )


def _disk_bytes(wanted: Wanted) -> int:
    """A disk has no holes shorter than a page."""
    start, stop, *_ = wanted
    if not isinstance(wanted, Strip):
        return stop - start
    row = sum(b - a + PAGE_BYTES for a, b in wanted.kept)
    return (stop - start) // wanted.period * min(wanted.period, row)


def _batch(sources: list[Source], store: Store, file: str, some: Sequence[Wanted]) -> None:
    written: list[tuple[Wanted, str]] = []
    try:
        for chunk in some:
            written.append((chunk, _chunk(sources, store, file, chunk)))
    finally:
        store.keep(file, written)


def _chunk(sources: list[Source], store: Store, file: str, chunk: Wanted) -> str:
    """Write a chunk from the first source that has it; its SHA-256."""
    refused: CheckpointError | None = None
    for source in list(sources):

        def write(source: Source = source) -> str:
            if isinstance(chunk, Strip):
                return store.write_columns(file, chunk, source.columns(file, chunk))
            return store.write(file, chunk[0], source.read(file, *chunk), chunk[1])

        try:
            return _patiently(write)
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError):  # the disk, not the source
                raise
            refused = error
            if isinstance(error.__cause__, Interrupted) and source in sources[:-1]:
                sources.remove(source)
    raise refused or CheckpointError(f"{file}: there is no source to fetch it from")


def _patiently(work: Callable[[], T]) -> T:
    """Do it again after a while if the source breaks off.

    Raises:
        CheckpointError: it does so too often.
    """
    pause = FIRST_PAUSE_S
    for _ in range(TRIES - 1):
        with suppress(Interrupted):
            return work()
        time.sleep(pause)
        pause *= 2
    try:
        return work()
    except Interrupted as error:
        raise CheckpointError(
            f"{error}; given up after {TRIES} attempts. What has come is kept: ask again"
        ) from error


def _check(source: Hub, store: Store, wanted: Mapping[str, Sequence[Wanted]]) -> None:
    """Files that are here whole must have the hashes that the hub gives."""
    if not any(store.spans(file) == [(0, store.sizes[file])] for file in wanted):
        return
    for file, what in _patiently(source.files).items():
        if file in wanted and what.sha256 and store.complete(file, what.sha256) is False:
            store.forget({file: [span for span, _ in store._done[file]]})
            raise CheckpointError(
                f"{store.folder / file}: its SHA-256 is not the one that {source.name} gives: it "
                f"was damaged on the way; ask again, the file is fetched anew"
            )


def _of_a_model(file: str) -> bool:
    """Whether mlx-lm would fetch it: nothing else of a folder is given away."""
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    return file != JOURNAL and any(fnmatch(file, pattern) for pattern in DEFAULT_ALLOW_PATTERNS)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0]
