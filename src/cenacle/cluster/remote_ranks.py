"""Ranks on several machines: what `LocalRanks` is on one.

Owns: having agents start one rank on each node of a group, and their channels.
Does not know: models, placement, how agents are reached (`head.py`).
Invariant: when `close` has returned, no rank can be heard, and every rank whose node can be reached
has ended; the others end when their agent misses the head.
Next: `agent.py` starts them, `formation.py` decides what they load.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from .. import net
from ..errors import CenacleError, ClusterError, RankLost
from ..message import parse
from ..ranks.channel import Channel, ChannelClosed, ChannelTimeout
from ..ranks.local_ranks import STOP_TIMEOUT_S
from ..ranks.messages import Hello, LoadOrder, MeasureOrder, Stop
from ..ranks.rank_set import RankSet
from ..ranks.ranks import Epoch
from . import messages
from .head import GroupMembership, Head
from .membership import HEARTBEAT_TIMEOUT_S
from .thunderbolt import Devices

FAILURE_REASON_TIMEOUT_S = 1.0  # longest wait for an agent to report how a rank ended
RECENT_HEARTBEAT_S = 1.5  # an agent whose last heartbeat is younger is alive
START_RANK_TIMEOUT_S = 30.0
HELLO_TIMEOUT_S = 60.0  # an interpreter may start slowly on a busy machine


class RemoteRanks(RankSet):
    """One rank on each node of a group.

    Args:
        head: through which agents are reached.
        group: the nodes, in rank order.
        backend, backend_reason: how ranks communicate, and why.
        folders: of the model, on each node.
        epoch: which of a group's successive sets of ranks these are.
        devices: RDMA devices, for JACCL.

    Raises:
        ClusterError: a rank could not be started; names the node.
    """

    def __init__(
        self,
        head: Head,
        group: GroupMembership,
        backend: str,
        backend_reason: str,
        folders: Sequence[str],
        epoch: Epoch,
        devices: Devices | None = None,
    ) -> None:
        super().__init__(len(group.members), backend, backend_reason, epoch)
        self.group, self._head, self._folders = group, head, folders
        self._devices = devices or ()
        self._blamed_node: str | None = None  # id; "": a node failed, unknown which; None: none did
        self._relays = [secrets.token_hex(16) for _ in group.members]
        try:
            self._start()
        except BaseException:
            self.close(now=True)
            raise

    def _start(self) -> None:
        nodes = self.group.members
        answers = self._head.send_orders(
            [(node, messages.FindPorts(node.address, 1)) for node in nodes]
        )
        for node, answer in zip(nodes, answers, strict=True):
            if len(answer.ports) != 1:
                error = ClusterError(f"{node.name} sent {len(answer.ports)} ports, expected 1")
                error.node_id = node.id
                raise error
        addresses = tuple(
            net.format_address(node.address, answer.ports[0])
            for node, answer in zip(nodes, answers, strict=True)
        )
        secret, token = secrets.token_hex(32), secrets.token_hex(16)
        sockets = self._head.expect_relays(self._relays)
        self.channels = [Channel(sock, HEARTBEAT_TIMEOUT_S) for sock in sockets]
        orders = [
            messages.StartRank(
                group_id=self.group.group_id,
                epoch=self._epoch.number,
                rank=rank,
                backend=self.backend if self.nodes > 1 else "alone",
                addresses=addresses,
                devices=tuple(tuple(row) for row in self._devices),
                secret=secret,
                relay=self._relays[rank],
                token=token,
            )
            for rank in range(self.nodes)
        ]
        self._head.send_orders(list(zip(nodes, orders, strict=True)), START_RANK_TIMEOUT_S)
        ends_s = time.monotonic() + HELLO_TIMEOUT_S
        for rank, channel in enumerate(self.channels):
            hello = self._receive_hello(rank, channel, ends_s)
            is_expected = (hello.rank, hello.epoch) == (rank, self._epoch.number)
            if not (is_expected and secrets.compare_digest(hello.token, token)):
                raise ClusterError(
                    f"rank {rank} on {nodes[rank].name}: another process answered in its place"
                )
            self.pids.append(hello.pid)

    def _receive_hello(self, rank: int, channel: Channel, ends_s: float) -> Hello:
        while True:
            self._check_closing()
            try:
                return parse(channel.receive(), Hello)
            except ChannelTimeout:
                if time.monotonic() > ends_s:
                    reason = f"did not connect within {HELLO_TIMEOUT_S:g} s"
                    raise self.blame(rank, reason) from None
                if (failure := self._head.failure_reason(self.group, rank)) is not None:
                    raise RankLost(rank, failure) from None
            except ClusterError as error:
                raise self.blame(rank, str(error)) from error

    def _order_for(self, rank: int, order: LoadOrder | MeasureOrder) -> LoadOrder | MeasureOrder:
        order = super()._order_for(rank, order)
        return replace(order, folder=self._folders[rank]) if isinstance(order, LoadOrder) else order

    def blame(self, rank: int, reason: str) -> RankLost:
        """See `Ranks.blame`: the head knows which node is lost and which process ended."""
        node = self.group.members[rank]
        hangs = self.channels[rank].silent and self._head.heartbeat_age_s(node) < RECENT_HEARTBEAT_S
        # A silent rank on a node that is alive has not ended: the head will not learn any more.
        ends_s = time.monotonic() + (0.1 if hangs else FAILURE_REASON_TIMEOUT_S)
        while time.monotonic() < ends_s:
            for index, member in enumerate(self.group.members):
                if (failure := self._head.failure_reason(self.group, index)) is not None:
                    self._blamed_node = member.id
                    return RankLost(index, f"{failure}; all ranks were ended")
            time.sleep(0.02)
        self._blamed_node = node.id if hangs else ""
        return RankLost(rank, f"rank {rank} on {node.name} {reason}; all ranks were ended")

    def close(self, *, now: bool) -> None:
        """See `Ranks.close`."""
        if self._closed:
            return
        self._closed = True
        if not now:
            for channel in self.channels:
                with suppress(ChannelClosed, ChannelTimeout):
                    channel.send(Stop().to_json())
        self._head.cancel_relays(self._relays)
        reachable = [node for node in self.group.members if self._head.is_connected(node)]
        order = messages.StopRanks(self.group.group_id, 0.0 if now else STOP_TIMEOUT_S)
        with suppress(CenacleError):
            self._head.send_orders([(node, order) for node in reachable])
        for channel in self.channels:
            channel.close()
        # Ranks that never became ready have failed, for whatever reason.
        blamed = self._blamed_node if self.ready else self._blamed_node or ""
        self._head.end_group(self.group.group_id, blamed)
