"""The processes of the ranks on one node of a cluster.

Owns: starting ranks as the head orders, their environment, and ending them.
Does not know: the connection to the head, models, plans.
Invariant: nothing of a rank is left on disk, however this process ends; after `stop` no process of
those ranks is left.
Next: `agent.py`, which is told to; `ranks/worker.py` is what is started.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from .. import net
from ..collective import mesh
from ..errors import ClusterError
from ..ranks import exit_reason
from ..ranks.local_ranks import MALLOC_TUNABLES, WORKER_COMMAND
from . import messages

KILL_TIMEOUT_S = 5.0


@dataclass
class RankProcess:
    """The running process of a rank."""

    group_id: int
    rank: int
    process: asyncio.subprocess.Process
    oom_kills_before: int | None = field(default_factory=exit_reason.oom_kill_count)
    exited: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self) -> str | None:
        """Wait for the process to end; how it failed, or None."""
        status = await self.process.wait()
        return exit_reason.describe_exit(status, self.oom_kills_before) if status else None


class RankProcesses:
    """The ranks of this node."""

    def __init__(self) -> None:
        self._running: list[RankProcess] = []
        self.group_id = 0  # of the last group that a rank was started for

    async def start(self, order: messages.StartRank) -> tuple[RankProcess, socket.socket]:
        """Start a rank, and end those of earlier groups.

        Returns:
            The rank, and the socket for its messages.

        Raises:
            ClusterError: the group is older than one that is known here.
            OSError: the process could not be started.
        """
        if order.group_id < self.group_id:
            raise ClusterError(
                f"start_rank.group_id: expected at least {self.group_id}, got {order.group_id}"
            )
        if order.group_id > self.group_id:
            await self.kill()
        self.group_id = order.group_id
        near, far = socket.socketpair()
        with ExitStack() as files:
            files.enter_context(far)
            inherited = [far.fileno()]

            def write(content: object) -> str:
                """A path under which the rank can read this as JSON."""
                file = files.enter_context(tempfile.TemporaryFile())
                file.write(json.dumps(content).encode())
                file.seek(0)
                inherited.append(file.fileno())
                return f"/dev/fd/{file.fileno()}"

            environment = os.environ | _rank_environment(order, far.fileno())
            environment |= _backend_environment(order, write)
            try:
                process = await asyncio.create_subprocess_exec(
                    *WORKER_COMMAND,
                    env=environment,
                    stdin=asyncio.subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=inherited,
                )
            except BaseException:
                near.close()
                raise
        rank = RankProcess(order.group_id, order.rank, process)
        self._running.append(rank)
        return rank, near

    def remove(self, rank: RankProcess) -> None:
        """Forget a rank that has ended."""
        if rank in self._running:
            self._running.remove(rank)
        rank.exited.set()

    async def stop(self, group_id: int, timeout_s: float) -> None:
        """Wait for the ranks of a group to end by themselves, then kill the others."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                for rank in [r for r in self._running if r.group_id == group_id]:
                    await rank.exited.wait()
        await self.kill(group_id)

    async def kill(self, group_id: int | None = None) -> None:
        """Kill the ranks of a group, or all, and wait until they have ended."""
        ranks = [r for r in self._running if group_id in (None, r.group_id)]
        for rank in ranks:
            with suppress(ProcessLookupError):
                rank.process.kill()
        for rank in ranks:
            with suppress(TimeoutError):
                await asyncio.wait_for(rank.exited.wait(), KILL_TIMEOUT_S)


def _rank_environment(order: messages.StartRank, control_fd: int) -> dict[str, str]:
    tunables = filter(None, [os.environ.get("GLIBC_TUNABLES"), MALLOC_TUNABLES])
    return {
        "CENACLE_CONTROL": f"fd:{control_fd}",
        "CENACLE_TOKEN": order.token,
        "CENACLE_RANK": str(order.rank),
        "CENACLE_EPOCH": str(order.epoch),
        "CENACLE_LOCAL_RANKS": "1",
        "MLX_RANK": str(order.rank),
        "GLIBC_TUNABLES": ":".join(tunables),
    }


def _backend_environment(
    order: messages.StartRank, write: Callable[[object], str]
) -> dict[str, str]:
    match order.backend:
        case "mesh":
            return {mesh.ADDRESSES: json.dumps(order.addresses), mesh.SECRET: order.secret}
        case "ring":
            return {"MLX_HOSTFILE": write([[address] for address in order.addresses])}
        case "jaccl":  # never run
            return {
                "MLX_IBV_DEVICES": write(order.devices),
                "MLX_JACCL_COORDINATOR": order.addresses[0],
            }
        case "nccl":  # never run
            host, port = net.parse_address(order.addresses[0])
            size = str(len(order.addresses))
            return {"NCCL_HOST_IP": host, "NCCL_PORT": str(port), "MLX_WORLD_SIZE": size}
    return {}
