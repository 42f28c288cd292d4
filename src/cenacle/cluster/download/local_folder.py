"""A checkpoint's folder on this machine as a source.

Owns: reading what is in a folder, whole or partial.
Does not know: who reads it.
Next: `file_server.py` serves it to other nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ...errors import CheckpointError
from ...model.byte_ranges import ColumnRange, is_partial
from ...model.weight_files import read_index, select_files
from .source import READ_BYTES, SourceFile
from .sparse_store import SparseStore


class LocalFolder:
    """A checkpoint's folder on this machine, whole or partial."""

    def __init__(self, path: Path) -> None:
        self.name, self._path = str(path), path
        self._store = SparseStore(path) if is_partial(path) else None

    def files(self) -> Mapping[str, SourceFile]:
        """See `Source`."""
        if not self._path.is_dir():
            raise CheckpointError(f"{self._path}: no such folder")
        if self._store is not None:
            sizes: Mapping[str, int] = self._store.sizes
        else:
            sizes = {p.name: p.stat().st_size for p in self._path.iterdir() if p.is_file()}
        files = select_files(self.name, sizes, read_index(self._path))
        return {name: SourceFile(sizes[name]) for name in files}

    def has(self, file: str, start: int, stop: int) -> bool:
        """Whether all of a range is present now."""
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
                piece = f.read(min(READ_BYTES, stop - start))
                if not piece:
                    raise CheckpointError(f"{self._path / file}: the file ended at byte {start}")
                yield piece
                start += len(piece)

    def read_columns(self, file: str, columns: ColumnRange) -> bytes:
        """See `Source`."""
        return columns.extract(b"".join(self.read(file, columns.start, columns.stop)))
