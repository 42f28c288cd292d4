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
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import native
from ..collective.base import Collective
from ..core.plan import Plan
from ..model import native_layers
from ..model.architecture import input_width
from ..model.checkpoint import Checkpoint
from ..model.expert_parallel import NativeExperts, parallelize
from ..model.loader import load_rank_model
from ..model.step_timer import StepTimer
from .rank_worker import RankPool

READ_BYTES = 256 << 20
MESSAGE_BYTES = (4, 4096, 24_576, 262_144, 1_572_864)  # bytes of an exchange
CHAIN_LENGTH = 50  # exchanges in one lazy graph
ENOUGH_S = 0.25  # one size of exchange is measured for about this long


def measure_limits(
    nodes: int,
    backend: str,
    cores: Sequence[Sequence[int]] | None,
    threads: int | None,
    folder: Path | None = None,
    plan: Plan | None = None,
    activations: str = "int16",
) -> dict[str, Any]:
    """The ceilings of `nodes` ranks, placed as the model's will be.

    Returns:
        A JSON object: "read_gb_s", by number of threads of one process; "ranks_read_gb_s", what
        each rank reads while all read at once with their own threads; "exchange_us", for each size
        in bytes one exchange, evaluated alone ("one") and in a chain of many ("chain"); empty for
        one node. With `folder` and `plan`, "kernels_ms": for each rank what `kernels` found.
    """
    with RankPool(1) as single:
        read_gb_s = single.run(read_rate_by_threads)[0]
    with RankPool(nodes, backend, cores, threads) as ranks:
        together = ranks.run(read_rate)
        exchange_us = ranks.run(all_reduce_times, sizes=list(MESSAGE_BYTES))[0] if nodes > 1 else []
        alone_ms = None
        if folder is not None and plan is not None and native.is_available():
            alone_ms = ranks.run(
                kernel_times,
                300.0,
                folder=str(folder.resolve()),
                plan=plan.to_json(),
                times=15,
                activations=activations,
            )
    return {
        "read_gb_s": read_gb_s,
        "ranks_read_gb_s": together,
        "exchange_us": exchange_us,
        "kernels_ms": alone_ms,
    }


def _reader(bytes_: int) -> Callable[[], object]:
    """A function that reads that many bytes of memory once, with the kernels' threads."""
    data = np.ones(bytes_ // 4, np.float32)
    if native.is_available():
        array = mx.array(data)
        mx.eval(array)
        read = native.extension().read
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


def read_rate_by_threads(collective: Collective) -> dict[str, float]:  # noqa: ARG001
    """GB/s by number of threads: one, two, four, ... up to the cores."""
    read_rate = _reader(READ_BYTES)
    if not native.is_available():
        return {"1": _gb_s(read_rate)}
    most = native.set_threads()
    counts = sorted({1, most, *(2**i for i in range(most.bit_length()))})
    found = {}
    for threads in counts:
        native.extension().set_threads(threads)
        found[str(threads)] = _gb_s(read_rate)
    return found


def read_rate(collective: Collective) -> float:
    """GB/s of this rank while all ranks read."""
    reader = _reader(READ_BYTES)
    collective.barrier()
    return _gb_s(reader, times=15)


def all_reduce_times(collective: Collective, sizes: Sequence[int]) -> list[dict[str, Any]]:
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
        each_us = max(1, int(np.asarray(collective.broadcast_from(0, mx.array([int(first)])))[0]))
        times = max(3, min(100, int(ENOUGH_S * 1e6 / each_us)))
        links = max(1, min(CHAIN_LENGTH, times))
        one = statistics.median(once(x, 1) for _ in range(times))
        chain = statistics.median(once(x, links) for _ in range(max(3, times // links)))
        rows.append({"bytes": size, "one": one, "chain": chain})
    return rows


def kernel_times(
    collective: Collective, folder: str, plan: dict[str, Any], times: int, activations: str
) -> dict[str, float] | None:
    """Milliseconds of one token's matrices alone: every linear layer and every layer's experts.

    All are one graph of calls that need nothing of one another, so what is left out is norms,
    attention, routing, sampling, exchanges and Python. None: this model has no native layers.
    """
    dealt = Plan.from_json(plan)
    native.set_activations(activations)
    model = load_rank_model(Checkpoint.open(Path(folder)), dealt, collective.rank, lambda *_: None)
    parallelize(model, dealt.spec.family, dealt, collective, StepTimer(), "native")
    count, rng = dealt.spec.moe[0].experts, np.random.default_rng(0)
    linears: list[Callable[[], mx.array]] = []
    stacks: list[Callable[[], mx.array]] = []
    for _, layer in model.named_modules():
        if isinstance(layer, NativeExperts):
            x = mx.random.normal((1, 1, input_width(layer.experts)))
            mx.eval(x)

            def run(layer: NativeExperts = layer, x: mx.array = x) -> mx.array:
                ids = rng.permutation(count)[: dealt.spec.top_k]
                return layer.compute(x, mx.array(ids.astype(np.int32))[None, None])

            stacks.append(run)
        elif isinstance(layer, native_layers.LINEARS):
            x = mx.random.normal((1, 1, _width(layer)))
            mx.eval(x)
            linears.append(partial(layer, x))
    if not linears and not stacks:
        return None
    collective.barrier()
    found = {}
    for name, calls in (("linear", linears), ("experts", stacks)):
        seconds = []
        for _ in range(times):
            began = time.perf_counter()
            mx.eval([call() for call in calls])
            seconds.append(time.perf_counter() - began)
        found[name] = 1000 * statistics.median(seconds)
    return found


def _width(layer: Any) -> int:
    """What a linear layer takes."""
    width: int = layer.weight.shape[-1]
    return width * 32 // layer.bits if "scales" in layer else width
