"""Downloading a node's part of the model beside everything else.

Owns: one download at a time in a thread of its own, and the head as a source.
Does not know: plans (it is given byte ranges), how files are written (`sparse_store.py`).
Invariant: what the head sends is compared with its SHA-256 before it is recorded as present; what
an earlier process left is verified before it is relied on; each thread has its own connection.
Next: `file_server.py` answers, `distribution.py` says which node downloads what.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ...errors import CenacleError, CheckpointError, ClusterError, error_from_json
from ...message import Message, parse
from ...model.byte_ranges import ByteRange, ColumnRange, byte_range_from_json, total_bytes
from ...ranks.channel import Channel
from .. import client, messages
from ..security import identity as identities
from .download import check_disk_space, fetch_metadata, fetch_ranges
from .hub import Hub
from .source import READ_BYTES, Source, SourceFile, SourceInterrupted
from .sparse_store import SparseStore

A = TypeVar("A", bound=Message)
DEADLINE_S = 120.0  # the head may have to download first; the agent watches whether it is alive
_STOPPED = "the download was stopped before it was complete"


class HeadSource:
    """The model's files as the head has them, whole or partial.

    Args:
        identity: of this node.
        host, port: of the head.
    """

    def __init__(self, identity: identities.Identity, host: str, port: int) -> None:
        self.name = f"the head at {host}:{port}"
        self._identity, self._address = identity, (host, port)
        self._per_thread = threading.local()
        self._channels: set[Channel] = set()
        self._stopped = False

    def stop(self) -> None:
        """Read nothing more."""
        self._stopped = True
        self.close()

    def close(self) -> None:
        """Close all connections."""
        for channel in list(self._channels):
            channel.close()

    def files(self) -> Mapping[str, SourceFile]:
        """See `Source`."""
        answer, _ = self._request(messages.FileRequest(), messages.FileList)
        return {name: SourceFile(size) for name, size in answer.files.items()}

    def read(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """See `Source`."""
        return self._read(file, (start, stop), stop - start)

    def read_columns(self, file: str, columns: ColumnRange) -> bytes:
        """See `Source`."""
        return b"".join(self._read(file, columns, columns.nbytes))

    def _read(self, file: str, byte_range: ByteRange, count: int) -> Iterator[bytes]:
        request = messages.FileRequest(file, tuple(byte_range))
        answer, channel = self._request(request, messages.FileData)
        digest, is_complete = hashlib.sha256(), False
        try:
            for start in range(0, count, READ_BYTES):
                piece = channel.receive_bytes(min(READ_BYTES, count - start))
                digest.update(piece)
                yield piece
            if digest.hexdigest() != answer.sha256:
                raise SourceInterrupted(
                    f"{self.name}: bytes {byte_range[0]} to {byte_range[1]} of {file} were damaged "
                    f"on the way"
                )
            is_complete = True
        except ClusterError as error:
            raise SourceInterrupted(f"{self.name} {error}") from error
        finally:
            if not is_complete:
                self._drop_channel()

    def _request(self, request: messages.FileRequest, kind: type[A]) -> tuple[A, Channel]:
        while not self._stopped:
            try:
                channel = self._connect()
                channel.send(request.to_json())
                answer: Message = parse(
                    channel.receive(), kind, messages.RetryLater, messages.Rejection
                )
            except ClusterError as error:
                self._drop_channel()
                raise SourceInterrupted(f"{self.name}: {error}") from error
            if isinstance(answer, messages.RetryLater):  # the head is downloading it
                continue
            if isinstance(answer, messages.Rejection):
                failure = error_from_json(answer.error, f"{self.name}: ")
                if isinstance(failure, CheckpointError):
                    raise failure
                self._drop_channel()
                raise SourceInterrupted(str(failure))
            assert isinstance(answer, kind)
            return answer, channel
        raise CheckpointError(_STOPPED)

    def _connect(self) -> Channel:
        """This thread's connection."""
        channel: Channel | None = getattr(self._per_thread, "channel", None)
        if channel is None:
            context = self._identity.client_tls_context()
            sock = client.connect_to_head(*self._address, context, identities.SERVER_NAME)
            channel = self._per_thread.channel = Channel(sock, DEADLINE_S)
            self._channels.add(channel)
        return channel

    def _drop_channel(self) -> None:
        if (channel := getattr(self._per_thread, "channel", None)) is not None:
            self._per_thread.channel = None
            channel.close()
            self._channels.discard(channel)


