"""."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil

from .collective.mesh import COMM_DTYPES
from .core.plan import Plan
from .engine.options import EngineOptions
from .errors import InputError
from .model.checkpoint import Checkpoint, locate_checkpoint
from .model.spec_reader import read_model_spec
from .planning import choose_plan, plan_cost
from .planning.memory import MemoryEstimate, check_available, kv_cache_budget
from .ranks.local_ranks import resolve_backend as choose_backend
from .scheduler.prefix_index import CacheFootprint
from .scheduler.scheduler import Scheduler
from .text.tokenizer import ChatTokenizer

ACTIVATIONS = ("int16", "int8")


@dataclass(frozen=True)
class LoadOptions:
    """Which model to load, where, and how to run it.

    The same names are keyword arguments of `cenacle.load`, options of the command line (with
    dashes) and keys in JSON.

    Args:
        model: a folder, or the name of a Hub repository.
        nodes: number of ranks.
        node_weights: relative speeds of the ranks; None: equal.
        placement: of the experts: "whole", each on one rank; "sliced", a part of each on every
            rank; "replicated", whole ones on several ranks; "auto": whole or sliced, whichever the
            cost model predicts to be faster.
        trunk: "replicated": attention, dense layers and head on every rank; "sharded": divided
            where the family allows it, for one more all-reduce each; "auto": as above.
        node_memory_bytes: bytes of weights per rank, for placement "replicated": as many replicas
            as fit.
        plan: a saved plan; overrides all of these.
        backend: "mesh", "ring", "mpi", "jaccl" or "nccl"; "auto": the mesh if this installation has
            it, else the ring.
        comm_dtype: "f32", or "bf16": the mesh sends each rank's part rounded to bfloat16, half the
            bytes.
        latency_s: seconds added to every all-reduce, to study a slower link.
        kernels: "native": Cenacle's own for CPUs; "mlx"; "auto": native where possible.
        activations: "int16" or "int8", inside quantised layers of the native kernels; int8 is less
            exact (docs/performance.md).
        draft_model: a small model with the same tokenizer (folder or Hub repository) for
            speculative decoding while one request runs; rank 0 keeps it. None: n-gram drafts only.
        speculative: draft tokens for a request that runs alone: "auto", while it pays; "always";
            "off".
        max_batch_size: most requests that are generated at once.
        max_queue: most requests that wait; None: any number.
        kv_cache_gb: gigabytes on each rank for the KV caches of running requests; None: half of the
            memory that is left.
        prefix_cache_gb: gigabytes on each rank for the KV caches of completed requests; None: an
            eighth of the memory that is left; 0: off.
        prefix_cache_disk_gb: gigabytes on each rank's disk for the same; 0: off.
        prefix_cache_dir: folder for those; None: `paths.prefix_cache_dir`.
        prefill_chunk_size: most prompt tokens per step.
        kv_bits: bits of a quantised KV cache, 4 or 8; None: not quantised.
        kv_group_size: group size of a quantised KV cache.
        max_kv_size: most positions in a KV cache (the first four and the last); None: all.
        measure_every: one step in this many is measured; 0: none.
        recover: restart the ranks when one fails, and resume every request; else the first failure
            is final.
        verify: verify the group before it serves: True: always; None: unless this plan passed on
            these machines before; False: never.
        cores: for each rank the cores that it may run on; None: all.
        threads: of the native kernels in each rank; None: its share of the cores.

    Raises:
        InputError: an unknown value.
    """

    model: str
    nodes: int = 1
    node_weights: Sequence[float] | None = None
    placement: str = "auto"
    trunk: str = "auto"
    node_memory_bytes: Sequence[int] | None = None
    plan: Plan | None = None
    backend: str = "auto"
    comm_dtype: str = "f32"
    latency_s: float = 0.0
    kernels: str = "auto"
    activations: str = "int16"
    draft_model: str | None = None
    speculative: str = "auto"
    max_batch_size: int = 32
    max_queue: int | None = None
    kv_cache_gb: float | None = None
    prefix_cache_gb: float | None = None
    prefix_cache_disk_gb: float = 0.0
    prefix_cache_dir: str | None = None
    prefill_chunk_size: int = 512
    kv_bits: int | None = None
    kv_group_size: int = 64
    max_kv_size: int | None = None
    measure_every: int = 8
    recover: bool = True
    verify: bool | None = False
    cores: Sequence[Sequence[int]] | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.activations not in ACTIVATIONS:
            raise InputError(
                f"activations: expected one of {', '.join(ACTIVATIONS)}, got {self.activations!r}",
                "activations",
            )
        if self.comm_dtype not in COMM_DTYPES:
            raise InputError(
                f"comm_dtype: expected one of {', '.join(COMM_DTYPES)}, got {self.comm_dtype!r}",
                "comm_dtype",
            )
        if self.prefix_cache_dir is not None:
            folder = Path(self.prefix_cache_dir).expanduser()
            if folder.exists() and not folder.is_dir():
                raise InputError(
                    f"prefix_cache_dir: expected a folder or the name of a new one, got the file "
                    f"{folder}",
                    "prefix_cache_dir",
                )

    @property
    def engine(self) -> EngineOptions:
        """What the ranks are told of these."""
        return EngineOptions(
            prefill_chunk_size=self.prefill_chunk_size,
            max_batch_size=self.max_batch_size,
            kv_bits=self.kv_bits,
            kv_group_size=self.kv_group_size,
            max_kv_size=self.max_kv_size,
            max_queue=self.max_queue,
            kv_cache_gb=self.kv_cache_gb,
            prefix_cache_gb=self.prefix_cache_gb,
            speculative=self.speculative,
            prefix_cache_disk_gb=self.prefix_cache_disk_gb,
            prefix_cache_dir=self.prefix_cache_dir,
        )


def inspect(model: str, nodes: int = 1, **options: Any) -> Plan:
    """The plan that `load` would use for a checkpoint; reads no weights.

    Args:
        model, nodes, options: see `LoadOptions`.

    Raises:
        CheckpointError, PlanError: see those.
    """
    return choose(LoadOptions(model, nodes, **options))[0]


def choose(options: LoadOptions) -> tuple[Plan, str]:
    """As `inspect`, with one line that says why this plan was chosen (may be empty)."""
    return _choose(Checkpoint.open(locate_checkpoint(options.model)), options)


def _choose(checkpoint: Checkpoint, options: LoadOptions) -> tuple[Plan, str]:
    if options.plan is not None:
        return options.plan, ""
    gpu = mx.default_device().type != mx.DeviceType.cpu
    latency = choose_plan.ASSUMED_LATENCY_S + options.latency_s
    nodes = options.nodes
    found = (
        plan_cost.local_measurements(checkpoint.config, nodes, options.latency_s)
        if nodes > 1
        else ""
    )
    return choose_plan.choose_plan(
        read_model_spec(checkpoint),
        nodes,
        options.node_weights,
        options.placement,
        options.trunk,
        options.node_memory_bytes,
        gpu,
        latency,
        None if isinstance(found, str) else found,
    )


def _scheduler(
    ready: Sequence[dict[str, Any]],
    options: EngineOptions,
    measure_every: int,
    planned: int,
    sharing: int,
) -> Scheduler:
    """From what the ranks said when they were ready; `sharing` of them are on one machine."""
    kv_bytes, footprint, cache_bytes = _room(ready, options, planned, sharing)
    return Scheduler(
        options.max_batch_size,
        measure_every,
        prefill_chunk_size=options.prefill_chunk_size,
        max_queue=options.max_queue,
        kv_cache_bytes=kv_bytes,
        footprint=footprint,
        prefix_cache_bytes=cache_bytes,
        disk_bytes=int(options.prefix_cache_disk_gb * 1e9),
    )


def _room(
    ready: Sequence[dict[str, Any]], options: EngineOptions, planned: int, sharing: int
) -> tuple[int | None, CacheFootprint, int]:
    """Bytes for caches of running requests, what these take, and bytes for caches that are kept."""
    footprint = CacheFootprint.maximum(CacheFootprint.from_json(r["footprint"]) for r in ready)
    left = min(r["memory_left"] for r in ready)
    budget = kv_cache_budget(left, sharing, planned)
    if options.kv_cache_gb is not None:
        budget = int(options.kv_cache_gb * 1e9)
    kept = kv_cache_budget(left, sharing, 0) // 4
    if options.prefix_cache_gb is not None:
        kept = int(options.prefix_cache_gb * 1e9)
    return budget, footprint, kept


def _check_comm_dtype(options: LoadOptions) -> None:
    nodes = options.plan.nodes if options.plan is not None else options.nodes
    backend, _ = choose_backend(options.backend, nodes)
    if options.comm_dtype != "f32" and nodes > 1 and backend != "mesh":
        raise InputError(
            f"comm_dtype: expected f32, since the backend {backend} sends vectors unchanged, got "
            f"{options.comm_dtype!r}; use --backend mesh",
            "comm_dtype",
        )


def _check_memory(need: MemoryEstimate) -> None:
    """On Linux CPUs all ranks' weights come out of the available memory."""
    if sys.platform == "linux" and mx.default_device().type == mx.DeviceType.cpu:
        check_available(psutil.virtual_memory().available, need)


def _text(checkpoint: Checkpoint) -> ChatTokenizer | None:
    """None for a folder without any tokenizer: it can be asked with ids."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    found = any((checkpoint.folder / n).exists() for n in names)
    if not found and not any(checkpoint.folder.glob("*.tiktoken")):
        return None
    return ChatTokenizer(checkpoint.folder, checkpoint.config)
