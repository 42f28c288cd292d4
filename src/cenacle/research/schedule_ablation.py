"""`cenacle bench ablation`: the paper's schedules step by step, and Cenacle's, over emulated links.

Owns: the rows, how they are timed, and the comparison.
Does not know: how a schedule works (`paper_schedules.py`), how it is drawn (`plot.py`).
How: every row has the same model, kernels, ranks and tokens. The token of each step is drawn at
random, the same for all rows: a random model would repeat its own, and one token has one routing.
So ranks send each other no tokens, and logits are compared instead. A link is emulated by adding
its latency to each all-reduce (`DelayedCollective`).
Invariant: a row's step timings are those of rank 0 and add up to its measured total: trunk +
experts + all-reduce + waiting + rest.
Next: `paper_schedules.py`, `plot.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..calibration.rank_worker import RankPool, split_cores
from ..collective.base import Collective
from ..collective.delayed import DelayedCollective
from ..core.model_spec import ModelSpec
from ..core.plan import Plan
from ..errors import ClusterError, InputError
from ..model import config_catalog
from ..model.checkpoint import Checkpoint, locate_checkpoint
from ..model.expert_parallel import parallelize
from ..model.loader import load_rank_model
from ..model.spec_reader import read_model_spec
from ..model.step_timer import StepTimer
from ..planning.plan_cost import max_experts
from .paper_schedules import CENTRALIZED_SCHEDULES, SCHEDULES, ScheduledBlock, install_schedule

# The paper's gRPC, TCP over Thunderbolt, RDMA, and this machine's own all-reduce.
LATENCIES_MS = (1.0, 0.3, 0.05, 0.0)
OWN_ROWS = ("ours, whole", "ours, replicated", "ours, sliced", "ours, sliced, trunk sharded")
BASELINES = ("naive", "P-LR-D")
CONTEXT = 16  # tokens of the prompt
RANK_TIMEOUT_S = 300.0
# Relative: rows add in different orders, and kernels round activations to 16 bits.
LOGIT_TOLERANCE = 2e-3
COMPARED_LOGITS = 256
SPIN_S = 0.0003  # how late the system's sleep may end

Report = Callable[[str], None]


@dataclass(frozen=True)
class AblationConfig:
    """What to compare.

    Args:
        model: a folder or the name of a Hub repository.
        latencies_ms: one block of rows for each.
        tokens: decoded for each number in a round.
        repeat: rounds over all rows, so that a drift of the machine affects all of them.
        kernels: as `api.load`.
    """

    model: str
    nodes: int = 2
    threads: int | None = None
    backend: str = "auto"
    kernels: str = "auto"
    latencies_ms: tuple[float, ...] = LATENCIES_MS
    tokens: int = 16
    repeat: int = 2


def run_ablation(config: AblationConfig, report: Report = lambda _: None) -> dict[str, Any]:
    """Measure every row.

    Returns:
        A JSON object: "rows", each with "row", "latency_ms", "token_ms" (median, not measured
        inside), "tok_per_s", "step_timings_ms", "experts_slowest_ms" (per token, of the slowest
        rank of each layer), "expected_experts" (E[max] of a layer by the plan; schedules may
        compute more), "all_reduces" and "all_reduce_bytes" per token; "compared", see
        `compare_rows`.

    Raises:
        InputError, PlanError: what cannot be compared.
        ClusterError: a rank failed, or two rows compute different logits.
    """
    if config.nodes < 2 or config.tokens < 2:
        raise InputError("bench ablation: expected at least 2 nodes and 2 tokens", "nodes")
    checkpoint = Checkpoint.open(locate_checkpoint(config.model))
    spec = read_model_spec(checkpoint)
    cores, threads = split_cores(config.nodes, config.threads)
    own_rows = [r for r in OWN_ROWS if spec.dense_modules or not r.endswith("trunk sharded")]
    plans = {name: plan_for_row(name, spec, config.nodes) for name in (*SCHEDULES, *own_rows)}
    measured = _Measurements({}, {})
    for name in [*plans] * config.repeat:
        report(f"loading {name}")
        # New processes for each row and round: which memory a process happens to get changes its
        # speed by a quarter (docs/devlog.md), so one set for all rows would not be a comparison.
        with RankPool(config.nodes, config.backend, cores, threads) as ranks:
            _measure_row(config, checkpoint, name, plans[name], ranks, measured, report)
    rows = [
        {
            "row": name,
            "latency_ms": latency_ms,
            **_summarize(measured.rounds[latency_ms, name]),
            "expected_experts": max_experts(plan),
        }
        for latency_ms in config.latencies_ms
        for name, plan in plans.items()
    ]
    layers = len(spec.moe)
    depth = cataloged_depth(checkpoint.config)
    return {
        "benchmark": "ablation",
        "model": config.model,
        "family": spec.family,
        "quantization": spec.quantization,
        "layers": layers,
        "depth": depth,
        "conditions": {
            "nodes": config.nodes,
            "threads": threads,
            "pinned": cores is not None,
            "backend": measured.backend,
            "kernels": config.kernels,
            "tokens": config.tokens,
            "repeat": config.repeat,
        },
        "rows": rows,
        "logits_differ": _check_logits([*measured.logits.values()]),
        "compared": compare_rows(rows, layers, depth),
    }


@dataclass
class _Measurements:
    """What ranks reported: `rounds` by latency and row, the last `logits` by row."""

    rounds: dict[tuple[float, str], list[list[dict[str, Any]]]]
    logits: dict[str, np.ndarray]
    backend: str = ""


def _measure_row(
    config: AblationConfig,
    checkpoint: Checkpoint,
    name: str,
    plan: Plan,
    ranks: RankPool,
    measured: _Measurements,
    report: Report,
) -> None:
    """Measure one round of a row with every latency."""
    measured.backend = ranks.backend
    ranks.run(
        load_row,
        RANK_TIMEOUT_S,
        folder=str(checkpoint.folder.resolve()),
        plan=plan.to_json(),
        row=name,
        kernels=config.kernels,
    )
    for latency_ms in config.latencies_ms:
        report(f"{name}, {latency_ms:g} ms")
        results = ranks.run(
            decode_row, RANK_TIMEOUT_S, latency_s=latency_ms / 1000, tokens=config.tokens
        )
        measured.logits[name] = np.array(results[0]["logits"])
        measured.rounds.setdefault((latency_ms, name), []).append(results)


def _check_logits(logits: Sequence[np.ndarray]) -> float:
    """The largest relative difference to the first row's."""
    first = logits[0]
    difference = max(float(np.abs(row - first).max() / np.abs(first).max()) for row in logits)
    if not difference <= LOGIT_TOLERANCE:
        raise ClusterError(
            f"bench ablation: expected logits of all rows within {LOGIT_TOLERANCE:g} (relative), "
            f"got a difference of {difference:.1e}; this installation computes wrong results"
        )
    return difference


