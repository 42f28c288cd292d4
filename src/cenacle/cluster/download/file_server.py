"""The head's model files, served to the nodes of its cluster.

Owns: answering a request from what the head has, is downloading, or can get from the Hub.
Does not know: connections (`cluster/head.py`), which node needs what (`distribution.py`).
Invariant: only files of the model are served, from one open file at a time; each answer carries its
SHA-256; what the head downloads for itself is read from the Hub once.
Next: `task.HeadSource` sends the requests.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...errors import CheckpointError
from ...model.byte_ranges import (
    ByteRange,
    ColumnRange,
    Span,
    byte_range_from_json,
    is_valid,
    merge_spans,
    subtract_spans,
)
from .. import messages
from .hub import Hub
from .local_folder import LocalFolder
from .source import CHUNK_BYTES, SourceInterrupted


class ModelFileServer:
    """Serves a model to the nodes of a cluster.

    Args:
        folder: the head's, whole or partial.
        hub: what has the rest.
    """

    def __init__(self, folder: Path, hub: Hub | None) -> None:
        self.folder, self.hub = folder, hub
        self._local = LocalFolder(folder)
        self._sizes = {name: file.size for name, file in self._local.files().items()}
        self._expected: Mapping[str, list[Span]] = {}
        self._lock = threading.Lock()

    def expect(self, spans: Mapping[str, Iterable[Span]]) -> None:
        """Set what the head is downloading from now on, by file."""
        with self._lock:
            self._expected = {file: merge_spans(of_file) for file, of_file in spans.items()}

    def serve(
        self, request: messages.FileRequest
    ) -> tuple[messages.FileList | messages.FileData, bytes] | None:
        """The answer to one request of `HeadSource`, and the bytes that follow it.

        Returns:
            None: the head is downloading it; ask again.

        Raises:
            CheckpointError: the head does not have it.
            SourceInterrupted: the Hub, which has it, does not respond.
        """
        file = request.file
        if file is None:
            return messages.FileList(self._sizes), b""
        try:
            byte_range = byte_range_from_json(request.byte_range)
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"expected a byte range of {file}, got {request.byte_range!r:.80}"
            ) from None
        start, stop, *_ = byte_range
        if (
            not is_valid(byte_range)
            or stop > self._sizes.get(file, 0)
            or (stop - start > CHUNK_BYTES)
        ):
            raise CheckpointError(f"the head has no bytes {start} to {stop} of {file}")
        if self._local.has(file, start, stop):
            data = _read(self._local, file, byte_range)
        else:
            with self._lock:
                expected = self._expected.get(file, [])
            if not subtract_spans([(start, stop)], expected):
                return None
            if self.hub is None:
                raise CheckpointError(f"the head does not have bytes {start} to {stop} of {file}")
            data = _read(self.hub, file, byte_range)
            if len(data) < stop - start and not isinstance(byte_range, ColumnRange):
                raise SourceInterrupted(f"{self.hub.name} broke off")
        return messages.FileData(hashlib.sha256(data).hexdigest()), data


def _read(source: LocalFolder | Hub, file: str, byte_range: ByteRange) -> bytes:
    if isinstance(byte_range, ColumnRange):
        return source.read_columns(file, byte_range)
    return b"".join(source.read(file, *byte_range))
