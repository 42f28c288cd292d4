"""From connected nodes to ranks that serve.

Owns: the order of steps: which nodes take part, what they have of the model, the links between
them, the plan, downloads, starting and loading; and a dry run of all this for nodes that return
while a group runs.
Does not know: sockets (`head.py`), how decisions are made (`placement.py`), requests.
Invariant: a failure on the way leaves no rank and no group behind; the error names a node.
Next: `remote_ranks.py`, which this creates.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..core.link import Link
from ..core.plan import Plan
from ..engine.options import EngineOptions
from ..engine.speculative.draft_model import DraftModelConfig
from ..errors import CenacleError, CheckpointError, ClusterError, PlanError
from ..model.checkpoint import Checkpoint
from ..model.spec_reader import read_model_spec
from ..ranks.messages import LoadOrder
from ..ranks.ranks import Epoch, ReportProgress
from . import hostsfile, link_probe, messages, placement
from .download import node_cache
from .download.distribution import ModelDistribution
from .download.hub import Hub
from .head import GroupMembership, Head, ReturningNodes
from .hostsfile import Host
from .membership import Node
from .remote_ranks import RemoteRanks
from .security import pairing
from .thunderbolt import Devices

log = logging.getLogger(__name__)

LOST_NODE_WAIT_S = 3.0  # for a lost node, if the others can do without it
FIRST_GROUP_WAIT_S = 86400.0  # machines may be started by hand
AGENTS_WAIT_S = 10.0  # while requests wait; agents connect again within seconds
MIN_WAIT_S = 1.0  # of a later try

Report = Callable[[str], None]
WhileWaiting = Callable[[Callable[[], str]], AbstractContextManager[None]]
"""What surrounds a wait for nodes; it gets a function that says which are missing."""


@dataclass(frozen=True)
class ClusterModel:
    """What is to run on a cluster.

    Args:
        name: by which each node looks for its folder.
        checkpoint: in the folder that `Cluster.locate` returned.
        placement: how to place it, and how ranks communicate.
        engine, kernels: see `runtime.LoadOptions`.
        draft_model: of the head's machine, which has rank 0.
    """

    name: str
    checkpoint: Checkpoint
    placement: placement.PlacementOptions
    engine: EngineOptions
    kernels: str
    draft_model: DraftModelConfig | None = None


@dataclass(frozen=True)
class FormedGroup:
    """What was decided for one group.

    Args:
        group: the nodes, in rank order.
        folders: of the model, on each node.
        backend, backend_reason: how ranks communicate, and why.
        links: measured between pairs of ranks.
        plan, plan_reason: what each rank holds, and why, in one line.
        devices: RDMA devices, see `thunderbolt.Devices`.
    """

    group: GroupMembership
    folders: list[str]
    backend: str
    backend_reason: str
    links: Mapping[tuple[int, int], Link]
    plan: Plan
    plan_reason: str
    devices: Devices


class Cluster:
    """The nodes of a cluster, as a place where ranks can be started.

    Args:
        head: running.
        nodes: how many nodes take part; 0: all that belong to the cluster.
        report: told in sentences what is waited for and what was decided.
        hosts: of a hosts file: the expected nodes, and the addresses for all-reduces.
        wait_s: after so long, counted from now, missing nodes are not waited for any more where no
            group has run; None: they are, without end.
        while_waiting: surrounds the waits before the first group of all.
    """

    def __init__(
        self,
        head: Head,
        nodes: int = 0,
        report: Report = lambda _: None,
        hosts: Sequence[Host] = (),
        wait_s: float | None = FIRST_GROUP_WAIT_S,
        while_waiting: WhileWaiting = lambda _: nullcontext(),
    ) -> None:
        self._head, self._nodes, self._hosts = head, nodes, hosts
        self._ends_s = None if wait_s is None else time.monotonic() + wait_s
        self._while_waiting = while_waiting
        self._report_plain = report
        self.formed: FormedGroup | None = None  # decided and not started yet
        self._running: FormedGroup | None = None  # started last
        self._hub: Hub | None = None  # has what the head's machine has not
        self._links: dict[tuple[str, float, str, float], Link] = {}
        self._reform_running: Report | None = None  # of the group that was started last

    def locate(self, model: str) -> Path:
        """The head's folder of a model. Of a model that only the Hub has, the folder is incomplete:
        `form` and `ClusterRankSource.start` complete it.

        Raises:
            CheckpointError: see `node_cache.open_model`.
        """
        folder, self._hub = node_cache.open_model(model)
        return folder

    def check_fit(self, model: ClusterModel) -> None:
        """Refuse a model that would not fit in place of the one that runs, which goes on.

        Raises:
            PlanError: it would not; names the node.
        """
        if (running := self._running) is None:
            return  # `form` finds out
        members = running.group.members  # with the memory that they had before it was loaded
        backend, _, _ = placement.choose_backend(
            model.placement.backend, model.placement.comm_dtype, members, running.devices
        )
        _place(model, members, running.links, backend)

    def form(self, model: ClusterModel, cancel: threading.Event | None = None) -> FormedGroup:
        """Wait for the nodes, query them, measure their links and decide on a model's first group.

        Args:
            cancel: set to stop waiting.

        Raises:
            CheckpointError: a node cannot download its part, or has another model of that name.
            PlanError: the model does not fit; names the node.
            NodesMissing: not all have connected in time.
            ClusterError: nodes cannot reach each other, or the cluster was shut down.
        """
        self.set_model(model)
        self.formed = None
        while self.formed is None:
            group = self._wait_for_nodes(cancel)
            try:
                self.formed = self._plan_group(group, self._report)
            except ClusterError as error:
                is_late = self._ends_s is not None and time.monotonic() > self._ends_s
                if is_late or all(self._head.is_connected(node) for node in group.members):
                    raise
                self._report(f"{error}; downloaded data is kept")
        return self.formed

    def _wait_for_nodes(self, cancel: threading.Event | None) -> GroupMembership:
        wait = partial(self._head.form_group, self._nodes, self._report, cancel)
        if self._running is not None:  # a lost node is not waited for, as after a loss
            return wait(LOST_NODE_WAIT_S, timeout_s=AGENTS_WAIT_S)
        left_s = None
        if self._ends_s is not None:
            left_s = max(MIN_WAIT_S, self._ends_s - time.monotonic())
        with self._while_waiting(lambda: self._head.describe_missing(self._nodes)):
            return wait(timeout_s=left_s)

    def set_model(self, model: ClusterModel) -> None:
        """What groups are formed for."""
        self._model = model
        self._distribution = ModelDistribution(self._head, model.name, model.checkpoint, self._hub)

    def measure_links_again(self) -> dict[tuple[int, int], Link]:
        """Measure the links of the group that is not started yet once more.

        Raises:
            ClusterError: a node was lost meanwhile.
        """
        assert self.formed is not None
        self._links.clear()
        return self._measure_links(self.formed.group.members)

    def start(self, order: LoadOrder, epoch: Epoch, report: ReportProgress | None) -> RemoteRanks:
        """See `ClusterRankSource.start`."""
        formed, self.formed = self.formed, None
        formed = formed or self._reform(epoch)
        ranks = RemoteRanks(
            self._head,
            formed.group,
            formed.backend,
            formed.backend_reason,
            formed.folders,
            epoch,
            formed.devices,
        )
        ranks.links = formed.links
        try:
            ranks.load(replace(order, plan=formed.plan), report)
        except BaseException:
            ranks.close(now=True)
            raise
        self._running = formed
        self._head.mark_ready(formed.group.group_id)
        self._head.set_status(
            waiting="", backend_reason=formed.backend_reason, plan_reason=formed.plan_reason
        )
        return ranks

    def watch_for_returns(self, reform: Report) -> None:
        """From now on have this group, the one that was started last, reformed whenever nodes
        return.

        Args:
            reform: ends the running ranks between two steps, for the reason given; others are then
                started by `start`.
        """
        is_watched, self._reform_running = self._reform_running is not None, reform
        if not is_watched:
            threading.Thread(target=self._admit_returning, name="returns", daemon=True).start()

    def _report(self, message: str) -> None:
        """Report, with the nodes of the hosts file that are still expected."""
        if self._hosts:
            nodes = self._head.status()["nodes"]
            connected = [node["address"] for node in nodes if node["connected"]]
            expected = hostsfile.expected_hosts(self._hosts, connected)
            message = "; ".join(filter(None, [message, expected]))
        self._report_plain(message)

    def _admit_returning(self) -> None:
        while not self._head.closed:
            request = self._head.wait_for_returning(0.5)
            if request is None:
                continue
            names = " and ".join(node.name for node in request.returning)
            try:
                self._dry_run(request)
            except Exception as error:  # this thread lives as long as the head
                if not isinstance(error, CenacleError | OSError):
                    log.exception("an unexpected error")
                log.warning("%s cannot be added: %s", names, error)
                self._head.reject_nodes(request.returning, str(error))
                continue
            if self._head.is_joining(request):
                verb = "has" if len(request.returning) == 1 else "have"
                assert self._reform_running is not None
                self._reform_running(
                    f"{names} {verb} returned: the group is formed again with {names}"
                )

    def _dry_run(self, request: ReturningNodes) -> None:
        """Find out what would fail, while the running group goes on.

        The memory of its ranks counts as available.
        """
        members = _with_freed_memory(request.members, self._running)
        self._plan_ranks(GroupMembership(request.group_id, members), log.info)

    def _reform(self, epoch: Epoch) -> FormedGroup:
        """Form a group after a loss: of the nodes that are left if the model fits, else of more."""

        def report(message: str) -> None:
            self._report(message)
            epoch.report(message)

        self._head.set_status(reformed=f"re-formed: {epoch.reason}")
        group = self._head.form_group(self._nodes, report, epoch.closing, LOST_NODE_WAIT_S)
        while True:
            try:
                return self._plan_group(group, report, epoch.closing)
            except (PlanError, CheckpointError) as error:
                count = len(group.members)
                if count >= (self._nodes or self._head.node_count):
                    raise
                verb = "does not fit on" if isinstance(error, PlanError) else "is not complete on"
                obstacle = f"the model {verb} the remaining nodes ({error})"
                report(obstacle)

            def report_missing(missing: str, obstacle: str = obstacle) -> None:
                report(
                    f"{obstacle}; waiting for more: {missing}; start a missing agent with "
                    f"`cenacle join`, or add a machine with `cenacle nodes --invite`"
                )

            group = self._head.form_group(count + 1, report_missing, epoch.closing, temporary=True)

    def _plan_group(
        self, group: GroupMembership, report: Report, closing: threading.Event | None = None
    ) -> FormedGroup:
        try:
            return self._plan_ranks(group, report, closing)
        except BaseException as error:
            self._head.end_group(group.group_id, getattr(error, "node_id", None) or "")
            raise

    def _plan_ranks(
        self, group: GroupMembership, report: Report, closing: threading.Event | None = None
    ) -> FormedGroup:
        model = self._model
        devices: Devices = ()
        if self._hosts:
            members, devices = hostsfile.order_by_hosts(self._hosts, group.members)
            group = replace(group, members=members)
        members = group.members
        local_models = self._distribution.locate(members)
        backend, backend_reason, devices = placement.choose_backend(
            model.placement.backend, model.placement.comm_dtype, members, devices
        )
        links = self._measure_links(members)
        plan, plan_reason = _place(model, members, links, backend)
        self._distribution.distribute(members, local_models, plan, report, closing)
        if links:
            backend_reason += f"; {placement.describe_links(members, links)}"
        folders = [local_model.folder for local_model in local_models]
        return FormedGroup(
            group, folders, backend, backend_reason, links, plan, plan_reason, devices
        )

    def _measure_links(self, members: tuple[Node, ...]) -> dict[tuple[int, int], Link]:
        """Measure every pair, one after the other, since a busy link measures badly. Each pair is
        measured once while both nodes stay connected: after a loss every second counts."""
        links = {}
        for a, one in enumerate(members):
            for b, other in enumerate(members[a + 1 :], a + 1):
                pair = (one.id, one.connected_at_s, other.id, other.connected_at_s)
                if pair not in self._links:
                    self._links[pair] = self._measure_link(one, other)
                links[a, b] = self._links[pair]
        return links

    def _measure_link(self, one: Node, other: Node) -> Link:
        secret = pairing.encode(secrets.token_bytes(16))
        served = self._head.send_order(other, messages.ServeProbe(other.address, secret))
        order = messages.ProbeLink(other.address, served.port, secret)
        return self._head.send_order(one, order, link_probe.PROBE_TIMEOUT_S + 5)


def _place(
    model: ClusterModel,
    members: tuple[Node, ...],
    links: Mapping[tuple[int, int], Link],
    backend: str,
) -> tuple[Plan, str]:
    return placement.place(
        read_model_spec(model.checkpoint, images=model.engine.sees_images),
        model.checkpoint.config,
        members,
        links,
        model.placement,
        model.engine,
        model.kernels,
        model.draft_model,
        backend,
    )


def _with_freed_memory(members: Sequence[Node], running: FormedGroup | None) -> tuple[Node, ...]:
    """Nodes with the memory that they will have when the running ranks have ended."""
    held_bytes: dict[str, int] = {}
    if running is not None:
        for rank, node in enumerate(running.group.members):
            held_bytes[node.id] = running.plan.bytes_of(rank)["total"]
    freed = []
    for node in members:
        available_bytes = node.info.available_bytes + held_bytes.get(node.id, 0)
        freed.append(replace(node, info=replace(node.info, available_bytes=available_bytes)))
    return tuple(freed)


@dataclass(frozen=True)
class ClusterRankSource:
    """Starts the ranks of a group on the nodes of a cluster; see `RankSource`.

    Args:
        order: what they load; the plan is that of the group.
    """

    cluster: Cluster
    order: LoadOrder

    def start(self, epoch: Epoch, report: ReportProgress | None = None) -> RemoteRanks:
        """Start and load the ranks of an epoch: the first as `Cluster.form` decided, others on the
        remaining nodes if the model fits there; else when enough have returned.

        Raises:
            CenacleError: what the first failing rank reported; no rank is left.
        """
        return self.cluster.start(self.order, epoch, report)
