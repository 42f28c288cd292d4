"""Which rank holds which experts, and which slices of the trunk.

Owns: `Plan`, which names for every layer and expert the ranks and the slices of its hidden width
that they hold, and the placements that make one.
Does not know: MLX, files, sockets, which replica computes a token (`planning/load_balancer.py`).
Invariants, checked on construction: in every layer the slices of each expert tile its width exactly
once, and each slice is on one rank or on several (replicas); a rank's slice is the same for all
experts that it holds of a layer; every rank holds at least one expert of every layer, and equally
many of each layer; the bytes of every rank are known.
Next: `model/loader.py` reads what a rank holds, `model/expert_parallel.py` computes it.

    >>> print(Plan.whole(spec, nodes=2).table())
    rank   experts  of        trunk     experts      shared       total
    0            8  16     180.4 MB     1.27 GB         0 B     1.45 GB
    1            8  16     180.4 MB     1.27 GB         0 B     1.45 GB
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from ..errors import InputError, PlanError
from .model_spec import DenseModule, ModelSpec, MoELayer
from .units import format_bytes

FORMAT = 3
TRUNKS = ("replicated", "sharded")


@dataclass(frozen=True)
class WidthSlice:
    """`rank` holds [start, stop) of a hidden width, in the units of its owner (see `LayerPlan`)."""

    rank: int
    start: int
    stop: int

    @property
    def span(self) -> tuple[int, int]:
        """[start, stop)."""
        return self.start, self.stop


@dataclass(frozen=True)
class HeadSlice:
    """A rank's slice of attention: [start, stop) of the query and of the key/value heads."""

    query_start: int
    query_stop: int
    kv_start: int
    kv_stop: int


