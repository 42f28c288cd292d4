"""The performance model: the time of a token, and the memory that it takes.

Owns: for a workload, machines, a link and a scheme: the timings of one step, the time of a prompt,
and the bytes that each node holds.
Does not know: names of machines (`catalog.py`), which scheme is best (`planner.py`), MLX.
Invariants: timings are in seconds and add up to the step; more bandwidth, less latency or less
overhead never slows a step; one machine takes the same time under every scheme.

    time per token = trunk + experts + communication + overhead + head
      trunk          attention, routers, dense layers, and reading the KV cache
      experts        the busiest node's: E[max] x expert bytes, or top-k / N of them if sliced
      communication  all-reduces x (latency + bytes / bandwidth); a pipeline: hops
      overhead       layers x the chip's own time per layer; the paper's program: hand-offs as well
      head           the output head, and gathering the logits where it is sliced

Whatever takes longer counts: reading at `efficiency` x nominal bandwidth, or computing at
`compute` x nominal operations.
Next: `planner.py` compares schemes; `plan_cost.py` predicts a given plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from ..core.plan import largest_remainder
from ..errors import InputError, PlanError
from .catalog import CatalogLink, Fact, Machine, Quantization
from .load_balancer import ReplicaRanks
from .model_shapes import ModelShape
from .routing_stats import (
    ExpertGroup,
    even_counts,
    expected_distinct_experts,
    expected_max_load_of_batch,
    mean_max_load,
    overlapping_windows,
)

PHASES = ("trunk", "experts", "communication", "overhead", "head")
PREFILL_CHUNK_SIZE = 512  # prompt tokens per step, as the engine's default
PAPER_SCHEMES = ("naive", "P-LB", "P-LR", "P-LR-D")
SCHEMES = ("single", "pipeline", "tensor", "expert", *PAPER_SCHEMES)
PLACEMENTS = ("whole", "replicated", "sliced", "weighted")
PROGRAM_BYTES = 1.5e9  # the program, its libraries and activations
ENUMERATED_CHOICES = 2000  # routings over which replicas are averaged
MAX_ENUMERATED_EXPERTS = 64  # distinct experts of a batch; of more, replicas are taken as balanced


@dataclass(frozen=True)
class Workload:
    """A model and how it is used.

    Args:
        shape, quantization: the model.
        context: positions in the cache when a token is generated, per user.
        users: concurrent requests.
        prompt_tokens: prompt tokens until the first token.
        stored_bytes: of trunk, experts and shared experts, as read from a checkpoint.
        skew: E[max] of recorded routing over that of uniform routing (1: uniform).
    """

    shape: ModelShape
    quantization: Quantization
    context: int = 4096
    users: int = 1
    prompt_tokens: int = 512
    stored_bytes: tuple[float, float, float] | None = None
    skew: float = 1.0

    def __post_init__(self) -> None:
        for name in ("context", "users", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, got {getattr(self, name)}", name)

    @property
    def trunk_bytes(self) -> float:
        """Everything but routed and shared experts, as held in memory."""
        if self.stored_bytes:
            return self.stored_bytes[0]
        return self.shape.trunk * self.quantization.trunk_bits / 8

    @property
    def trunk_weight_bytes(self) -> float:
        """Bytes per parameter of the trunk."""
        return self.trunk_bytes / self.shape.trunk

    @property
    def expert_bytes(self) -> float:
        """One routed expert."""
        if self.stored_bytes:
            return self.stored_bytes[1] / (self.shape.moe_layers * self.shape.experts)
        return self.shape.expert * self.quantization.expert_bits / 8

    @property
    def shared_bytes(self) -> float:
        """One layer's shared experts, which are quantized like the trunk."""
        if self.stored_bytes:
            return self.stored_bytes[2] / self.shape.moe_layers
        return self.shape.shared * self.quantization.trunk_bits / 8

    @property
    def expert_bytes_of_layers(self) -> float:
        """One routed expert of every layer."""
        return self.shape.moe_layers * self.expert_bytes

    @property
    def routed_bytes(self) -> float:
        """All routed experts."""
        return self.shape.experts * self.expert_bytes_of_layers

    @property
    def total_bytes(self) -> float:
        """The whole model."""
        shared = self.shape.moe_layers * self.shared_bytes
        return self.trunk_bytes + self.routed_bytes + shared

    @property
    def attention_bytes(self) -> float:
        """Attention, routers and norms."""
        s = self.shape
        return self.trunk_bytes - (s.embedding + s.head + s.dense) * self.trunk_weight_bytes

    @property
    def dense_bytes(self) -> float:
        """Head, dense layers and shared experts: what can be sliced besides experts."""
        s = self.shape
        return (s.head + s.dense) * self.trunk_weight_bytes + s.moe_layers * self.shared_bytes

    @property
    def fixed_bytes(self) -> float:
        """What every node keeps: the embedding (a tied head is read from it) and the program."""
        return self.shape.embedding * self.trunk_weight_bytes + PROGRAM_BYTES

    @property
    def kv_bytes(self) -> float:
        """KV cache of all users."""
        return self.users * self.shape.kv_bytes(self.context)


