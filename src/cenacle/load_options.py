"""Which model to load, where, and how to run it.

Owns: `LoadOptions` and the checks that need no model.
Does not know: files of models, MLX's models, what the options do.
Invariant: options that exist are valid by themselves. Importing this takes little time, so that
wrong options are refused, and ranks started, before anything large is imported.
Next: `runtime.py`, which makes a running group of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from .collective.mesh import COMM_DTYPES
from .core.plan import Plan
from .engine.options import EngineOptions
from .errors import InputError
from .paths import resolve_model

ACTIVATIONS = ("int16", "int8")


@dataclass(frozen=True)
class LoadOptions:
    """Which model to load, where, and how to run it.

    The same names are keyword arguments of `cenacle.load`, options of the command line (with
    dashes) and keys in JSON.

    Args:
        model: a folder, the name of a Hub repository, or "demo"; see `paths.resolve_model`.
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
        bandwidth_gb_s: gigabytes a second at which each rank's memory is to be read, to study other
            machines; ranks sleep, and `latency_s` is then all that an all-reduce takes (see
            `engine/emulated_machine.py`). None: as fast as possible.
        kernels: "native": Cenacle's own for CPUs; "mlx"; "auto": native where possible.
        activations: "int16" or "int8", inside quantized layers of the native kernels; int8 is less
            exact (docs/performance.md).
        draft_model: a small model with the same tokenizer, or a drafter that was made for the
            model (EAGLE-3, DFlash, DSpark), as a folder or Hub repository; rank 0 keeps it. None:
            the checkpoint's multi-token prediction layer drafts, if it has one, and the text
            itself.
        speculative: draft tokens: "auto", while it pays; "always"; "off".
        mtp: load the checkpoint's multi-token prediction layer on rank 0, if it has one.
        max_batch_size: most requests that are generated at once.
        max_queue: most requests that wait; None: any number.
        kv_cache_gb: gigabytes on each rank for the KV caches of running requests; None: half of the
            memory that is left.
        prefix_cache_gb: gigabytes on each rank for the KV caches of completed requests; None: an
            eighth of the memory that is left; 0: off.
        prefix_cache_disk_gb: gigabytes on each rank's disk for the same; 0: off.
        prefix_cache_dir: folder for those; None: `paths.prefix_cache_dir`.
        share_prefixes: API keys use each other's caches, and can learn each other's prompts.
        prefill_chunk_size: most prompt tokens per step.
        kv_dtype: of keys and values in caches beside native kernels: "auto", that of the
            checkpoint; "float32", "float16" or "bfloat16".
        kv_bits: bits of a quantized KV cache, 4 or 8; None: not quantized.
        kv_group_size: group size of a quantized KV cache.
        max_kv_size: most positions in a KV cache (the first four and the last); None: all.
        measure_every: one step in this many is measured; 0: none.
        recover: restart the ranks when one fails, and resume every request; else the first failure
            is final.
        verify: verify the group before it serves: True: always; None: unless this plan passed on
            these machines before; False: never.
        images: load what sees images on rank 0, if the checkpoint has it.
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
    bandwidth_gb_s: Sequence[float] | None = None
    kernels: str = "auto"
    activations: str = "int16"
    draft_model: str | None = None
    speculative: str = "auto"
    mtp: bool = True
    max_batch_size: int = 32
    max_queue: int | None = None
    kv_cache_gb: float | None = None
    prefix_cache_gb: float | None = None
    prefix_cache_disk_gb: float = 0.0
    prefix_cache_dir: str | None = None
    share_prefixes: bool = False
    prefill_chunk_size: int = 512
    kv_dtype: str = "auto"
    kv_bits: int | None = None
    kv_group_size: int = 64
    max_kv_size: int | None = None
    measure_every: int = 8
    recover: bool = True
    verify: bool | None = False
    images: bool = True
    cores: Sequence[Sequence[int]] | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", resolve_model(self.model))
        if self.draft_model is not None:
            object.__setattr__(self, "draft_model", resolve_model(self.draft_model))
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
        """Those that the ranks' engine needs."""
        return EngineOptions(**{f.name: getattr(self, f.name) for f in fields(EngineOptions)})
