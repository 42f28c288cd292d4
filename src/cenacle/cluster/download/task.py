"""A machine's part of the model: where it is kept here, and fetching it beside everything else.

Owns: the folder of parts, one fetch at a time in a thread of its own, and the head as a source.
Does not know: plans (it is given ranges), orders (`agent.py`), how files are written (`fetch.py`).
Invariant: what the head gives is compared with its hash before it is noted as here; what an earlier
process left is, before it is relied on; one connection for each thread that fetches.
Next: `giving.py` answers, `sharing.py` says who fetches what.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CenacleError, CheckpointError, ClusterError, error_from_json
from ...model.byte_ranges import ByteRange, ColumnRange, byte_range_from_json, total_bytes
from ...ranks.channel import Channel
from .. import client
from ..security import identity as identities
from .download import check_disk_space, fetch_metadata, fetch_ranges
from .hub import Hub
from .source import READ_BYTES, Source, SourceFile, SourceInterrupted
from .sparse_store import SparseStore

DEADLINE_S = 120.0  # the head may have to fetch it first; whether it lives the agent watches


# The head's own


# A machine's own


class HeadSource:
    """The model's files as the head has them, whole or in part.

    Args:
        identity: what this machine proves itself with.
        host, port: of the head.
    """

    def __init__(self, identity: identities.Identity, host: str, port: int) -> None:
        self.name = f"the head at {host}:{port}"
        self._identity, self._where = identity, (host, port)
        self._mine = threading.local()
        self._all: set[Channel] = set()
        self._stopped = False

    def stop(self) -> None:
        """Nothing more is read."""
        self._stopped = True
        self.close()

    def close(self) -> None:
        """End all connections."""
        for channel in list(self._all):
            channel.close()

    def files(self) -> Mapping[str, SourceFile]:
        """See `fetch.Source`."""
        answer, _ = self._ask({})
        return {str(name): SourceFile(int(count)) for name, count in answer["files"].items()}

    def read(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """See `fetch.Source`."""
        return self._read({"file": file, "wanted": [start, stop]}, stop - start)

    def columns(self, file: str, strip: ColumnRange) -> bytes:
        """See `fetch.Source`."""
        return b"".join(self._read({"file": file, "wanted": strip}, strip.nbytes))

    def _read(self, what: dict[str, Any], count: int) -> Iterator[bytes]:
        answer, channel = self._ask(what)
        seen, whole = hashlib.sha256(), False
        try:
            for at in range(0, count, READ_BYTES):
                piece = channel.receive_bytes(min(READ_BYTES, count - at))
                seen.update(piece)
                yield piece
            if seen.hexdigest() != answer["sha256"]:
                raise SourceInterrupted(
                    f"{self.name}: bytes {what['wanted'][0]} to {what['wanted'][1]} of "
                    f"{what['file']} were damaged on the way"
                )
            whole = True
        except ClusterError as error:
            raise SourceInterrupted(f"{self.name} {error}") from error
        finally:
            if not whole:
                self._drop()

    def _ask(self, what: dict[str, Any]) -> tuple[dict[str, Any], Channel]:
        while not self._stopped:
            try:
                channel: Channel | None = getattr(self._mine, "channel", None)
                if channel is None:
                    sock = client.call(
                        *self._where, self._identity.client(), identities.SERVER_NAME
                    )
                    channel = self._mine.channel = Channel(sock, DEADLINE_S)
                    self._all.add(channel)
                channel.send({"type": "part", **what})
                answer = channel.receive()
            except ClusterError as error:
                self._drop()
                raise SourceInterrupted(f"{self.name}: {error}") from error
            match answer.get("type"):
                case "part":
                    return answer, channel
                case "later":  # it is fetching this itself
                    continue
            failure = error_from_json(answer.get("error"), f"{self.name}: ")
            if isinstance(failure, CheckpointError):
                raise failure
            self._drop()
            raise SourceInterrupted(str(failure))
        raise CheckpointError(_ENDED)

    def _drop(self) -> None:
        if (channel := getattr(self._mine, "channel", None)) is not None:
            self._mine.channel = None
            channel.close()
            self._all.discard(channel)


@dataclass(frozen=True)
class DownloadOrder:
    """What a machine shall fetch.

    Args:
        of_hub: ranges by file that it gets from the hub, or else from the head.
        of_head: ranges that it gets from the head.
        hub, revision: the repository and its commit; None: there is no hub.
        head: whether the head can be asked: not by its own machine.
    """

    of_hub: Mapping[str, Sequence[ByteRange]]
    of_head: Mapping[str, Sequence[ByteRange]]
    hub: str | None
    revision: str | None
    head: bool

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> DownloadOrder:
        """What `vars` of one became on its way.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        of_hub, of_head = (
            {
                str(file): [byte_range_from_json(w) for w in each]
                for file, each in given[key].items()
            }
            for key in ("of_hub", "of_head")
        )
        return cls(of_hub, of_head, given["hub"], given["revision"], bool(given["head"]))


