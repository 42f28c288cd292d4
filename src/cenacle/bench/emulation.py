"""`cenacle bench --emulate`: the speed on machines of which only the speeds are given.

Owns: running a group for each description of machines, and what of it is compared with the
performance model.
Does not know: how a rank waits for its machine (`engine/emulated_machine.py`).
Invariant: what a computer could not keep up with is said beside each speed: the percent of passes
that were late, and of their time by which they were.
Next: `report.py` prints the results; docs/internals/benchmarks.md explains them.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import api
from ..calibration.rank_worker import split_cores
from ..core.emulation import EmulatedMachines, EmulationStats
from ..errors import CenacleError, InputError
from ..load_options import LoadOptions
from ..machine import usable_cores
from ..model.checkpoint import Checkpoint, locate_checkpoint
from ..planning import plan_cost
from ..runtime import select_plan
from .measure import Report, time_requests

WARMUP_TOKENS = 4


@dataclass(frozen=True)
class EmulationConfig:
    """What to run.

    Args:
        load: the model and how to run it; nodes, weights, speeds and links are those of the
            machines.
        machines: one group after the other; speeds are compared with the first one's.
        context: prompt tokens of each request.
        concurrency: numbers of concurrent requests.
        tokens: decoded by each request.
        repeat: number of rounds; the median counts.
    """

    load: LoadOptions
    machines: tuple[EmulatedMachines, ...]
    context: int = 32
    concurrency: tuple[int, ...] = (1,)
    tokens: int = 64
    repeat: int = 3

    def __post_init__(self) -> None:
        if self.load.nodes != 1 or self.load.latency_s:
            raise InputError("--emulate cannot be combined with --nodes or --latency-ms", "emulate")
        if self.tokens < 2 or self.repeat < 1 or self.context < 1:
            raise InputError("bench: expected at least 2 tokens, 1 repetition and 1 prompt token")


def run_emulation(config: EmulationConfig, report: Report = lambda _: None) -> dict[str, Any]:
    """Decode on each of the groups of machines.

    Returns:
        A JSON object: "conditions", and "rows", one for each group and number of requests; see
        docs/internals/benchmarks.md.

    Raises:
        CenacleError: as `api.load`.
    """
    load_before, rows = os.getloadavg()[0], list[dict[str, Any]]()
    for machines in config.machines:
        report(f"loading {config.load.model} on {machines.text}")
        rows += _run_group(config, machines, report)
    for row in rows:
        base = next(r for r in rows if r["requests"] == row["requests"])
        for key in ("tok_per_s", "predicted_tok_per_s"):
            known = row[key] is not None and base[key] is not None
            row[key.replace("tok_per_s", "ratio")] = row[key] / base[key] if known else None
    return {
        "benchmark": "emulation",
        "model": config.load.model,
        "conditions": {
            "cores": len(usable_cores()),
            "load_before": round(load_before, 2),
            "context": config.context,
            "tokens": config.tokens,
            "repeat": config.repeat,
            "versions": {n: importlib.metadata.version(n) for n in ("cenacle", "mlx", "mlx-lm")},
        },
        "rows": rows,
    }


def _run_group(
    config: EmulationConfig, machines: EmulatedMachines, report: Report
) -> list[dict[str, Any]]:
    cores, threads = split_cores(machines.nodes, config.load.threads)
    load = replace(
        config.load,
        nodes=machines.nodes,
        node_weights=machines.node_weights,
        latency_s=machines.run_link_s,
        bandwidth_gb_s=[rate / 1e9 for rate in machines.run_bytes_per_s],
        speculative="off",  # a drafter's reads are not emulated
        cores=cores,
        threads=threads,
        measure_every=0,
        recover=False,
        max_batch_size=max(config.concurrency),
        prefix_cache_gb=0,
    )
    checkpoint = Checkpoint.open(locate_checkpoint(load.model))
    plan, reason = select_plan(load, checkpoint)
    rng, rows = random.Random(0), []
    with api.Model.load(replace(load, plan=plan)) as model:
        time_requests(model, rng, config.context, WARMUP_TOKENS, 1)
        for requests in config.concurrency:
            report(f"{machines.text}: {requests} requests")
            model.group.reset_statistics(0)
            speeds = [
                machines.slow
                * _decoding_speed(
                    time_requests(model, rng, config.context, config.tokens, requests)
                )
                for _ in range(config.repeat)
            ]
            stats = [model.group.emulation.get(r, EmulationStats()) for r in range(plan.nodes)]
            rows.append(
                {
                    "machines": machines.text,
                    "nodes": plan.nodes,
                    "placement": plan.placement,
                    "trunk": plan.trunk,
                    "plan_reason": reason,
                    "threads": threads,
                    "requests": requests,
                    "tok_per_s": statistics.median(speeds),
                    "all": speeds,
                    "predicted_tok_per_s": _predict(
                        config, machines, plan, checkpoint.config, requests
                    ),
                    "ranks": [_rank_row(s, machines.slow) for s in stats],
                    "late_percent": max(100 * s.late / max(1, s.passes) for s in stats),
                    "late_time_percent": max(100 * s.late_s / max(1e-9, s.total_s) for s in stats),
                }
            )
    return rows


def _decoding_speed(times: Sequence[Sequence[float]]) -> float:
    """Tokens per second of all requests while all of them are decoding."""
    begin, end = max(t[0] for t in times), min(t[-1] for t in times)
    tokens = sum(begin < at <= end for of_request in times for at in of_request)
    return tokens / (end - begin) if end > begin else 0.0


def _predict(
    config: EmulationConfig,
    machines: EmulatedMachines,
    plan: Any,
    model_config: dict[str, Any],
    requests: int,
) -> float | None:
    """Tokens per second of all requests by the performance model; None: it does not know it."""
    measured = plan_cost.emulated_machines(model_config, machines.bytes_per_s, machines.link_s)
    context = config.context + config.tokens // 2
    try:
        prediction = plan_cost.predict_plan(plan, measured, "", context, requests)
    except CenacleError:
        return None
    return prediction.tok_per_s_all_users


def _rank_row(stats: EmulationStats, slow: float) -> dict[str, Any]:
    """Means of a pass; milliseconds as they would be without `slow`."""
    passes = max(1, stats.passes)
    parts = {"read": stats.read_s, "wait": stats.wait_s, "link": stats.link_s}
    parts["late"] = max(0.0, stats.total_s - sum(parts.values()))
    return {
        "passes": stats.passes,
        "late_passes": stats.late,
        "read_bytes": round(stats.read_bytes / passes),
        "pass_ms": {
            name: 1000 * seconds / passes / slow
            for name, seconds in {**parts, "total": stats.total_s}.items()
        },
    }
