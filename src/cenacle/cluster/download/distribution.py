"""Who fetches which bytes of the model from where, so that the hub gives each as seldom as can be.

Owns: what machines have, dealing what they lack, waiting for it.
Does not know: sockets (`control.py`), how bytes are fetched (`parts.py`, `fetch.py`).
The rule: what one machine alone reads it gets from the hub itself. What the head reads too, and
rows of which machines read some columns each, the head gets, and gives on; so its disk has all such
rows. Without a hub the head has the model, and gives all.
Invariant: when `fetch` has returned every machine has all that its rank will read.
Next: `forming.py` asks for both.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
from ...model.loader import required_ranges
from .. import node_info
from ..head import Head
from ..membership import Node
from .file_server import ModelFileServer
from .hub import Hub
from .node_cache import LocalModel
from .task import DownloadOrder

FIND_S = 30.0
ASK_S = 60.0  # for a word on how far it is
SAY_EVERY_S = 10.0

Files = Mapping[str, Sequence[ByteRange]]
Say = Callable[[str], None]


def plan_downloads(wanted: Sequence[Files], hub: bool) -> list[tuple[Files, Files]]:
    """What each machine fetches from the hub, and what from the head.

    Args:
        wanted: what each machine's rank reads, of what is not whole there; the head's the first.
        hub: whether there is one; else the head has all.
    """
    if not hub:
        return [({}, {}), *(({}, files) for files in wanted[1:])]
    heads: dict[str, list[Span]] = {}
    for rank, files in enumerate(wanted):
        for file, each in files.items():
            rows = covering_spans(w for w in each if rank == 0 or isinstance(w, ColumnRange))
            heads[file] = merge_spans([*heads.get(file, []), *rows])
    dealt: list[tuple[Files, Files]] = [({f: s for f, s in heads.items() if s}, {})]
    for files in wanted[1:]:
        of_hub: dict[str, Sequence[ByteRange]] = {}
        of_head: dict[str, Sequence[ByteRange]] = {}
        for file, each in files.items():
            spans = [(w[0], w[1]) for w in each if not isinstance(w, ColumnRange)]
            strips = [w for w in each if isinstance(w, ColumnRange)]
            if alone := subtract_spans(spans, heads.get(file, [])):
                of_hub[file] = alone
            given: list[ByteRange] = [*intersect_spans(spans, heads.get(file, [])), *strips]
            if given:
                of_head[file] = given
        dealt.append((of_hub, of_head))
    return dealt


class ModelDistribution:
    """A model, for the machines of a cluster.

    Args:
        head: through which they are asked and told.
        name: of the model, by which each machine looks for it.
        checkpoint: the head's, whole or its headers only.
        hub: what has the rest.
    """

    def __init__(self, head: Head, name: str, checkpoint: Checkpoint, hub: Hub | None) -> None:
        self._head, self._name, self._checkpoint, self._hub = head, name, checkpoint, hub
        self._folder = checkpoint.folder.resolve()
        self._digest = node_info.digest(self._folder)
        config = (self._folder / "config.json").read_bytes()
        self._config = hashlib.sha256(config).hexdigest()
        self._given = ModelFileServer(self._folder, hub)
        self._latest = object()  # of what is fetched; what was begun before it is given up
        head.serve_files(self._given)

    def find(self, members: Sequence[Node]) -> list[LocalModel]:
        """What of the model each machine has; the first is the head's own.

        Raises:
            CheckpointError: one has another model of that name.
        """
        asked = {"model": self._name, "digest": self._digest, "config": self._config}
        answers = self._head.send_orders([(n, asked) for n in members[1:]], "find", FIND_S)
        found = [LocalModel(str(a["folder"]), bool(a["whole"])) for a in answers]
        return [LocalModel(str(self._folder), self._hub is None), *found]

    def fetch(
        self,
        members: Sequence[Node],
        found: Sequence[LocalModel],
        plan: Plan,
        say: Say,
        ending: threading.Event | None = None,
    ) -> None:
        """Have every machine fetch what its rank reads, and wait for it.

        Args:
            plan: who holds what; ranks are in the order of `members`.
            say: told what is fetched, and how far it is.
            ending: gives up when it is set.

        Raises:
            CheckpointError: one cannot; names the machine, and says what to do.
            ClusterError: one was lost, `ending` was set, or this was called again meanwhile. What
                has come is kept everywhere.
        """
        lacking = [rank for rank, each in enumerate(found) if not each.whole]
        if not lacking:
            return
        wanted: list[Files] = [
            required_ranges(self._checkpoint, plan, rank) if rank in lacking else {}
            for rank in range(len(members))
        ]
        dealt = plan_downloads(wanted, self._hub is not None)
        hub, revision = (None, None) if self._hub is None else (self._hub.name, self._hub.commit)
        mine = self._latest = object()
        self._given.expect({file: covering_spans(each) for file, each in dealt[0][0].items()})
        orders = [
            (
                members[rank],
                {
                    "model": self._name,
                    "folder": found[rank].folder,
                    "order": vars(DownloadOrder(*dealt[rank], hub, revision, rank > 0)),
                },
            )
            for rank in lacking
        ]
        began = time.monotonic()

        def over() -> bool:
            return self._latest is not mine or (ending is not None and ending.is_set())

        try:
            self._head.send_orders(orders, "fetch", FIND_S)
            fetched = self._wait([members[rank] for rank in lacking], say, over)
        except BaseException:
            if self._latest is mine:
                self._given.expect({})
            raise
        if any(fetched.values()):
            names = ", ".join(f"{name} {format_bytes(n)}" for name, n in fetched.items() if n)
            say(f"fetched in {time.monotonic() - began:.0f} s: {names}")

    def _wait(self, members: list[Node], say: Say, over: Callable[[], bool]) -> dict[str, int]:
        """Bytes that each has fetched, when all have."""
        fetched: dict[str, int] = {}
        progress: dict[str, tuple[int, int]] = {}
        next_s = time.monotonic() + 1
        while members:
            if over():
                raise ClusterError("machines fetch for another group now, or the cluster was ended")
            answers = self._head.send_orders([(n, {}) for n in members], "fetched", ASK_S)
            for node, answer in zip(members, answers, strict=True):
                progress[node.name] = (int(answer["done"]), int(answer["total"]))
                self._head.set_download_progress(node, *progress[node.name])
                if answer["ended"]:
                    fetched[node.name] = self._came(node, answer)
            members = [n for n in members if n.name not in fetched]
            if members and time.monotonic() > next_s:
                parts = [
                    f"{n} {format_bytes(a)} of {format_bytes(b)}" for n, (a, b) in progress.items()
                ]
                say(f"fetching: {', '.join(parts)}")
                next_s = time.monotonic() + SAY_EVERY_S
        return fetched

    def _came(self, node: Node, answer: dict[str, Any]) -> int:
        if answer["digest"] != self._digest:
            raise CheckpointError(
                f"{node.name}: what it fetched into {answer['folder']} is not the head's model: "
                f"remove that folder, it is fetched anew"
            )
        return int(answer["fetched"])
