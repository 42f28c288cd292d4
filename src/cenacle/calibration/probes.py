"""What one rank measures of its machine while the other ranks do the same.

Owns: timing reads, kernels, experts and all-reduces. Each probe is a job of `rank_worker.py`.
Does not know: what becomes of the numbers (`calibrate.py`, `bench/hardware_limits.py`).
Invariant: what is read is far larger than the caches, or read in turn with as much; a spread is
half of the width of the middle half, over the median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.switch_layers import SwitchGLU

from .. import native
from ..collective.base import Collective
from ..model.expert_parallel import NativeExperts
from ..model.native_layers import is_supported
from ..model.step_timer import StepTimer

READ_MB = (1, 4, 16, 64, 256)
KERNEL_SHAPES = {  # rows, columns: what a layer of such a model multiplies
    "attention 2048x2048": (2048, 2048),
    "expert 768x2048": (768, 2048),
    "expert 3584x2048": (3584, 2048),
    "head 32000x2048": (32000, 2048),
}
MESSAGE_BYTES = (64, 4096, 24576, 262144, 1572864)
LARGE_MESSAGE_BYTES = 100_000
MAX_RUNS = 400
BATCH = 64  # tokens for which operations are counted
COLD_BYTES = 200_000_000  # of weights that are read in turn, more than caches hold
HIDDEN, NARROW, WIDE = 2048, 128, 1024  # widths of experts


def probe_machine(collective: Collective, seconds: float) -> dict[str, Any]:
    """Measure everything, each number for about `seconds`.

    Returns:
        A JSON object. "reads": MB -> [GB/s, spread]. "kernels": shape -> [GB/s, spread, GFLOP/s
        with `BATCH` tokens]. "expert": [us, spread], see `time_expert`. "all_reduces": bytes ->
        [us, spread]; empty for one rank. "device": what computed.
    """
    if native.is_available():
        mx.set_default_device(mx.cpu)
    return {
        "device": f"{mx.default_device()}, {native.describe_kernels()}",
        "reads": _measure_reads(collective, seconds),
        "kernels": _measure_kernels(collective, seconds),
        "expert": time_expert(collective, seconds),
        "all_reduces": _measure_all_reduces(collective, seconds),
    }


def make_reader(size: int) -> Callable[[], object]:
    """A function that reads `size` bytes of memory once, with the kernels' threads."""
    data = np.ones(size // 4, np.float32)
    if not native.is_available() and mx.default_device().type == mx.DeviceType.cpu:
        words = data.view(np.uint64)
        return lambda: np.bitwise_or.reduce(words)  # one thread, near the limit of one core
    array = mx.array(data)
    mx.eval(array)
    if native.is_available():
        return lambda: native.extension().read(array)
    return lambda: mx.eval(mx.max(array))


def time_runs(work: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each run, after a warm-up, for about `seconds` but at least three runs."""
    work()
    ends, times = time.perf_counter() + seconds, time_repeatedly(work, 3)
    while time.perf_counter() < ends and len(times) < MAX_RUNS:
        times += time_repeatedly(work, 1)
    return times


def time_repeatedly(work: Callable[[], object], runs: int) -> list[float]:
    """Seconds of each run."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times


def _measure_reads(collective: Collective, seconds: float) -> dict[str, list[float]]:
    reads = {}
    for size_mb in READ_MB:
        read = make_reader(size_mb * 1_000_000)
        collective.barrier()
        reads[str(size_mb)] = _rate(time_runs(read, seconds), size_mb / 1000)
    return reads


def _measure_kernels(collective: Collective, seconds: float) -> dict[str, list[float]]:
    """4-bit matrices in groups of 64, in as many copies as make them cold."""
    kernels = {}
    for name, (rows, columns) in KERNEL_SHAPES.items():
        dense = mx.random.normal((rows, columns)).astype(mx.bfloat16)
        parts = mx.quantize(dense, 64, 4)
        nbytes = sum(part.nbytes for part in parts)
        copies = [[mx.array(p) + 0 for p in parts] for _ in range(max(2, COLD_BYTES // nbytes))]
        vector, batch = mx.random.normal((1, columns)), mx.random.normal((BATCH, columns))
        mx.eval(copies, vector, batch)
        layers = [_make_linear(copy) for copy in copies]

        def one(layers: list[Any] = layers, x: mx.array = vector) -> None:
            mx.eval([layer(x) for layer in layers])

        def many(layers: list[Any] = layers, x: mx.array = batch) -> None:
            mx.eval(layers[0](x))

        collective.barrier()
        rate = _rate(time_runs(one, seconds), len(copies) * nbytes / 1e9)
        operations = 2 * BATCH * rows * columns
        kernels[name] = [*rate, operations / statistics.median(time_runs(many, seconds / 2)) / 1e9]
    return kernels


def _make_linear(parts: list[Any]) -> Callable[[Any], Any]:
    if native.is_available():
        extension = native.extension()
        weights = extension.Weights(*parts, None, bits=4, group_size=64, mode="affine")
        return lambda x: extension.linear(x, weights)
    w, scales, biases = parts
    return lambda x: mx.quantized_matmul(x, w, scales, biases, True, 64, 4)


def time_expert(collective: Collective, seconds: float) -> list[float]:
    """Microseconds, and spread, that an expert takes besides reading its bytes.

    Eight narrow experts less one that has as many bytes as they have together, over seven; each
    time other ones, so that they are cold.
    """
    layers, ratio = 24, WIDE // NARROW
    narrow, wide = _make_experts(NARROW, ratio), _make_experts(WIDE, 1)
    x = mx.random.normal((1, HIDDEN))
    mx.eval(x)

    def run(experts: Any, active: int, stride: int, turn: int) -> float:
        # Neighbors of one token are far from one another, and so are those of the next.
        ids = [
            mx.array(
                [[(turn * layers + i) % stride + stride * e for e in range(active)]], mx.uint32
            )
            for i in range(layers)
        ]
        mx.eval(ids)
        started = time.perf_counter()
        mx.eval([experts(x, chosen) for chosen in ids])
        return (time.perf_counter() - started) / layers * 1e6

    collective.barrier()
    added_us: list[float] = []
    ends = time.perf_counter() + 2 * seconds
    while len(added_us) < 6 or time.perf_counter() < ends:
        turn = len(added_us)
        added_us.append((run(*narrow, turn) - run(*wide, turn)) / (ratio - 1))
    return [max(0.0, statistics.median(added_us[1:])), _spread(added_us[1:])]


def _make_experts(width: int, active: int) -> tuple[Any, int, int]:
    """Experts, how many of them are active, and how many there are for each active one."""
    stack: Any = SwitchGLU(HIDDEN, width, active)
    nn.quantize(stack, 64, 4)
    stack.set_dtype(mx.bfloat16)  # scales, as they are in checkpoints
    copies = max(1, COLD_BYTES // (3 * HIDDEN * width * active * 9 // 16))
    stack.update(tree_map(lambda p: mx.tile(p, (copies, 1, 1)), stack.parameters()))
    mx.eval(stack.parameters())
    count = active * copies
    if is_supported() and NativeExperts.supports(stack):
        stack = NativeExperts(stack, range(count), count, 0, StepTimer())
    return stack, active, copies


def _measure_all_reduces(collective: Collective, seconds: float) -> dict[str, list[float]]:
    all_reduces = {}
    for size in MESSAGE_BYTES if collective.size > 1 else ():
        chain = 50 if size < LARGE_MESSAGE_BYTES else 10
        times_us = time_all_reduces(collective, size, chain, seconds)
        all_reduces[str(size)] = [statistics.median(times_us), _spread(times_us)]
    return all_reduces


def time_all_reduces(collective: Collective, size: int, chain: int, seconds: float) -> list[float]:
    """Microseconds of one all-reduce of `size` bytes of float32, `chain` of them in one graph."""
    x = mx.zeros(max(1, size // 4))
    mx.eval(x)

    def run() -> None:
        y = x
        for _ in range(chain):
            y = collective.all_sum(y)
        mx.eval(y)

    # Every rank must run as often as the others: rank 0's pace decides.
    pace = statistics.median(time_runs(run, 0))
    runs = max(5, min(200, int(seconds / max(pace, 1e-6))))
    runs = int(np.asarray(collective.broadcast_from(0, mx.array([runs])))[0])
    return [1e6 * s / chain for s in time_repeatedly(run, runs)]


def _rate(times: list[float], amount: float) -> list[float]:
    rates = [amount / seconds for seconds in times]
    return [statistics.median(rates), _spread(rates)]


def _spread(values: list[float]) -> float:
    if len(values) < 4:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / middle
