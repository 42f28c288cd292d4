"""The model's files as the head gives them to the machines of its cluster.

Owns: what is asked for against what the head has, is fetching, or can get from the hub.
Does not know: connections (`control.py`), who needs what (`sharing.py`).
Invariant: nothing but files of the model is given, from one open file at a time; what goes out has
its hash; what the head fetches for itself is read from the hub once.
Next: `parts.FromHead` asks.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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
from .hub import Hub
from .local_folder import LocalFolder
from .source import CHUNK_BYTES, SourceInterrupted


class ModelFileServer:
    """A model that machines of the cluster may fetch.

    Args:
        folder: the head's, whole or a part.
        hub: what has the rest.
    """

    def __init__(self, folder: Path, hub: Hub | None) -> None:
        self.folder, self.hub = folder, hub
        self._here = LocalFolder(folder)
        self._sizes = {name: file.size for name, file in self._here.files().items()}
        self._coming: Mapping[str, list[Span]] = {}
        self._lock = threading.Lock()

    def expect(self, coming: Mapping[str, Iterable[Span]]) -> None:
        """What the head is fetching from now on."""
        with self._lock:
            self._coming = {file: merge_spans(spans) for file, spans in coming.items()}

    def answer(self, asked: dict[str, Any]) -> tuple[dict[str, Any], bytes] | None:
        """The answer to one question of `parts.FromHead`, and the bytes that follow it; None: it
        is on its way here.

        Raises:
            CheckpointError: the head does not have it.
            Interrupted: the hub, which has it, does not answer.
        """
        file = asked.get("file")
        if file is None:
            return {"files": self._sizes}, b""
        try:
            wanted = byte_range_from_json(asked["wanted"])
        except (KeyError, TypeError, ValueError):
            raise CheckpointError("the head was asked for what is no range") from None
        start, stop, *_ = wanted
        if not is_valid(wanted) or stop > self._sizes.get(file, 0) or stop - start > CHUNK_BYTES:
            raise CheckpointError(f"the head has no bytes {start} to {stop} of {file}")
        if self._here.has(file, start, stop):
            data = _read(self._here, file, wanted)
        else:
            with self._lock:
                coming = self._coming.get(file, [])
            if not subtract_spans([(start, stop)], coming):
                return None
            if self.hub is None:
                raise CheckpointError(f"the head does not have bytes {start} to {stop} of {file}")
            data = _read(self.hub, file, wanted)
            if len(data) < stop - start and not isinstance(wanted, ColumnRange):
                raise SourceInterrupted(f"{self.hub.name} broke off")
        return {"sha256": hashlib.sha256(data).hexdigest()}, data


def _read(source: LocalFolder | Hub, file: str, wanted: ByteRange) -> bytes:
    if isinstance(wanted, ColumnRange):
        return source.columns(file, wanted)
    return b"".join(source.read(file, *wanted))
