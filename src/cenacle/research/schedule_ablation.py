"""`cenacle bench ablation`: the paper's schedules, step by step, and ours, over emulated links.

Owns: the rows, how they are timed, and the comparison.
Does not know: how a schedule works (`model/schedules.py`), how it is drawn (`picture.py`).
How: every row is the same model, kernels, ranks and tokens. Each step's token is drawn at random,
the same for all rows: a random model would repeat its own, and one token has one routing. So no
token is exchanged; logits are compared instead. A link is emulated by adding its latency to each
exchange (`collective.study.Delayed`).
Invariant: a row's terms are those that rank 0 sees, and add up to its measured total:
trunk + experts + exchange + waiting + rest.
Next: `model/schedules.py`, `picture.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..bench.expected_work import expected_experts, split_cores
from ..bench.rank_worker import RankPool
from ..collective.base import Collective
from ..collective.delayed import DelayedCollective
from ..core.plan import Plan
from ..errors import ClusterError, InputError, PlanError
from ..model import config_catalogue
from ..model.checkpoint import Checkpoint, locate_checkpoint
from ..model.expert_parallel import parallelize
from ..model.loader import load_rank_model
from ..model.spec_reader import read_model_spec
from ..model.step_timer import StepTimer
from .paper_schedules import CENTRALIZED_SCHEDULES, SCHEDULES, ScheduledBlock, install_schedule

LATENCIES_MS = (1.0, 0.3, 0.05, 0.0)
"""The paper's gRPC, TCP over Thunderbolt, RDMA, and this machine's own exchange."""

CONTEXT = 16  # tokens of the prompt
TERMS = ("experts", "all_reduce", "waiting", "trunk", "rest")
AGREE = 2e-3  # relative: rows add in different orders, and kernels round activations to 16 bits


@dataclass(frozen=True)
class AblationConfig:
    """What to compare.

    Args:
        model: a folder or a hub repository's name.
        latencies_ms: one block of rows for each.
        tokens: decoded for each number in a round.
        repeat: rounds over all rows, so that a drift of the machine meets all of them.
        kernels: as `api.load`.
        ours: placements of ours to compare with.
    """

    model: str
    nodes: int = 2
    threads: int | None = None
    backend: str = "auto"
    kernels: str = "auto"
    latencies_ms: tuple[float, ...] = LATENCIES_MS
    tokens: int = 16
    repeat: int = 2
    ours: tuple[str, ...] = ("whole", "replicated", "sliced", "sliced, trunk sharded")
    deadline_s: float = 300.0
    conditions: dict[str, Any] = field(default_factory=dict)


def run_ablation(
    asked: AblationConfig, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure every row.

    Returns:
        A JSON object: "rows", each with "row", "latency_ms", "token_ms" (median, not measured
        inside), "tok_s", "terms_ms", "experts_slowest_ms" (per token, of the slowest rank of each
        layer), "expected_experts" (E[max] of a layer by the plan; schedules may run more),
        "exchanges" and "exchange_bytes" per token; "compared", see `compare`.

    Raises:
        InputError, PlanError: what cannot be compared.
        ClusterError: a rank failed, or two rows compute different logits.
    """
    if asked.nodes < 2 or asked.tokens < 2:
        raise InputError("bench ablation: expected at least 2 nodes and 2 tokens", "nodes")
    checkpoint = Checkpoint.open(locate_checkpoint(asked.model))
    spec = read_model_spec(checkpoint)
    cores, threads = split_cores(asked.nodes, asked.threads)
    ours = [p for p in asked.ours if spec.dense_modules or not p.endswith("trunk sharded")]
    names = [*SCHEDULES, *(f"ours, {placement}" for placement in ours)]
    seen: dict[tuple[float, str], list[list[dict[str, Any]]]] = {}
    expected: dict[str, float] = {}
    logits: dict[str, np.ndarray] = {}
    backend = ""
    for name in names * asked.repeat:
        say(f"loading {name}")
        plan = plan_for_row(name, checkpoint, asked.nodes)
        expected[name] = expected_experts(plan)[1]
        # New processes for each row and round: which memory a process happens to get changes its
        # speed by a quarter (docs/devlog.md), so one set for all rows would not be a comparison.
        with RankPool(asked.nodes, asked.backend, cores, threads) as ranks:
            backend = ranks.backend
            ranks.run(
                ablation_load,
                asked.deadline_s,
                folder=str(checkpoint.folder.resolve()),
                plan=plan.to_json(),
                row=name,
                kernels=asked.kernels,
            )
            for latency_ms in asked.latencies_ms:
                say(f"{name}, {latency_ms:g} ms")
                reports = ranks.run(
                    ablation_decode,
                    asked.deadline_s,
                    latency_s=latency_ms / 1000,
                    tokens=asked.tokens,
                )
                logits[name] = np.array(reports[0]["logits"])
                seen.setdefault((latency_ms, name), []).append(reports)
    rows = [
        {
            "row": name,
            "latency_ms": latency_ms,
            **_numbers(seen[latency_ms, name]),
            "expected_experts": expected[name],
        }
        for latency_ms in asked.latencies_ms
        for name in names
    ]
    differ = max(
        float(np.abs(other - logits[names[0]]).max() / np.abs(logits[names[0]]).max())
        for other in logits.values()
    )
    if not differ <= AGREE:
        raise ClusterError(
            f"bench ablation: rows must compute the same logits, but they differ by {differ:.1e} "
            f"(relative, expected at most {AGREE:g}); this installation computes something wrong"
        )
    layers = len(spec.moe)
    depth = catalogued_depth(checkpoint.config)
    return {
        "benchmark": "ablation",
        "model": asked.model,
        "family": spec.family,
        "quantization": spec.quantization,
        "layers": layers,
        "depth": depth,
        "conditions": {
            **asked.conditions,
            "nodes": asked.nodes,
            "threads": threads,
            "pinned": cores is not None,
            "backend": backend,
            "kernels": asked.kernels,
            "tokens": asked.tokens,
            "repeat": asked.repeat,
        },
        "rows": rows,
        "logits_differ": differ,
        "compared": compare_rows(rows, layers, depth),
    }


