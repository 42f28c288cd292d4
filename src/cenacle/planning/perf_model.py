"""The model of a token's time.

Owns: for a model, a quantisation, machines, a link and a scheme: the terms of one step, the
prompt's time, and what each node must hold.
Does not know: names (`catalog.py`), which scheme is best (`planner.py`), MLX.
Invariants: terms are seconds and add up to the step; more bandwidth, less latency or less overhead
never slows a step; one machine costs the same under every scheme.

    time per token = trunk + experts + exchange + overhead + head
      trunk     attention, routers, dense layers, and the reading of the KV cache
      experts   the busiest node's experts: E[max] x expert bytes, or top-k/N of them when sliced
      exchange  exchanges x (latency + bytes / bandwidth); pipelines: hops
      overhead  layers x the chip's own time per layer; the paper's program: hand-offs too
      head      the output head, and the gathering of logits where it is sliced

Everything is read at `efficiency` x nominal bandwidth or computed at `compute` x nominal
operations, whichever takes longer. Next: `planner.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from ..core.plan import largest_remainder
from ..errors import InputError, PlanError
from .catalog import Fact, Link, Machine, Quantization
from .model_shapes import ModelShape
from .routing_stats import (
    ExpertGroup,
    even_counts,
    expected_distinct_experts,
    expected_max_load_of_batch,
    mean_max_load,
    overlapping_windows,
)

PHASES = ("trunk", "experts", "all_reduce", "overhead", "head")
PREFILL_CHUNK_SIZE = 512  # prompt tokens per step, `engine.Options.prefill_chunk`
PAPER_SCHEMES = ("naive", "P-LB", "P-LR", "P-LR-D")
SCHEMES = ("single", "pipeline", "tensor", "expert", *PAPER_SCHEMES)
PLACEMENTS = ("whole", "replicated", "sliced", "weighted")
SYSTEM_SHARE = 1 / 16  # of a Mac's memory that no setting should take from the system,
SYSTEM_BYTES = 4 * 2**30  # nor less than this
WORKSPACE_BYTES = 1.5e9  # activations, the program itself and its libraries


@dataclass(frozen=True)
class Workload:
    """What is asked of the machines.

    Args:
        shape, quant: the model.
        context: positions in the cache when a token is made, per user.
        users: requests at once.
        prompt: prompt tokens until the first token.
        bytes_: trunk, experts and shared experts of a checkpoint, where they were read.
        skew: E[max] of recorded routing over that of uniform routing (1: uniform).
    """

    shape: ModelShape
    quant: Quantization
    context: int = 4096
    users: int = 1
    prompt: int = 512
    bytes_: tuple[float, float, float] | None = None
    skew: float = 1.0

    def __post_init__(self) -> None:
        for name in ("context", "users", "prompt"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, got {getattr(self, name)}", name)

    @property
    def trunk_bytes(self) -> float:
        """Everything but routed and shared experts, as held in memory."""
        return self.bytes_[0] if self.bytes_ else self.shape.trunk * self.quant.trunk_bits / 8

    @property
    def trunk_byte(self) -> float:
        """Bytes per parameter of the trunk."""
        return self.trunk_bytes / self.shape.trunk

    @property
    def expert_bytes(self) -> float:
        """One routed expert."""
        s = self.shape
        if self.bytes_:
            return self.bytes_[1] / (s.moe_layers * s.experts)
        return s.expert * self.quant.expert_bits / 8

    @property
    def shared_bytes(self) -> float:
        """One layer's shared experts; they are kept at the trunk's bits."""
        if self.bytes_:
            return self.bytes_[2] / self.shape.moe_layers
        return self.shape.shared * self.quant.trunk_bits / 8

    @property
    def routed_bytes(self) -> float:
        """All routed experts."""
        return self.shape.moe_layers * self.shape.experts * self.expert_bytes

    @property
    def total_bytes(self) -> float:
        """The whole model."""
        return self.trunk_bytes + self.routed_bytes + self.shape.moe_layers * self.shared_bytes

    @property
    def kv_bytes(self) -> float:
        """Cache of all users."""
        return self.users * self.shape.kv_bytes(self.context)


@dataclass(frozen=True)
class Prediction:
    """What a scheme would do.

    Args:
        terms: seconds of one token for one user, by `TERMS`.
        terms_users: seconds of one step in which every user gets a token.
        users: how many.
        ttft_s: until the first token of a prompt, for one user.
        bytes_per_node: weights, cache and workspace.
        usable_per_node: what each node may hold.
        executed: experts run per layer by the busiest node, one user.
        fair_share: experts a layer that each node would run if they were spread evenly.
        note: what is special about it.
    """

    scheme: str
    placement: str
    trunk: str
    machines: tuple[Machine, ...]
    link: Link | None
    terms: dict[str, float]
    terms_users: dict[str, float]
    users: int
    ttft_s: float
    bytes_per_node: tuple[float, ...]
    usable_per_node: tuple[float, ...]
    executed: float
    fair_share: float
    note: str = ""

    @property
    def seconds(self) -> float:
        """One token for one user."""
        return sum(self.terms.values())

    @property
    def tok_per_s(self) -> float:
        """One user alone."""
        return 1 / self.seconds

    @property
    def tok_per_s_all_users(self) -> float:
        """All users together."""
        return self.users / sum(self.terms_users.values())

    @property
    def binding(self) -> str:
        """The largest term."""
        return max(PHASES, key=lambda t: self.terms[t])

    @property
    def missing_bytes(self) -> float:
        """By how much the fullest node lacks memory; 0: it fits."""
        pairs = zip(self.bytes_per_node, self.usable_per_node, strict=True)
        return max(0.0, *(need - room for need, room in pairs))

    @property
    def fits(self) -> bool:
        """Whether every node's memory suffices."""
        return self.missing_bytes == 0

    @property
    def usd(self) -> float | None:
        """Price of the machines; None if one is unknown."""
        prices = [m.usd for m in self.machines]
        return None if None in prices else sum(p for p in prices if p is not None)

    @property
    def watts(self) -> float:
        """At full load."""
        return sum(m["watts"] for m in self.machines)


