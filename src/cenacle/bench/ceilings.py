"""What this machine could give at most, measured in the same run as what it gives.

Owns: how fast memory is read by one thread, by several, and by all ranks at once; what an exchange
costs between such ranks; how long a token's kernels take on their own.
Does not know: models' families, peers.
Invariant: every time is a median; arrays are far larger than the caches (`READ_BYTES`).
Next: `measure.py`, which divides by these.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .. import native
from ..collective.base import Collective
from .ranks import Ranks

READ_BYTES = 256 << 20
SIZES = (4, 4096, 24_576, 262_144, 1_572_864)  # bytes of an exchange
CHAIN = 50  # exchanges in one lazy graph
ENOUGH_S = 0.25  # one size of exchange is measured for about this long


def measure(
    nodes: int, backend: str, cores: Sequence[Sequence[int]] | None, threads: int | None
) -> dict[str, Any]:
    """The ceilings of `nodes` ranks, placed as the model's will be.

    Returns:
        A JSON object: "read_gb_s", by number of threads of one process; "ranks_read_gb_s", what
        each rank reads while all read at once with their own threads; "exchange_us", for each size
        in bytes one exchange, evaluated alone ("one") and in a chain of many ("chain"); empty for
        one node.
    """
    with Ranks(1) as alone:
        read = alone.ask("read_by_threads")[0]
    with Ranks(nodes, backend, cores, threads) as ranks:
        together = ranks.ask("read")
        exchange = ranks.ask("exchange", sizes=list(SIZES))[0] if nodes > 1 else []
    return {"read_gb_s": read, "ranks_read_gb_s": together, "exchange_us": exchange}


def _reader(bytes_: int) -> Callable[[], object]:
    """A function that reads that many bytes of memory once, with the kernels' threads."""
    data = np.ones(bytes_ // 4, np.float32)
    if native.available():
        array = mx.array(data)
        mx.eval(array)
        read = native.module().read
        return lambda: read(array)
    words = data.view(np.uint64)
    return lambda: np.bitwise_or.reduce(words)  # one thread, near the limit of one core


def _gb_s(read: Callable[[], object], times: int = 7) -> float:
    read()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - began)
    return READ_BYTES / statistics.median(seconds) / 1e9


def read_by_threads(collective: Collective) -> dict[str, float]:  # noqa: ARG001
    """GB/s by number of threads: one, two, four, ... up to the cores."""
    read = _reader(READ_BYTES)
    if not native.available():
        return {"1": _gb_s(read)}
    most = native.set_threads()
    counts = sorted({1, most, *(2**i for i in range(most.bit_length()))})
    found = {}
    for threads in counts:
        native.module().set_threads(threads)
        found[str(threads)] = _gb_s(read)
    return found


def read(collective: Collective) -> float:
    """GB/s of this rank while all ranks read."""
    reader = _reader(READ_BYTES)
    collective.barrier()
    return _gb_s(reader, times=15)


def exchange(collective: Collective, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Microseconds of one all_sum of float32 by size in bytes, alone and in a chain."""

    def once(x: mx.array, links: int) -> float:
        began = time.perf_counter()
        for _ in range(links):
            x = collective.all_sum(x)
        mx.eval(x)
        return (time.perf_counter() - began) / links * 1e6

    rows = []
    for size in sizes:
        x = mx.zeros(max(1, size // 4))
        mx.eval(x)
        # All ranks must do the same: rank 0 says how often.
        first = statistics.median(once(x, 1) for _ in range(3))
        each_us = max(1, int(np.asarray(collective.share(mx.array([int(first)])))[0]))
        times = max(3, min(100, int(ENOUGH_S * 1e6 / each_us)))
        links = max(1, min(CHAIN, times))
        one = statistics.median(once(x, 1) for _ in range(times))
        chain = statistics.median(once(x, links) for _ in range(max(3, times // links)))
        rows.append({"bytes": size, "one": one, "chain": chain})
    return rows


JOBS: dict[str, Callable[..., Any]] = {
    "read_by_threads": read_by_threads,
    "read": read,
    "exchange": exchange,
}
