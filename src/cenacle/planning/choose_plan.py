"""Which placement is the fastest for a model on given ranks.

Owns: `choose_plan`, and what it assumes of machines that nobody has measured.
Does not know: MLX, files, how the time of a plan is computed (`plan_cost.py`).
Invariant: the choice comes with its reason, in one line.
Next: `plan_cost.py`; `core/plan.py` makes the plans.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core.model_spec import ModelSpec
from ..core.plan import Plan
from ..errors import CenacleError, PlanError
from .plan_cost import MeasuredMachines, lower_bound_s, token_s

ASSUMED_LATENCY_S = (
    100e-6  # an all-reduce and waiting for the slowest (docs/devlog.md: two local ranks)
)
ASSUMED_CPU_BYTES_PER_S = 20e9  # native kernels on one core, 4 bits (docs/devlog.md)
ASSUMED_GPU_BYTES_PER_S = 400e9  # about that of a Mac Studio's memory


def choose_plan(
    spec: ModelSpec,
    nodes: int,
    node_weights: Sequence[float] | None = None,
    placement: str = "auto",
    trunk: str = "auto",
    node_memory_bytes: Sequence[int] | None = None,
    gpu: bool = False,
    latency_s: float = ASSUMED_LATENCY_S,
    measured: MeasuredMachines | None = None,
) -> tuple[Plan, str]:
    """The requested plan, or the fastest of whole and sliced experts with both trunks.

    Replicated experts are never chosen by themselves: they take memory, of which nothing is known
    here.

    Args:
        placement: "whole", "sliced", "replicated" or "auto".
        trunk: "replicated", "sharded" or "auto".
        node_memory_bytes: see `Plan.replicated`; only with that placement.
        gpu: whether ranks compute on GPUs, whose stock kernels skip no expert of another rank.
        latency_s: seconds of an all-reduce between machines that were not measured.
        measured: the machines, if they were measured.

    Returns:
        The plan, and one line that says why it was chosen or what of it may surprise; may be empty.

    Raises:
        PlanError: no plan is possible, or not the requested one.
    """
    if node_memory_bytes is not None and placement != "replicated":
        raise PlanError(
            f"node_memory_bytes: expected placement replicated, got {placement}; remove "
            f"--node-memory-gb or use --placement replicated"
        )
    placements = ("whole", "sliced") if placement == "auto" else (placement,)
    trunks = ("replicated", "sharded") if trunk == "auto" else (trunk,)
    plans: list[Plan] = []
    first_error: PlanError | None = None
    for candidate in [(p, t) for p in placements for t in trunks]:
        try:
            plans.append(_make_plan(spec, nodes, node_weights, *candidate, node_memory_bytes))
        except PlanError as error:
            first_error = first_error or error
    if not plans:
        assert first_error is not None
        raise first_error
    if nodes == 1:
        return plans[0], ""
    seconds, basis = _predict(plans, gpu, latency_s, measured)
    best = min(range(len(plans)), key=lambda i: (seconds[i], i))
    plan, reasons = plans[best], []
    if len(plans) > 1:
        others = ", ".join(
            f"{other.placement}/{other.trunk} {1e3 * s:.2f}"
            for other, s in zip(plans, seconds, strict=True)
            if other is not plan
        )
        reasons.append(
            f"experts {plan.placement}, trunk {plan.trunk}: predicted {1e3 * seconds[best]:.2f} ms "
            f"per token ({others}), {basis}"
        )
    attention = [module for module in spec.dense_modules if module.kind == "attention"]
    if plan.trunk == "sharded" and not any(plan.is_sharded(module) for module in attention):
        why = (
            f"has too few heads for {nodes} nodes"
            if attention
            else "cannot be divided by heads (it is not plain grouped-query attention)"
        )
        reasons.append(f"attention of {spec.family} {why} and is on every node")
    return plan, "; ".join(reasons)


def _make_plan(
    spec: ModelSpec,
    nodes: int,
    node_weights: Sequence[float] | None,
    placement: str,
    trunk: str,
    node_memory_bytes: Sequence[int] | None,
) -> Plan:
    if placement == "whole":
        return Plan.whole(spec, nodes, node_weights, trunk)
    if placement == "sliced":
        return Plan.sliced(spec, nodes, node_weights, trunk)
    if placement == "replicated":
        return Plan.replicated(spec, nodes, node_memory_bytes, node_weights, trunk)
    raise PlanError(f"placement: expected whole, sliced, replicated or auto, got {placement!r}")


def _predict(
    plans: Sequence[Plan], gpu: bool, latency_s: float, measured: MeasuredMachines | None
) -> tuple[list[float], str]:
    """Seconds of a token under each plan, and what they are based on."""
    if measured is None:
        bytes_per_s = ASSUMED_GPU_BYTES_PER_S if gpu else ASSUMED_CPU_BYTES_PER_S
        source, digits = "assumed", ""
    else:
        bytes_per_s, latency_s = measured.bytes_per_s, measured.latency_s
        source, digits = measured.source, ".2"
    basis = (
        f"at {bytes_per_s / 1e9:.3g} GB/s per node and {1e3 * latency_s:{digits}g} ms per "
        f"all-reduce, {source}"
    )
    try:
        if measured is not None:
            return [token_s(plan, measured, skips=not gpu) for plan in plans], basis
    except CenacleError:  # the performance model does not know this model
        pass
    return [lower_bound_s(plan, latency_s, bytes_per_s, skips=not gpu) for plan in plans], basis
