"""What a given plan costs: what its ranks read for a token, and how long the token takes.

Owns: the bytes and experts that the ranks of a plan read, for a token and in a pass; the prediction
of a plan on measured machines, and its lower bound where the performance model does not know the
model; the machines and the link that `cenacle calibrate` measured here, or that are emulated.
Does not know: which plan is best (`choose_plan.py`), how other machines are measured.
Invariant: nothing is guessed: without measured machines there is a reason instead of a prediction.
Next: `perf_model.py`, the model itself.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

from ..core.plan import Plan
from ..errors import CenacleError
from . import catalog
from .catalog import CatalogLink, Fact, Machine
from .load_balancer import assign_experts, assign_replicas, integer_speeds
from .model_shapes import ModelShape, shape_from_config
from .perf_model import PaperConstants, Prediction, Workload, predict
from .routing_stats import ExpertGroup, expected_max_load

LOCAL_MACHINE, LOCAL_LINK = "this", "measured"  # the names under which `cenacle calibrate` saves
CONTEXT = 512  # positions in the cache of the token that is predicted
SAMPLED_TOKENS = 1000  # random routings over which the load of replicas is averaged


@dataclass(frozen=True)
class MeasuredMachines:
    """What the machines of a group were measured to be.

    Args:
        config: the checkpoint's config.json.
        machines: one for each rank.
        link: between them; None for one.
        constants: of all-reduces.
        source: where the numbers come from, in a few words.
    """

    config: Mapping[str, Any] = field(repr=False)
    machines: tuple[Machine, ...]
    link: CatalogLink | None
    constants: PaperConstants
    source: str

    @property
    def bytes_per_s(self) -> float:
        """At which the fastest machine reads weights."""
        return max(m.bytes_per_s for m in self.machines)

    @property
    def latency_s(self) -> float:
        """Of an all-reduce."""
        return self.link["latency_us"] / 1e6 if self.link is not None else 0.0


def local_measurements(
    config: Mapping[str, Any], nodes: int, latency_s: float = 0.0
) -> MeasuredMachines | str:
    """Ranks of this machine as it was calibrated, or one sentence that says why there are none.

    Args:
        config: the checkpoint's config.json.
        nodes: number of ranks.
        latency_s: added to every all-reduce.
    """
    try:
        known = catalog.load_catalog()
        if LOCAL_MACHINE not in known.machines:
            return "this machine is not calibrated: run `cenacle calibrate`"
        if nodes > 1 and LOCAL_LINK not in known.links:
            return "the link between nodes is not calibrated: run `cenacle calibrate --nodes 2`"
        link = known.link(LOCAL_LINK) if nodes > 1 else None
        if link is not None and latency_s:
            link = link.with_fact("latency_us", link["latency_us"] + 1e6 * latency_s, "emulated")
        machines = (known.machine(LOCAL_MACHINE),) * nodes
        constants = PaperConstants.from_fits(known.fits["paper"])
    except CenacleError as error:
        return f"the performance model cannot predict this machine: {error}"
    return MeasuredMachines(config, machines, link, constants, "calibrated")


def emulated_machines(
    config: Mapping[str, Any], bytes_per_s: Sequence[float], link_s: float
) -> MeasuredMachines:
    """Machines of which only the speed of memory and links is known: all else takes no time.

    Args:
        config: the checkpoint's config.json.
        bytes_per_s: at which each rank reads.
        link_s: seconds of an all-reduce.
    """
    source = "emulated"
    free = {"tflops": 1e9, "overhead_us": 0.0, "memory_gib": 1e9, "usd": 0.0, "watts": 0.0}
    free |= dict.fromkeys(("efficiency", "kv_efficiency", "compute", "attention_compute"), 1.0)
    machines = tuple(
        Machine(
            f"{rate / 1e9:g} GB/s",
            f"emulated, {rate / 1e9:g} GB/s",
            "cpu-emulated",
            {k: Fact(v, "E", source) for k, v in {**free, "bandwidth_gb_s": rate / 1e9}.items()},
            1.0,
        )
        for rate in bytes_per_s
    )
    facts = {"latency_us": Fact(1e6 * link_s, "E", source), "gb_s": Fact(1e9, "E", source)}
    link = CatalogLink(source, f"emulated, {1e3 * link_s:g} ms", "mesh", facts)
    constants = PaperConstants(per_peer=0.0, handoff_s=0.0, naive_read=1.0, naive_exchange_s=0.0)
    return MeasuredMachines(
        config, machines, link if len(machines) > 1 else None, constants, source
    )


def predict_plan(
    plan: Plan,
    measured: MeasuredMachines,
    name: str = "",
    context: int = CONTEXT,
    users: int = 1,
) -> Prediction:
    """Predict one token of each request.

    Args:
        plan: what each rank holds.
        measured: as many machines as the plan has ranks.
        name: of the model, for messages.
        context: positions in the cache of each request.
        users: requests at once.

    Raises:
        CenacleError: the model cannot predict this plan: an unknown shape, heads that do not
            divide.
    """
    spec, machines, weights = plan.spec, measured.machines, plan.node_weights
    if weights is None:  # even parts: all wait for the slowest
        machines = (min(machines, key=lambda m: m.bytes_per_s),) * plan.nodes
    stored_bytes = (float(spec.trunk_bytes), float(spec.expert_bytes), float(spec.shared_bytes))
    shape = shape_from_config(name, dict(measured.config))
    # The quantization does not matter: the bytes are given.
    quantization = catalog.parse_quantization(16)
    return predict(
        Workload(shape, quantization, context, users, stored_bytes=stored_bytes),
        "expert" if plan.nodes > 1 else "single",
        machines,
        measured.link,
        measured.constants,
        placement="weighted" if plan.placement == "sliced" and weights else plan.placement,
        trunk=plan.trunk,
        node_weights=[weight / sum(weights) for weight in weights] if weights else None,
        slice_dense=plan.trunk == "sharded",
    )


def token_s(plan: Plan, measured: MeasuredMachines, skips: bool = True) -> float:
    """Predicted seconds of a token.

    Args:
        skips: whether kernels skip the experts of other ranks, see `unskipped_ratio`.

    Raises:
        CenacleError: see `predict_plan`.
    """
    timings = predict_plan(plan, measured).step_timings
    unskipped = 0.0 if skips else (unskipped_ratio(plan) - 1) * timings["experts"]
    return sum(timings.values()) + unskipped


# ---- what the ranks read


def dense_bytes(plan: Plan, rank: int) -> int:
    """Bytes that a rank reads for every token: trunk without the embedding, and shared experts."""
    spec = plan.spec
    undivided = spec.trunk_bytes - spec.embedding_bytes - sum(m.bytes for m in spec.dense_modules)
    divided = sum(plan.module_bytes(module, rank) for module in spec.dense_modules)
    return undivided + divided + plan.bytes_of(rank)["shared"]


@dataclass(frozen=True)
class RankReads:
    """Bytes that one rank reads in a pass of the model, by part; `dense_bytes` in more detail.

    Args:
        plan: what each rank holds.
        rank: which one.
        shape: of the model, which gives what is read of KV caches.
    """

    plan: Plan
    rank: int
    shape: ModelShape
    index_of: dict[int, int] = field(init=False, repr=False)
    """By index of a layer in the model, its index among those with experts."""

    def __post_init__(self) -> None:
        layers = {layer.layer: index for index, layer in enumerate(self.plan.layers)}
        object.__setattr__(self, "index_of", layers)

    @property
    def moe_layers(self) -> int:
        """Number of layers with experts."""
        return len(self.plan.layers)

    @cached_property
    def head(self) -> int:
        """The output head; 0 if it is tied to an embedding that cannot be divided."""
        heads = [m for m in self.plan.spec.dense_modules if m.kind in ("head", "tied")]
        return sum(self.plan.module_bytes(module, self.rank) for module in heads)

    @cached_property
    def trunk(self) -> int:
        """Everything else but routed and shared experts, of all layers."""
        return dense_bytes(self.plan, self.rank) - self.head - self._shared

    @cached_property
    def _shared(self) -> int:
        return self.plan.bytes_of(self.rank)["shared"]

    def cache_bytes(self, context: int) -> float:
        """The rank's part of one request's KV cache, by its part of the attention."""
        attention = [m for m in self.plan.spec.dense_modules if m.kind == "attention"]
        whole = sum(module.bytes for module in attention)
        part = sum(self.plan.module_bytes(module, self.rank) for module in attention)
        return self.shape.kv_read(context) * (part / whole if whole else 1.0)

    def expert_bytes(self, index: int, counts: Mapping[int, int]) -> float:
        """Shared experts, and those of the chosen ones that this rank computes.

        Args:
            index: of the layer, among those with experts.
            counts: how often each expert was chosen, by its id.
        """
        plan, layer, moe = self.plan, self.plan.layers[index], self.plan.spec.moe[index]
        start, stop = layer.slice_of(self.rank)
        ranks_of = layer.replica_ranks(self.rank)
        speeds = integer_speeds(plan.nodes, plan.node_weights)
        chosen = [counts.get(expert, 0) for expert in range(moe.experts)]
        number = assign_replicas(chosen, ranks_of, speeds).count(self.rank)
        sliced = (moe.expert_bytes - moe.unsliced_bytes) * (stop - start) / plan.width
        return number * (sliced + moe.unsliced_bytes) + self._shared / self.moe_layers


def token_read_bytes(plan: Plan) -> tuple[list[int], list[int]]:
    """Bytes of weights that each rank reads for a token under uniform routing.

    Returns:
        For each rank the mean, and what it reads if it is the busiest rank of every layer.
    """
    dense = [dense_bytes(plan, rank) for rank in range(plan.nodes)]
    per_expert = sum(moe.expert_bytes for moe in plan.spec.moe)
    busiest = max_experts(plan) * per_expert
    mean = [int(d + n * per_expert) for d, n in zip(dense, mean_experts(plan), strict=True)]
    return mean, [int(d + busiest) for d in dense]


def max_experts(plan: Plan, weighted: bool = False) -> float:
    """Expected experts (in whole ones) that the busiest rank reads of a layer for one token.

    Of the first MoE layer, under uniform routing: E[max] counted exactly, or for replicas the mean
    of `SAMPLED_TOKENS` tokens.

    Args:
        weighted: the busiest is the last to have read its experts, by `Plan.node_weights`; the
            result is what the fastest rank reads in that time.
    """
    layer, top_k = plan.layers[0], min(plan.spec.top_k, plan.spec.moe[0].experts)
    speeds = integer_speeds(plan.nodes, plan.node_weights if weighted else None)
    costs = [max(speeds) / speed for speed in speeds]
    if plan.width > 1:
        return max(n * cost for n, cost in zip(mean_experts(plan), costs, strict=True))
    if all(len(ranks) == 1 for ranks in layer.replica_ranks(0)):
        counts = [len(layer.experts_of(rank)) for rank in range(plan.nodes)]
        groups = [ExpertGroup(n, cost=cost) for n, cost in zip(counts, costs, strict=True)]
        return expected_max_load(groups, top_k)
    loads = _sample_replica_loads(plan)
    return sum(max(n * c for n, c in zip(load, costs, strict=True)) for load in loads) / len(loads)


def mean_experts(plan: Plan) -> list[float]:
    """Expected experts (in whole ones) that each rank reads of a layer for one token."""
    layer = plan.layers[0]
    if plan.placement == "replicated":
        loads = _sample_replica_loads(plan)
        return [sum(column) / len(loads) for column in zip(*loads, strict=True)]
    units_of = [0] * plan.nodes
    for part in chain.from_iterable(layer.experts):
        units_of[part.rank] += part.stop - part.start
    return [plan.spec.top_k * units / (plan.width * len(layer.experts)) for units in units_of]


def _sample_replica_loads(plan: Plan) -> list[list[int]]:
    """Each rank's number of experts for random tokens."""
    replica_ranks, top_k = plan.layers[0].replica_ranks(0), plan.spec.top_k
    speeds = integer_speeds(plan.nodes, plan.node_weights)
    rng, loads = random.Random(0), []
    for _ in range(SAMPLED_TOKENS):
        active = sorted(rng.sample(range(len(replica_ranks)), top_k))
        ranks = assign_experts([1] * top_k, [replica_ranks[expert] for expert in active], speeds)
        loads.append([ranks.count(rank) for rank in range(plan.nodes)])
    return loads


