"""Ranks that do what a benchmark asks, instead of serving: both sides of that.

Owns: `Ranks`, the front's side (start, ask every rank the same, collect), and the program of such a
rank, `python -m cenacle.bench.rank_worker`.
Does not know: what the jobs measure: they are functions of `ceilings.py` and `ablation.py`.
Invariant: a job runs on every rank at once; every answer comes within the deadline or the rank is
named; no process is left.
Next: `ceilings.py`, `ablation.py`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import ClusterError
from ..ranks.channel import Channel, Silent
from ..ranks.local_ranks import LocalRanks
from ..ranks.worker import connect, join, last_words, receive, say_alive, stay_on_cores

if TYPE_CHECKING:
    from ..collective.base import Collective

PROGRAM = (sys.executable, "-m", "cenacle.bench.rank_worker")


class Ranks:
    """Started ranks that wait for jobs; use it in a `with` statement.

    Args:
        nodes, backend, cores, threads: as `cluster.launcher.LocalRanks`.

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
        """How the ranks exchange."""
        return self._ranks.backend

    def ask(self, job: str, deadline_s: float = 120.0, **order: Any) -> list[Any]:
        """Run a job on every rank.

        Returns:
            What each rank's job returned, in rank order.

        Raises:
            CenacleError: what the first rank that failed said; or it did not answer in time.
        """
        for channel in self._ranks.channels:
            channel.send({"type": "job", "job": job, "order": order})
        ends = time.monotonic() + deadline_s
        return [self._answer(rank, job, ends) for rank in range(self._ranks.nodes)]

    def _answer(self, rank: int, job: str, ends: float) -> Any:
        while time.monotonic() < ends:
            try:
                message = self._ranks.channels[rank].receive()
            except Silent:
                break
            except ClusterError as error:
                raise self._ranks.blame(rank, str(error)) from error
            if message["type"] == "error":
                raise ClusterError(f"rank {rank}: {message['message']}")
            if message["type"] == "result":
                return message["result"]
        raise self._ranks.blame(rank, f"did not finish the job {job!r} in time")

    def __enter__(self) -> Ranks:
        """The ranks themselves."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the ranks."""
        self._ranks.close(now=True)


def main() -> None:
    """Run one rank until the front goes away."""
    stay_on_cores()
    channel = connect()
    threading.Thread(target=say_alive, args=(channel,), daemon=True).start()
    try:
        _serve(channel)
    except Exception as error:
        last_words(channel, error)
        raise
    finally:
        os._exit(0)  # MLX's threads may wait for ever for a peer that is lost


def _serve(channel: Channel) -> None:
    # Imported here: the front must hear of this process before MLX is loaded.
    from .. import native
    from ..ranks.worker import share_of_cores
    from ..research import schedule_ablation
    from . import hardware_limits

    order = receive(channel)
    native.set_threads(local_ranks=share_of_cores(order["nodes"]))
    collective: Collective = join(order, order["nodes"])
    channel.send({"type": "ready"})
    jobs = {**hardware_limits.JOBS, **schedule_ablation.JOBS}
    while (message := receive(channel))["type"] != "stop":
        result = jobs[message["job"]](collective, **message["order"])
        channel.send({"type": "result", "result": result})


if __name__ == "__main__":
    main()
