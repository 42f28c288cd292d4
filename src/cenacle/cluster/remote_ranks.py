"""Ranks on several machines: what `launcher.LocalRanks` is on one.

Owns: having agents start the ranks of one formation, and their channels.
Does not know: models, placing, how agents are reached (`control.Head`).
Invariant: as `launcher.LocalRanks`: when `close` has returned no rank can be heard, and every rank
whose machine can be reached is gone; the others end when their agent misses the head.
Next: `agent.py` starts them, `forming.py` decides what they load.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from .. import net
from ..core.plan import Plan
from ..errors import CenacleError, ClusterError, RankLost
from ..ranks.channel import Channel, ChannelClosed, ChannelTimeout
from ..ranks.local_ranks import STOP_TIMEOUT_S, LocalRanks
from ..ranks.ranks import Epoch
from . import messages
from .head import GroupMembership, Head
from .membership import HEARTBEAT_TIMEOUT_S
from .thunderbolt import Devices

FATE_S = 1.0  # longest wait for an agent's word on how a rank ended
HEARD_S = 1.5  # an agent that was heard so lately lives
HELLO_S = 60.0  # a rank's interpreter on a busy machine


class RemoteRanks(LocalRanks):
    """One rank on each machine of a formation.

    Args:
        head: through which agents are reached.
        formation: the machines, in rank order.
        plan: who holds what.
        backend, reason: how ranks exchange, and why.
        folders: of the model, on each machine.
        epoch: which of a group's successive ranks these are.

    Raises:
        ClusterError: a rank could not be started; names the machine.
    """

    def __init__(
        self,
        head: Head,
        formation: GroupMembership,
        plan: Plan,
        backend: str,
        reason: str,
        folders: Sequence[str],
        epoch: Epoch,
        devices: Devices | None = None,
    ) -> None:
        self.plan = plan
        self._devices = devices or ()
        self.nodes = len(formation.members)
        self.backend, self.backend_reason = backend, reason
        self.formation, self._head, self._folders = formation, head, folders
        self.channels: list[Channel] = []
        self.pids: list[int] = []
        self.ready: list[dict[str, Any]] = []
        self._epoch = epoch
        self._closed = False
        self._blamed: str | None = None  # who failed; "": not known; None: nothing did
        self._relays = [secrets.token_hex(16) for _ in formation.members]
        try:
            self._start_all()
        except BaseException:
            self.close(now=True)
            raise

    def _start_all(self) -> None:
        members = self.formation.members
        ports = self._head.send_orders([(n, messages.FindPorts(n.address, 1)) for n in members])
        addresses = tuple(
            net.format_address(n.address, answer.ports[0])
            for n, answer in zip(members, ports, strict=True)
        )
        secret, token = secrets.token_hex(32), secrets.token_hex(16)
        ends = self._head.expect_relays(self._relays)
        self.channels = [Channel(end, HEARTBEAT_TIMEOUT_S) for end in ends]
        orders = [
            messages.StartRank(
                group_id=self.formation.group_id,
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
        self._head.send_orders(list(zip(members, orders, strict=True)), 30.0)
        ends_at = time.monotonic() + HELLO_S
        for rank, channel in enumerate(self.channels):
            hello = self._hello(rank, channel, ends_at)
            right = secrets.compare_digest(str(hello.get("token")), token)
            if not right or (hello.get("rank"), hello.get("epoch")) != (rank, self._epoch.number):
                raise ClusterError(f"what calls as rank {rank} on {members[rank].name} is not it")
            self.pids.append(int(hello["pid"]))

    def _hello(self, rank: int, channel: Channel, ends_at: float) -> dict[str, Any]:
        while True:
            self._go_on()
            try:
                return channel.receive()
            except ChannelTimeout:
                if time.monotonic() > ends_at:
                    raise self.blame(rank, f"did not call within {HELLO_S:g} s") from None
                if (why := self._failure_reason(rank)) is not None:
                    raise RankLost(rank, why) from None
            except ClusterError as error:
                raise self.blame(rank, str(error)) from error

    def _order_for(self, rank: int, order: dict[str, Any]) -> dict[str, Any]:
        return {**order, "folder": self._folders[rank], "backend": self.backend}

    def _loaded(self) -> None:
        pass  # nothing of remote ranks is on this disk

    def _failure_reason(self, rank: int) -> str | None:
        return self._head.failure_reason(self.formation, rank)

    def blame(self, rank: int, reason: str) -> RankLost:
        """The rank that really failed: a machine that is lost or a process that died goes before
        those that noticed."""
        hangs = (
            self.channels[rank].silent
            and self._head.heartbeat_age_s(self.formation.members[rank]) < HEARD_S
        )
        # A rank that says nothing on a machine that does has not ended: no word of that will come.
        ends = time.monotonic() + (0.1 if hangs else FATE_S)
        while time.monotonic() < ends:
            for index in range(self.nodes):
                if (why := self._failure_reason(index)) is not None:
                    self._blamed = self.formation.members[index].id
                    return RankLost(index, f"{why}; all ranks were ended")
            time.sleep(0.02)
        member = self.formation.members[rank]
        self._blamed = member.id if hangs else ""
        name = member.name
        return RankLost(rank, f"rank {rank} on {name} {reason}; all ranks were ended")

    def close(self, *, now: bool) -> None:
        """End every rank; `now`: without asking first. Safe to call again."""
        if self._closed:
            return
        self._closed = True
        if not now:
            for channel in self.channels:
                with suppress(ChannelClosed, ChannelTimeout):
                    channel.send({"type": "stop"})
        self._head.cancel_relays(self._relays)
        here = [n for n in self.formation.members if self._head.is_connected(n)]
        with suppress(CenacleError):
            order = messages.StopRanks(self.formation.group_id, 0.0 if now else STOP_TIMEOUT_S)
            self._head.send_orders([(n, order) for n in here])
        for channel in self.channels:
            channel.close()
        # Ranks that never answered failed, whatever it was.
        blamed = self._blamed if self.ready else self._blamed or ""
        self._head.end_group(self.formation.group_id, blamed)
