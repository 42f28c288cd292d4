"""Who holds which expert.

Owns: `Plan`, data that names for every layer and expert the ranks and the slices of its hidden
width that they hold, and the ways to deal one.
Does not know: MLX, files, sockets.
Invariants, checked when a plan is made: in every layer each expert's parts tile its width exactly
once; every rank named exists; every rank holds at least one expert of every layer; the bytes of
every rank are known.
Next: `model/weights.py` reads what the plan gives a rank, `model/experts.py` computes it.

    >>> print(Plan.whole(spec, nodes=2).table())
    rank   experts  of        trunk     experts      shared       total
    0            8  16     180.4 MB     1.27 GB         0 B     1.45 GB
    1            8  16     180.4 MB     1.27 GB         0 B     1.45 GB
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from .errors import PlanError
from .spec import ModelSpec, MoELayer

FORMAT = 1


@dataclass(frozen=True)
class Part:
    """`rank` holds columns [start, stop) of an expert's hidden width, in units of `Plan.width`."""

    rank: int
    start: int
    stop: int


@dataclass(frozen=True)
class LayerPlan:
    """One MoE layer.

    Args:
        layer: index among all the model's layers.
        experts: for each expert the parts that tile its width, by start.
        shared: the rank that holds and computes the block's shared experts (None: it has none).
    """

    layer: int
    experts: tuple[tuple[Part, ...], ...]
    shared: int | None

    def held_by(self, rank: int) -> tuple[int, ...]:
        """Ids of the experts of which `rank` holds a part, ascending."""
        return tuple(
            e for e, parts in enumerate(self.experts) if any(p.rank == rank for p in parts)
        )