@dataclass(frozen=True)
class Prediction:
    """What a scheme would achieve.

    Args:
        step_timings: seconds of one token for one user, by `PHASES`.
        batch_timings: seconds of one step in which every user gets a token.
        users: how many.
        ttft_s: time to first token of a prompt, for one user.
        bytes_per_node: weights, cache and the program.
        usable_per_node: what each node may hold.
        max_experts: experts per layer on the busiest node, one user.
        fair_share: experts per layer on each node if they were spread evenly.
    """

    scheme: str
    placement: str
    trunk: str
    machines: tuple[Machine, ...]
    link: CatalogLink | None
    step_timings: dict[str, float]
    batch_timings: dict[str, float]
    users: int
    ttft_s: float
    bytes_per_node: tuple[float, ...]
    usable_per_node: tuple[float, ...]
    max_experts: float
    fair_share: float

    @property
    def token_s(self) -> float:
        """One token for one user."""
        return sum(self.step_timings.values())

    @property
    def tok_per_s(self) -> float:
        """One user alone."""
        return 1 / self.token_s

    @property
    def tok_per_s_all_users(self) -> float:
        """All users together."""
        return self.users / sum(self.batch_timings.values())

    @property
    def bound_by(self) -> str:
        """The longest phase."""
        return max(PHASES, key=lambda phase: self.step_timings[phase])

    @property
    def missing_bytes(self) -> float:
        """Memory that the fullest node lacks; 0: it fits."""
        pairs = zip(self.bytes_per_node, self.usable_per_node, strict=True)
        return max(0.0, *(needed - usable for needed, usable in pairs))

    @property
    def fits(self) -> bool:
        """Whether every node's memory suffices."""
        return self.missing_bytes == 0

    @property
    def watts(self) -> float:
        """Power at full load."""
        return sum(m["watts"] for m in self.machines)


@dataclass(frozen=True)
class PaperConstants:
    """Constants of the paper's program and of all-reduces, from fits.toml [paper].

    Args:
        per_peer: what each peer beyond the first adds to the latency of an all-reduce, relative.
        handoff_s: between GPU and host, in every layer of the paper's program.
        naive_read: speed at which the naive program reads experts, relative.
        naive_exchange_s: what an exchange of the naive program takes besides.
    """

    per_peer: float
    handoff_s: float
    naive_read: float
    naive_exchange_s: float

    @classmethod
    def from_fits(cls, table: dict[str, dict[str, float]]) -> PaperConstants:
        """From the rows of fits.toml."""
        values = {key: float(row["v"]) for key, row in table.items()}
        return cls(
            values["per_peer"],
            values["handoff_us"] / 1e6,
            values["naive_read"],
            values["naive_exchange_us"] / 1e6,
        )


