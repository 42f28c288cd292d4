"""What a group of nodes does: which backend its ranks use, and who holds what, with the reasons.

Owns: the decisions; pure functions of what agents reported and of the model's shape.
Does not know: sockets, agents.
Invariant: a returned plan fits every node's memory; otherwise the error says what does not fit
where, and what would help.
Next: `formation.py` asks the nodes and then calls these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..core.link import Link
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
from .membership import Node
from .thunderbolt import Devices

# Nodes whose read rates differ by less than this get equal weights: measurements vary as much.
EQUAL_SPEED_RATIO = 1.25
REMOTE_BACKENDS = ("jaccl", "nccl", "mesh", "ring")  # in order of preference
UNMEASURED_TFLOPS = 1000.0  # memory limits a single token anyway

LinksByRanks = Mapping[tuple[int, int], Link]


@dataclass(frozen=True)
class PlacementOptions:
    """How to place a model on nodes; the fields are those of `runtime.LoadOptions`."""

    placement: str = "auto"
    trunk: str = "auto"
    backend: str = "auto"
    comm_dtype: str = "f32"
    node_weights: Sequence[float] | None = None
    node_memory_bytes: Sequence[int] | None = None


class BackendChoice(NamedTuple):
    """How ranks communicate, why, and the RDMA devices for JACCL (see `thunderbolt.Devices`)."""

    backend: str
    reason: str
    devices: Devices = ()


def choose_backend(
    backend: str, comm_dtype: str, members: Sequence[Node], devices: Devices = ()
) -> BackendChoice:
    """How ranks communicate, by what the nodes have.

    JACCL if a Thunderbolt cable with RDMA connects every pair, NCCL if all are CUDA, the mesh if
    all have it (Linux), else the ring.

    Args:
        backend: the requested one, or "auto".
        comm_dtype: see `runtime.LoadOptions`.
        members: in rank order.
        devices: of a hosts file; empty: as the nodes reported them.

    Raises:
        ClusterError, InputError: what was requested is not possible between these nodes.
    """
    if len(members) == 1:
        return BackendChoice("mesh", "backend: none, as there is one node")
    if backend not in ("auto", *REMOTE_BACKENDS):
        raise ClusterError(
            f"backend: expected auto or {', '.join(REMOTE_BACKENDS)} between nodes, got {backend}; "
            f"the others are for `cenacle serve`"
        )
    matrix = devices or thunderbolt.device_matrix([n.info.thunderbolt for n in members]) or ()
    obstacles = _backend_obstacles(members, matrix)
    requested = backend != "auto"
    if not requested:
        backend = next(b for b in REMOTE_BACKENDS if not obstacles[b])
    if obstacles[backend]:
        raise ClusterError(
            f"backend {backend}: {'; '.join(obstacles[backend])}; use --backend ring"
        )
    if comm_dtype != "f32" and backend != "mesh":
        raise InputError(
            f"comm_dtype: expected f32 with the {backend} backend, got {comm_dtype}", "comm_dtype"
        )
    reason = {
        "jaccl": "backend: jaccl, RDMA over Thunderbolt between all nodes",
        "nccl": "backend: nccl, as all nodes have CUDA",
        "mesh": "backend: mesh, one hop between any two nodes",
        "ring": f"backend: ring, which takes {2 * len(members) - 2} hops",
    }[backend]
    if requested:
        reason += " (as requested)"
    elif backend == "ring":
        reason += f" ({'; '.join(obstacles['mesh'])})"
    return BackendChoice(backend, reason, matrix if backend == "jaccl" else ())


def _backend_obstacles(members: Sequence[Node], devices: Devices) -> dict[str, list[str]]:
    """Why each backend cannot be used; empty lists where it can."""
    jaccl = []
    if not devices:
        without = [n.name for n in members if not n.info.thunderbolt]
        jaccl = [
            f"{', '.join(without)}: no cable with RDMA over Thunderbolt"
            if without
            else "not every pair of nodes has a Thunderbolt cable of its own"
        ]
    return {
        "jaccl": jaccl,
        "nccl": [f"{n.name} has no CUDA" for n in members if not n.info.cuda],
        "mesh": [
            f"{n.name}: {n.info.mesh_unavailable_reason}"
            for n in members
            if n.info.mesh_unavailable_reason
        ],
        "ring": [],
    }


def describe_links(members: Sequence[Node], links: LinksByRanks) -> str:
    """The links in one line, with the slowest by name."""
    if not links:
        return ""
    (a, b), slowest = max(links.items(), key=lambda item: item[1].latency_s)
    bytes_per_s = min(link.bytes_per_s for link in links.values())
    return (
        f"links: latency at most {1e6 * slowest.latency_s:.0f} us ({members[a].name} to "
        f"{members[b].name}), bandwidth at least {bytes_per_s / 1e9:.2f} GB/s"
    )


def speed_weights(members: Sequence[Node]) -> list[float]:
    """Relative speeds: how fast each node reads memory, which limits decoding."""
    rates = [n.info.read_bytes_per_s for n in members]
    if max(rates) <= EQUAL_SPEED_RATIO * min(rates):
        return [1.0] * len(members)
    # Rounded to a tenth of the slowest, so that a plan does not change with every measurement.
    return [round(10 * r / min(rates)) / 10 for r in rates]


def place(
    spec: ModelSpec,
    config: Mapping[str, Any],
    members: Sequence[Node],
    links: LinksByRanks,
    placement: PlacementOptions,
    options: EngineOptions,
    kernels: str,
    draft: DraftModelConfig | None = None,
    backend: str = "mesh",
) -> tuple[Plan, str]:
    """The plan for these nodes, and why: weighted by speed or, if that does not fit, by memory.

    Args:
        links: by pairs of ranks.
        draft: the draft model, which rank 0 keeps.
        backend: how ranks communicate.

    Raises:
        PlanError: it does not fit either way; says what does not fit where.
    """
    gpu = all(n.info.gpu for n in members)
    latency_s = _latency_s(links)
    machines = measured_machines(config, members, links, backend)
    problems: list[str] = []
    for description, weights in _weightings(members, placement.node_weights):
        plan, reason = choose_plan.choose_plan(
            spec,
            len(members),
            weights,
            placement.placement,
            placement.trunk,
            placement.node_memory_bytes,
            gpu,
            latency_s,
            machines,
        )
        problems = []
        for rank, node in enumerate(members):
            estimate = estimate_memory(dict(config), plan, rank, options, kernels, draft)
            try:
                _check_memory(node, replace(estimate, neighbors=0))
            except PlanError as error:
                problems.append(f"{node.name}: {error}")
        if not problems:
            return plan, "; ".join(filter(None, [description if len(members) > 1 else "", reason]))
    raise PlanError(" | ".join(problems))


def _weightings(
    members: Sequence[Node], node_weights: Sequence[float] | None
) -> list[tuple[str, Sequence[float]]]:
    """The node weights to try, in this order, each with its description."""
    if node_weights is not None:
        return [("node weights as requested", node_weights)]
    speeds = speed_weights(members)
    free = [float(_usable_bytes(n)) for n in members]
    by_speed = f"node weights by speed {_format_ratio(speeds)}"
    return [
        ("equal node weights" if len(set(speeds)) == 1 else by_speed, speeds),
        (f"node weights by memory {_format_ratio(free)}, as it does not fit by speed", free),
    ]


def measured_machines(
    config: Mapping[str, Any], members: Sequence[Node], links: LinksByRanks, backend: str
) -> MeasuredMachines | None:
    """The nodes and links for the performance model; None if it cannot be used.

    The read rate is each node's own measurement. The constants of its kernels are those of its
    calibration if it has one, else of its family of machines.
    """
    if len(members) == 1 or not links:
        return None
    bytes_per_s = min(link.bytes_per_s for link in links.values())
    facts = {
        "latency_us": Fact(1e6 * _latency_s(links), "M", "measured when the group was formed"),
        "gb_s": Fact(bytes_per_s / 1e9, "M", "likewise"),
    }
    topology = "ring" if backend == "ring" else "mesh"
    try:
        known = catalog.load_catalog()
        machines = tuple(_machine(known, node) for node in members)
    except CenacleError:  # the user's own catalog cannot be read
        return None
    link = catalog.CatalogLink("measured", "between the machines", topology, facts)
    constants = PaperConstants.from_fits(known.fits["paper"])
    return MeasuredMachines(config, machines, link, constants, "as measured")


def _latency_s(links: LinksByRanks) -> float:
    slowest_s = max((link.latency_s for link in links.values()), default=0.0)
    return choose_plan.ASSUMED_LATENCY_S + slowest_s


def _machine(known: catalog.Catalog, node: Node) -> Machine:
    info, family = node.info, _machine_family(node)
    numbers = {k: float(v["v"]) for k, v in known.fits["families"][family].items()}
    numbers |= info.calibration
    memory_bytes = float(info.memory_bytes or _usable_bytes(node))
    numbers |= {"memory_gib": memory_bytes / 2**30, "usd": 0.0, "watts": 0.0}
    numbers["bandwidth_gb_s"] = info.read_bytes_per_s / 1e9
    numbers.setdefault("tflops", UNMEASURED_TFLOPS)
    facts = {k: Fact(v, "M", f"the agent of {node.name}") for k, v in numbers.items()}
    return Machine(node.name, node.name, family, facts, _usable_bytes(node) / memory_bytes)


def _machine_family(node: Node) -> str:
    """The family of machines in `catalog/fits.toml` whose constants apply."""
    if node.info.metal is not None:
        chip = re.search(r"\bM(\d+)\b", node.info.processor)
        generation = int(chip[1]) if chip else 4
        if generation < 3:
            return "apple-m1-m2"
        return "apple-m3-m4" if generation < 5 else "apple-m5"
    return "nvidia-rtx" if node.info.gpu else "cpu"


def _check_memory(node: Node, estimate: memory.MemoryEstimate) -> None:
    if node.info.metal is not None:
        memory.wired_limit(node.info.metal, estimate)
    else:
        memory.check_available(node.info.available_bytes, estimate)


def _usable_bytes(node: Node) -> int:
    """Bytes that a node can give to a rank."""
    if node.info.metal is not None:
        return int(node.info.metal["max_recommended_working_set_size"])
    return node.info.available_bytes


def _format_ratio(numbers: Sequence[float]) -> str:
    if max(numbers) > 1e6:
        return ":".join(format_bytes(n) for n in numbers)
    return ":".join(f"{n:g}" for n in numbers)
