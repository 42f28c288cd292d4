"""Ranks that run measuring jobs instead of serving: both sides of that.

Owns: `RankPool`, which starts ranks, runs a job on all of them and collects the results, and the
program of such a rank, `python -m cenacle.calibration.rank_worker`.
Does not know: what a job measures. An order carries the job's dotted name; the rank imports it.
Invariant: a job is a function of this package; it runs on every rank at once, and every rank
answers within the timeout or is named in the error; no process is left behind.
Next: `probes.py` and `bench/hardware_limits.py` have such jobs.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from ..errors import ClusterError, InputError
from ..machine import usable_cores
from ..message import Message, parse
from ..ranks.channel import Channel, ChannelTimeout
from ..ranks.local_ranks import LocalRanks
from ..ranks.messages import Heartbeat, MeasureOrder, RankFailure, Ready, Stop
from ..ranks.worker import (
    connect_to_front,
    join_collective,
    pin_to_cores,
    receive_message,
    report_failure,
    send_heartbeats,
)

PACKAGE = "cenacle"
PROGRAM = (sys.executable, "-m", "cenacle.calibration.rank_worker")


@dataclass(frozen=True)
class RunJob(Message, type="job"):
    """Call a function of this package with a rank's collective and these arguments."""

    job: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class JobResult(Message, type="result"):
    """What a job returned."""

    result: Any


def split_cores(nodes: int, threads: int | None) -> tuple[list[list[int]] | None, int]:
    """The cores of each node, and its threads; None for the cores if there are too few.

    Args:
        threads: per node; None: an even share of the cores.

    Raises:
        InputError: fewer than one thread.
    """
    cores = usable_cores()
    threads = threads if threads is not None else max(1, len(cores) // nodes)
    if threads < 1:
        raise InputError(f"--threads: expected at least 1, got {threads}", "threads")
    if nodes * threads > len(cores) or not hasattr(os, "sched_setaffinity"):
        return None, threads
    return [cores[i * threads : (i + 1) * threads] for i in range(nodes)], threads


class RankPool:
    """Started ranks that wait for jobs; use it in a `with` statement.

    Args:
        nodes, backend, cores, threads: as for `LocalRanks`.

    Raises:
        ClusterError: a rank did not start.
    """

    def __init__(
        self,
        nodes: int,
        backend: str = "auto",
        cores: Sequence[Sequence[int]] | None = None,
        threads: int | None = None,
    ) -> None:
        self._ranks = LocalRanks(nodes, backend, PROGRAM, cores, threads)
        try:
            self._ranks.load(MeasureOrder(nodes))
        except BaseException:
            self._ranks.close(now=True)
            raise

    @property
    def backend(self) -> str:
        """How the ranks communicate."""
        return self._ranks.backend

    def run(self, job: Callable[..., Any], timeout_s: float = 120.0, **arguments: Any) -> list[Any]:
        """Run a job on every rank.

        Args:
            job: a function of this package that takes the rank's collective and `arguments`.
            arguments: JSON values.

        Returns:
            What each rank's job returned, in rank order.

        Raises:
            ClusterError: a rank failed, or did not answer in time.
        """
        name = f"{job.__module__}.{job.__name__}"
        for channel in self._ranks.channels:
            channel.send(RunJob(name, arguments).to_json())
        ends = time.monotonic() + timeout_s
        # All are read at once: heartbeats that nobody reads fill a channel within a minute, and the
        # rank that sends them stands still.
        outcomes: SimpleQueue[tuple[int, JobResult | RankFailure | ClusterError | None]] = (
            SimpleQueue()
        )

        def receive(rank: int) -> None:
            outcomes.put((rank, self._receive(rank, ends)))

        for rank in range(self._ranks.nodes):
            threading.Thread(target=receive, args=(rank,), daemon=True).start()
        results = {}
        for _ in range(self._ranks.nodes):
            rank, outcome = outcomes.get()
            match outcome:
                case JobResult():
                    results[rank] = outcome.result
                case RankFailure():
                    raise outcome.to_error(f"rank {rank}: ")
                case ClusterError():
                    raise self._ranks.blame(rank, str(outcome)) from outcome
                case None:
                    raise self._ranks.blame(rank, f"did not finish {name} in time")
        return [results[rank] for rank in range(self._ranks.nodes)]

    def _receive(self, rank: int, ends: float) -> JobResult | RankFailure | ClusterError | None:
        """What a rank's job came to; None: nothing in time."""
        while time.monotonic() < ends:
            try:
                message = parse(
                    self._ranks.channels[rank].receive(), Heartbeat, JobResult, RankFailure
                )
            except ChannelTimeout:
                continue  # a job may keep the thread of the heartbeats from running
            except ClusterError as error:
                return error
            if isinstance(message, JobResult | RankFailure):
                return message
        return None

    def __enter__(self) -> RankPool:
        """The pool itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the ranks."""
        self._ranks.close(now=True)


def find_job(name: str) -> Callable[..., Any]:
    """The function of this package with that dotted name.

    Raises:
        InputError: there is none.
    """
    module_name, _, function_name = name.rpartition(".")
    job = None
    if module_name.startswith(f"{PACKAGE}."):
        with suppress(ImportError):
            job = getattr(importlib.import_module(module_name), function_name, None)
    if not callable(job) or job.__module__ != module_name:
        raise InputError(f"job: expected the dotted name of a function in {PACKAGE}, got {name!r}")
    return job


def main() -> None:
    """Run one rank until the process that started it goes away."""
    pin_to_cores()
    channel = connect_to_front()
    threading.Thread(target=send_heartbeats, args=(channel,), daemon=True).start()
    try:
        _serve(channel)
    except Exception as error:
        report_failure(channel, error)
        raise
    finally:
        os._exit(0)  # MLX's threads may wait for ever for a peer that is lost


def _serve(channel: Channel) -> None:
    # Imported here: the starting process must hear of this one before MLX is loaded.
    from .. import native
    from ..ranks.worker import ranks_sharing_cores

    order = parse(receive_message(channel), MeasureOrder)
    native.set_threads(local_ranks=ranks_sharing_cores(order.nodes))
    collective = join_collective(order.backend, order.nodes)
    channel.send(Ready().to_json())
    while True:
        message = parse(receive_message(channel), RunJob, Stop)
        if isinstance(message, Stop):
            return
        result = find_job(message.job)(collective, **message.arguments)
        channel.send(JobResult(result).to_json())


if __name__ == "__main__":
    main()