@dataclass(frozen=True)
class LayerPlan:
    """The placement of one MoE layer.

    Args:
        layer: index among all the model's layers.
        experts: for each expert its slices, by start and then by rank, in units of `Plan.width`.
        shared: the slices of the block's shared experts, in units of `MoELayer.shared_units`
            (empty: the block has none).
    """

    layer: int
    experts: tuple[tuple[WidthSlice, ...], ...]
    shared: tuple[WidthSlice, ...]

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """Ids of the experts of which `rank` holds a slice, ascending."""
        return tuple(
            e for e, slices in enumerate(self.experts) if any(s.rank == rank for s in slices)
        )

    def slice_of(self, rank: int) -> tuple[int, int]:
        """[start, stop) of the width of each expert that `rank` holds."""
        return next(s.span for slices in self.experts for s in slices if s.rank == rank)

    def shared_slice_of(self, rank: int) -> tuple[int, int] | None:
        """[start, stop) of the shared experts' width that `rank` holds, or None."""
        return next((s.span for s in self.shared if s.rank == rank), None)

    def replica_ranks(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """For each expert the ranks that hold the same slice as `rank` does, ascending."""
        span = self.slice_of(rank)
        return tuple(tuple(s.rank for s in slices if s.span == span) for slices in self.experts)


@dataclass(frozen=True)
class Plan:
    """The placement of a model on `nodes` ranks.

    Args:
        placement: "whole", "sliced" or "replicated": the constructor that made it.
        nodes: number of ranks.
        width: number of units into which expert widths are divided (1: experts are whole).
        layers: one entry per MoE layer.
        spec: the model that was placed; it gives the bytes.
        trunk: "replicated" (all of it on every rank) or "sharded" (the spec's `dense_modules` are
            divided by units; a module with fewer units than ranks stays replicated).
        node_weights: relative speeds of the ranks, in proportion to which everything was assigned;
            None: equal.

    Raises:
        PlanError: an invariant of this module does not hold.
    """

    placement: str
    nodes: int
    width: int
    layers: tuple[LayerPlan, ...]
    spec: ModelSpec
    trunk: str = "replicated"
    node_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.width < 1 or not self.layers:
            raise PlanError(
                f"plan: expected at least 1 node, width 1 and 1 MoE layer, got {self.nodes} nodes, "
                f"width {self.width} and {len(self.layers)} layers (a dense model has no MoE layer)"
            )
        if self.trunk not in TRUNKS:
            raise PlanError(f"trunk: expected {' or '.join(TRUNKS)}, got {self.trunk!r}")
        _resolve_node_weights(self.nodes, self.node_weights)
        if [p.layer for p in self.layers] != [m.layer for m in self.spec.moe]:
            raise PlanError(
                f"the plan covers layers {[p.layer for p in self.layers]}, "
                f"the model's MoE layers are {[m.layer for m in self.spec.moe]}"
            )
        for plan, moe in zip(self.layers, self.spec.moe, strict=True):
            self._check_layer(plan, moe)
        for rank in range(self.nodes):
            counts = {len(p.experts_of(rank)) for p in self.layers}
            if len(counts) > 1:
                raise PlanError(
                    f"rank {rank}: expected equally many experts of every layer, got "
                    f"{sorted(counts)}"
                )

    def _check_layer(self, plan: LayerPlan, moe: MoELayer) -> None:
        name = f"layer {plan.layer}"
        if len(plan.experts) != moe.experts:
            raise PlanError(
                f"{name}: expected a rank for each of {moe.experts} experts, "
                f"got {len(plan.experts)}"
            )
        if moe.units % self.width:
            raise PlanError(
                f"{name}: an expert's width has {moe.units} units, which cannot be divided into "
                f"{self.width} equal pieces"
            )
        spans: dict[int, tuple[int, int]] = {}
        for expert, slices in enumerate(plan.experts):
            self._check_tiling(slices, self.width, f"{name}: expert {expert}")
            for part in slices:
                if spans.setdefault(part.rank, part.span) != part.span:
                    raise PlanError(f"{name}: rank {part.rank} holds different slices of experts")
        empty = [r for r in range(self.nodes) if r not in spans]
        if empty:
            raise PlanError(f"{name}: ranks {empty} hold no expert; use fewer nodes")
        if bool(plan.shared) != bool(moe.shared_bytes):
            raise PlanError(
                f"{name}: shared experts take {moe.shared_bytes} bytes but are assigned to "
                f"{'no rank' if not plan.shared else f'rank {plan.shared[0].rank}'}"
            )
        if plan.shared:
            self._check_tiling(
                plan.shared, moe.shared_units, f"{name}: shared experts", replicas=False
            )

    def _check_tiling(
        self, slices: tuple[WidthSlice, ...], width: int, name: str, replicas: bool = True
    ) -> None:
        """The slices must tile `width`, each on one rank or, with `replicas`, on several."""
        reached, last = 0, (0, 0)
        for part in slices:
            if not 0 <= part.rank < self.nodes:
                raise PlanError(
                    f"{name}: expected a rank from 0 to {self.nodes - 1}, got {part.rank}"
                )
            is_replica = replicas and part.span == last
            if not is_replica and (part.start != reached or part.stop <= part.start):
                raise PlanError(
                    f"{name} must be held exactly once, but its slices "
                    f"{[s.span for s in slices]} do not tile 0 to {width}"
                )
            reached, last = part.stop, part.span
        if len({s.rank for s in slices}) < len(slices):
            raise PlanError(
                f"{name} must be held at most once by a rank, got ranks {[s.rank for s in slices]}"
            )
        if reached != width:
            raise PlanError(f"{name} is held up to {reached} of {width} of its width")

    @classmethod
    def whole(
        cls,
        spec: ModelSpec,
        nodes: int,
        node_weights: Sequence[float] | None = None,
        trunk: str = "replicated",
    ) -> Plan:
        """Assign whole experts, evenly or in proportion to `node_weights`.

        Each rank gets neighboring experts, so that its rows of a stacked tensor are one range of
        bytes. With a replicated trunk the shared experts of each layer go to the rank that is
        furthest behind its proportion of the bytes so far; with a sharded trunk they are sliced.

        Args:
            nodes: from 1 to the number of experts.
            node_weights: one positive weight per rank, such as (2, 1, 1); None: equal.
            trunk: see `Plan`.

        Raises:
            PlanError: more nodes than experts, or invalid node weights.
        """
        weights = _resolve_node_weights(nodes, node_weights)
        experts = []
        for moe in spec.moe:
            counts = largest_remainder(moe.experts, weights)
            experts.append(
                tuple((WidthSlice(r, 0, 1),) for r in range(nodes) for _ in range(counts[r]))
            )
        return cls._with_shared("whole", nodes, 1, experts, spec, trunk, node_weights)

    @classmethod
    def sliced(
        cls,
        spec: ModelSpec,
        nodes: int,
        node_weights: Sequence[float] | None = None,
        trunk: str = "replicated",
    ) -> Plan:
        """Assign every rank a slice of every expert's hidden width, in proportion to the weights.

        Slices end at borders of quantization groups.

        Raises:
            PlanError: the experts of this family cannot be sliced, there are more nodes than
                groups, or invalid node weights.
        """
        weights = _resolve_node_weights(nodes, node_weights)
        width = math.gcd(*(m.units for m in spec.moe))
        if nodes > 1 and spec.unsliceable_reason is not None:
            raise PlanError(
                f"sliced: experts of {spec.family} cannot be sliced: {spec.unsliceable_reason}; "
                f"use --placement whole or replicated"
            )
        if width < nodes:
            raise PlanError(
                f"sliced: an expert's hidden width can be divided into {width} slices at most "
                f"(at borders of quantization groups), got {nodes} nodes; use fewer nodes, or "
                f"--placement whole or replicated"
            )
        slices = _width_slices(width, weights)
        experts = [(slices,) * m.experts for m in spec.moe]
        return cls._with_shared("sliced", nodes, width, experts, spec, trunk, node_weights)

    @classmethod
    def replicated(
        cls,
        spec: ModelSpec,
        nodes: int,
        node_memory_bytes: Sequence[int] | None = None,
        node_weights: Sequence[float] | None = None,
        trunk: str = "replicated",
    ) -> Plan:
        """Assign each whole expert to one rank or several.

        Which replica computes an expert is decided per token by `planning/load_balancer.py`.

        Args:
            node_memory_bytes: bytes of weights that each rank may hold, the trunk included; as many
                replicas as fit. None: two replicas of every expert on more than two nodes (the
                layout of arXiv:2506.23635 for four nodes), in proportion to `node_weights`.
            node_weights: relative speeds of the ranks.

        Raises:
            PlanError: the memory does not hold every expert once, or invalid numbers.
        """
        weights = _resolve_node_weights(nodes, node_weights)
        experts_per_layer = min(m.experts for m in spec.moe)
        if node_memory_bytes is None:
            replicas = experts_per_layer * (2 if nodes > 2 else 1)
            counts = cap_by_budget(replicas, weights, experts_per_layer)
        else:
            lean = cls.whole(spec, nodes, node_weights, trunk)
            counts = _experts_that_fit(spec, lean, node_memory_bytes)
        if len({m.experts for m in spec.moe}) > 1:
            raise PlanError(
                "replicated: expected equally many experts in every layer; "
                "use --placement whole or sliced"
            )
        experts = tuple(
            tuple(WidthSlice(r, 0, 1) for r in ranks)
            for ranks in spread_replicas(experts_per_layer, counts)
        )
        return cls._with_shared(
            "replicated", nodes, 1, [experts] * len(spec.moe), spec, trunk, node_weights
        )

    @classmethod
    def _with_shared(
        cls,
        placement: str,
        nodes: int,
        width: int,
        experts: Sequence[tuple[tuple[WidthSlice, ...], ...]],
        spec: ModelSpec,
        trunk: str,
        node_weights: Sequence[float] | None,
    ) -> Plan:
        """Add the shared experts: sliced where experts or trunk are, if they can be, else whole."""
        weights = _resolve_node_weights(nodes, node_weights)
        load = [0.0] * nodes  # bytes
        layers: list[LayerPlan] = []
        for moe, layer_experts in zip(spec.moe, experts, strict=True):
            for part in (s for slices in layer_experts for s in slices):
                load[part.rank] += moe.expert_bytes * (part.stop - part.start) / width
            shared: tuple[WidthSlice, ...] = ()
            is_sliced = placement == "sliced" or trunk == "sharded"
            if moe.shared_bytes and is_sliced and moe.shared_units >= nodes:
                shared = _width_slices(moe.shared_units, weights)
            elif moe.shared_bytes:
                rank = min(range(nodes), key=lambda r: (load[r] / weights[r], r))
                load[rank] += moe.shared_bytes
                shared = (WidthSlice(rank, 0, moe.shared_units),)
            layers.append(LayerPlan(moe.layer, layer_experts, shared))
        checked = tuple(map(float, node_weights)) if node_weights is not None else None
        return cls(placement, nodes, width, tuple(layers), spec, trunk, checked)

    def is_sharded(self, module: DenseModule) -> bool:
        """Whether `module` is divided among the ranks."""
        if self.trunk != "sharded" or self.nodes == 1:
            return False
        if module.groups:
            ranks_per_group = -(-self.nodes // module.groups)
            return module.units // module.groups >= ranks_per_group
        return module.units >= self.nodes

    def rows_of(self, module: DenseModule, rank: int) -> tuple[int, int]:
        """`rank`'s [start, stop) of the units of a module without groups."""
        borders = _borders(module.units, _resolve_node_weights(self.nodes, self.node_weights))
        return borders[rank], borders[rank + 1]

    def heads_of(self, module: DenseModule, rank: int) -> HeadSlice:
        """`rank`'s heads of an attention module.

        Key/value heads go with the query heads that use them. Where there are more ranks than
        key/value heads, several ranks hold the same one and divide its query heads.
        """
        weights = _resolve_node_weights(self.nodes, self.node_weights)
        queries = module.units // module.groups
        if self.nodes <= module.groups:
            start, stop = _borders(module.groups, weights)[rank : rank + 2]
            return HeadSlice(start * queries, stop * queries, start, stop)
        first_ranks = [g * self.nodes // module.groups for g in range(module.groups + 1)]
        group = next(g for g in range(module.groups) if rank < first_ranks[g + 1])
        begin, end = first_ranks[group], first_ranks[group + 1]
        start, stop = _borders(queries, weights[begin:end])[rank - begin : rank - begin + 2]
        return HeadSlice(group * queries + start, group * queries + stop, group, group + 1)

    def module_bytes(self, module: DenseModule, rank: int) -> int:
        """Bytes of `module` that `rank` reads for a token (and holds, unless the head is tied)."""
        if not self.is_sharded(module):
            return module.bytes
        if module.groups:
            heads = self.heads_of(module, rank)
            queries = heads.query_stop - heads.query_start
            return (
                queries * module.unit_bytes + (heads.kv_stop - heads.kv_start) * module.group_bytes
            )
        start, stop = self.rows_of(module, rank)
        return (stop - start) * module.unit_bytes

    @property
    def all_reduces(self) -> int:
        """All-reduces of one forward pass: one per MoE layer and per sharded module."""
        return len(self.layers) + sum(self.is_sharded(m) for m in self.spec.dense_modules)

    def bytes_of(self, rank: int) -> dict[str, int]:
        """Bytes of weights that `rank` holds: trunk, experts, shared and their total; where it sees
        images, also those of the tower."""
        experts = shared = 0
        for plan, moe in zip(self.layers, self.spec.moe, strict=True):
            held = [s for slices in plan.experts for s in slices if s.rank == rank]
            units = sum(s.stop - s.start for s in held)
            sliceable = moe.expert_bytes - moe.unsliced_bytes
            experts += sliceable * units // self.width + moe.unsliced_bytes * len(held)
            span = plan.shared_slice_of(rank)
            if span is not None:
                sliceable = moe.shared_bytes - moe.shared_unsliced_bytes
                shared += sliceable * (span[1] - span[0]) // moe.shared_units
                shared += moe.shared_unsliced_bytes
        trunk = self.spec.trunk_bytes - sum(
            m.bytes - self.module_bytes(m, rank)
            for m in self.spec.dense_modules
            if m.kind != "tied"
        )
        tower = self.spec.tower_bytes if rank == 0 else 0
        return {
            "trunk": trunk,
            "experts": experts,
            "shared": shared,
            "total": trunk + experts + shared + tower,
        } | ({"tower": tower} if tower else {})

    def loading_bytes_of(self, rank: int) -> int:
        """Most bytes beside its weights that `rank` needs while it loads them.

        What a matrix is made of and the matrix are there at once: of all the rank's experts of a
        layer, whose projections may be made together, or of a large part of the trunk.
        """
        layers = []
        for plan, moe in zip(self.layers, self.spec.moe, strict=True):
            held = [s for slices in plan.experts for s in slices if s.rank == rank]
            units = sum(s.stop - s.start for s in held)
            sliceable = moe.expert_bytes - moe.unsliced_bytes
            layers.append(sliceable * units // self.width + moe.unsliced_bytes * len(held))
        trunk = [m.bytes for m in self.spec.dense_modules]
        return max([self.spec.embedding_bytes, *layers, *trunk])

    def table(self) -> str:
        """A table with one line per rank (experts: of the first MoE layer)."""
        lines = [
            f"{'rank':<5}{'experts':>9}{'of':>4}{'trunk':>13}{'experts':>12}{'shared':>12}{'total':>12}"
        ]
        first = self.layers[0]
        for rank in range(self.nodes):
            b = self.bytes_of(rank)
            lines.append(
                f"{rank:<5}{len(first.experts_of(rank)):>9}{len(first.experts):>4}"
                f"{format_bytes(b['trunk']):>13}{format_bytes(b['experts']):>12}"
                f"{format_bytes(b['shared']):>12}{format_bytes(b['total']):>12}"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back; slices are [rank, start, stop]."""
        return {
            "format": FORMAT,
            "placement": self.placement,
            "nodes": self.nodes,
            "width": self.width,
            "trunk": self.trunk,
            "node_weights": list(self.node_weights) if self.node_weights is not None else None,
            "layers": [
                {
                    "layer": plan.layer,
                    "experts": [
                        [[s.rank, s.start, s.stop] for s in slices] for slices in plan.experts
                    ],
                    "shared": [[s.rank, s.start, s.stop] for s in plan.shared],
                }
                for plan in self.layers
            ],
            "spec": {k: v for k, v in self.spec.to_json().items() if k in _SPEC_FIELDS},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            PlanError: another format, unknown or missing keys, or a broken invariant.
        """
        keys = {"format", "placement", "nodes", "width", "trunk", "node_weights", "layers", "spec"}
        if not isinstance(data, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(f"plan file: expected a JSON object, got {data!r:.40}")
        if set(data) != keys or data["format"] != FORMAT:
            raise PlanError(
                f"plan file: expected format {FORMAT} with keys {sorted(keys)}, "
                f"got format {data.get('format')} with {sorted(data)}; save the plan again with "
                f"`cenacle inspect --save`"
            )
        try:
            moe = tuple(MoELayer(**m) for m in data["spec"]["moe"])
            modules = tuple(DenseModule(**m) for m in data["spec"]["dense_modules"])
            fields: dict[str, Any] = {**data["spec"], "moe": moe, "dense_modules": modules}
            spec = ModelSpec(**fields)
            layers = tuple(
                LayerPlan(
                    plan["layer"],
                    tuple(tuple(WidthSlice(*s) for s in slices) for slices in plan["experts"]),
                    tuple(WidthSlice(*s) for s in plan["shared"]),
                )
                for plan in data["layers"]
            )
            _check_integers(data["nodes"], data["width"], spec, layers)
            weights = tuple(data["node_weights"]) if data["node_weights"] is not None else None
            return cls(
                *(data["placement"], data["nodes"], data["width"], layers, spec),
                trunk=data["trunk"],
                node_weights=weights,
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise PlanError(f"plan file: {error}") from error

    def save(self, path: Path) -> None:
        """Write the plan as JSON.

        Raises:
            InputError: the file cannot be written.
        """
        try:
            path.write_text(json.dumps(self.to_json()))
        except OSError as error:
            raise InputError(f"save: cannot write {path}: {error}", "save") from error

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: not a plan (see `from_json`), or not JSON.
        """
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan {path}: {error}") from error


_SPEC_FIELDS = frozenset(ModelSpec.__dataclass_fields__)


def _check_integers(nodes: int, width: int, spec: ModelSpec, layers: tuple[LayerPlan, ...]) -> None:
    """Raise TypeError unless all counts, indices and bytes of a plan file are integers."""
    numbers: list[Any] = [nodes, width, spec.layers, spec.top_k, spec.trunk_bytes, spec.vocab_size]
    numbers.append(spec.embedding_bytes)
    for moe in spec.moe:
        numbers += asdict(moe).values()
    for module in spec.dense_modules:
        numbers += [module.units, module.unit_bytes, module.groups, module.group_bytes]
    for plan in layers:
        numbers.append(plan.layer)
        for slices in (*plan.experts, plan.shared):
            numbers += [n for s in slices for n in (s.rank, s.start, s.stop)]
    wrong = [n for n in numbers if type(n) is not int]
    if wrong:
        raise TypeError(f"expected integers, got {wrong[0]!r}")
    positive = [n for moe in spec.moe for n in (moe.units, moe.shared_units)]
    positive += [n for m in spec.dense_modules for n in (m.units, m.groups or 1)]
    if any(n < 1 for n in positive) or any(m.units % (m.groups or 1) for m in spec.dense_modules):
        raise TypeError("expected at least one unit, and equally many units in every group")


def _resolve_node_weights(nodes: int, node_weights: Sequence[float] | None) -> tuple[float, ...]:
    """One positive weight per node; None: all 1."""
    weights = tuple(node_weights) if node_weights is not None else (1.0,) * nodes
    if nodes < 1:
        raise PlanError(f"nodes: expected at least 1, got {nodes}")
    if len(weights) != nodes:
        raise PlanError(f"node_weights: expected {nodes} numbers, one per node, got {len(weights)}")
    if not all(0 < w < float("inf") for w in weights):
        raise PlanError(f"node_weights: expected positive numbers, got {list(weights)}")
    return weights


def _borders(items: int, weights: Sequence[float]) -> list[int]:
    """Prefix sums of `largest_remainder`: rank r has items [borders[r], borders[r + 1])."""
    return [0, *accumulate(largest_remainder(items, weights))]


def _width_slices(width: int, weights: Sequence[float]) -> tuple[WidthSlice, ...]:
    return tuple(WidthSlice(r, *span) for r, span in enumerate(pairwise(_borders(width, weights))))


def _experts_that_fit(spec: ModelSpec, lean: Plan, node_memory_bytes: Sequence[int]) -> list[int]:
    """Experts of each layer that fit on each rank beside its trunk and shared experts in `lean`."""
    if len(node_memory_bytes) != lean.nodes:
        raise PlanError(
            f"node_memory_bytes: expected {lean.nodes} numbers, got {len(node_memory_bytes)}"
        )
    experts_per_layer = min(m.experts for m in spec.moe)
    expert_bytes = sum(m.expert_bytes for m in spec.moe)
    counts = []
    for rank, limit in enumerate(node_memory_bytes):
        held = lean.bytes_of(rank)
        free = limit - held["trunk"] - held["shared"]
        counts.append(min(experts_per_layer, max(0, free // expert_bytes)))
    if sum(counts) < experts_per_layer or not all(counts):
        raise PlanError(
            f"replicated: expected memory for at least one expert of each layer on each node, and "
            f"for {experts_per_layer} on all together, got {counts}; an expert takes "
            f"{format_bytes(expert_bytes)} over all layers, the rest of a rank "
            f"{format_bytes(lean.bytes_of(0)['trunk'])}; allow more memory or use more nodes"
        )
    return counts


def largest_remainder(items: int, weights: Sequence[float]) -> list[int]:
    """Divide `items` in proportion to `weights`: largest remainders, at least one each.

    Raises:
        PlanError: fewer items than weights.
    """
    if items < len(weights):
        raise PlanError(
            f"nodes: expected at most {items}, the number of experts of a layer, "
            f"got {len(weights)}; use fewer nodes"
        )
    largest = max(weights)
    scaled = [w / largest for w in weights]  # so that sums of huge weights stay finite
    exact = [items * w / sum(scaled) for w in scaled]
    counts = [max(1, int(x)) for x in exact]
    ranks = range(len(weights))
    while sum(counts) < items:
        counts[max(ranks, key=lambda r: (exact[r] - counts[r], -r))] += 1
    while sum(counts) > items:
        counts[max((r for r in ranks if counts[r] > 1), key=lambda r: counts[r] - exact[r])] -= 1
    return counts


def cap_by_budget(items: int, weights: Sequence[float], limit: int) -> list[int]:
    """`largest_remainder` with at most `limit` each; what exceeds it goes to the others."""
    counts = [min(limit, c) for c in largest_remainder(items, weights)]
    while sum(counts) < items:
        below = [r for r in range(len(weights)) if counts[r] < limit]
        counts[max(below, key=lambda r: (weights[r] / (counts[r] + 1), -r))] += 1
    return counts


def spread_replicas(experts: int, counts: Sequence[int]) -> list[tuple[int, ...]]:
    """The ranks that hold each expert, where rank r holds counts[r] of them.

    Each expert goes to the ranks with most room, which always works out; among equals to the ranks
    that have the fewest experts in common so far, so that any set of experts can be balanced well.
    """
    room = list(counts)
    in_common = [[0] * len(room) for _ in room]
    ranks_of_expert = []
    for expert in range(experts):
        replicas = -(-sum(room) // (experts - expert))
        chosen: list[int] = []
        while len(chosen) < replicas:
            rest = [r for r in range(len(room)) if r not in chosen and room[r]]
            if not rest:
                break
            best = min(rest, key=lambda r: (-room[r], sum(in_common[r][c] for c in chosen), r))
            chosen.append(best)
        for r in chosen:
            room[r] -= 1
            for c in chosen:
                in_common[r][c] += 1
        ranks_of_expert.append(tuple(sorted(chosen)))
    return ranks_of_expert