def lower_bound_s(plan: Plan, latency_s: float, bytes_per_s: float, skips: bool = True) -> float:
    """Seconds of a decoded token by its reads and all-reduces alone.

    For models and machines that `predict_plan` does not know.

    Args:
        latency_s: of an all-reduce.
        bytes_per_s: at which the fastest rank reads weights; others by `Plan.node_weights`.
        skips: see `token_s`.
    """
    speeds = integer_speeds(plan.nodes, plan.node_weights)
    dense = max(dense_bytes(plan, r) * max(speeds) / speed for r, speed in enumerate(speeds))
    experts = max_experts(plan, weighted=True) * (1.0 if skips else unskipped_ratio(plan))
    read = dense + experts * sum(moe.expert_bytes for moe in plan.spec.moe)
    return read / bytes_per_s + (plan.all_reduces * latency_s if plan.nodes > 1 else 0.0)


def unskipped_ratio(plan: Plan) -> float:
    """How much longer a token's experts take with kernels that skip no expert of another rank.

    Such kernels compute one of their own rank's experts in its place.
    """
    if plan.width > 1:
        return 1.0
    speeds = integer_speeds(plan.nodes, plan.node_weights)
    return plan.spec.top_k * max(speeds) / min(speeds) / max_experts(plan, weighted=True)
