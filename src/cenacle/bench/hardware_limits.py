"""What this machine could give at most, measured in the same run as what it gives.

Owns: how fast memory is read by one thread, by several, and by all ranks at once; how long an
all-reduce takes; how long a token's kernels take on their own.
Does not know: families of models, peers.
Invariant: every time is a median; what is read is far larger than the caches (`READ_BYTES`).
Next: `measure.py` relates speeds to these limits.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import native
from ..calibration.probes import make_reader, time_all_reduces, time_repeatedly
from ..calibration.rank_worker import RankPool
from ..collective.base import Collective
from ..core.plan import Plan
from ..model import native_layers
from ..model.architecture import input_width
from ..model.checkpoint import Checkpoint
from ..model.expert_parallel import NativeExperts, parallelize
from ..model.loader import load_rank_model
from ..model.step_timer import StepTimer

READ_BYTES = 256 << 20
MESSAGE_BYTES = (4, 4096, 24_576, 262_144, 1_572_864)
CHAIN_LENGTH = 50  # all-reduces in one lazy graph
ALL_REDUCE_S = 0.25  # one message size is measured for about this long
KERNELS_TIMEOUT_S = 300.0
KERNEL_RUNS = 15


def measure_limits(
    nodes: int,
    backend: str,
    cores: Sequence[Sequence[int]] | None,
    threads: int | None,
    folder: Path | None = None,
    plan: Plan | None = None,
    activations: str = "int16",
) -> dict[str, Any]:
    """The limits of `nodes` ranks on the cores that the model's ranks will have.

    Returns:
        A JSON object. "read_gb_s": by number of threads of one process. "ranks_read_gb_s": of each
        rank while all read at once with their own threads. "all_reduce_us": for each size in bytes
        one all-reduce, evaluated alone ("one") and in a chain of many ("chain"); empty for one
        node. "kernels_ms": see `time_kernels`, for each rank; None without `folder` and `plan`.
    """
    kernels_ms = None
    with RankPool(1) as single:
        read_gb_s = single.run(measure_reads_by_threads)[0]
    with RankPool(nodes, backend, cores, threads) as ranks:
        ranks_read_gb_s = ranks.run(measure_read)
        all_reduce_us = ranks.run(measure_all_reduces)[0] if nodes > 1 else []
        if folder is not None and plan is not None and native.is_available():
            kernels_ms = ranks.run(
                time_kernels,
                KERNELS_TIMEOUT_S,
                folder=str(folder.resolve()),
                plan=plan.to_json(),
                activations=activations,
            )
    return {
        "read_gb_s": read_gb_s,
        "ranks_read_gb_s": ranks_read_gb_s,
        "all_reduce_us": all_reduce_us,
        "kernels_ms": kernels_ms,
    }


def measure_reads_by_threads(collective: Collective) -> dict[str, float]:
    """GB/s by number of threads: one, two, four, ... up to the cores."""
    if not native.is_available():
        return {"1": measure_read(collective)}
    limit = native.set_threads()
    rates = {}
    for threads in sorted({1, limit, *(2**i for i in range(limit.bit_length()))}):
        native.extension().set_threads(threads)
        rates[str(threads)] = measure_read(collective)
    return rates


def measure_read(collective: Collective) -> float:
    """GB/s of this rank while all ranks read."""
    read = make_reader(READ_BYTES)
    read()
    collective.barrier()
    return READ_BYTES / statistics.median(time_repeatedly(read, 15)) / 1e9


def measure_all_reduces(collective: Collective) -> list[dict[str, Any]]:
    """Microseconds of one all-reduce by size in bytes, alone and in a chain."""
    return [
        {
            "bytes": size,
            "one": statistics.median(time_all_reduces(collective, size, 1, ALL_REDUCE_S)),
            "chain": statistics.median(
                time_all_reduces(collective, size, CHAIN_LENGTH, ALL_REDUCE_S)
            ),
        }
        for size in MESSAGE_BYTES
    ]


def time_kernels(
    collective: Collective, folder: str, plan: dict[str, Any], activations: str
) -> dict[str, float] | None:
    """Milliseconds of one token's matrices alone: all linear layers, and all layers' experts.

    All are one graph of calls that do not depend on one another, so this leaves out norms,
    attention, routing, sampling, all-reduces and Python. None: this model has no native layers.
    """
    rank_plan = Plan.from_json(plan)
    spec = rank_plan.spec
    native.set_activations(activations)
    model = load_rank_model(
        Checkpoint.open(Path(folder)), rank_plan, collective.rank, lambda *_: None
    )
    parallelize(model, spec.family, rank_plan, collective, StepTimer(), "native")
    rng = np.random.default_rng(0)
    calls: dict[str, list[Callable[[], mx.array]]] = {"linear": [], "experts": []}

    def run_experts(layer: NativeExperts, x: mx.array) -> mx.array:
        ids = rng.permutation(spec.moe[0].experts)[: spec.top_k]
        return layer.compute(x, mx.array(ids.astype(np.int32))[None, None])

    for _, layer in model.named_modules():
        if isinstance(layer, NativeExperts):
            x = mx.random.normal((1, 1, input_width(layer.experts)))
            calls["experts"].append(partial(run_experts, layer, x))
        elif isinstance(layer, native_layers.LINEARS):
            width = layer.weight.shape[-1]
            width = width * 32 // layer.bits if "scales" in layer else width
            x = mx.random.normal((1, 1, width))
            calls["linear"].append(partial(layer, x))
        else:
            continue
        mx.eval(x)
    if not any(calls.values()):
        return None
    collective.barrier()
    times_ms = {}
    for name, layers in calls.items():
        runs = time_repeatedly(partial(_evaluate, layers), KERNEL_RUNS)
        times_ms[name] = 1000 * statistics.median(runs)
    return times_ms


def _evaluate(calls: Sequence[Callable[[], mx.array]]) -> None:
    mx.eval([call() for call in calls])