def plan_for_row(row: str, spec: ModelSpec, nodes: int) -> Plan:
    """The placement of a row: whole experts for the paper's schedules."""
    placement = row.removeprefix("ours, ")
    if placement == "sliced":
        return Plan.sliced(spec, nodes)
    if placement == "sliced, trunk sharded":
        return Plan.sliced(spec, nodes, trunk="sharded")
    whole = Plan.whole(spec, nodes)
    if placement != "replicated":
        return whole
    # Half as many experts again on every rank, at most all: what spare memory is for.
    experts = min(moe.experts for moe in spec.moe)
    per_rank = min(experts, -(-3 * experts // (2 * nodes)))
    expert_bytes = per_rank * sum(moe.expert_bytes for moe in spec.moe)
    sizes = [whole.bytes_of(rank) for rank in range(nodes)]
    budgets = [size["trunk"] + size["shared"] + expert_bytes for size in sizes]
    return Plan.replicated(spec, nodes, budgets)


def cataloged_depth(config: dict[str, Any]) -> int | None:
    """Layers of the cataloged model whose first layers this config is; None: of none."""
    ignored = {"quantization", "quantization_config", "torch_dtype"}
    ignored |= {"eos_token_id", "pad_token_id", "bos_token_id"}

    def relevant(config: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key not in ignored}

    layers = config_catalog.layer_count(config)
    depths = []
    for entry in config_catalog.model_catalog().values():
        total = config_catalog.layer_count(entry.config)
        same_family = entry.config.get("model_type") == config.get("model_type")
        if same_family and total > layers:
            first_layers = config_catalog.first_layers(entry.config, layers)
            if relevant(first_layers) == relevant(config):
                depths.append(total)
    return max(depths, default=None)


def compare_rows(
    rows: Sequence[dict[str, Any]], layers: int, depth: int | None
) -> list[dict[str, Any]]:
    """For each latency, how many times faster than naive, and than P-LR-D, each row is.

    "layers" leaves out what is not in a layer (head, Python): it compares layers alone, in measured
    steps. "depth" is calculated for a model of `depth` such layers: a layer's time that many
    times, and the rest once.
    """

    def layers_ms(row: dict[str, Any]) -> float:
        return row["step_timings_ms"]["total"] - row["step_timings_ms"]["rest"]

    def deep_ms(row: dict[str, Any], depth: int) -> float:
        # Measured steps wait more often: their layers are scaled to the token's real time.
        timings_ms = row["step_timings_ms"]
        scale = row["token_ms"] / timings_ms["total"]
        return scale * (layers_ms(row) * depth / layers + timings_ms["rest"])

    compared = []
    for latency_ms in dict.fromkeys(r["latency_ms"] for r in rows):
        block = {r["row"]: r for r in rows if r["latency_ms"] == latency_ms}
        for base in BASELINES:
            for name, row in block.items():
                ratios: dict[str, Any] = {
                    "token": block[base]["token_ms"] / row["token_ms"],
                    "layers": layers_ms(block[base]) / layers_ms(row),
                }
                if depth is not None:
                    ratios["depth"] = deep_ms(block[base], depth) / deep_ms(row, depth)
                    ratios["depth_tok_per_s"] = 1000 / deep_ms(row, depth)
                compared.append({"latency_ms": latency_ms, "row": name, "over": base, **ratios})
    return compared


def _summarize(rounds: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """One row's numbers from every rank's results of each round.

    Of the measured steps, the middle half by time: a mean that adds up, without outliers.
    """
    steps = [
        ranks for results in rounds for ranks in zip(*(r["steps"] for r in results), strict=True)
    ]
    steps.sort(key=lambda ranks: ranks[0]["total_s"])
    steps = steps[len(steps) // 4 : len(steps) - len(steps) // 4]
    timings = [_step_timings(ranks) for ranks in steps]
    slowest = [sum(map(max, zip(*(r["experts_s"] for r in ranks), strict=True))) for ranks in steps]
    token_ms = 1000 * statistics.median(t for results in rounds for t in results[0]["tokens_s"])
    return {
        "token_ms": token_ms,
        "tok_per_s": 1000 / token_ms,
        "step_timings_ms": {
            phase: 1000 * statistics.fmean(step[phase] for step in timings) for phase in timings[0]
        },
        "experts_slowest_ms": 1000 * statistics.fmean(slowest),
        "all_reduces": rounds[0][0]["all_reduces"],
        "all_reduce_bytes": rounds[0][0]["all_reduce_bytes"],
    }


def _step_timings(ranks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds of a step of rank 0 by phase.

    An all-reduce itself takes as long as for the rank that comes last; the rest is waiting.
    """
    all_reduce = sum(map(min, zip(*(r["all_reduces_s"] for r in ranks), strict=True)))
    first = ranks[0]
    timings = {
        "experts": first["laps_s"].get("experts", 0.0),
        "all_reduce": all_reduce,
        "waiting": sum(first["all_reduces_s"]) - all_reduce,
        "trunk": first["laps_s"].get("trunk", 0.0),
    }
    rest = first["total_s"] - sum(timings.values())
    return {**timings, "rest": rest, "total": first["total_s"]}


# ---- on the ranks


class _LayerTimer(StepTimer):
    """Keeps the experts of each layer apart, besides the sums."""

    def stop(self) -> dict[str, Any]:
        """As `StepTimer.stop`, with "experts_s", the seconds of each layer's experts in order."""
        experts = [s for name, s in self._laps if name == "experts"]
        return {**super().stop(), "experts_s": experts}


@dataclass
class _LoadedRow:
    """What a rank holds: its model, or on a rank that is not central its layers."""

    model: Any
    layers: list[ScheduledBlock]
    central: bool
    link: DelayedCollective
    timer: _LayerTimer
    top_k: int
    vocab_size: int


_loaded: list[_LoadedRow] = []


def precise_sleep(seconds: float) -> None:
    """Sleep, and spin at the end: a system's sleep is late by as much as a fast link takes."""
    ends = time.perf_counter() + seconds
    if seconds > SPIN_S + 0.0001:
        time.sleep(seconds - SPIN_S)
    while time.perf_counter() < ends:
        pass


def load_row(
    collective: Collective, folder: str, plan: dict[str, Any], row: str, kernels: str
) -> None:
    """Load the model of a row."""
    rank_plan, timer = Plan.from_json(plan), _LayerTimer()
    link = DelayedCollective(collective, 0.0, precise_sleep)
    checkpoint, spec = Checkpoint.open(Path(folder)), rank_plan.spec
    model = load_rank_model(checkpoint, rank_plan, collective.rank, lambda *_: None)
    layers: list[ScheduledBlock] = []
    if row in SCHEDULES:
        layers = install_schedule(model, spec.family, rank_plan, link, timer, kernels, row)
    else:
        parallelize(model, spec.family, rank_plan, link, timer, kernels)
    central = row in CENTRALIZED_SCHEDULES
    sizes = (spec.top_k, spec.vocab_size)
    _loaded.append(_LoadedRow(model, layers, central, link, timer, *sizes))
    collective.barrier()


def decode_row(collective: Collective, latency_s: float, tokens: int) -> dict[str, Any]:
    """Decode random tokens, first for their time, then measured inside."""
    row = _loaded[0]
    row.link.latency_s = 0.0
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, row.vocab_size, CONTEXT)
    timed_tokens, measured_tokens = rng.integers(0, row.vocab_size, (2, tokens))
    serves = row.central and collective.rank > 0
    cache = None if serves else make_prompt_cache(row.model)

    def step(ids: np.ndarray) -> mx.array | None:
        if serves:
            for layer in row.layers:
                layer.serve(1, len(ids), row.top_k)
            return None
        logits = row.model(mx.array(ids)[None], cache=cache)[0, -1]
        mx.eval(logits)
        return logits

    step(prompt)
    step(prompt[:1])
    collective.barrier()
    row.link.latency_s = latency_s
    calls, bytes_ = row.link.traffic.calls, row.link.traffic.bytes
    tokens_s, logits = [], None
    for token in timed_tokens:
        started = time.perf_counter()
        logits = step(np.array([token]))
        tokens_s.append(time.perf_counter() - started)
    calls, bytes_ = row.link.traffic.calls - calls, row.link.traffic.bytes - bytes_
    steps = []
    for token in measured_tokens:
        row.timer.start()
        step(np.array([token]))
        steps.append({k: v for k, v in row.timer.stop().items() if k != "routed"})
    row.link.latency_s = 0.0
    collective.barrier()
    compared = [] if logits is None else logits.astype(mx.float32)[:COMPARED_LOGITS].tolist()
    return {
        "tokens_s": tokens_s,
        "steps": steps,
        "all_reduces": calls / tokens,
        "all_reduce_bytes": bytes_ / tokens,
        "logits": compared,
    }
