"""Who holds which expert, and which part of the trunk.

Owns: `Plan`, data that names for every layer and expert the ranks and the slices of its hidden
width that they hold, and the ways to deal one.
Does not know: MLX, files, sockets, which replica computes what (`model/balance.py`).
Invariants, checked when a plan is made: in every layer the slices of each expert tile its width
exactly once, and each slice has one rank or several (replicas); a rank's slice is the same in all
experts of a layer that it holds; every rank holds at least one expert of every layer, and equally
many of each; the bytes of every rank are known.
Next: `model/weights.py` reads what the plan gives a rank, `model/experts.py` computes it.

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
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..errors import PlanError
from .model_spec import ModelSpec, MoELayer, TrunkPart

FORMAT = 2
TRUNKS = ("replicated", "sharded")


@dataclass(frozen=True)
class Part:
    """`rank` holds columns [start, stop) of an expert's hidden width, in units of `Plan.width`."""

    rank: int
    start: int
    stop: int


@dataclass(frozen=True)
class Heads:
    """A rank's slice of attention: query heads [start, stop), key and value heads [first, last)."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class LayerPlan:
    """One MoE layer.

    Args:
        layer: index among all the model's layers.
        experts: for each expert its parts, by start and then by rank.
        shared: the parts of the block's shared experts, in units of `MoELayer.shared_units`
            (none: it has none).
    """

    layer: int
    experts: tuple[tuple[Part, ...], ...]
    shared: tuple[Part, ...]

    def held_by(self, rank: int) -> tuple[int, ...]:
        """Ids of the experts of which `rank` holds a part, ascending."""
        return tuple(
            e for e, parts in enumerate(self.experts) if any(p.rank == rank for p in parts)
        )

    def slice_of(self, rank: int) -> tuple[int, int]:
        """[start, stop) of the width, of each expert that `rank` holds."""
        return next((p.start, p.stop) for parts in self.experts for p in parts if p.rank == rank)

    def shared_of(self, rank: int) -> tuple[int, int] | None:
        """[start, stop) of the shared experts' width that `rank` holds, or None."""
        return next(((p.start, p.stop) for p in self.shared if p.rank == rank), None)

    def holders(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """For each expert the ranks that hold the same slice as `rank` does, ascending."""
        mine = self.slice_of(rank)
        return tuple(
            tuple(p.rank for p in parts if (p.start, p.stop) == mine) for parts in self.experts
        )


@dataclass(frozen=True)
class Plan:
    """A placement of a model on `nodes` ranks.

    Args:
        placement: the name of the way it was dealt ("whole", "sliced", "replicated").
        nodes: number of ranks.
        width: the number of units in which expert widths are cut (1: experts are whole).
        layers: one entry per MoE layer.
        spec: the facts the plan was dealt from; they give the bytes.
        trunk: "replicated" (all of it on every rank) or "sharded": the spec's `parts` are divided,
            each by its units; one that has fewer units than there are ranks stays replicated.
        shares: relative speeds of the ranks, by which everything was dealt; None: equal.

    Raises:
        PlanError: an invariant of this module does not hold.
    """

    placement: str
    nodes: int
    width: int
    layers: tuple[LayerPlan, ...]
    spec: ModelSpec
    trunk: str = "replicated"
    shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.width < 1 or not self.layers:
            raise PlanError(
                f"expected at least 1 node, width 1 and 1 MoE layer, got {self.nodes} nodes, "
                f"width {self.width} and {len(self.layers)} layers (no MoE layer: a dense model)"
            )
        if self.trunk not in TRUNKS:
            raise PlanError(f"trunk: expected {' or '.join(TRUNKS)}, got {self.trunk!r}")
        _weights(self.nodes, self.shares)
        if [p.layer for p in self.layers] != [m.layer for m in self.spec.moe]:
            raise PlanError(
                f"the plan covers layers {[p.layer for p in self.layers]}, "
                f"the model's MoE layers are {[m.layer for m in self.spec.moe]}"
            )
        for plan, moe in zip(self.layers, self.spec.moe, strict=True):
            self._check(plan, moe)
        for rank in range(self.nodes):
            counts = {len(p.held_by(rank)) for p in self.layers}
            if len(counts) > 1:
                raise PlanError(
                    f"rank {rank} must hold equally many experts of every layer, got "
                    f"{sorted(counts)}"
                )

    def _check(self, plan: LayerPlan, moe: MoELayer) -> None:
        where = f"layer {plan.layer}"
        if len(plan.experts) != moe.experts:
            raise PlanError(
                f"{where}: expected a holder for each of {moe.experts} experts, "
                f"got {len(plan.experts)}"
            )
        if moe.units % self.width:
            raise PlanError(
                f"{where}: the width of an expert has {moe.units} units, which cannot be cut "
                f"in {self.width} equal pieces"
            )
        slices: dict[int, tuple[int, int]] = {}
        for expert, parts in enumerate(plan.experts):
            self._tiles(parts, self.width, f"{where}: expert {expert}")
            for part in parts:
                if slices.setdefault(part.rank, (part.start, part.stop)) != (part.start, part.stop):
                    raise PlanError(f"{where}: rank {part.rank} holds different slices of experts")
        empty = [r for r in range(self.nodes) if r not in slices]
        if empty:
            raise PlanError(f"{where}: ranks {empty} hold no expert; use fewer nodes")
        if bool(plan.shared) != bool(moe.shared_bytes):
            raise PlanError(
                f"{where}: shared experts take {moe.shared_bytes} bytes but are given to "
                f"{'no rank' if not plan.shared else f'rank {plan.shared[0].rank}'}"
            )
        if plan.shared:
            self._tiles(plan.shared, moe.shared_units, f"{where}: shared experts", replicas=False)

    def _tiles(self, parts: tuple[Part, ...], width: int, what: str, replicas: bool = True) -> None:
        """The parts must tile `width`, each slice held by one rank or, with `replicas`, several."""
        reached, last = 0, (0, 0)
        for part in parts:
            if not 0 <= part.rank < self.nodes:
                raise PlanError(
                    f"{what} is given to rank {part.rank}, expected 0 to {self.nodes - 1}"
                )
            copy = replicas and (part.start, part.stop) == last
            if not copy and (part.start != reached or part.stop <= part.start):
                raise PlanError(
                    f"{what} must be held exactly once, but its parts "
                    f"{[(p.start, p.stop) for p in parts]} do not tile 0 to {width}"
                )
            reached, last = part.stop, (part.start, part.stop)
        if len({p.rank for p in parts}) < len(parts):
            raise PlanError(
                f"{what} must be held exactly once by a rank, got {[p.rank for p in parts]}"
            )
        if reached != width:
            raise PlanError(f"{what} is held up to {reached} of {width} of its width")

    @classmethod
    def whole(
        cls,
        spec: ModelSpec,
        nodes: int,
        shares: Sequence[float] | None = None,
        trunk: str = "replicated",
    ) -> Plan:
        """Deal whole experts, evenly or by `shares`.

        Each rank gets neighbouring experts, so that its rows of a stacked tensor are one range of
        bytes; the cuts are prefix sums. With a replicated trunk the shared experts of each layer go
        to the rank that is furthest behind its share of the bytes so far, so that memory stays
        even; with a sharded one they are cut.

        Args:
            nodes: from 1 to the number of experts.
            shares: one positive weight per rank, for instance (2, 1, 1); None: equal.
            trunk: see `Plan`.

        Raises:
            PlanError: more nodes than experts, or a wrong number or value of shares.
        """
        weights = _weights(nodes, shares)
        counts = [_deal(moe.experts, weights) for moe in spec.moe]
        owners = [[r for r in range(nodes) for _ in range(c[r])] for c in counts]
        experts = [tuple((Part(r, 0, 1),) for r in own) for own in owners]
        return cls._with_shared("whole", nodes, 1, experts, spec, trunk, shares)

    @classmethod
    def sliced(
        cls,
        spec: ModelSpec,
        nodes: int,
        shares: Sequence[float] | None = None,
        trunk: str = "replicated",
    ) -> Plan:
        """Every rank holds a slice of every expert's hidden width, by `shares`.

        Cuts are at the borders of quantisation groups, by prefix sums.

        Raises:
            PlanError: the experts of this family cannot be cut, or there are more nodes than
                groups, or a wrong number or value of shares.
        """
        weights = _weights(nodes, shares)
        width = math.gcd(*(m.units for m in spec.moe))
        if nodes > 1 and spec.unsliced is not None:
            raise PlanError(
                f"sliced: experts of {spec.family} cannot be cut: {spec.unsliced}; "
                f"use --placement whole or replicated"
            )
        if width < nodes:
            raise PlanError(
                f"sliced: an expert's hidden width can be cut into {width} pieces at most (at "
                f"borders of quantisation groups), got {nodes} nodes; use fewer nodes, or "
                f"--placement whole or replicated"
            )
        counts = _deal(width, weights)
        cuts = [0, *accumulate(counts)]
        parts = tuple(Part(r, cuts[r], cuts[r + 1]) for r in range(nodes))
        experts = [(parts,) * m.experts for m in spec.moe]
        return cls._with_shared("sliced", nodes, width, experts, spec, trunk, shares)

    @classmethod
    def replicated(
        cls,
        spec: ModelSpec,
        nodes: int,
        budgets: Sequence[int] | None = None,
        shares: Sequence[float] | None = None,
        trunk: str = "replicated",
    ) -> Plan:
        """Each whole expert on one rank or several; `model/balance.py` deals a token's experts.

        Args:
            budgets: bytes of weights that each rank may hold, the trunk included: as many copies
                as fit. None: two copies of every expert where there are more than two nodes (the
                layout of arXiv:2506.23635 for four), in proportion to `shares`.
            shares: relative speeds of the ranks; a faster one is dealt more.

        Raises:
            PlanError: the budgets do not hold every expert once, or wrong numbers.
        """
        weights = _weights(nodes, shares)
        most = min(m.experts for m in spec.moe)
        if budgets is None:
            copies = [2 if nodes > 2 else 1] * most
            counts = _capped(sum(copies), weights, most)
        else:
            if len(budgets) != nodes:
                raise PlanError(f"budgets: expected {nodes} numbers, got {len(budgets)}")
            lean = cls.whole(spec, nodes, shares, trunk)
            each = sum(m.expert_bytes for m in spec.moe)
            free = [
                b - lean.bytes_of(r)["trunk"] - lean.bytes_of(r)["shared"]
                for r, b in enumerate(budgets)
            ]
            counts = [min(most, max(0, f // each)) for f in free]
            if sum(counts) < most or not all(counts):
                raise PlanError(
                    f"replicated: the budgets hold {counts} experts of each layer on the ranks, "
                    f"expected at least one on each and {most} together; an expert takes "
                    f"{human(each)} over all layers, the rest of a rank "
                    f"{human(lean.bytes_of(0)['trunk'])}; allow more bytes or use more nodes"
                )
        if len({m.experts for m in spec.moe}) > 1:
            raise PlanError("replicated: layers with different numbers of experts")
        holders = _spread(most, counts)
        experts = [tuple(tuple(Part(r, 0, 1) for r in h) for h in holders) for _ in spec.moe]
        return cls._with_shared("replicated", nodes, 1, experts, spec, trunk, shares)

    @classmethod
    def _with_shared(
        cls,
        placement: str,
        nodes: int,
        width: int,
        experts: Sequence[tuple[tuple[Part, ...], ...]],
        spec: ModelSpec,
        trunk: str,
        shares: Sequence[float] | None,
    ) -> Plan:
        """Place the shared experts: cut where experts or trunk are and they can be, else whole."""
        weights = _weights(nodes, shares)
        load = [0.0] * nodes
        layers: list[LayerPlan] = []
        for moe, parts in zip(spec.moe, experts, strict=True):
            for part in (p for each in parts for p in each):
                load[part.rank] += moe.expert_bytes * (part.stop - part.start) / width
            shared: tuple[Part, ...] = ()
            cut = placement == "sliced" or trunk == "sharded"
            if moe.shared_bytes and cut and moe.shared_units >= nodes:
                cuts = [0, *accumulate(_deal(moe.shared_units, weights))]
                shared = tuple(Part(r, cuts[r], cuts[r + 1]) for r in range(nodes))
            elif moe.shared_bytes:
                rank = min(range(nodes), key=lambda r: (load[r] / weights[r], r))
                load[rank] += moe.shared_bytes
                shared = (Part(rank, 0, moe.shared_units),)
            layers.append(LayerPlan(moe.layer, parts, shared))
        given = tuple(float(w) for w in shares) if shares is not None else None
        return cls(placement, nodes, width, tuple(layers), spec, trunk, given)

    def divides(self, part: TrunkPart) -> bool:
        """Whether `part` is divided among the ranks."""
        if self.trunk != "sharded" or self.nodes == 1:
            return False
        if part.groups:
            ranks_a_group = -(-self.nodes // part.groups)
            return part.units // part.groups >= ranks_a_group
        return part.units >= self.nodes

    def rows_of(self, part: TrunkPart, rank: int) -> tuple[int, int]:
        """[start, stop) of the units of a part without groups that is `rank`'s."""
        cuts = [0, *accumulate(_deal(part.units, _weights(self.nodes, self.shares)))]
        return cuts[rank], cuts[rank + 1]

    def heads_of(self, part: TrunkPart, rank: int) -> Heads:
        """`rank`'s heads of an attention: key and value heads are dealt with the query heads that
        use them; where there are more ranks than those, ranks share one and deal its queries."""
        weights = _weights(self.nodes, self.shares)
        queries = part.units // part.groups
        if self.nodes <= part.groups:
            cuts = [0, *accumulate(_deal(part.groups, weights))]
            first, last = cuts[rank], cuts[rank + 1]
            return Heads(first * queries, last * queries, first, last)
        borders = [g * self.nodes // part.groups for g in range(part.groups + 1)]
        group = next(g for g in range(part.groups) if rank < borders[g + 1])
        begin, end = borders[group], borders[group + 1]
        cuts = [group * queries + c for c in accumulate(_deal(queries, weights[begin:end]))]
        start = cuts[rank - begin - 1] if rank > begin else group * queries
        return Heads(start, cuts[rank - begin], group, group + 1)

    def part_bytes(self, part: TrunkPart, rank: int) -> int:
        """Bytes of `part` that `rank` reads for a token (and holds, unless the head is tied)."""
        if not self.divides(part):
            return part.bytes
        if part.groups:
            h = self.heads_of(part, rank)
            return (h.stop - h.start) * part.unit_bytes + (h.last - h.first) * part.group_bytes
        start, stop = self.rows_of(part, rank)
        return (stop - start) * part.unit_bytes

    @property
    def exchanges(self) -> int:
        """Exchanges of one pass through the model: one a MoE layer, one a divided part."""
        return len(self.layers) + sum(self.divides(p) for p in self.spec.parts)

    def bytes_of(self, rank: int) -> dict[str, int]:
        """Bytes of weights that `rank` holds: trunk, experts, shared and their total."""
        experts = shared = 0
        for plan, moe in zip(self.layers, self.spec.moe, strict=True):
            held = [p for parts in plan.experts for p in parts if p.rank == rank]
            units = sum(p.stop - p.start for p in held)
            cut = moe.expert_bytes - moe.kept_bytes
            experts += cut * units // self.width + moe.kept_bytes * len(held)
            mine = plan.shared_of(rank)
            if mine is not None:
                cut = moe.shared_bytes - moe.shared_kept_bytes
                shared += cut * (mine[1] - mine[0]) // moe.shared_units + moe.shared_kept_bytes
        held_parts = [p for p in self.spec.parts if p.kind != "tied"]
        trunk = self.spec.trunk_bytes
        trunk -= sum(p.bytes - self.part_bytes(p, rank) for p in held_parts)
        return {
            "trunk": trunk,
            "experts": experts,
            "shared": shared,
            "total": trunk + experts + shared,
        }

    def table(self) -> str:
        """The plan as a small table, one line per rank (experts: of the first MoE layer)."""
        lines = [
            f"{'rank':<5}{'experts':>9}{'of':>4}{'trunk':>13}{'experts':>12}{'shared':>12}{'total':>12}"
        ]
        first = self.layers[0]
        for rank in range(self.nodes):
            b = self.bytes_of(rank)
            lines.append(
                f"{rank:<5}{len(first.held_by(rank)):>9}{len(first.experts):>4}"
                f"{human(b['trunk']):>13}{human(b['experts']):>12}"
                f"{human(b['shared']):>12}{human(b['total']):>12}"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back; parts are [rank, start, stop]."""
        return {
            "format": FORMAT,
            "placement": self.placement,
            "nodes": self.nodes,
            "width": self.width,
            "trunk": self.trunk,
            "shares": list(self.shares) if self.shares is not None else None,
            "layers": [
                {
                    "layer": p.layer,
                    "experts": [[[q.rank, q.start, q.stop] for q in parts] for parts in p.experts],
                    "shared": [[q.rank, q.start, q.stop] for q in p.shared],
                }
                for p in self.layers
            ],
            "spec": {k: v for k, v in self.spec.to_json().items() if k in _SPEC_FIELDS},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Read what `to_json` gave.

        Raises:
            PlanError: another format, unknown or missing keys, or a broken invariant.
        """
        keys = {"format", "placement", "nodes", "width", "trunk", "shares", "layers", "spec"}
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
            parts = tuple(TrunkPart(**p) for p in data["spec"]["parts"])
            facts: dict[str, Any] = {**data["spec"], "moe": moe, "parts": parts}
            spec = ModelSpec(**facts)
            layers = tuple(
                LayerPlan(
                    p["layer"],
                    tuple(tuple(Part(*q) for q in parts) for parts in p["experts"]),
                    tuple(Part(*q) for q in p["shared"]),
                )
                for p in data["layers"]
            )
            _expect_numbers(data["nodes"], data["width"], spec, layers)
            shares = tuple(data["shares"]) if data["shares"] is not None else None
            where = (data["placement"], data["nodes"], data["width"], layers, spec)
            return cls(*where, data["trunk"], shares)
        except (TypeError, KeyError, AttributeError) as error:
            raise PlanError(f"plan file: {error}") from error

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        path.write_text(json.dumps(self.to_json()))

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


def _expect_numbers(nodes: int, width: int, spec: ModelSpec, layers: tuple[LayerPlan, ...]) -> None:
    """Raise a TypeError unless all counts, indices and bytes are integers."""
    numbers: list[Any] = [nodes, width, spec.layers, spec.top_k, spec.trunk_bytes, spec.vocabulary]
    numbers.append(spec.lookup_bytes)
    for moe in spec.moe:
        numbers += asdict(moe).values()
    for trunk in spec.parts:
        numbers += [trunk.units, trunk.unit_bytes, trunk.groups, trunk.group_bytes]
    for plan in layers:
        numbers.append(plan.layer)
        for parts in (*plan.experts, plan.shared):
            numbers += [n for p in parts for n in (p.rank, p.start, p.stop)]
    wrong = [n for n in numbers if type(n) is not int]
    if wrong:
        raise TypeError(f"expected integers, got {wrong[0]!r}")
    positive = [n for moe in spec.moe for n in (moe.units, moe.shared_units)]
    positive += [n for part in spec.parts for n in (part.units, part.groups or 1)]
    if any(n < 1 for n in positive) or any(p.units % (p.groups or 1) for p in spec.parts):
        raise TypeError("expected at least one unit, and as many units for every group")


def _weights(nodes: int, shares: Sequence[float] | None) -> tuple[float, ...]:
    """One positive weight per node."""
    weights = tuple(shares) if shares is not None else (1.0,) * nodes
    if nodes < 1:
        raise PlanError(f"nodes: expected at least 1, got {nodes}")
    if len(weights) != nodes:
        raise PlanError(f"shares: expected {nodes} numbers, one per node, got {len(weights)}")
    if not all(0 < w < float("inf") for w in weights):
        raise PlanError(f"shares: expected positive numbers, got {list(weights)}")
    return weights


def _capped(items: int, weights: Sequence[float], most: int) -> list[int]:
    """As `_deal`, but at most `most` each; what is too much for one goes to the others."""
    counts = [min(most, c) for c in _deal(items, weights)]
    while sum(counts) < items:
        open_ = [r for r in range(len(weights)) if counts[r] < most]
        counts[max(open_, key=lambda r: (weights[r] / (counts[r] + 1), -r))] += 1
    return counts


def _spread(experts: int, counts: Sequence[int]) -> list[tuple[int, ...]]:
    """The ranks that hold each expert, where rank r holds counts[r] of them.

    Each expert goes to the ranks with most room, which always works out; among equals to those
    that share the fewest experts with each other so far, so that any set can be dealt well.
    """
    room = list(counts)
    together = [[0] * len(room) for _ in room]
    holders = []
    for expert in range(experts):
        copies = -(-sum(room) // (experts - expert))
        chosen: list[int] = []
        while len(chosen) < copies:
            rest = [r for r in range(len(room)) if r not in chosen and room[r]]
            if not rest:
                break
            best = min(rest, key=lambda r: (-room[r], sum(together[r][c] for c in chosen), r))
            chosen.append(best)
        for r in chosen:
            room[r] -= 1
            for c in chosen:
                together[r][c] += 1
        holders.append(tuple(sorted(chosen)))
    return holders


def _deal(items: int, weights: Sequence[float]) -> list[int]:
    """How many of `items` each weight gets: largest remainders, at least one each."""
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


def human(n: float) -> str:
    """Bytes in decimal units, three or four digits: 1.27 GB."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(n) < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.{2 if n < 10 else 1}f} {unit}"
        n /= 1000
    raise AssertionError("unreachable")