def plan_for_row(row: str, checkpoint: Checkpoint, nodes: int) -> Plan:
    """The placement of a row: whole experts for the paper's schedules."""
    placement = row.removeprefix("ours, ")
    spec = read_model_spec(checkpoint)
    if row in SCHEDULES or placement == "whole":
        return Plan.whole(spec, nodes)
    if placement == "sliced":
        return Plan.sliced(spec, nodes)
    if placement == "sliced, trunk sharded":
        return Plan.sliced(spec, nodes, trunk="sharded")
    if placement == "replicated":
        # Half as many experts again on every rank, at most all: the spare memory this is for.
        experts = min(m.experts for m in spec.moe)
        held = min(experts, -(-3 * experts // (2 * nodes)))
        lean = Plan.whole(spec, nodes)
        each = sum(m.expert_bytes for m in spec.moe)
        rest = [lean.bytes_of(r)["trunk"] + lean.bytes_of(r)["shared"] for r in range(nodes)]
        return Plan.replicated(spec, nodes, [b + held * each for b in rest])
    raise PlanError(f"placement: expected whole, sliced or replicated, got {placement!r}")


def catalogued_depth(config: dict[str, Any]) -> int | None:
    """Layers of the catalogued model whose first layers this config is; None: of none."""
    keys = {"quantization", "quantization_config"}
    tokens = {"eos_token_id", "pad_token_id", "bos_token_id", "torch_dtype"}

    def plain(one: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in one.items() if k not in keys | tokens}

    layers = config_catalogue.layer_count(config)
    depths = []
    for entry in config_catalogue.model_catalogue().values():
        total = config_catalogue.layer_count(entry.config)
        same = entry.config.get("model_type") == config.get("model_type")
        if not same or total <= layers:
            continue
        if plain(config_catalogue.first_layers(entry.config, layers)) == plain(config):
            depths.append(total)
    return max(depths, default=None)


def compare_rows(
    rows: Sequence[dict[str, Any]], layers: int, depth: int | None
) -> list[dict[str, Any]]:
    """For each latency, how many times quicker than naive, and than P-LR-D, each row is.

    "layers" leaves out what is not in a layer (head, Python): it compares layers alone, in measured
    steps. "depth" is calculated for a model of `depth` such layers: a layer's time that many
    times, and the rest once.
    """
    found = []
    for latency in dict.fromkeys(r["latency_ms"] for r in rows):
        block = {r["row"]: r for r in rows if r["latency_ms"] == latency}

        def inside(row: dict[str, Any]) -> float:
            return row["terms_ms"]["total"] - row["terms_ms"]["rest"]

        def deep(row: dict[str, Any]) -> float:
            # Measured steps wait more often: their layers are scaled to the token's real time.
            scale = row["token_ms"] / row["terms_ms"]["total"]
            return scale * (inside(row) * (depth or layers) / layers + row["terms_ms"]["rest"])

        for base in ("naive", "P-LR-D"):
            for name, row in block.items():
                of = block[base]
                ratios: dict[str, Any] = {
                    "token": of["token_ms"] / row["token_ms"],
                    "layers": inside(of) / inside(row),
                }
                if depth is not None:
                    ratios["depth"] = deep(of) / deep(row)
                    ratios["depth_tok_s"] = 1000 / deep(row)
                found.append({"latency_ms": latency, "row": name, "over": base, **ratios})
    return found


def _numbers(rounds: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """One row's numbers from every rank's reports of each round.

    Of the measured steps the middle half by time is taken: a mean that adds up, without outliers.
    """
    together = [
        [r["steps"][step] for r in reports]
        for reports in rounds
        for step in range(len(reports[0]["steps"]))
    ]
    together.sort(key=lambda seen: seen[0]["total_s"])
    kept = together[len(together) // 4 : len(together) - len(together) // 4]
    steps = len(kept)
    terms = dict.fromkeys((*TERMS, "total"), 0.0)
    slowest = 0.0
    for seen in kept:
        pure = sum(min(times) for times in zip(*(s["all_reduces_s"] for s in seen), strict=True))
        own = seen[0]
        step_terms = {
            "experts": own["laps_s"].get("experts", 0.0),
            "trunk": own["laps_s"].get("trunk", 0.0),
            "all_reduce": pure,
            "waiting": sum(own["all_reduces_s"]) - pure,
        }
        step_terms["rest"] = own["total_s"] - sum(step_terms.values())
        step_terms["total"] = own["total_s"]
        for name, value in step_terms.items():
            terms[name] += 1000 * value / steps
        each = zip(*(s["experts_s"] for s in seen), strict=True)
        slowest += 1000 * sum(max(times) for times in each) / steps
    token_ms = 1000 * statistics.median(t for reports in rounds for t in reports[0]["tokens_s"])
    return {
        "token_ms": token_ms,
        "tok_s": 1000 / token_ms,
        "terms_ms": terms,
        "experts_slowest_ms": slowest,
        "exchanges": rounds[0][0]["exchanges"],
        "exchange_bytes": rounds[0][0]["exchange_bytes"],
    }


# ---- on the ranks


class _EveryLap(StepTimer):
    """Keeps each layer's experts apart, besides the sums."""

    def stop(self) -> dict[str, Any]:
        """As `Watch.stop`, with "experts_s", the seconds of each layer's experts in order."""
        experts = [s for name, s in self._laps if name == "experts"]
        return {**super().stop(), "experts_s": experts}


@dataclass
class _Loaded:
    """The row that a rank holds: its model, or for a rank that is not central its layers."""

    model: Any
    layers: list[ScheduledBlock]
    central: bool
    link: DelayedCollective
    watch: _EveryLap
    top_k: int
    vocabulary: int


_held: list[_Loaded] = []


def precise_sleep(seconds: float) -> None:
    """Sleep, and spin at the end: a system's sleep is late by as much as a quick link takes."""
    ends = time.perf_counter() + seconds
    if seconds > 0.0004:
        time.sleep(seconds - 0.0003)
    while time.perf_counter() < ends:
        pass


def ablation_load(
    collective: Collective, folder: str, plan: dict[str, Any], row: str, kernels: str
) -> None:
    """Load a row."""
    dealt = Plan.from_json(plan)
    watch = _EveryLap()
    link = DelayedCollective(collective, 0.0, precise_sleep)
    model = load_rank_model(Checkpoint.open(Path(folder)), dealt, collective.rank, lambda *_: None)
    family = dealt.spec.family
    layers: list[ScheduledBlock] = []
    if row in SCHEDULES:
        layers = install_schedule(model, family, dealt, link, watch, kernels, row)
    else:
        parallelize(model, family, dealt, link, watch, kernels)
    central = row in CENTRALIZED_SCHEDULES
    _held.append(
        _Loaded(model, layers, central, link, watch, dealt.spec.top_k, dealt.spec.vocab_size)
    )
    collective.barrier()


def ablation_decode(collective: Collective, latency_s: float, tokens: int) -> dict[str, Any]:
    """Decode random tokens, first for their time, then measured inside."""
    held = _held[0]
    held.link.latency_s = 0.0
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, held.vocabulary, CONTEXT)
    given = rng.integers(0, held.vocabulary, (2, tokens))
    serves = held.central and collective.rank > 0
    cache = None if serves else make_prompt_cache(held.model)

    def step(ids: np.ndarray) -> mx.array | None:
        if serves:
            for layer in held.layers:
                layer.serve(1, len(ids), held.top_k)
            return None
        logits = held.model(mx.array(ids)[None], cache=cache)[0, -1]
        mx.eval(logits)
        return logits

    step(prompt)
    step(prompt[:1])
    collective.barrier()
    held.link.latency_s = latency_s
    before = (held.link.traffic.calls, held.link.traffic.bytes)
    times, logits = [], None
    for token in given[0]:
        began = time.perf_counter()
        logits = step(np.array([token]))
        times.append(time.perf_counter() - began)
    calls = (held.link.traffic.calls - before[0]) / tokens
    moved = (held.link.traffic.bytes - before[1]) / tokens
    steps = []
    for token in given[1]:
        held.watch.start()
        step(np.array([token]))
        steps.append(held.watch.stop())
    held.link.latency_s = 0.0
    collective.barrier()
    shown = [] if logits is None else logits.astype(mx.float32)[:256].tolist()
    return {
        "tokens_s": times,
        "steps": [{k: v for k, v in s.items() if k != "routed"} for s in steps],
        "exchanges": calls,
        "exchange_bytes": moved,
        "logits": shown,
    }