@dataclass(frozen=True)
class Plan:
    """A placement of a model's experts on `nodes` ranks.

    Args:
        placement: the name of the way it was dealt ("whole").
        nodes: number of ranks.
        width: the number of units in which expert widths are cut (1: experts are whole).
        layers: one entry per MoE layer.
        spec: the facts the plan was dealt from; they give the bytes.

    Raises:
        PlanError: an invariant of this module does not hold.
    """

    placement: str
    nodes: int
    width: int
    layers: tuple[LayerPlan, ...]
    spec: ModelSpec

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.width < 1 or not self.layers:
            raise PlanError(
                f"expected at least 1 node, width 1 and 1 MoE layer, got {self.nodes} nodes, "
                f"width {self.width} and {len(self.layers)} layers (no MoE layer: a dense model)"
            )
        if [p.layer for p in self.layers] != [m.layer for m in self.spec.moe]:
            raise PlanError(
                f"the plan covers layers {[p.layer for p in self.layers]}, "
                f"the model's MoE layers are {[m.layer for m in self.spec.moe]}"
            )
        for plan, moe in zip(self.layers, self.spec.moe, strict=True):
            self._check(plan, moe)

    def _check(self, plan: LayerPlan, moe: MoELayer) -> None:
        where = f"layer {plan.layer}"
        if len(plan.experts) != moe.experts:
            raise PlanError(
                f"{where}: expected a holder for each of {moe.experts} experts, "
                f"got {len(plan.experts)}"
            )
        for expert, parts in enumerate(plan.experts):
            reached = 0
            for part in parts:
                if not 0 <= part.rank < self.nodes:
                    raise PlanError(
                        f"{where}: expert {expert} is given to rank {part.rank}, "
                        f"expected 0 to {self.nodes - 1}"
                    )
                if part.start != reached or part.stop <= part.start:
                    raise PlanError(
                        f"{where}: expert {expert} must be held exactly once, but its parts "
                        f"{[(p.start, p.stop) for p in parts]} do not tile 0 to {self.width}"
                    )
                reached = part.stop
            if reached != self.width:
                raise PlanError(
                    f"{where}: expert {expert} is held up to {reached} of {self.width} of its width"
                )
        empty = [r for r in range(self.nodes) if not plan.held_by(r)]
        if empty:
            raise PlanError(f"{where}: ranks {empty} hold no expert; use fewer nodes")
        if (plan.shared is not None) != bool(moe.shared_bytes):
            raise PlanError(
                f"{where}: shared experts take {moe.shared_bytes} bytes but are given to "
                f"{'no rank' if plan.shared is None else f'rank {plan.shared}'}"
            )
        if plan.shared is not None and not 0 <= plan.shared < self.nodes:
            raise PlanError(f"{where}: shared experts are given to rank {plan.shared}")

    @classmethod
    def whole(cls, spec: ModelSpec, nodes: int, shares: Sequence[float] | None = None) -> Plan:
        """Deal whole experts, evenly or by `shares`.

        Each rank gets neighbouring experts, so that its rows of a stacked tensor are one range of
        bytes; the cuts are prefix sums. The shared experts of each layer go to the rank that is
        furthest behind its share of the bytes so far, so that memory stays even.

        Args:
            nodes: from 1 to the number of experts.
            shares: one positive weight per rank, for instance (2, 1, 1); None: equal.

        Raises:
            PlanError: more nodes than experts, or a wrong number or value of shares.
        """
        weights = tuple(shares) if shares is not None else (1.0,) * nodes
        if nodes < 1:
            raise PlanError(f"nodes: expected at least 1, got {nodes}")
        if len(weights) != nodes:
            raise PlanError(f"shares: expected {nodes} numbers, one per node, got {len(weights)}")
        if not all(0 < w < float("inf") for w in weights):
            raise PlanError(f"shares: expected positive numbers, got {list(weights)}")
        load = [0.0] * nodes
        layers: list[LayerPlan] = []
        for moe in spec.moe:
            counts = _deal(moe.experts, weights)
            cuts = [0, *accumulate(counts)]
            owner = [r for r in range(nodes) for _ in range(cuts[r], cuts[r + 1])]
            for rank in range(nodes):
                load[rank] += counts[rank] * moe.expert_bytes
            shared = None
            if moe.shared_bytes:
                shared = min(range(nodes), key=lambda r: (load[r] / weights[r], r))
                load[shared] += moe.shared_bytes
            layers.append(LayerPlan(moe.layer, tuple((Part(r, 0, 1),) for r in owner), shared))
        return cls("whole", nodes, 1, tuple(layers), spec)

    def bytes_of(self, rank: int) -> dict[str, int]:
        """Bytes of weights that `rank` holds: trunk, experts, shared and their total."""
        experts = shared = 0
        for plan, moe in zip(self.layers, self.spec.moe, strict=True):
            units = sum(p.stop - p.start for parts in plan.experts for p in parts if p.rank == rank)
            experts += moe.expert_bytes * units // self.width
            shared += moe.shared_bytes if plan.shared == rank else 0
        trunk = self.spec.trunk_bytes
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
            "layers": [
                {
                    "layer": p.layer,
                    "experts": [[[q.rank, q.start, q.stop] for q in parts] for parts in p.experts],
                    "shared": p.shared,
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
        keys = {"format", "placement", "nodes", "width", "layers", "spec"}
        if not isinstance(data, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(f"plan file: expected a JSON object, got {data!r:.40}")
        if set(data) != keys or data["format"] != FORMAT:
            raise PlanError(
                f"plan file: expected format {FORMAT} with keys {sorted(keys)}, "
                f"got format {data.get('format')} with {sorted(data)}"
            )
        try:
            moe = tuple(MoELayer(**m) for m in data["spec"]["moe"])
            facts: dict[str, Any] = {**data["spec"], "moe": moe}
            spec = ModelSpec(**facts)
            layers = tuple(
                LayerPlan(
                    p["layer"],
                    tuple(tuple(Part(*q) for q in parts) for parts in p["experts"]),
                    p["shared"],
                )
                for p in data["layers"]
            )
            _expect_numbers(data["nodes"], data["width"], spec, layers)
            return cls(data["placement"], data["nodes"], data["width"], layers, spec)
        except (TypeError, KeyError) as error:
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
    for moe in spec.moe:
        numbers += [moe.layer, moe.experts, moe.expert_bytes, moe.shared_bytes]
    for plan in layers:
        numbers += [plan.layer, plan.shared or 0]
        numbers += [n for parts in plan.experts for p in parts for n in (p.rank, p.start, p.stop)]
    wrong = [n for n in numbers if type(n) is not int]
    if wrong:
        raise TypeError(f"expected integers, got {wrong[0]!r}")


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
