"""What a group of given machines shall do: how ranks exchange, and who holds what, with the reason.

Owns: the decisions; pure functions of what agents reported and of the model's shape.
Does not know: sockets, agents.
Invariant: what is returned fits every machine's memory, or there is an error that says what does
not fit where, and what would help.
Next: `forming.py` asks the machines and then these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..core.model_spec import ModelSpec
from ..core.plan import Plan
from ..core.units import format_bytes
from ..engine.memory import estimate_memory
from ..engine.options import EngineOptions
from ..engine.speculative.draft_model import DraftModelConfig
from ..errors import CenacleError, ClusterError, InputError, PlanError
from ..planning import catalog, choose_plan, memory
from ..planning.catalog import Fact, Machine
from ..planning.perf_model import PaperConstants
from ..planning.plan_cost import MeasuredMachines
from . import thunderbolt
from .link_probe import Link
from .membership import Node
from .thunderbolt import Devices

# Machines whose memory differs by less than that are dealt the same: a measurement's own spread.
ALIKE = 1.25
REMOTE_BACKENDS = ("jaccl", "nccl", "mesh", "ring")  # the first that can be is taken


@dataclass(frozen=True)
class Wanted:
    """What was asked for; see `api.load`."""

    placement: str = "auto"
    trunk: str = "auto"
    backend: str = "auto"
    wire: str = "f32"
    shares: Sequence[float] | None = None
    budgets: Sequence[int] | None = None


class Exchange(NamedTuple):
    """How ranks exchange, why, and for JACCL the RDMA devices (see `rdma.Devices`)."""

    backend: str
    why: str
    devices: Devices = []  # noqa: RUF012  (never changed)


def exchange(
    backend: str, wire: str, members: Sequence[Node], devices: Devices | None = None
) -> Exchange:
    """How ranks exchange, from what the machines have.

    JACCL where a Thunderbolt cable with RDMA leads from each to each; NCCL where all are CUDA; the
    mesh where all have it (Linux), else the ring.

    Args:
        backend: what was asked for, or "auto".
        wire: see `api.load`.
        members: in rank order.
        devices: of a hosts file; None or empty: as the machines found them.

    Raises:
        ClusterError, InputError: what was asked for cannot be used between these machines.
    """
    if len(members) == 1:
        return Exchange("mesh", "one machine: nothing is exchanged")
    if backend not in ("auto", *REMOTE_BACKENDS):
        raise ClusterError(
            f"backend: expected auto or {', '.join(REMOTE_BACKENDS)} between machines, got "
            f"{backend}; the others are for `cenacle serve`"
        )
    without = {
        "mesh": [f"{n.name}: {n.facts['no_mesh']}" for n in members if n.facts.get("no_mesh")],
        "nccl": [f"{n.name} has no CUDA" for n in members if not n.facts.get("cuda")],
        "jaccl": [],
        "ring": [],
    }
    table = devices or thunderbolt.table([n.facts.get("thunderbolt") or [] for n in members])
    if not table:
        none = [n.name for n in members if not n.facts.get("thunderbolt")]
        without["jaccl"] = [
            f"{', '.join(none)}: no cable with RDMA over Thunderbolt"
            if none
            else "not every pair of machines has a Thunderbolt cable of its own"
        ]
    if backend == "auto":
        backend = next(b for b in REMOTE_BACKENDS if not without[b])
        asked = ""
    else:
        asked = " (it was asked for)"
    if without[backend]:
        raise ClusterError(f"backend {backend}: {'; '.join(without[backend])}; use --backend ring")
    if wire != "f32" and backend != "mesh":
        raise InputError(
            f"wire: expected f32, as {backend} exchanges vectors as they are, got {wire}"
        )
    because = f" ({'; '.join(without['mesh'])})" if backend == "ring" and not asked else asked
    why = {
        "jaccl": "exchange: JACCL, RDMA over Thunderbolt between all machines",
        "nccl": "exchange: NCCL, as all machines are CUDA",
        "mesh": "exchange: mesh, one hop from every machine to every other",
        "ring": f"exchange: MLX's ring, which takes {2 * len(members) - 2} hops",
    }[backend]
    return Exchange(backend, why + because, table or [] if backend == "jaccl" else [])


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
    options: EngineOptions,
    kernels: str,
    draft: DraftModelConfig | None = None,
    backend: str = "mesh",
) -> tuple[Plan, str]:
    """The plan for these machines, and why.

    Dealt by speed; if that does not fit some machine, by memory.

    Args:
        found: links by pairs of ranks.
        draft: what the first rank has besides.
        backend: how ranks exchange.

    Raises:
        PlanError: it fits in neither way; says what does not fit where.
    """
    gpu = all(bool(n.facts.get("gpu")) for n in members)
    latency = choose_plan.ASSUMED_LATENCY_S + max(
        (link.latency_s for link in found.values()), default=0.0
    )
    known = measured(config, members, found, backend)
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
        plan, why = choose_plan.choose_plan(
            spec,
            len(members),
            shares,
            wanted.placement,
            wanted.trunk,
            wanted.budgets,
            gpu,
            latency,
            known,
        )
        refused = []
        for rank, node in enumerate(members):
            need = estimate_memory(dict(config), plan, rank, options, kernels, draft)
            need = replace(need, beside=0)
            try:
                _check(node, need)
            except PlanError as error:
                refused.append(f"{node.name}: {error}")
        if not refused:
            dealt = f"dealt {said}" if len(members) > 1 else ""
            return plan, "; ".join(filter(None, [dealt, why]))
    raise PlanError(" | ".join(refused))


def measured(
    config: Mapping[str, Any],
    members: Sequence[Node],
    found: Mapping[tuple[int, int], Link],
    backend: str,
) -> MeasuredMachines | None:
    """The machines and links for the performance model; None: it cannot be asked.

    How fast weights are read is the machine's own measurement. What share of that kernels reach,
    and a layer's own time, are those of its calibration where it has one, else of its family.
    """
    if len(members) == 1 or not found:
        return None
    latency = choose_plan.ASSUMED_LATENCY_S + max(link.latency_s for link in found.values())
    facts = {
        "latency_us": Fact(1e6 * latency, "M", "measured when the group was formed"),
        "gb_s": Fact(min(link.bytes_s for link in found.values()) / 1e9, "M", "likewise"),
    }
    topology = "ring" if backend == "ring" else "mesh"
    try:
        known = catalog.load_catalog()
        machines = tuple(_machine(known, node) for node in members)
    except CenacleError:  # a file of this user's own that cannot be read
        return None
    link = catalog.Link("measured", "between the machines", topology, facts)
    study = PaperConstants.of(known.fits["study"])
    return MeasuredMachines(config, machines, link, study, "as measured")


def _machine(known: catalog.Catalog, node: Node) -> Machine:
    facts, family = node.facts, _family(node.facts)
    numbers = {k: float(v["v"]) for k, v in known.fits["families"][family].items()}
    numbers |= {str(k): float(v) for k, v in (facts.get("calibrated") or {}).items()}
    memory = float(facts.get("memory_bytes") or _allowed(node))
    numbers |= {"memory_gib": memory / 2**30, "usd": 0.0, "watts": 0.0}
    numbers["bandwidth_gb_s"] = float(facts["read_bytes_s"]) / 1e9
    # Where nobody measured how fast it computes, memory binds: so it does for one token.
    numbers.setdefault("tflops", 1000.0)
    said = {k: Fact(v, "M", f"the agent of {node.name}") for k, v in numbers.items()}
    return Machine(node.name, node.name, family, said, _allowed(node) / memory)


def _family(facts: Mapping[str, Any]) -> str:
    """Whose share of the bandwidth kernels reach, see `catalog/fits.toml`."""
    if facts.get("metal") is not None:
        chip = re.search(r"\bM(\d+)\b", str(facts.get("processor")))
        number = int(chip[1]) if chip else 4
        return "apple-m1-m2" if number < 3 else "apple-m3-m4" if number < 5 else "apple-m5"
    return "nvidia-rtx" if facts.get("gpu") else "cpu"


def _check(node: Node, need: memory.MemoryEstimate) -> None:
    if (metal := node.facts.get("metal")) is not None:
        memory.wired_limit(metal, need)
        return
    memory.check_available(f"MemAvailable: {_allowed(node) // 1024} kB", need)


def _allowed(node: Node) -> int:
    """Bytes that a machine can give to a rank."""
    if (metal := node.facts.get("metal")) is not None:
        return int(metal["max_recommended_working_set_size"])
    return int(node.facts["available_bytes"])


def _ratio(numbers: Sequence[float]) -> str:
    if max(numbers) > 1e6:
        return ":".join(format_bytes(n) for n in numbers)
    return ":".join(f"{n:g}" for n in numbers)
