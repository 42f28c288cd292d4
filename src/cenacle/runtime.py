"""."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from .collective.mesh import WIRES
from .core.plan import Plan
from .engine.options import Options
from .errors import InputError
from .model.checkpoint import Checkpoint, locate
from .model.loader import describe
from .planning import choose_plan, plan_cost
from .planning.memory import Need, cache_budget, check_available
from .ranks.local_ranks import choose
from .scheduler.prefix_index import Footprint
from .scheduler.scheduler import Scheduler
from .text.tokenizer import Text

ACTIVATIONS = ("int16", "int8")


MEMINFO = Path("/proc/meminfo")


def inspect(model: str, nodes: int = 1, **how: Any) -> Plan:
    """What a checkpoint is and how it would be placed; reads no weights.

    Args:
        model, nodes: see `load`.
        how: `shares`, `placement`, `trunk`, `budgets` and `latency_s` of `load`.

    Raises:
        CheckpointError, PlanError: see those.
    """
    return place(model, nodes, **how)[0]


def place(
    model: str,
    nodes: int = 1,
    shares: Sequence[float] | None = None,
    *,
    placement: str = "auto",
    trunk: str = "auto",
    budgets: Sequence[int] | None = None,
    latency_s: float = 0.0,
) -> tuple[Plan, str]:
    """As `inspect`, with one line that says why this plan was chosen (may be empty)."""
    checkpoint = Checkpoint.open(locate(model))
    return _choose(checkpoint, nodes, shares, placement, trunk, budgets, latency_s)


def _choose(
    checkpoint: Checkpoint,
    nodes: int,
    shares: Sequence[float] | None,
    placement: str,
    trunk: str,
    budgets: Sequence[int] | None,
    latency_s: float,
) -> tuple[Plan, str]:
    gpu = mx.default_device().type != mx.DeviceType.cpu
    latency = choose_plan.LATENCY_S + latency_s
    found = plan_cost.here(checkpoint.config, nodes, latency_s) if nodes > 1 else ""
    measured = None if isinstance(found, str) else found
    spec = describe(checkpoint)
    return choose_plan.choose(
        spec, nodes, shares, placement, trunk, budgets, gpu, latency, measured
    )


def _scheduler(
    ready: Sequence[dict[str, Any]],
    options: Options,
    measure_every: int,
    planned: int,
    sharing: int,
) -> Scheduler:
    """From what the ranks said when they were ready; `sharing` of them are on one machine."""
    kv_bytes, footprint, cache_bytes = _room(ready, options, planned, sharing)
    return Scheduler(
        options.batch,
        measure_every,
        chunk=options.prefill_chunk,
        queue=options.queue,
        kv_bytes=kv_bytes,
        footprint=footprint,
        cache_bytes=cache_bytes,
        disk_bytes=int(options.cache_disk_gb * 1e9),
    )


def _room(
    ready: Sequence[dict[str, Any]], options: Options, planned: int, sharing: int
) -> tuple[int | None, Footprint, int]:
    """Bytes for caches of running requests, what these take, and bytes for caches that are kept."""
    footprint = Footprint.largest(Footprint.of(r["footprint"]) for r in ready)
    left = min(r["memory_left"] for r in ready)
    budget = cache_budget(left, sharing, planned)
    if options.kv_gb is not None:
        budget = int(options.kv_gb * 1e9)
    kept = cache_budget(left, sharing, 0) // 4
    if options.cache_gb is not None:
        kept = int(options.cache_gb * 1e9)
    return budget, footprint, kept


def _check_wire(wire: str, backend: str, nodes: int) -> None:
    if wire not in WIRES:
        raise InputError(f"wire: expected one of {', '.join(WIRES)}, got {wire!r}", "wire")
    used, _ = choose(backend, nodes)
    if wire != "f32" and nodes > 1 and used != "mesh":
        raise InputError(
            f"wire: expected f32, since {used} exchanges vectors as they are, got {wire!r}; "
            f"use --backend mesh",
            "wire",
        )


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(
            f"cache_dir: expected a folder, or a name for a new one, got the file {folder}",
            "cache_dir",
        )


def _check_memory(need: Need) -> None:
    """On Linux CPUs all ranks' weights come out of what /proc/meminfo calls available."""
    if MEMINFO.exists() and mx.default_device().type == mx.DeviceType.cpu:
        check_available(MEMINFO.read_text(), need)


def _text(checkpoint: Checkpoint) -> Text | None:
    """None for a folder without any tokenizer: it can be asked with ids."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    found = any((checkpoint.folder / n).exists() for n in names)
    if not found and not any(checkpoint.folder.glob("*.tiktoken")):
        return None
    return Text(checkpoint.folder, checkpoint.config)
