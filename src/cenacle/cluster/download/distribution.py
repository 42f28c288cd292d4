"""Distributing a model's files over the nodes of a cluster.

Owns: which node downloads which bytes from where, so that the Hub sends each byte as rarely as
possible; starting the downloads and waiting for them.
Does not know: sockets (`cluster/head.py`), how bytes are fetched (`task.py`, `download.py`).
The rule: what only one node reads it downloads from the Hub itself. What the head reads too, and
rows of which nodes read some columns each, the head downloads and passes on; so its disk has all
such rows. Without a Hub the head has the model and passes on everything.
Invariant: when `distribute` has returned every node has all that its rank will read.
Next: `formation.py` calls both methods.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from ...core.plan import Plan
from ...core.units import format_bytes
from ...errors import CheckpointError, ClusterError
from ...model.byte_ranges import (
    ByteRange,
    ColumnRange,
    Span,
    covering_spans,
    intersect_spans,
    merge_spans,
    subtract_spans,
)
from ...model.checkpoint import Checkpoint
from ...model.slicing import ModelLayout, required_ranges, slices_for
from ...model.weight_files import config_file
from .. import messages, node_info
from ..head import Head
from ..membership import Node
from .file_server import ModelFileServer
from .hub import Hub
from .node_cache import LocalModel
from .task import DownloadOrder

ORDER_TIMEOUT_S = 30.0
PROGRESS_TIMEOUT_S = 60.0
REPORT_INTERVAL_S = 10.0

FileRanges = Mapping[str, Sequence[ByteRange]]
"""Byte ranges by file."""
OnMessage = Callable[[str], None]


def plan_downloads(
    required: Sequence[FileRanges], has_hub: bool
) -> list[tuple[FileRanges, FileRanges]]:
    """What each node downloads from the Hub, and what from the head.

    Args:
        required: what each node's rank reads of what is not complete there; the head's first.
        has_hub: whether there is a Hub; else the head has everything.
    """
    if not has_hub:
        return [({}, {}), *(({}, ranges) for ranges in required[1:])]
    head_spans: dict[str, list[Span]] = {}
    for rank, by_file in enumerate(required):
        for file, ranges in by_file.items():
            rows = covering_spans(r for r in ranges if rank == 0 or isinstance(r, ColumnRange))
            head_spans[file] = merge_spans([*head_spans.get(file, []), *rows])
    downloads: list[tuple[FileRanges, FileRanges]] = [
        ({file: spans for file, spans in head_spans.items() if spans}, {})
    ]
    for by_file in required[1:]:
        from_hub: dict[str, Sequence[ByteRange]] = {}
        from_head: dict[str, Sequence[ByteRange]] = {}
        for file, ranges in by_file.items():
            spans = [(r[0], r[1]) for r in ranges if not isinstance(r, ColumnRange)]
            columns = [r for r in ranges if isinstance(r, ColumnRange)]
            if alone := subtract_spans(spans, head_spans.get(file, [])):
                from_hub[file] = alone
            shared: list[ByteRange] = [*intersect_spans(spans, head_spans.get(file, [])), *columns]
            if shared:
                from_head[file] = shared
        downloads.append((from_hub, from_head))
    return downloads


class ModelDistribution:
    """A model, and getting it to the nodes of a cluster.

    Args:
        head: sends orders to the nodes.
        name: of the model, by which each node looks for it.
        checkpoint: the head's, whole or its headers only.
        hub: what has the rest.
    """

    def __init__(self, head: Head, name: str, checkpoint: Checkpoint, hub: Hub | None) -> None:
        self._head, self._name, self._checkpoint, self._hub = head, name, checkpoint, hub
        self._folder = checkpoint.folder.resolve()
        self._digest = node_info.checkpoint_digest(self._folder)
        config = config_file(self._folder).read_bytes()
        self._config_sha256 = hashlib.sha256(config).hexdigest()
        self._file_server = ModelFileServer(self._folder, hub)
        self._latest = object()  # the latest `distribute`; earlier ones give up
        head.serve_files(self._file_server)

    def locate(self, members: Sequence[Node]) -> list[LocalModel]:
        """What of the model each node has; the first is the head's own.

        Raises:
            CheckpointError: a node has another model of that name.
        """
        order = messages.FindModel(self._name, self._digest, self._config_sha256)
        answers = self._head.send_orders([(n, order) for n in members[1:]], ORDER_TIMEOUT_S)
        others = [LocalModel(a.folder, a.complete) for a in answers]
        return [LocalModel(str(self._folder), self._hub is None), *others]

    def distribute(
        self,
        members: Sequence[Node],
        local_models: Sequence[LocalModel],
        plan: Plan,
        on_message: OnMessage,
        ending: threading.Event | None = None,
    ) -> None:
        """Have every node download what its rank reads, and wait for it.

        Args:
            local_models: see `locate`.
            plan: what each rank holds; ranks are in the order of `members`.
            on_message: told what is downloaded, and the progress.
            ending: gives up when it is set.

        Raises:
            CheckpointError: a node cannot; names the node, and says what to do.
            ClusterError: a node was lost, `ending` was set, or this was called again meanwhile.
                What was downloaded is kept everywhere.
        """
        lacking = [rank for rank, local in enumerate(local_models) if not local.is_complete]
        if not lacking:
            return
        layout = ModelLayout.read(self._checkpoint)
        required: list[FileRanges] = [
            required_ranges(slices_for(plan, rank, layout)) if rank in lacking else {}
            for rank in range(len(members))
        ]
        downloads = plan_downloads(required, self._hub is not None)
        hub, commit = (None, None) if self._hub is None else (self._hub.name, self._hub.commit)
        this = self._latest = object()
        self._file_server.expect(
            {file: covering_spans(ranges) for file, ranges in downloads[0][0].items()}
        )
        orders = [
            (
                members[rank],
                messages.StartDownload(
                    self._name,
                    local_models[rank].folder,
                    vars(DownloadOrder(*downloads[rank], hub, commit, rank > 0)),
                ),
            )
            for rank in lacking
        ]
        started_s = time.monotonic()

        def is_over() -> bool:
            return self._latest is not this or (ending is not None and ending.is_set())

        try:
            self._head.send_orders(orders, ORDER_TIMEOUT_S)
            fetched = self._wait([members[rank] for rank in lacking], on_message, is_over)
        except BaseException:
            if self._latest is this:
                self._file_server.expect({})
            raise
        if any(fetched.values()):
            names = ", ".join(f"{name} {format_bytes(n)}" for name, n in fetched.items() if n)
            on_message(f"downloaded in {time.monotonic() - started_s:.0f} s: {names}")

    def _wait(
        self, members: list[Node], on_message: OnMessage, is_over: Callable[[], bool]
    ) -> dict[str, int]:
        """Bytes that each node has fetched, when all are done."""
        fetched: dict[str, int] = {}
        progress: dict[str, tuple[int, int]] = {}
        next_report_s = time.monotonic() + 1
        while members:
            if is_over():
                raise ClusterError("the nodes download for another group now, or the cluster ended")
            order = messages.WaitForDownload()
            answers = self._head.send_orders([(n, order) for n in members], PROGRESS_TIMEOUT_S)
            for node, answer in zip(members, answers, strict=True):
                progress[node.name] = (answer.done, answer.total)
                self._head.set_download_progress(node, *progress[node.name])
                if answer.finished:
                    fetched[node.name] = self._check_download(node, answer)
            members = [n for n in members if n.name not in fetched]
            if members and time.monotonic() > next_report_s:
                parts = [
                    f"{name} {format_bytes(done)} of {format_bytes(total)}"
                    for name, (done, total) in progress.items()
                ]
                on_message(f"downloading: {', '.join(parts)}")
                next_report_s = time.monotonic() + REPORT_INTERVAL_S
        return fetched

    def _check_download(self, node: Node, answer: messages.DownloadProgress) -> int:
        if answer.digest != self._digest:
            raise CheckpointError(
                f"{node.name}: the download in {answer.folder} differs from the head's model; "
                f"remove that folder to download it again"
            )
        return answer.downloaded_bytes
