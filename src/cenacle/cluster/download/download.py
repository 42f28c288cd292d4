"""."""

from __future__ import annotations

import shutil
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...core.units import format_bytes
from ...errors import CheckpointError
from ...model.byte_ranges import ByteRange, ColumnRange, total_bytes
from .hub import HEADER_BYTES, MAX_SMALL_FILE_BYTES, Hub
from .source import CHUNK_BYTES, CONNECTIONS, Progress, Source, SourceInterrupted, retry
from .sparse_store import PAGE_BYTES, SparseStore


def fetch_metadata(source: Source, folder: Path) -> SparseStore:
    """A checkpoint's small files and the headers of its weights: enough to describe and plan it.

    Raises:
        CheckpointError: it is no checkpoint, the disk is full, or the source cannot be reached.
    """
    store, listed = SparseStore(folder), retry(source.files)
    weights = [f for f in listed if f.endswith(".safetensors")]
    if not weights:
        raise CheckpointError(f"{source.name} has no weights: expected files named *.safetensors")
    wanted: dict[str, list[ByteRange]] = {}
    for file, what in listed.items():
        store.make(file, what.size)
        if file in weights:
            wanted[file] = [(0, min(what.size, HEADER_BYTES))]
        elif 0 < what.size <= MAX_SMALL_FILE_BYTES:
            wanted[file] = [(0, what.size)]
    fetch_ranges([source], store, wanted)
    longer: dict[str, list[ByteRange]] = {
        f: [(0, header)] for f in weights if (header := _header_end(store, f)) > HEADER_BYTES
    }
    fetch_ranges([source], store, longer)
    return store


def _header_end(store: SparseStore, file: str) -> int:
    with (store.folder / file).open("rb") as f:
        head = f.read(8)
    end = 8 + struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    return int(min(end, store.sizes[file]))


def fetch_ranges(
    sources: Sequence[Source],
    store: SparseStore,
    wanted: Mapping[str, Sequence[ByteRange]],
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
    need = total_bytes(w for gaps in missing.values() for w in gaps)
    total = total_bytes(w for each in wanted.values() for w in each)
    check_disk_space(store, missing)
    done = total - need
    progress(done, total)
    lock, stop = threading.Lock(), threading.Event()
    asked = list(sources)

    def one(file: str, some: Sequence[ByteRange]) -> None:
        nonlocal done
        if stop.is_set():
            return
        try:
            _batch(asked, store, file, some)
            with lock:
                done += total_bytes(some)
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


def _batches(gaps: Iterable[ByteRange]) -> Iterator[list[ByteRange]]:
    """In chunks; so many together as are put onto the disk at once."""
    batch: list[ByteRange] = []
    for chunk in _chunks(gaps):
        if batch and total_bytes(batch) + total_bytes([chunk]) > CHUNK_BYTES:
            yield batch
            batch = []
        batch.append(chunk)
    if batch:
        yield batch


def _chunks(gaps: Iterable[ByteRange]) -> Iterator[ByteRange]:
    for gap in gaps:
        if isinstance(gap, ColumnRange):
            yield from gap.steps(CHUNK_BYTES)
            continue
        for at in range(gap[0], gap[1], CHUNK_BYTES):
            yield at, min(at + CHUNK_BYTES, gap[1])


def check_disk_space(store: SparseStore, missing: Mapping[str, Sequence[ByteRange]]) -> None:
    """Whether the disk has room for what is missing.

    Raises:
        CheckpointError: not all of it.
    """
    need = sum(_disk_bytes(w) for gaps in missing.values() for w in gaps)
    free = shutil.disk_usage(store.folder).free
    if need > free:
        raise CheckpointError(
            f"{store.folder}: {format_bytes(need)} are to be fetched, {format_bytes(free)} are "
            f"free on this disk; free {format_bytes(need - free)}, or use more nodes. What is here "
            f"is kept"
        )


def _disk_bytes(wanted: ByteRange) -> int:
    """A disk has no holes shorter than a page."""
    start, stop, *_ = wanted
    if not isinstance(wanted, ColumnRange):
        return stop - start
    row = sum(b - a + PAGE_BYTES for a, b in wanted.kept)
    return (stop - start) // wanted.period * min(wanted.period, row)


def _batch(sources: list[Source], store: SparseStore, file: str, some: Sequence[ByteRange]) -> None:
    written: list[tuple[ByteRange, str]] = []
    try:
        for chunk in some:
            written.append((chunk, _chunk(sources, store, file, chunk)))
    finally:
        store.keep(file, written)


def _chunk(sources: list[Source], store: SparseStore, file: str, chunk: ByteRange) -> str:
    """Write a chunk from the first source that has it; its SHA-256."""
    refused: CheckpointError | None = None
    for source in list(sources):

        def write(source: Source = source) -> str:
            if isinstance(chunk, ColumnRange):
                return store.write_columns(file, chunk, source.columns(file, chunk))
            return store.write(file, chunk[0], source.read(file, *chunk), chunk[1])

        try:
            return retry(write)
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError):  # the disk, not the source
                raise
            refused = error
            if isinstance(error.__cause__, SourceInterrupted) and source in sources[:-1]:
                sources.remove(source)
    raise refused or CheckpointError(f"{file}: there is no source to fetch it from")


def _check(source: Hub, store: SparseStore, wanted: Mapping[str, Sequence[ByteRange]]) -> None:
    """Files that are here whole must have the hashes that the hub gives."""
    if not any(store.spans(file) == [(0, store.sizes[file])] for file in wanted):
        return
    for file, what in retry(source.files).items():
        if file in wanted and what.sha256 and store.complete(file, what.sha256) is False:
            store.forget({file: [span for span, _ in store._done[file]]})
            raise CheckpointError(
                f"{store.folder / file}: its SHA-256 is not the one that {source.name} gives: it "
                f"was damaged on the way; ask again, the file is fetched anew"
            )
