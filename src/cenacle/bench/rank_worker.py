"""Ranks that run measuring jobs instead of serving: both sides of that.

Owns: `RankPool`, which starts ranks, runs a job on all of them and collects the results, and the
program of such a rank, `python -m cenacle.bench.rank_worker`.
Does not know: what a job measures. An order carries the job's dotted name; the rank imports it.
Invariant: a job is a function of this package; it runs on every rank at once, and every rank
answers within the timeout or is named in the error; no process is left behind.
Next: `hardware_limits.py`, whose jobs these are.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import ClusterError, InputError, error_from_json
from ..ranks.channel import Channel, ChannelTimeout
from ..ranks.local_ranks import LocalRanks
from ..ranks.worker import (
    connect_to_front,
    join_collective,
    pin_to_cores,
    receive_message,
    report_failure,
    send_heartbeats,
)

if TYPE_CHECKING:
    from ..collective.base import Collective

PACKAGE = "cenacle"
PROGRAM = (sys.executable, "-m", "cenacle.bench.rank_worker")


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
            order = {"type": "load", "nodes": nodes, "latency_s": 0.0, "wire": "f32"}
            self._ranks.load(order)
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
            channel.send({"type": "job", "job": name, "arguments": arguments})
        ends = time.monotonic() + timeout_s
        return [self._result(rank, name, ends) for rank in range(self._ranks.nodes)]

    def _result(self, rank: int, name: str, ends: float) -> Any:
        while time.monotonic() < ends:
            try:
                message = self._ranks.channels[rank].receive()
            except ChannelTimeout:
                break
            except ClusterError as error:
                raise self._ranks.blame(rank, str(error)) from error
            if message["type"] == "error":
                raise error_from_json(message["error"], f"rank {rank}: ")
            if message["type"] == "result":
                return message["result"]
        raise self._ranks.blame(rank, f"did not finish {name} in time")

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

    order = receive_message(channel)
    native.set_threads(local_ranks=ranks_sharing_cores(order["nodes"]))
    collective: Collective = join_collective(order, order["nodes"])
    channel.send({"type": "ready"})
    while (message := receive_message(channel))["type"] != "stop":
        result = find_job(message["job"])(collective, **message["arguments"])
        channel.send({"type": "result", "result": result})


if __name__ == "__main__":
    main()
