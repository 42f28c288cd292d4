"""Which replica computes what, and which placement is the quickest.

Owns: `deal`, which deals the active experts of a call to the ranks that hold them, with its slow
references; `choose`, which compares placements by the bytes that the busiest rank reads.
Does not know: MLX, files, who asks.
Invariant: only integers, and ties are broken by rank: every rank that sees the same routing decides
the same, without a message; `native/deal.h` is the same rule in C++, and a test compares them.
A token reads the weights of every expert it activates, so with few tokens the number of active
experts on the busiest rank counts (arXiv:2512.09277); with many tokens per expert it is the number
of tokens that it computes.
Next: `experts.py`, which computes what is dealt to its rank; `plan.py`, which placed the replicas.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from ..core.model_spec import ModelSpec
from ..core.plan import Plan
from ..errors import CenacleError, PlanError
from .load_balancer import assign_experts, integer_speeds
from .plan_cost import MeasuredMachines, predict_plan

# What `choose` assumes of machines that nobody has measured.
ASSUMED_LATENCY_S = (
    100e-6  # an exchange, and waiting in it for the slowest (docs/devlog.md: two local ranks)
)
ASSUMED_CPU_BYTES_S = 20e9  # native kernels on one core, 4 bits (docs/devlog.md)
ASSUMED_GPU_BYTES_S = 400e9  # a Mac Studio's memory is about as fast


def expected_busiest(counts: Sequence[int], speeds: Sequence[int], chosen: int) -> float:
    """E[max over ranks of active experts / speed] where a token chooses among whole experts.

    Exact for uniform routing: P(all ranks within a time t) counts the sets of `chosen` experts
    with at most t * speed of each rank's (a product of truncated binomials), over all sets.

    Args:
        counts: experts on each rank.
        speeds: relative speed of each rank, positive integers.
        chosen: experts per token.
    """
    total = math.comb(sum(counts), chosen)
    times = sorted({(j, s) for s in speeds for j in range(chosen + 1)}, key=lambda p: p[0] / p[1])
    mean, before = 0.0, 0
    for work, speed in times:
        ways = [1] + [0] * chosen
        for count, own in zip(counts, speeds, strict=True):
            most = min(count, work * own // speed)
            ways = [
                sum(ways[k - j] * math.comb(count, j) for j in range(min(most, k) + 1))
                for k in range(chosen + 1)
            ]
        mean += work / speed * (ways[chosen] - before) / total
        before = ways[chosen]
    return mean


def expert_reads(plan: Plan, skips: bool) -> float:
    """Whole experts' bytes that the busiest rank reads of a layer for one token, over its speed
    (the fastest rank's is 1): the mean over layers' uniform routing, of the first MoE layer.

    Args:
        skips: whether kernels can skip experts that are not this rank's (stock ones on GPUs
            compute another in their place).
    """
    layer, chosen = plan.layers[0], min(plan.spec.top_k, plan.spec.moe[0].experts)
    speeds = integer_speeds(plan.nodes, plan.node_weights)
    fastest = max(speeds)
    slices = [layer.slice_of(r) for r in range(plan.nodes)]
    if all(len(layer.experts_of(r)) == len(layer.experts) for r in range(plan.nodes)) and (
        plan.width > 1
    ):
        parts = [(b - a) / plan.width for a, b in slices]
        return max(chosen * p * fastest / s for p, s in zip(parts, speeds, strict=True))
    if not skips:
        return chosen * fastest / min(speeds)
    holders = layer.replica_ranks(0)
    if all(len(h) == 1 for h in holders):
        counts = [len(layer.experts_of(r)) for r in range(plan.nodes)]
        return expected_busiest(counts, speeds, chosen) * fastest
    draw, seen = random.Random(0), []
    for _ in range(200):
        active = set(draw.sample(range(len(holders)), chosen))
        counts = [int(e in active) for e in range(len(holders))]
        dealt = assign_experts(counts, holders, speeds)
        seen.append(max(dealt.count(r) * fastest / speeds[r] for r in range(plan.nodes)))
    return sum(seen) / len(seen)


def token_s(
    plan: Plan,
    gpu: bool = False,
    latency_s: float = ASSUMED_LATENCY_S,
    bytes_s: float | None = None,
) -> float:
    """Modelled seconds of one decoded token: bytes of the busiest rank and exchanges.

    Args:
        gpu: whether ranks compute on GPUs.
        latency_s: seconds of an exchange.
        bytes_s: at which the quickest rank reads weights; None: as assumed.
    """
    spec = plan.spec
    speeds = integer_speeds(plan.nodes, plan.node_weights)
    fastest = max(speeds)
    common = spec.trunk_bytes - spec.embedding_bytes - sum(p.bytes for p in spec.dense_modules)
    trunk = 0.0
    for rank, speed in enumerate(speeds):
        own = common + sum(plan.module_bytes(p, rank) for p in spec.dense_modules)
        own += plan.bytes_of(rank)["shared"]
        trunk = max(trunk, own * fastest / speed)
    experts = sum(m.expert_bytes for m in spec.moe) * expert_reads(plan, skips=not gpu)
    exchanges = plan.all_reduces * latency_s if plan.nodes > 1 else 0.0
    return (trunk + experts) / (bytes_s or _bytes_s(gpu)) + exchanges


def _bytes_s(gpu: bool) -> float:
    return ASSUMED_GPU_BYTES_S if gpu else ASSUMED_CPU_BYTES_S


def measured_s(plan: Plan, measured: MeasuredMachines, gpu: bool = False) -> float:
    """The same by the performance model (`cost/`), on machines that were measured.

    Raises:
        CenacleError: it has no word on this plan.
    """
    terms = predict_plan(plan, measured).terms
    seconds = sum(terms.values())
    if gpu and plan.nodes > 1:  # it does not know that stock kernels cannot skip an expert
        reads = expert_reads(plan, skips=False) / expert_reads(plan, skips=True)
        seconds += (reads - 1) * terms["experts"]
    return seconds


def _times(
    plans: Sequence[Plan], gpu: bool, latency_s: float, measured: MeasuredMachines | None
) -> tuple[list[float], str]:
    """Seconds of a token under each plan, and what they are made of."""
    if measured is None:
        by = f"at {_bytes_s(gpu) / 1e9:g} GB/s a node and {1e3 * latency_s:g} ms an exchange"
        return [token_s(p, gpu, latency_s) for p in plans], f"{by}, assumed"
    rate, latency_s = measured.bytes_s, measured.latency_s
    by = f"at {rate / 1e9:.3g} GB/s a node and {1e3 * latency_s:.2g} ms an exchange"
    by = f"{by}, {measured.said}"
    try:
        return [measured_s(p, measured, gpu) for p in plans], by
    except CenacleError:  # a shape that it does not know: then by bytes alone
        return [token_s(p, gpu, latency_s, rate) for p in plans], by


def choose_plan(
    spec: ModelSpec,
    nodes: int,
    shares: Sequence[float] | None = None,
    placement: str = "auto",
    trunk: str = "auto",
    budgets: Sequence[int] | None = None,
    gpu: bool = False,
    latency_s: float = ASSUMED_LATENCY_S,
    measured: MeasuredMachines | None = None,
) -> tuple[Plan, str]:
    """The plan that was asked for, or of whole and sliced experts and both trunks the quickest.

    Replicas are dealt only if they are asked for: they take memory, of which nothing is known here.

    Args:
        placement: "whole", "sliced", "replicated" or "auto".
        trunk: "replicated", "sharded" or "auto".
        budgets: see `Plan.replicated`; they need that placement.
        gpu: see `token_s`.
        latency_s: see `token_s`.
        measured: the machines, where they were measured; then `latency_s` is not looked at.

    Returns:
        The plan, and one line that says why, or what of the plan may surprise; empty if nothing.

    Raises:
        PlanError: no plan is possible, or not the one asked for.
    """
    if budgets is not None and placement != "replicated":
        raise PlanError(f"budgets are for --placement replicated, the placement is {placement}")
    ways = ("whole", "sliced") if placement == "auto" else (placement,)
    trunks = ("replicated", "sharded") if trunk == "auto" else (trunk,)
    plans: list[Plan] = []
    refused: PlanError | None = None
    for way in ways:
        for each in trunks:
            try:
                plans.append(_plan(way, spec, nodes, shares, each, budgets))
            except PlanError as error:
                refused = refused or error
    if not plans:
        assert refused is not None
        raise refused
    if nodes == 1:
        return plans[0], ""
    times, by = _times(plans, gpu, latency_s, measured)
    best = min(range(len(plans)), key=lambda i: (times[i], i))
    plan, said = plans[best], ""
    if len(plans) > 1:
        others = [
            f"{p.placement}/{p.trunk} {1e3 * t:.2f}"
            for p, t in zip(plans, times, strict=True)
            if p is not plan
        ]
        said = (
            f"experts {plan.placement}, trunk {plan.trunk}: {1e3 * times[best]:.2f} ms a token "
            f"modelled ({', '.join(others)}), {by}"
        )
    attention = [p for p in spec.dense_modules if p.kind == "attention"]
    if plan.trunk == "sharded" and not any(plan.is_sharded(p) for p in attention):
        why = (
            f"has too few heads for {nodes} nodes"
            if attention
            else "cannot be divided by heads (not plain grouped-query attention)"
        )
        said += f"{'; ' if said else ''}attention of {spec.family} {why} and is on every node"
    return plan, said


def _plan(
    placement: str,
    spec: ModelSpec,
    nodes: int,
    shares: Sequence[float] | None,
    trunk: str,
    budgets: Sequence[int] | None,
) -> Plan:
    if placement == "whole":
        return Plan.whole(spec, nodes, shares, trunk)
    if placement == "sliced":
        return Plan.sliced(spec, nodes, shares, trunk)
    if placement == "replicated":
        return Plan.replicated(spec, nodes, budgets, shares, trunk)
    raise PlanError(f"placement: expected whole, sliced, replicated or auto, got {placement!r}")
