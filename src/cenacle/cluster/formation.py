"""From machines that are there to ranks that answer.

Owns: the order of things: who takes part, what of the model is where, what do the links give, who
holds what, fetch, start, load; the same tried out beside a group that works, for machines that came
back.
Does not know: sockets (`control.py`), how the decisions are made (`placing.py`), requests.
Invariant: what fails on the way leaves no rank and no formation behind; the error names a machine.
Next: `hosts.RemoteRanks`, which is what comes out.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.plan import Plan
from ..engine.options import EngineOptions
from ..engine.speculative.draft_model import DraftModelConfig
from ..errors import CenacleError, CheckpointError, ClusterError, PlanError
from ..model.checkpoint import Checkpoint
from ..model.spec_reader import read_model_spec
from ..ranks.local_ranks import LoadProgress
from ..ranks.ranks import Epoch
from . import hostsfile, link_probe, messages, placement
from .download import node_cache
from .download.distribution import ModelDistribution, OnMessage
from .download.hub import Hub
from .head import GroupMembership, Head, ReturningNodes
from .hostsfile import Host
from .link_probe import Link
from .membership import Node
from .remote_ranks import RemoteRanks
from .security import pairing
from .thunderbolt import Devices

log = logging.getLogger(__name__)

LEFT_S = 3.0  # how long a lost machine is waited for where the others may do without
FIRST = Epoch(0, threading.Event())


@dataclass(frozen=True)
class Formed:
    """What was decided for one formation.

    Args:
        formation: the machines.
        folders: of the model, on each.
        backend, exchange: how ranks exchange, and why.
        devices: of RDMA, see `rdma.Devices`.
        links: what was measured between pairs of ranks.
        plan: who holds what.
        reason: why, in one line.
    """

    formation: GroupMembership
    folders: list[str]
    backend: str
    exchange: str
    links: Mapping[tuple[int, int], Link]
    plan: Plan
    reason: str
    devices: Devices


class Joined:
    """The machines of a cluster, as a place where ranks can be started.

    Args:
        head: started.
        nodes: how many machines; 0: all that belong to the cluster.
        wanted: placement and exchange, as far as they were asked for.
        say: told what is waited for and what was decided, in sentences.
        hosts: of a hosts file: who is awaited, and at which addresses machines exchange.
    """

    def __init__(
        self,
        head: Head,
        nodes: int = 0,
        wanted: placement.PlacementOptions | None = None,
        say: Callable[[str], None] = lambda _: None,
        hosts: Sequence[Host] = (),
    ) -> None:
        self._head, self._nodes = head, nodes
        self._hosts = hosts
        self._say = self._naming(say)
        self._wanted = wanted or placement.PlacementOptions()
        self._formed: Formed | None = None  # not started yet
        self._present: Formed | None = None  # what was started last
        self._hub: Hub | None = None  # that has what the head has not
        self._links: dict[tuple[str, float, str, float], Link] = {}

    def locate(self, model: str) -> Path:
        """The head's folder of a model; of one that only the hub has, a part, which `form` and
        `start` complete.

        Raises:
            CheckpointError: see `parts.open_model`.
        """
        folder, self._hub = node_cache.open_model(model)
        return folder

    def _naming(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """With a hosts file whoever is awaited has a name."""

        def with_names(text: str) -> None:
            here = [n["address"] for n in self._head.status()["nodes"] if n["connected"]]
            say("; ".join(filter(None, [text, hostsfile.expected_hosts(self._hosts, here)])))

        return with_names if self._hosts else say

    def form(
        self,
        name: str,
        checkpoint: Checkpoint,
        options: EngineOptions,
        kernels: str,
        draft: DraftModelConfig | None = None,
    ) -> tuple[Plan, str]:
        """Wait until all machines that are wanted are there, ask and measure them, and decide.

        Args:
            name: of the model, by which each machine looks for its folder.
            checkpoint: in the folder that `locate` gave.
            options, kernels: see `api.load`.
            draft: of the head's machine, whose rank is the first.

        Returns:
            The plan of the first group, and why it was chosen.

        Raises:
            CheckpointError: a machine cannot fetch its part, or has another model of that name.
            PlanError: it does not fit; names the machine.
            ClusterError: the cluster was ended, or machines cannot reach each other.
        """
        self._what = (checkpoint, options, kernels, draft)
        self._sharing = ModelDistribution(self._head, name, checkpoint, self._hub)
        while self._formed is None:
            formation = self._head.form_group(self._nodes, self._say)
            try:
                self._formed = self._decide(formation, self._say)
            except ClusterError as error:
                if all(self._head.is_connected(n) for n in formation.members):
                    raise
                self._say(f"{error}; what it has fetched is kept")
        return self._formed.plan, self._formed.reason

    @property
    def formed(self) -> Formed | None:
        """What was decided for the group that is not started yet."""
        return self._formed

    def measure_again(self) -> dict[tuple[int, int], Link]:
        """The links of the group that is not started yet, once more.

        Raises:
            ClusterError: a machine was lost meanwhile.
        """
        assert self._formed is not None
        self._links.clear()
        return self._measure(self._formed.formation.members)

    def start(
        self, order: dict[str, Any], progress: LoadProgress | None = None, epoch: Epoch = FIRST
    ) -> RemoteRanks:
        """Start and load the ranks of an epoch: the first on what `form` decided, others on the
        machines that are left, if the model fits there; else when enough have come back.

        Raises:
            CenacleError: what the first failing rank said; no rank is left.
        """
        formed, self._formed = self._formed, None
        formed = formed or self._again(epoch)
        order = {**order, "plan": formed.plan.to_json(), "wire": self._wanted.comm_dtype}
        ranks = RemoteRanks(
            self._head,
            formed.formation,
            formed.plan,
            formed.backend,
            formed.exchange,
            formed.folders,
            epoch,
            formed.devices,
        )
        try:
            ranks.load(order, progress)
        except BaseException:
            ranks.close(now=True)
            raise
        self._present = formed
        self._head.mark_ready(formed.formation.group_id)
        self._head.set_status(waiting="", backend_reason=formed.exchange, plan_reason=formed.reason)
        return ranks

    def serves(self, move: Callable[[str], None]) -> None:
        """From now on have the group formed anew whenever machines come back.

        Args:
            move: ends the ranks that work, between two steps, for the reason given; others are then
                begun by `start`.
        """
        work = threading.Thread(target=self._take_in, args=(move,), name="returns", daemon=True)
        work.start()

    def _take_in(self, move: Callable[[str], None]) -> None:
        while not self._head.closed:
            asked = self._head.wait_for_returning(0.5)
            if asked is None:
                continue
            names = " and ".join(n.name for n in asked.returning)
            try:
                self._try_out(asked)
            except (CenacleError, OSError) as error:
                log.warning("%s cannot be taken in: %s", names, error)
                self._head.reject_nodes(asked.returning, str(error))
                continue
            if self._head.is_joining(asked):
                are = "is" if len(asked.returning) == 1 else "are"
                move(f"{names} {are} here and wanted: the group is formed anew with {names}")

    def _try_out(self, asked: ReturningNodes) -> None:
        """All that can be known to fail before the group that works is ended.

        What its ranks hold now will be free then.
        """
        held = {}
        if self._present is not None:
            plan = self._present.plan
            for rank, node in enumerate(self._present.formation.members):
                held[node.id] = plan.bytes_of(rank)["total"]
        members = []
        for node in asked.members:
            available = node.info.available_bytes + held.get(node.id, 0)
            members.append(replace(node, info=replace(node.info, available_bytes=available)))
        self._propose(GroupMembership(asked.group_id, tuple(members)), log.info)

    def _again(self, epoch: Epoch) -> Formed:
        """After a loss."""

        def say(text: str) -> None:
            self._say(text)
            epoch.report(text)

        self._head.set_status(reformed=f"re-formed: {epoch.reason}")
        formation = self._head.form_group(self._nodes, say, epoch.closing, LEFT_S)
        while True:
            try:
                return self._decide(formation, say, epoch.closing)
            except (PlanError, CheckpointError) as error:
                have = len(formation.members)
                if have >= (self._nodes or self._head.node_count):
                    raise
                fits = "does not fit on" if isinstance(error, PlanError) else "cannot be had by"
                say(f"the model {fits} what is left ({error})")
            formation = self._head.form_group(have + 1, say, epoch.closing, temporary=True)

    def _decide(
        self, formation: GroupMembership, say: OnMessage, ending: threading.Event | None = None
    ) -> Formed:
        try:
            return self._propose(formation, say, ending)
        except BaseException as error:
            self._head.end_group(formation.group_id, getattr(error, "node_id", None) or "")
            raise

    def _propose(
        self, formation: GroupMembership, say: OnMessage, ending: threading.Event | None = None
    ) -> Formed:
        checkpoint, options, kernels, draft = self._what
        devices: Devices = ()
        if self._hosts:
            members, devices = hostsfile.order_by_hosts(self._hosts, formation.members)
            formation = replace(formation, members=members)
        members = formation.members
        found = self._sharing.locate(members)
        backend, exchange, devices = placement.choose_backend(
            self._wanted.backend, self._wanted.comm_dtype, members, devices
        )
        measured = self._measure(members)
        plan, reason = placement.place(
            read_model_spec(checkpoint),
            checkpoint.config,
            members,
            measured,
            self._wanted,
            options,
            kernels,
            draft,
            backend,
        )
        self._sharing.distribute(members, found, plan, say, ending)
        if measured:
            exchange = f"{exchange}; {placement.describe_links(members, measured)}"
        folders = [each.folder for each in found]
        return Formed(formation, folders, backend, exchange, measured, plan, reason, devices)

    def _measure(self, members: tuple[Node, ...]) -> dict[tuple[int, int], Link]:
        """Every pair, one after the other: links that are busy say little. Each is measured once
        while both its machines stay: after a loss every second counts."""
        found = {}
        for a, one in enumerate(members):
            for b in range(a + 1, len(members)):
                two = members[b]
                pair = (one.id, one.connected_at_s, two.id, two.connected_at_s)
                if pair in self._links:
                    found[a, b] = self._links[pair]
                    continue
                secret = pairing.encode(secrets.token_bytes(16))
                served = self._head.send_order(two, messages.ServeProbe(two.address, secret))
                order = messages.ProbeLink(two.address, served.port, secret)
                link = self._head.send_order(one, order, link_probe.PROBE_TIMEOUT_S + 5)
                found[a, b] = self._links[pair] = link
        return found