def predict(
    workload: Workload,
    scheme: str,
    machines: Sequence[Machine],
    link: CatalogLink | None,
    constants: PaperConstants,
    placement: str = "sliced",
    trunk: str = "replicated",
    node_weights: Sequence[float] | None = None,
    slice_dense: bool = True,
) -> Prediction:
    """Time and memory of a scheme.

    Args:
        scheme: one of `SCHEMES`.
        machines: the nodes, in order.
        link: between them; None for one node.
        placement: of experts (scheme "expert"): one of `PLACEMENTS`.
        trunk: "replicated" or "sharded" (scheme "expert").
        node_weights: each node's part if the placement is weighted, adding up to 1; None: by
            bandwidth, within memory.
        slice_dense: whether dense layers, shared experts and head are sliced over the nodes or
            are on all of them (scheme "expert").

    Raises:
        PlanError: the scheme is not possible: heads that do not divide, no memory for replicas.
        InputError: an unknown scheme, no machine, no link.
    """
    machines = tuple(machines)
    if not machines:
        raise InputError("machines: expected at least one, got none", "machines")
    if scheme not in SCHEMES:
        raise InputError(f"scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}", "scheme")
    if placement not in PLACEMENTS or trunk not in ("replicated", "sharded"):
        raise InputError(
            f"placement: expected one of {', '.join(PLACEMENTS)}, got {placement!r}", "placement"
        )
    if len(machines) > 1:
        if scheme == "single":
            raise InputError(
                f"scheme: expected one machine for single, got {len(machines)}", "scheme"
            )
        if link is None:
            raise InputError(
                "link: several machines need a link such as tb5-rdma, got none", "link"
            )
    if len(machines) == 1 or scheme == "pipeline":  # the stages of a pipeline take turns
        machines = tuple(m.alone for m in machines)
    if len(machines) == 1:
        layout = _single_machine_layout(workload)
    elif scheme == "pipeline":
        layout = _pipeline_layout(workload, machines, node_weights)
    elif scheme == "tensor":
        layout = _tensor_parallel_layout(workload, machines)
    elif scheme == "expert":
        layout = _expert_parallel_layout(
            workload, machines, placement, trunk, node_weights, slice_dense
        )
    else:
        layout = _paper_layout(workload, scheme, machines)
    cluster = _Cluster(workload, layout, machines, link, constants)
    timings = cluster.step(tokens=1, users=1)
    return Prediction(
        layout.scheme,
        layout.placement,
        layout.trunk,
        machines,
        link,
        timings,
        cluster.batch_step(),
        workload.users,
        cluster.prompt_s() + sum(timings.values()),
        tuple(layout.sizes.tolist()),
        tuple(m.usable_bytes for m in machines),
        layout.max_experts(1) * workload.skew,
        workload.shape.top_k / len(machines),
    )


# ---- who holds and computes what


@dataclass(frozen=True, eq=False)
class _Layout:
    """Which node holds and computes what. Arrays have an entry for each node.

    Args:
        sizes: bytes of weights, cache and the program.
        attention: part of attention and routers (and of reading their cache).
        dense: part of dense layers, shared experts and head.
        experts: part of every expert, where they are sliced.
        groups: of whole experts with the same members (cost per node); None: sliced.
        replica_ranks: of replicated experts, else None.
        local_experts: experts held per node where all of them are computed (P-LB).
        all_reduces: per layer.
    """

    scheme: str
    placement: str
    trunk: str
    shape: ModelShape
    sizes: np.ndarray
    attention: np.ndarray
    dense: np.ndarray
    experts: np.ndarray
    groups: tuple[ExpertGroup, ...] | None = None
    replica_ranks: ReplicaRanks | None = None
    local_experts: int = 0
    all_reduces: int = 1

    @property
    def is_pipeline(self) -> bool:
        return self.scheme == "pipeline"

    @property
    def is_paper(self) -> bool:
        return self.scheme in PAPER_SCHEMES

    def max_experts(self, tokens: int) -> float:
        """Distinct experts (in whole ones) that the busiest node computes in one layer."""
        experts, top_k = self.shape.experts, self.shape.top_k
        if self.local_experts:
            return float(self.local_experts)
        if self.groups is None:
            distinct = expected_distinct_experts(experts, top_k, tokens)
            return float(self.experts.max()) * distinct
        if self.replica_ranks is not None:
            return _replicated_load(self.replica_ranks, len(self.sizes), experts, top_k, tokens)
        return expected_max_load_of_batch(self.groups, top_k, tokens)