@dataclass(frozen=True)
class PaperConstants:
    """Constants of the paper's program and of exchanges, from fits.toml [study]."""

    per_peer: float
    handoff_s: float
    naive_read: float
    naive_exchange_s: float

    @classmethod
    def of(cls, table: dict[str, dict[str, float]]) -> PaperConstants:
        """From the rows of fits.toml."""
        v = {k: float(row["v"]) for k, row in table.items()}
        return cls(
            v["per_peer"], v["handoff_us"] / 1e6, v["naive_read"], v["naive_exchange_us"] / 1e6
        )


def predict(
    job: Workload,
    scheme: str,
    machines: Sequence[Machine],
    link: Link | None,
    study: PaperConstants,
    placement: str = "sliced",
    trunk: str = "replicated",
    shares: Sequence[float] | None = None,
    rest_sliced: bool = True,
) -> Prediction:
    """Time, memory and price of a scheme.

    Args:
        scheme: one of `SCHEMES`.
        machines: the nodes, in order.
        link: between them; None for one node.
        placement: of experts (scheme "expert"): one of `PLACEMENTS`.
        trunk: "replicated" or "sharded" (scheme "expert").
        shares: each node's part where the placement is weighted, adding up to 1; None: by
            bandwidth within memory.
        rest_sliced: whether dense layers, shared experts and head are cut over the nodes (scheme
            "expert"), or are on all.

    Raises:
        PlanError: the scheme cannot be had: heads that do not divide, no memory for replicas.
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
    if len(machines) == 1 or scheme == "single":
        if len(machines) > 1:
            raise InputError(f"scheme: single is one machine, got {len(machines)}", "scheme")
        machines = (machines[0].alone,)
        layout, name = _single_machine_layout(job, machines[0]), ("single", "whole", "replicated")
    else:
        if link is None:
            raise InputError("link: several machines need one, such as tb5-rdma", "link")
        if scheme == "pipeline":  # its stages take turns
            machines = tuple(m.alone for m in machines)
        layout, name = _layout(job, scheme, machines, placement, trunk, shares, rest_sliced)
    terms = _step(job, layout, machines, link, study, tokens=1, users=1)
    users = _step_of_all(job, layout, machines, link, study)
    return Prediction(
        *name,
        machines,
        link,
        terms,
        users,
        job.users,
        _first_token(job, layout, machines, link, study) + sum(terms.values()),
        tuple(layout.held),
        tuple(m.usable_bytes for m in machines),
        layout.executed(1) * job.skew,
        job.shape.top_k / len(machines),
        layout.note,
    )


@dataclass(frozen=True)
class _Layout:
    """Who holds and computes what.

    Args:
        held: bytes per node.
        trunk: each node's part of attention and routers (and of reading its cache).
        rest: each node's part of dense layers, shared experts and head.
        part: each node's part of every expert (sliced), else 1.
        groups: of whole experts, sharing members (cost filled in per node); None: sliced.
        holders: of replicated experts, else None.
        local: experts held per node, where all of them run (P-LB).
        exchanges: per layer.
        pipeline: whether layers, not widths, are cut.
        study: a scheme of the paper's program.
    """

    held: tuple[float, ...]
    trunk: tuple[float, ...]
    rest: tuple[float, ...]
    part: tuple[float, ...]
    groups: tuple[ExpertGroup, ...] | None
    experts: int
    top_k: int
    holders: tuple[frozenset[int], ...] | None = None
    local: int = 0
    exchanges: float = 1.0
    pipeline: bool = False
    study: str = ""
    note: str = ""

    def executed(self, tokens: int) -> float:
        """Distinct experts (in whole ones) that the busiest node runs in one layer."""
        if self.local:
            return float(self.local)
        if self.groups is None:
            return max(self.part) * expected_distinct_experts(self.experts, self.top_k, tokens)
        if self.holders is not None:
            return _replicated_load(self.holders, len(self.held), self.experts, self.top_k, tokens)
        return expected_max_load_of_batch(self.groups, self.top_k, tokens)


@cache
def _replicated_load(
    holders: tuple[frozenset[int], ...], nodes: int, experts: int, top_k: int, tokens: int
) -> float:
    if all(len(h) == nodes for h in holders) and tokens == 1:
        return float(-(-top_k // nodes))
    drawn = top_k if tokens == 1 else round(expected_distinct_experts(experts, top_k, tokens))
    if all(len(h) == nodes for h in holders) or drawn > 64:
        return max(-(-drawn // nodes), drawn / nodes)
    return mean_max_load(holders, nodes, drawn, most=2000)


def _single_machine_layout(job: Workload, machine: Machine) -> _Layout:
    held = job.total_bytes + job.kv_bytes + WORKSPACE_BYTES
    s = job.shape
    return _Layout(
        (held,), (1.0,), (1.0,), (1.0,), None, s.experts, s.top_k, exchanges=0, note=machine.title
    )


def _layout(
    job: Workload,
    scheme: str,
    machines: tuple[Machine, ...],
    placement: str,
    trunk: str,
    shares: Sequence[float] | None,
    rest_sliced: bool,
) -> tuple[_Layout, tuple[str, str, str]]:
    """The layout of a scheme on several machines, and its three names."""
    s, n = job.shape, len(machines)
    equal = (1 / n,) * n
    ones = (1.0,) * n
    alike = len({(m.name, m.usable_bytes, m.bytes_per_s) for m in machines}) == 1
    attention = job.trunk_bytes - (s.embedding + s.head + s.dense) * job.trunk_byte
    # Every node keeps the embedding; a head tied to it is read from there.
    fixed = s.embedding * job.trunk_byte + WORKSPACE_BYTES
    rest = (s.head + s.dense) * job.trunk_byte + s.moe_layers * job.shared_bytes

    if scheme == "pipeline":
        by_memory = shares or [m.usable_bytes for m in machines]
        part = tuple(x / sum(by_memory) for x in by_memory)
        held = tuple(p * (job.total_bytes + job.kv_bytes) + WORKSPACE_BYTES for p in part)
        layout = _Layout(held, part, part, part, None, s.experts, s.top_k, pipeline=True)
        return layout, ("pipeline", "whole", "layers")

    if scheme == "tensor":
        wrong = [
            f"{a.kv_heads if a.kind == 'gqa' else a.heads} heads of {a.kind}"
            for a in s.attention
            if (a.kv_heads if a.kind == "gqa" else a.heads) % n
        ]
        if wrong:
            raise PlanError(f"{wrong[0]} do not divide over {n} nodes")
        if not alike:
            raise PlanError("tensor parallelism cuts evenly; these machines are not alike")
        # Latents, states' heads: mla's one latent is on every node.
        latents = job.kv_bytes * (
            1 / n if all(a.kind in ("gqa", "linear") for a in s.attention) else 1
        )
        held = ((attention + rest + job.routed_bytes) / n + fixed + latents,) * n
        layout = _Layout(held, equal, equal, equal, None, s.experts, s.top_k, exchanges=2)
        return layout, ("tensor", "sliced", "sharded")

    if scheme in PAPER_SCHEMES:
        return _paper(job, scheme, machines)

    trunk_part, kv, exchanges = ones, [job.kv_bytes] * n, 1
    base_shares = tuple(shares) if shares else _weights(job, machines, attention, fixed)
    if trunk == "sharded":
        if s.kv_heads is None:
            raise PlanError(
                "attention of this family cannot be cut by heads (latents or states, not plain "
                "grouped queries)"
            )
        if n > s.kv_heads:
            raise PlanError(f"{s.kv_heads} heads of keys and values are fewer than {n} nodes")
        even_heads = even_counts(s.kv_heads, n)
        trunk_part = tuple(h / s.kv_heads for h in even_heads)
        kv, exchanges = [job.kv_bytes * p for p in trunk_part], 2
    attention_held = [attention * p for p in trunk_part]

    if placement in ("sliced", "weighted"):
        if placement == "sliced" and not alike:
            raise PlanError("the machines are unlike: weighted slices are better than even ones")
        if placement == "weighted" and alike and not shares:
            raise PlanError("the machines are alike: weighted slices are even ones")
        part = equal if placement == "sliced" else base_shares
        rest_part = part if rest_sliced else ones
        held = tuple(
            fixed + attention_held[i] + kv[i] + rest_part[i] * rest + part[i] * job.routed_bytes
            for i in range(n)
        )
        layout = _Layout(
            held, trunk_part, rest_part, part, None, s.experts, s.top_k, exchanges=exchanges
        )
        return layout, ("expert", placement, trunk)

    if n > s.experts:
        raise PlanError(f"{n} nodes cannot each hold one of {s.experts} experts")
    rest_part = (equal if alike else base_shares) if rest_sliced else ones
    room = [
        m.usable_bytes - fixed - attention_held[i] - kv[i] - rest_part[i] * rest
        for i, m in enumerate(machines)
    ]
    each = s.moe_layers * job.expert_bytes
    if placement == "replicated":
        if not alike:
            raise PlanError("replicas are dealt evenly; these machines are not alike")
        most = min(s.experts, int(min(room) / each))
        if most <= -(-s.experts // n):
            raise PlanError(
                f"no memory for copies: a node has room for {max(0, most)} experts a layer, an "
                f"even deal gives it {-(-s.experts // n)}"
            )
        holders = overlapping_windows(s.experts, n, most)
        held = tuple(
            fixed + attention_held[i] + kv[i] + rest_part[i] * rest + most * each for i in range(n)
        )
        layout = _Layout(
            *(held, trunk_part, rest_part, ones, (ExpertGroup(s.experts, n),), s.experts, s.top_k),
            holders=holders,
            exchanges=exchanges,
            note=f"{most} of {s.experts} experts a layer on each node",
        )
        return layout, ("expert", "replicated", trunk)
    counts = (
        even_counts(s.experts, n)
        if alike and not shares
        else tuple(largest_remainder(s.experts, base_shares))
    )
    held = tuple(
        fixed + attention_held[i] + kv[i] + rest_part[i] * rest + counts[i] * each for i in range(n)
    )
    slowest = max(1 / m.bytes_per_s for m in machines)
    groups = tuple(
        ExpertGroup(c, 1, (1 / m.bytes_per_s) / slowest)
        for c, m in zip(counts, machines, strict=True)
    )
    layout = _Layout(
        held, trunk_part, rest_part, ones, groups, s.experts, s.top_k, exchanges=exchanges
    )
    return layout, ("expert", "whole", trunk)


def _paper(
    job: Workload, scheme: str, machines: tuple[Machine, ...]
) -> tuple[_Layout, tuple[str, str, str]]:
    """The paper's schemes.

    "2 nodes: 8 experts each; 3 nodes: 0-7 on one, 8-15 on two; 4 nodes: each group on two. Scaling
    2 -> 4 nodes is replication + load split." "attention, router, norms, head replicated on every
    node." Where memory does not hold half the experts, they are dealt whole over all nodes.
    """
    s, n = job.shape, len(machines)
    if n > s.experts:
        raise PlanError(f"{n} nodes cannot each hold one of {s.experts} experts")
    base = job.trunk_bytes + s.moe_layers * job.shared_bytes + job.kv_bytes + WORKSPACE_BYTES
    each = s.moe_layers * job.expert_bytes
    half = -(-s.experts // 2)
    usable = min(m.usable_bytes for m in machines)
    if n == 2 or base + half * each <= usable:
        groups: tuple[ExpertGroup, ...] = (
            ExpertGroup(s.experts - half, n // 2),
            ExpertGroup(half, n - n // 2),
        )
        local, placement = half, "whole" if n == 2 else "replicated"
    else:
        groups = tuple(ExpertGroup(c) for c in even_counts(s.experts, n))
        local, placement = max(even_counts(s.experts, n)), "whole"
    ones = (1.0,) * n
    layout = _Layout(
        *((base + local * each,) * n, ones, ones, ones, groups, s.experts, s.top_k),
        local=local if scheme == "P-LB" else 0,
        exchanges=1 if scheme == "P-LR-D" else 2,
        study=scheme,
        note="the paper's program: gRPC and a hand-off to the host every layer",
    )
    return layout, (scheme, placement, "replicated")


def _weights(
    job: Workload, machines: tuple[Machine, ...], attention: float, fixed: float
) -> tuple[float, ...]:
    """Shares by bandwidth, none above what its memory holds; the excess goes to the others."""
    n = len(machines)
    total = job.total_bytes - attention - job.shape.embedding * job.trunk_byte
    caps = [max(0.0, m.usable_bytes - fixed - attention - job.kv_bytes) / total for m in machines]
    shares = [m.bytes_per_s for m in machines]
    full: set[int] = set()
    for _ in range(n):
        left = 1 - sum(caps[i] for i in full)
        free = sum(shares[i] for i in range(n) if i not in full)
        over = {i for i in range(n) if i not in full and left * shares[i] / free > caps[i]}
        if not over or len(full | over) == n:
            break
        full |= over
    left = max(0.0, 1 - sum(caps[i] for i in full))
    free = sum(shares[i] for i in range(n) if i not in full)
    out = [caps[i] if i in full else left * shares[i] / free for i in range(n)]
    return tuple(max(x, 1e-3) / sum(max(y, 1e-3) for y in out) for x in out)


def _step(
    job: Workload,
    layout: _Layout,
    machines: tuple[Machine, ...],
    link: Link | None,
    study: PaperConstants,
    tokens: int,
    users: int,
    context: float | None = None,
) -> dict[str, float]:
    """Seconds by term of a step that takes `tokens` tokens of `users` users through the model."""
    s, n = job.shape, len(machines)
    at = int(job.context if context is None else context)
    byte = job.trunk_byte
    weights = (s.trunk_read - s.dense) * byte
    pipelined = layout.pipeline

    def spend(per_node: list[float]) -> float:
        # Stages of a pipeline follow one another; ranks that share a layer work at once.
        return sum(per_node) if pipelined else max(per_node)

    def work(m: Machine, bytes_: float, operations: float) -> float:
        return max(bytes_ / m.bytes_per_s, operations / (m["tflops"] * 1e12 * m["compute"]))

    def attend(m: Machine, part: float) -> float:
        cached = part * users * s.kv_read(at)
        operations = part * tokens * s.attention_operations(at)
        return max(
            cached / (m["bandwidth_gb_s"] * 1e9 * m["kv_efficiency"]),
            operations / (m["tflops"] * 1e12 * m["attention_compute"]),
        )

    unwired = study.naive_read if layout.study == "naive" else 1.0
    trunk = [
        work(m, p * weights, 2 * tokens * p * (s.trunk_read - s.dense)) + attend(m, p)
        for m, p in zip(machines, layout.trunk, strict=True)
    ]
    dense = [
        work(m, p * s.dense * byte, 2 * tokens * p * s.dense)
        for m, p in zip(machines, layout.rest, strict=True)
    ]
    trunk_s = spend([a + b for a, b in zip(trunk, dense, strict=True)])

    distinct = expected_distinct_experts(s.experts, s.top_k, tokens)
    executed = layout.executed(tokens) * (job.skew if layout.groups is not None else 1.0)
    if layout.groups is None:
        loads = [p * distinct for p in layout.part]
    elif len({m.bytes_per_s for m in machines}) == 1:
        loads = [executed] * n
    else:  # `executed` counts in experts of the slowest node
        slowest = min(m.bytes_per_s for m in machines)
        loads = [executed * m.bytes_per_s / slowest for m in machines]
    routed, shared = [], []
    for m, load, p in zip(machines, loads, layout.rest, strict=True):
        # Work on one expert is shared by the tokens that chose it.
        operations = 2 * tokens * s.top_k * s.expert * min(1.0, load / distinct)
        if layout.local:
            operations = 2 * tokens * layout.local * s.expert
        # Of a sliced expert every node begins its own slice.
        begun = distinct if layout.groups is None and not pipelined else load
        begin = begun * m.expert_s
        routed.append(begin + work(m, load * job.expert_bytes / unwired, operations))
        shared.append(work(m, p * job.shared_bytes, 2 * tokens * p * s.shared))
    experts_s = s.moe_layers * spend([a + b for a, b in zip(routed, shared, strict=True)])

    # The head is read for tokens that are sampled: one per user.
    head = [
        work(m, p * s.head_read * byte, 2 * users * p * s.head_read)
        for m, p in zip(machines, layout.rest, strict=True)
    ]
    whole_head = work(machines[-1], s.head_read * byte, 2 * users * s.head_read)
    head_s = whole_head
    exchange_s = 0.0
    if link is not None and n > 1:
        element = 4 if machines[0].kind == "cpu" else 2
        vector = tokens * s.hidden * element
        if pipelined:
            hop = link.facts["hop_us"].value / 1e6 if "hop_us" in link.facts else None
            per_hop = hop if hop is not None else link["latency_us"] / 2e6
            # The last stage's token goes back to the first, or to whoever samples.
            exchange_s = (n - 1) * (per_hop + vector / (link["gb_s"] * 1e9))
        elif layout.study:
            # "(E[max], hidden) bf16 to every peer": outputs of all executed experts, warm-ups too.
            size = layout.executed(1) * s.hidden * 2
            one = all_reduce_s(link, n, size, study)
            exchange_s = tokens * s.moe_layers * layout.exchanges * one
            if layout.study == "naive":
                exchange_s += tokens * s.moe_layers * study.naive_exchange_s
        else:
            # A dense layer that is cut needs its sum as well; the last exchange shares the token.
            count = s.layers * layout.exchanges + 1
            exchange_s = count * all_reduce_s(link, n, vector, study)
            # The planner decides: a sliced head and gathered logits, or the whole head everywhere.
            gather = all_reduce_s(link, n, users * s.vocabulary * element, study)
            slowest_head = max(
                work(m, s.head_read * byte, 2 * users * s.head_read) for m in machines
            )
            head_s = min(max(head) + gather, slowest_head)
        if layout.study:
            head_s = max(work(m, s.head_read * byte, 2 * users * s.head_read) for m in machines)
    overhead_s = s.overhead_layers * max(m["overhead_us"] for m in machines) / 1e6
    if pipelined:
        weighted = sum(m["overhead_us"] * p for m, p in zip(machines, layout.part, strict=True))
        overhead_s = s.overhead_layers * weighted / 1e6
    if layout.study:
        overhead_s = tokens * (overhead_s + s.layers * study.handoff_s)
    return {
        "trunk": trunk_s,
        "experts": experts_s,
        "all_reduce": exchange_s,
        "overhead": overhead_s,
        "head": head_s,
    }


def _step_of_all(
    job: Workload,
    layout: _Layout,
    machines: tuple[Machine, ...],
    link: Link | None,
    study: PaperConstants,
) -> dict[str, float]:
    """Seconds in which each of the job's users gets a token.

    A pipeline takes the users in as many parts as it has stages: with fewer parts stages idle, and
    with all of them busy a round lasts parts / stages of one part's way through.
    """
    if not layout.pipeline:
        return _step(job, layout, machines, link, study, tokens=job.users, users=job.users)
    part = -(-job.users // len(machines))
    parts = -(-job.users // part)
    one = _step(job, layout, machines, link, study, tokens=part, users=part)
    return {k: v * max(1.0, parts / len(machines)) for k, v in one.items()}


def all_reduce_s(link: Link, nodes: int, size: float, study: PaperConstants) -> float:
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
    latency *= 1 + study.per_peer * (nodes - 2)
    direct = latency + (nodes - 1) * size / rate
    return min(direct, 2 * latency + 2 * (nodes - 1) / nodes * size / rate)


def _first_token(
    job: Workload,
    layout: _Layout,
    machines: tuple[Machine, ...],
    link: Link | None,
    study: PaperConstants,
) -> float:
    """Seconds to process the prompt.

    In chunks of `CHUNK`, at half the prompt's context on average. The paper: "tokens are processed
    one by one inside every layer, so prompt speed is about generation speed".
    """
    if layout.study:
        one = _step(job, layout, machines, link, study, 1, 1, job.prompt / 2)
        return job.prompt * sum(one.values())
    chunks, left = divmod(job.prompt, PREFILL_CHUNK_SIZE)
    seconds = 0.0
    for count, tokens in ((chunks, PREFILL_CHUNK_SIZE), (1 if left else 0, left)):
        if count:
            step = _step(job, layout, machines, link, study, tokens, 1, max(1, job.prompt / 2))
            seconds += count * sum(step.values())
    return seconds


def wired_limit_command(memory_bytes: float, need_bytes: float) -> str | None:
    """The command that lets a Mac wire `need_bytes`, or None if its memory is too small.

    By default Metal keeps about 75 % of memory at most. A sixteenth, at least 4 GiB, is left to the
    system whatever is set.
    """
    if need_bytes > memory_bytes - max(SYSTEM_BYTES, memory_bytes * SYSTEM_SHARE):
        return None
    return f"sudo sysctl iogpu.wired_limit_mb={math.ceil(need_bytes / 2**20)}"


def prediction_inputs(prediction: Prediction, job: Workload) -> list[tuple[str, Fact]]:
    """Where every number that went in came from."""
    found: dict[str, Fact] = {
        "model shape": Fact(job.shape.total / 1e9, job.shape.confidence, job.shape.source)
    }
    for m in {m.name: m for m in prediction.machines}.values():
        found |= {f"{m.name} {key}": fact for key, fact in m.facts.items()}
    if prediction.link is not None:
        found |= {f"{prediction.link.name} {k}": f for k, f in prediction.link.facts.items()}
    return list(found.items())