class DownloadTask:
    """One fetch, in a thread.

    Args:
        folder: of the part.
        order: what of it.
        head: the head as a source, if the order says so.
        verified: folders that this process has compared with their hashes; others are, first.
        after: an earlier one; it is told to end, and its end waited for.
    """

    def __init__(
        self,
        folder: Path,
        order: DownloadOrder,
        head: HeadSource,
        verified: set[Path],
        after: DownloadTask | None = None,
    ) -> None:
        self.folder, self._order, self._head, self._verified = folder, order, head, verified
        self.done, self.total, self.fetched, self.damaged = 0, 0, 0, 0
        self._hub = Hub(order.hub, order.revision) if order.hub else None
        self._error: Exception | None = None
        self._stopped, self._after = False, after
        if after is not None:
            after.stop()
        self._thread = threading.Thread(target=self._run, name="fetching", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            if self._after is not None:
                self._after._thread.join()
                self._after = None
            self._fetch()
        except Exception as error:
            self._error = error
        finally:
            self._head.close()
            if self._hub is not None:
                self._hub.close()

    def _fetch(self) -> None:
        order = self._order
        store = SparseStore(self.folder)
        if self.folder not in self._verified:
            if wrong := store.damaged():
                self.damaged = total_bytes(w for each in wrong.values() for w in each)
                store.forget(wrong)
            self._verified.add(self.folder)
        from_hub: list[Source] = [self._hub] if self._hub is not None else []
        from_head: list[Source] = [self._head] if order.head else []
        if order.head or self.damaged:
            store = fetch_metadata((from_head or from_hub)[0], self.folder)
        first = total_bytes(w for each in order.of_hub.values() for w in each)
        self.total = first + total_bytes(w for each in order.of_head.values() for w in each)
        # Before anything is fetched: a disk that is too small is not filled first.
        missing = [store.missing(order.of_hub), store.missing(order.of_head)]
        files = {f for each in missing for f in each}
        check_disk_space(store, {f: [w for m in missing for w in m.get(f, ())] for f in files})
        self.fetched = fetch_ranges([*from_hub, *from_head], store, order.of_hub, self._progress(0))
        self.fetched += fetch_ranges(from_head, store, order.of_head, self._progress(first))

    def _progress(self, before: int) -> Callable[[int, int], None]:
        def progress(done: int, _: int) -> None:
            self.done = before + done
            if self._stopped:
                raise CheckpointError(_ENDED)

        return progress

    def wait(self, seconds: float) -> bool:
        """Whether it has come to its end, after so many seconds at most.

        Raises:
            CenacleError: why it did not succeed.
        """
        self._thread.join(seconds)
        if self._thread.is_alive():
            return False
        if isinstance(self._error, CenacleError):
            raise self._error
        if self._error is not None:
            raise ClusterError(f"fetching failed: {self._error!r}") from self._error
        return True

    def stop(self) -> None:
        """Ask it to end after the ranges that it is at."""
        self._stopped = True
        self._head.stop()


_ENDED = "fetching was ended before all had come"