@dataclass(frozen=True)
class DownloadOrder:
    """What a node shall download.

    Args:
        from_hub: ranges by file that it gets from the Hub, or else from the head.
        from_head: ranges that it gets from the head.
        hub, revision: the repository and its commit; None: there is no Hub.
        use_head: whether the head can be asked: not by its own node.
    """

    from_hub: Mapping[str, Sequence[ByteRange]]
    from_head: Mapping[str, Sequence[ByteRange]]
    hub: str | None
    revision: str | None
    use_head: bool

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DownloadOrder:
        """Read what `vars` of an order became in transit.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        from_hub, from_head = (
            {
                str(file): [byte_range_from_json(r) for r in ranges]
                for file, ranges in data[key].items()
            }
            for key in ("from_hub", "from_head")
        )
        return cls(from_hub, from_head, data["hub"], data["revision"], bool(data["use_head"]))


class DownloadTask:
    """One download, in a thread.

    Attributes `done_bytes` and `total_bytes` are its progress; `fetched_bytes` came over the
    network, `damaged_bytes` were present but damaged.

    Args:
        folder: of the node's part.
        order: what of it.
        head: the head as a source, if the order says so.
        verified: folders that this process has verified; others are verified first.
        previous: an earlier task; it is stopped, and waited for.
    """

    def __init__(
        self,
        folder: Path,
        order: DownloadOrder,
        head: HeadSource,
        verified: set[Path],
        previous: DownloadTask | None = None,
    ) -> None:
        self.folder, self._order, self._head, self._verified = folder, order, head, verified
        self.done_bytes = self.total_bytes = self.fetched_bytes = self.damaged_bytes = 0
        self._hub = Hub(order.hub, order.revision) if order.hub else None
        self._error: Exception | None = None
        self._stopped, self._previous = False, previous
        if previous is not None:
            previous.stop()
        self._thread = threading.Thread(target=self._run, name="download", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            if self._previous is not None:
                self._previous._thread.join()
                self._previous = None
            self._download()
        except Exception as error:
            self._error = error
        finally:
            self._head.close()
            if self._hub is not None:
                self._hub.close()

    def _download(self) -> None:
        order = self._order
        store = SparseStore(self.folder)
        if self.folder not in self._verified:
            if damaged := store.find_damaged():
                self.damaged_bytes = _count_bytes(damaged)
                store.mark_missing(damaged)
            self._verified.add(self.folder)
        hub: list[Source] = [self._hub] if self._hub is not None else []
        head: list[Source] = [self._head] if order.use_head else []
        if order.use_head or self.damaged_bytes:
            store = fetch_metadata((head or hub)[0], self.folder)
        hub_bytes = _count_bytes(order.from_hub)
        self.total_bytes = hub_bytes + _count_bytes(order.from_head)
        # Before anything is fetched: a disk that is too small is not filled first.
        missing = [store.missing(order.from_hub), store.missing(order.from_head)]
        files = {file for gaps in missing for file in gaps}
        by_file = {f: [r for gaps in missing for r in gaps.get(f, ())] for f in files}
        check_disk_space(store, by_file)
        self.fetched_bytes = fetch_ranges(
            [*hub, *head], store, order.from_hub, self._report_progress(0)
        )
        self.fetched_bytes += fetch_ranges(
            head, store, order.from_head, self._report_progress(hub_bytes)
        )

    def _report_progress(self, before: int) -> Callable[[int, int], None]:
        def progress(done: int, _: int) -> None:
            self.done_bytes = before + done
            if self._stopped:
                raise CheckpointError(_STOPPED)

        return progress

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end; whether it has come.

        Raises:
            CenacleError: why the download failed.
        """
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        if isinstance(self._error, CenacleError):
            raise self._error
        if self._error is not None:
            raise ClusterError(f"the download failed: {self._error!r}") from self._error
        return True

    def stop(self) -> None:
        """Stop after the ranges that are being fetched."""
        self._stopped = True
        self._head.stop()


def _count_bytes(ranges: Mapping[str, Sequence[ByteRange]]) -> int:
    return sum(map(total_bytes, ranges.values()))
