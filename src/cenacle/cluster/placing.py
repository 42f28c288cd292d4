"""What a group of given machines shall do: how ranks exchange, and who holds what, with the reason.

Owns: the decisions; pure functions of what agents reported and of the model's shape.
Does not know: sockets, agents.
Invariant: what is returned fits every machine's memory, or there is an error that says what does
not fit where, and what would help.
Next: `forming.py` asks the machines and then these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..engine.drafting import DraftModel
from ..engine.engine import Options, need_of
from ..errors import ClusterError, InputError, PlanError
from ..model import balance, residency
from ..plan import Plan, human
from ..spec import ModelSpec
from .links import Link
from .state import Node

# Machines whose memory differs by less than that are dealt the same: a measurement's own spread.
ALIKE = 1.25
REMOTE_BACKENDS = ("mesh", "ring")


@dataclass(frozen=True)
class Wanted:
    """What was asked for; see `api.load`."""

    placement: str = "auto"
    trunk: str = "auto"
    backend: str = "auto"
    wire: str = "f32"
    shares: Sequence[float] | None = None
    budgets: Sequence[int] | None = None


def exchange(backend: str, wire: str, members: Sequence[Node]) -> tuple[str, str]:
    """How ranks exchange, and why.

    Raises:
        ClusterError, InputError: what was asked for cannot be used between these machines.
    """
    if len(members) == 1:
        return "mesh", "one machine: nothing is exchanged"
    if backend not in ("auto", *REMOTE_BACKENDS):
        raise ClusterError(
            f"backend: expected auto, {' or '.join(REMOTE_BACKENDS)} between machines, got "
            f"{backend}; the others are for `cenacle serve`"
        )
    without = [f"{n.name}: {n.facts['no_mesh']}" for n in members if n.facts.get("no_mesh")]
    if backend == "mesh" and without:
        raise ClusterError(f"backend mesh: {'; '.join(without)}; use --backend ring")
    if wire != "f32" and (backend == "ring" or without):
        raise InputError(
            f"wire: expected f32, as the ring exchanges vectors as they are, got {wire}"
        )
    if backend == "ring" or without:
        why = "it was asked for" if backend == "ring" else "; ".join(without)
        return "ring", f"exchange: MLX's ring, which takes {2 * len(members) - 2} hops ({why})"
    return "mesh", "exchange: mesh, one hop from every machine to every other"


def describe_links(members: Sequence[Node], found: Mapping[tuple[int, int], Link]) -> str:
    """The links in one line, the slowest by name."""
    if not found:
        return ""
    (a, b), slowest = max(found.items(), key=lambda item: item[1].latency_s)
    narrow = min(found.values(), key=lambda link: link.bytes_s)
    return (
        f"links: {1e6 * slowest.latency_s:.0f} us at most (half a round trip, "
        f"{members[a].name} to {members[b].name}), {narrow.bytes_s / 1e9:.2f} GB/s at least"
    )


def shares_of(members: Sequence[Node]) -> list[float]:
    """Relative speeds: how fast each machine reads memory, which is what decoding waits for."""
    rates = [float(n.facts["read_bytes_s"]) for n in members]
    if max(rates) <= ALIKE * min(rates):
        return [1.0] * len(members)
    # To a tenth of the slowest: a plan should not change with every measurement.
    return [round(10 * r / min(rates)) / 10 for r in rates]


def place(
    spec: ModelSpec,
    config: Mapping[str, Any],
    members: Sequence[Node],
    found: Mapping[tuple[int, int], Link],
    wanted: Wanted,
    options: Options,
    kernels: str,
    draft: DraftModel | None = None,
) -> tuple[Plan, str]:
    """The plan for these machines, and why.

    Dealt by speed; if that does not fit some machine, by memory.

    Args:
        found: links by pairs of ranks.
        draft: what the first rank has besides.

    Raises:
        PlanError: it fits in neither way; says what does not fit where.
    """
    gpu = all(bool(n.facts.get("gpu")) for n in members)
    latency = balance.LATENCY_S + max((link.latency_s for link in found.values()), default=0.0)
    ways: list[tuple[str, Sequence[float]]] = []
    if wanted.shares is not None:
        ways.append(("shares as asked for", wanted.shares))
    else:
        speeds = shares_of(members)
        even = len(set(speeds)) == 1
        ways.append(("alike" if even else f"by speed {_ratio(speeds)}", speeds))
        memory = [float(_allowed(n)) for n in members]
        ways.append((f"by memory {_ratio(memory)}, as it does not fit by speed", memory))
    refused: list[str] = []
    for said, shares in ways:
        plan, why = balance.choose(
            spec,
            len(members),
            shares,
            wanted.placement,
            wanted.trunk,
            wanted.budgets,
            gpu,
            latency,
        )
        refused = []
        for rank, node in enumerate(members):
            need = need_of(dict(config), plan, rank, options, kernels, draft)
            need = replace(need, beside=0)
            try:
                _check(node, need)
            except PlanError as error:
                refused.append(f"{node.name}: {error}")
        if not refused:
            dealt = f"dealt {said}" if len(members) > 1 else ""
            return plan, "; ".join(filter(None, [dealt, why]))
    raise PlanError(" | ".join(refused))


def _check(node: Node, need: residency.Need) -> None:
    if (metal := node.facts.get("metal")) is not None:
        residency.wired_limit(metal, need)
        return
    residency.check_available(f"MemAvailable: {_allowed(node) // 1024} kB", need)


def _allowed(node: Node) -> int:
    """Bytes that a machine can give to a rank."""
    if (metal := node.facts.get("metal")) is not None:
        return int(metal["max_recommended_working_set_size"])
    return int(node.facts["available_bytes"])


def _ratio(numbers: Sequence[float]) -> str:
    if max(numbers) > 1e6:
        return ":".join(human(n) for n in numbers)
    return ":".join(f"{n:g}" for n in numbers)
