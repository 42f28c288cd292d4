"""Downloading byte ranges into a sparse store.

Owns: what is fetched first, in which chunks, from which source, and when to give up.
Does not know: plans (it is given byte ranges), how sources work.
Invariant: a source that changes its files, or gives other bytes than it states, is rejected.
Next: `task.py` runs it in a thread; `slicing.required_ranges` says what a rank needs.
"""

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
from ...model.weight_files import GGUF_INDEX
from .hub import Hub
from .source import CHUNK_BYTES, CONNECTIONS, Progress, Source, SourceInterrupted, retry
from .sparse_store import PAGE_BYTES, SparseStore

MAX_SMALL_FILE_BYTES = 64 << 20  # files without weights are fetched whole, up to this
HEADER_BYTES = 1 << 16  # first guess at the length of a safetensors header


def fetch_metadata(source: Source, folder: Path) -> SparseStore:
    """Fetch a checkpoint's small files and the headers of its weights: enough to plan it.

    Raises:
        CheckpointError: it is not a checkpoint, the disk is full, or the source is unreachable.
    """
    store, files = SparseStore(folder), retry(source.files)
    weights = [name for name in files if name.endswith(".safetensors")]
    if not weights and GGUF_INDEX not in files:
        raise CheckpointError(f"{source.name} has no weights: expected files named *.safetensors")
    required: dict[str, list[ByteRange]] = {}
    for name, file in files.items():
        store.create_file(name, file.size)
        if name in weights:
            required[name] = [(0, min(file.size, HEADER_BYTES))]
        elif 0 < file.size <= MAX_SMALL_FILE_BYTES and not name.endswith(".gguf"):
            required[name] = [(0, file.size)]
    fetch_ranges([source], store, required)
    longer: dict[str, list[ByteRange]] = {
        name: [(0, stop)] for name in weights if (stop := _header_end(store, name)) > HEADER_BYTES
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
    required: Mapping[str, Sequence[ByteRange]],
    progress: Progress = lambda *_: None,
) -> int:
    """Fetch what is missing of `required`, each chunk from the first source that has it.

    Args:
        sources: in order of preference. One that was given up is not tried again, unless it is the
            last.
        required: by file; `fetch_metadata` has created the files.

    Returns:
        Bytes that were fetched.

    Raises:
        CheckpointError: no source has them, the disk is full, or what came is damaged. What was
            fetched is kept; the same call goes on from there.
    """
    missing = store.missing(required)
    batches = [(file, batch) for file, gaps in missing.items() for batch in _batches(gaps)]
    missing_bytes = total_bytes(r for gaps in missing.values() for r in gaps)
    all_bytes = total_bytes(r for ranges in required.values() for r in ranges)
    check_disk_space(store, missing)
    done = all_bytes - missing_bytes
    progress(done, all_bytes)
    lock, stop = threading.Lock(), threading.Event()
    left_sources = list(sources)

    def fetch(file: str, batch: Sequence[ByteRange]) -> None:
        nonlocal done
        if stop.is_set():
            return
        try:
            _fetch_batch(left_sources, store, file, batch)
            with lock:
                done += total_bytes(batch)
                progress(done, all_bytes)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for future in [pool.submit(fetch, *pair) for pair in batches]:
            future.result()
    for source in left_sources:
        if isinstance(source, Hub) and missing_bytes:
            _check_complete_files(source, store, required)
    return missing_bytes


def _batches(gaps: Iterable[ByteRange]) -> Iterator[list[ByteRange]]:
    """Chunks, grouped so that each group is synchronized to the disk at once."""
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
            yield from gap.split(CHUNK_BYTES)
            continue
        for start in range(gap[0], gap[1], CHUNK_BYTES):
            yield start, min(start + CHUNK_BYTES, gap[1])


def check_disk_space(store: SparseStore, missing: Mapping[str, Sequence[ByteRange]]) -> None:
    """Raise unless the disk has room for all that is missing.

    Raises:
        CheckpointError: it has not.
    """
    needed = sum(_disk_bytes(r) for gaps in missing.values() for r in gaps)
    free = shutil.disk_usage(store.folder).free
    if needed > free:
        raise CheckpointError(
            f"{store.folder}: the download needs {format_bytes(needed)}, this disk has "
            f"{format_bytes(free)} free; free {format_bytes(needed - free)}, or use more nodes. "
            f"Downloaded data is kept"
        )


def _disk_bytes(byte_range: ByteRange) -> int:
    """Disk space of a range: holes shorter than a page take space too."""
    start, stop, *_ = byte_range
    if not isinstance(byte_range, ColumnRange):
        return stop - start
    row = sum(b - a + PAGE_BYTES for a, b in byte_range.columns)
    return (stop - start) // byte_range.row_bytes * min(byte_range.row_bytes, row)


def _fetch_batch(
    sources: list[Source], store: SparseStore, file: str, batch: Sequence[ByteRange]
) -> None:
    written: list[tuple[ByteRange, str]] = []
    try:
        for chunk in batch:
            written.append((chunk, _fetch_chunk(sources, store, file, chunk)))
    finally:
        store.mark_present(file, written)


def _fetch_chunk(sources: list[Source], store: SparseStore, file: str, chunk: ByteRange) -> str:
    """Write a chunk from the first source that has it; returns its SHA-256."""
    last_error: CheckpointError | None = None
    for source in list(sources):

        def write(source: Source = source) -> str:
            if isinstance(chunk, ColumnRange):
                return store.write_columns(file, chunk, source.read_columns(file, chunk))
            return store.write(file, chunk[0], source.read(file, *chunk), chunk[1])

        try:
            return retry(write)
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError):  # the disk, not the source
                raise
            last_error = error
            if isinstance(error.__cause__, SourceInterrupted) and source in sources[:-1]:
                sources.remove(source)
    raise last_error or CheckpointError(f"{file}: there is no source to download it from")


def _check_complete_files(
    hub: Hub, store: SparseStore, required: Mapping[str, Sequence[ByteRange]]
) -> None:
    """Files that are complete must have the SHA-256 that the Hub states."""
    if not any(store.present_spans(file) == [(0, store.sizes[file])] for file in required):
        return
    for name, file in retry(hub.list_repository).items():
        if name in required and file.sha256 and store.matches_checksum(name, file.sha256) is False:
            store.mark_file_missing(name)
            raise CheckpointError(
                f"{store.folder / name}: expected the SHA-256 that {hub.name} states, got another: "
                f"the file was damaged in transit; try again"
            )