@cache
def _replicated_load(
    replica_ranks: ReplicaRanks, nodes: int, experts: int, top_k: int, tokens: int
) -> float:
    on_every_node = all(len(ranks) == nodes for ranks in replica_ranks)
    if on_every_node and tokens == 1:
        return float(-(-top_k // nodes))
    active = top_k if tokens == 1 else round(expected_distinct_experts(experts, top_k, tokens))
    if on_every_node or active > MAX_ENUMERATED_EXPERTS:
        return max(-(-active // nodes), active / nodes)
    return mean_max_load(replica_ranks, nodes, active, limit=ENUMERATED_CHOICES)


def _single_machine_layout(workload: Workload) -> _Layout:
    whole = np.ones(1)
    sizes = whole * (workload.total_bytes + workload.kv_bytes + PROGRAM_BYTES)
    names = ("single", "whole", "replicated")
    return _Layout(*names, workload.shape, sizes, whole, whole, whole, all_reduces=0)


def _pipeline_layout(
    workload: Workload, machines: tuple[Machine, ...], node_weights: Sequence[float] | None
) -> _Layout:
    """Layers by memory."""
    weights = np.array(node_weights or [m.usable_bytes for m in machines])
    parts = weights / weights.sum()
    sizes = parts * (workload.total_bytes + workload.kv_bytes) + PROGRAM_BYTES
    return _Layout("pipeline", "whole", "layers", workload.shape, sizes, parts, parts, parts)


def _tensor_parallel_layout(workload: Workload, machines: tuple[Machine, ...]) -> _Layout:
    """Every matrix sliced evenly, attention by heads."""
    s, n = workload.shape, len(machines)
    for attention in s.attention:
        heads = attention.kv_heads if attention.kind == "gqa" else attention.heads
        if heads % n:
            raise PlanError(f"{heads} heads of {attention.kind} do not divide over {n} nodes")
    if not _are_alike(machines):
        raise PlanError("tensor parallelism slices evenly; these machines are not alike")
    # The one latent of mla is on every node.
    kv_part = 1 / n if all(a.kind in ("gqa", "linear") for a in s.attention) else 1
    sliced = workload.attention_bytes + workload.dense_bytes + workload.routed_bytes
    even = np.full(n, 1 / n)
    sizes = sliced * even + workload.fixed_bytes + workload.kv_bytes * kv_part
    return _Layout("tensor", "sliced", "sharded", s, sizes, even, even, even, all_reduces=2)


def _expert_parallel_layout(
    workload: Workload,
    machines: tuple[Machine, ...],
    placement: str,
    trunk: str,
    node_weights: Sequence[float] | None,
    slice_dense: bool,
) -> _Layout:
    """Cenacle's own placements."""
    s, n, alike = workload.shape, len(machines), _are_alike(machines)
    weights = np.array(node_weights or _balanced_weights(workload, machines))
    attention = _head_parts(s, n) if trunk == "sharded" else np.ones(n)
    if placement == "sliced" and not alike:
        raise PlanError("the machines are unlike: weighted slices are better than even ones")
    if placement == "weighted" and alike and not node_weights:
        raise PlanError("the machines are alike: weighted slices are even ones")
    parts = np.full(n, 1 / n) if alike and placement != "weighted" else weights
    dense = parts if slice_dense else np.ones(n)
    sizes = (
        workload.fixed_bytes
        + attention * (workload.attention_bytes + workload.kv_bytes)
        + dense * workload.dense_bytes
    )
    layout = _Layout("expert", placement, trunk, s, sizes, attention, dense, parts)
    layout = replace(layout, all_reduces=2 if trunk == "sharded" else 1)
    if placement in ("sliced", "weighted"):
        return replace(layout, sizes=sizes + parts * workload.routed_bytes)
    if n > s.experts:
        raise PlanError(f"{n} nodes cannot each hold one of {s.experts} experts")
    expert_bytes = workload.expert_bytes_of_layers
    rates = [m.bytes_per_s for m in machines]
    if placement == "whole":
        even = alike and not node_weights
        counts = (
            even_counts(s.experts, n) if even else largest_remainder(s.experts, weights.tolist())
        )
        groups = [ExpertGroup(c, 1, min(rates) / r) for c, r in zip(counts, rates, strict=True)]
        return replace(layout, sizes=sizes + np.array(counts) * expert_bytes, groups=tuple(groups))
    if not alike:
        raise PlanError("replicas are assigned evenly; these machines are not alike")
    window = min(s.experts, int((machines[0].usable_bytes - sizes.max()) / expert_bytes))
    if window <= -(-s.experts // n):
        raise PlanError(
            f"no memory for replicas: a node has room for {max(0, window)} experts per layer, "
            f"an even placement gives it {-(-s.experts // n)}"
        )
    return replace(
        layout,
        sizes=sizes + window * expert_bytes,
        groups=(ExpertGroup(s.experts, n),),
        replica_ranks=overlapping_windows(s.experts, n, window),
    )


def _head_parts(shape: ModelShape, nodes: int) -> np.ndarray:
    """Each node's part of attention that is divided by heads."""
    if shape.kv_heads is None:
        raise PlanError(
            "attention of this family cannot be divided by heads (it has latents or states, not "
            "plain grouped queries)"
        )
    if nodes > shape.kv_heads:
        raise PlanError(f"{shape.kv_heads} key/value heads are fewer than {nodes} nodes")
    return np.array(even_counts(shape.kv_heads, nodes)) / shape.kv_heads


def _paper_layout(workload: Workload, scheme: str, machines: tuple[Machine, ...]) -> _Layout:
    """The paper's schemes.

    "2 nodes: 8 experts each; 3 nodes: 0-7 on one, 8-15 on two; 4 nodes: each group on two. Scaling
    2 -> 4 nodes is replication + load split." "attention, router, norms, head replicated on every
    node." Where memory does not hold half the experts, they are on all nodes, whole.
    """
    s, n = workload.shape, len(machines)
    if n > s.experts:
        raise PlanError(f"{n} nodes cannot each hold one of {s.experts} experts")
    shared_bytes = s.moe_layers * workload.shared_bytes
    replicated = workload.trunk_bytes + shared_bytes + workload.kv_bytes + PROGRAM_BYTES
    expert_bytes, half = workload.expert_bytes_of_layers, -(-s.experts // 2)
    if n == 2 or replicated + half * expert_bytes <= min(m.usable_bytes for m in machines):
        groups = [ExpertGroup(s.experts - half, n // 2), ExpertGroup(half, n - n // 2)]
        local, placement = half, "whole" if n == 2 else "replicated"
    else:
        groups = [ExpertGroup(count) for count in even_counts(s.experts, n)]
        local, placement = max(group.size for group in groups), "whole"
    ones = np.ones(n)
    sizes = ones * (replicated + local * expert_bytes)
    return _Layout(
        *(scheme, placement, "replicated", s, sizes, ones, ones, ones, tuple(groups)),
        local_experts=local if scheme == "P-LB" else 0,
        all_reduces=1 if scheme == "P-LR-D" else 2,
    )


def _are_alike(machines: Sequence[Machine]) -> bool:
    return len({(m.name, m.usable_bytes, m.bytes_per_s) for m in machines}) == 1


def _balanced_weights(workload: Workload, machines: tuple[Machine, ...]) -> list[float]:
    """Shares by bandwidth, none above what its memory holds; the excess goes to the others."""
    attention = workload.attention_bytes
    embedding = workload.shape.embedding * workload.trunk_weight_bytes
    usable = np.array([m.usable_bytes for m in machines])
    room = usable - workload.fixed_bytes - attention - workload.kv_bytes
    caps = np.maximum(0.0, room) / (workload.total_bytes - attention - embedding)
    rates = np.array([m.bytes_per_s for m in machines])
    full = np.zeros(len(machines), dtype=bool)
    while True:
        left = max(0.0, 1 - caps[full].sum())
        shares = np.where(full, caps, left * rates / rates[~full].sum())
        over = ~full & (shares > caps)
        if not over.any() or (full | over).all():
            break
        full |= over
    shares = np.maximum(shares, 1e-3)
    return list(shares / shares.sum())


# ---- time


class _Cluster:
    """A workload on machines, under a layout."""

    def __init__(
        self,
        workload: Workload,
        layout: _Layout,
        machines: tuple[Machine, ...],
        link: CatalogLink | None,
        constants: PaperConstants,
    ) -> None:
        self.workload, self.layout, self.machines = workload, layout, machines
        self.link, self.constants = link, constants
        # Vectors that nodes send are float32 on CPUs.
        self._element_bytes = 4 if machines[0].kind == "cpu" else 2
        self._operations_per_s = self._facts("tflops") * 1e12 * self._facts("compute")
        self._bytes_per_s = np.array([m.bytes_per_s for m in machines])

    def _facts(self, key: str) -> np.ndarray:
        return np.array([m[key] for m in self.machines])

    def step(self, tokens: int, users: int, context: float | None = None) -> dict[str, float]:
        """Seconds by phase of a step that takes `tokens` tokens of `users` users through."""
        at = int(self.workload.context if context is None else context)
        return {
            "trunk": self._trunk_s(tokens, users, at),
            "experts": self._experts_s(tokens),
            "communication": self._communication_s(tokens),
            "overhead": self._overhead_s(tokens),
            "head": self._head_s(users),
        }

    def batch_step(self) -> dict[str, float]:
        """Seconds by phase in which each of the workload's users gets a token.

        A pipeline takes the users in as many parts as it has stages: with fewer parts stages idle,
        and with all of them busy a round lasts parts / stages of one part's way through.
        """
        users, n = self.workload.users, len(self.machines)
        if not self.layout.is_pipeline:
            return self.step(users, users)
        part = -(-users // n)
        parts = -(-users // part)
        return {k: v * max(1.0, parts / n) for k, v in self.step(part, part).items()}

    def prompt_s(self) -> float:
        """Seconds to process the prompt.

        In chunks, at half the prompt's context on average. The paper: "tokens are processed one by
        one inside every layer, so prompt speed is about generation speed".
        """
        length = self.workload.prompt_tokens
        if self.layout.is_paper:
            return length * sum(self.step(1, 1, length / 2).values())
        chunks, left = divmod(length, PREFILL_CHUNK_SIZE)
        seconds = 0.0
        for count, tokens in ((chunks, PREFILL_CHUNK_SIZE), (1 if left else 0, left)):
            if count:
                seconds += count * sum(self.step(tokens, 1, max(1, length / 2)).values())
        return seconds

    def _elapsed(self, seconds_of_nodes: np.ndarray) -> float:
        """Stages of a pipeline follow one another; ranks that share a layer work at once."""
        pipeline = self.layout.is_pipeline
        return float(seconds_of_nodes.sum() if pipeline else seconds_of_nodes.max())

    def _work_s(self, bytes_: np.ndarray, operations: np.ndarray | float) -> Any:
        """Seconds to read weights and compute with them: whichever takes longer."""
        return np.maximum(bytes_ / self._bytes_per_s, operations / self._operations_per_s)

    def _trunk_s(self, tokens: int, users: int, context: int) -> float:
        s, layout, size = self.workload.shape, self.layout, self.workload.trunk_weight_bytes
        attention = layout.attention * (s.trunk_read - s.dense)
        dense = layout.dense * s.dense
        cache_bytes_per_s = self._facts("bandwidth_gb_s") * 1e9 * self._facts("kv_efficiency")
        operations_per_s = self._facts("tflops") * 1e12 * self._facts("attention_compute")
        cache_s = layout.attention * np.maximum(
            users * s.kv_read(context) / cache_bytes_per_s,
            tokens * s.attention_operations(context) / operations_per_s,
        )
        attention_s = self._work_s(attention * size, 2 * tokens * attention)
        return self._elapsed(attention_s + cache_s + self._work_s(dense * size, 2 * tokens * dense))

    def _experts_s(self, tokens: int) -> float:
        s, layout, workload = self.workload.shape, self.layout, self.workload
        distinct = expected_distinct_experts(s.experts, s.top_k, tokens)
        if layout.groups is None:
            loads = layout.experts * distinct
        else:  # `max_experts` counts in experts of the slowest node
            max_experts = layout.max_experts(tokens) * workload.skew
            loads = max_experts * self._bytes_per_s / self._bytes_per_s.min()
        # Work on one expert is shared by the tokens that chose it.
        computed = s.top_k * np.minimum(1.0, loads / distinct)
        if layout.local_experts:
            computed = np.full(len(self.machines), layout.local_experts)
        operations = 2 * tokens * s.expert * computed
        # Of a sliced expert every node begins its own slice.
        begun = distinct if layout.groups is None and not layout.is_pipeline else loads
        begin_s = begun * np.array([m.expert_s for m in self.machines])
        read_speed = self.constants.naive_read if layout.scheme == "naive" else 1.0
        routed_s = begin_s + self._work_s(loads * workload.expert_bytes / read_speed, operations)
        shared_bytes = layout.dense * workload.shared_bytes
        shared_s = self._work_s(shared_bytes, 2 * tokens * layout.dense * s.shared)
        return s.moe_layers * self._elapsed(routed_s + shared_s)

    def _communication_s(self, tokens: int) -> float:
        link, layout, s, n = self.link, self.layout, self.workload.shape, len(self.machines)
        if link is None or n == 1:
            return 0.0
        vector = tokens * s.hidden * self._element_bytes
        if layout.is_pipeline:
            hop_us = link["hop_us"] if "hop_us" in link.facts else link["latency_us"] / 2
            # The last stage's token goes back to the first, or to the rank that samples.
            return (n - 1) * (hop_us / 1e6 + vector / (link["gb_s"] * 1e9))
        if not layout.is_paper:
            # A dense layer that is sliced needs a sum as well; the last one shares the token.
            count = s.layers * layout.all_reduces + 1
            return count * all_reduce_s(link, n, vector, self.constants)
        # "(E[max], hidden) bf16 to every peer": outputs of all computed experts, warm-ups too.
        size = layout.max_experts(1) * s.hidden * 2
        layer_s = layout.all_reduces * all_reduce_s(link, n, size, self.constants)
        if layout.scheme == "naive":
            layer_s += self.constants.naive_exchange_s
        return tokens * s.moe_layers * layer_s

    def _head_s(self, users: int) -> float:
        """The head is read for tokens that are sampled: one per user."""
        s, link, n = self.workload.shape, self.link, len(self.machines)
        head_bytes = s.head_read * self.workload.trunk_weight_bytes
        whole_s = self._work_s(np.full(n, head_bytes), 2 * users * s.head_read)
        if link is None or n == 1 or self.layout.is_pipeline:
            return float(whole_s[-1])
        if self.layout.is_paper:
            return float(whole_s.max())
        # Whatever is quicker: a sliced head and gathered logits, or the whole head everywhere.
        part = self.layout.dense
        sliced_s = self._work_s(part * head_bytes, 2 * users * part * s.head_read)
        logits = users * s.vocabulary * self._element_bytes
        gather_s = all_reduce_s(link, n, logits, self.constants)
        return float(min(sliced_s.max() + gather_s, whole_s.max()))

    def _overhead_s(self, tokens: int) -> float:
        s, layout, overhead_us = self.workload.shape, self.layout, self._facts("overhead_us")
        layer_us = overhead_us @ layout.experts if layout.is_pipeline else overhead_us.max()
        seconds = float(s.overhead_layers * layer_us / 1e6)
        if layout.is_paper:
            seconds = tokens * (seconds + s.layers * self.constants.handoff_s)
        return seconds


def all_reduce_s(link: CatalogLink, nodes: int, size: float, constants: PaperConstants) -> float:
    """Seconds of one all-reduce of `size` bytes.

    mesh: every node sends its vector to every peer at once, one hop; large ones are scattered and
    gathered in two. Each peer beyond the first adds `per_peer` of the latency (waiting for the
    slowest of several). ring: 2 (N - 1) hops of 1/N of the vector.
    """
    if nodes == 1:
        return 0.0
    latency, rate = link["latency_us"] / 1e6, link["gb_s"] * 1e9
    if link.topology == "ring":
        return latency * (nodes - 1) + 2 * (nodes - 1) / nodes * size / rate
    latency *= 1 + constants.per_peer * (nodes - 2)
    direct = latency + (nodes - 1) * size / rate
    return min(direct, 2 * latency + 2 * (nodes - 1) / nodes * size / rate)


def prediction_inputs(prediction: Prediction, workload: Workload) -> list[tuple[str, Fact]]:
    """Every number that went in, with its source."""
    shape = workload.shape
    inputs = {"model shape": Fact(shape.total / 1e9, shape.confidence, shape.source)}
    for machine in prediction.machines:
        inputs |= {f"{machine.name} {key}": fact for key, fact in machine.facts.items()}
    if (link := prediction.link) is not None:
        inputs |= {f"{link.name} {key}": fact for key, fact in link.facts.items()}
    return list(inputs.items())
