"""."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.plan import Plan
from ..errors import InputError
from ..model import architecture
from ..planning import memory
from .speculative.draft_model import DraftModel


@dataclass(frozen=True)
class Options:
    """How a rank runs the model.

    Args:
        prefill_chunk: most prompt tokens per step.
        batch: most requests that are generated at once.
        kv_bits: bits of a quantised KV cache, 4 or 8; None: as computed.
        kv_group_size: group size of the quantised KV cache.
        max_kv_size: keep only this many positions (the first four and the last), None: all.
        queue: most requests that wait while others are answered; None: any number.
        kv_gb: gigabytes for caches of running requests on each rank; None: half of what is left.
        speculate: draft tokens for a request that runs alone, if its cache can forget them: "auto",
            while it pays; "always"; "off".
        cache_gb: gigabytes on each rank for caches of requests that have ended, for others that
            begin alike; None: an eighth of what is left; 0: none is kept.
        cache_disk_gb: gigabytes of disk on each rank for the beginnings of prompts, which outlive
            the program; 0: nothing is written.
        cache_dir: the folder for those; None: `paths.prefix_cache_dir`.
    """

    prefill_chunk: int = 512
    batch: int = 32
    kv_bits: int | None = None
    kv_group_size: int = 64
    max_kv_size: int | None = None
    queue: int | None = None
    kv_gb: float | None = None
    cache_gb: float | None = None
    speculate: str = "auto"
    cache_disk_gb: float = 0.0
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.speculate not in WAYS:
            raise InputError(
                f"speculate: expected one of {', '.join(WAYS)}, got {self.speculate!r}", "speculate"
            )


def need_of(
    config: dict[str, Any],
    plan: Plan,
    rank: int,
    options: Options,
    kernels: str,
    draft: DraftModel | None = None,
) -> memory.MemoryEstimate:
    """What a rank of the plan will keep in memory: its weights, one request's cache, a draft model.

    Args:
        config: config.json.
        kernels: as `model.experts.parallelize`; the native ones keep float32.
        draft: what rank 0 has besides.
    """
    spec = plan.spec
    width = 4 if kernels == "native" or spec.dtype == "float32" else 2
    cache = memory.kv_cache_bytes(
        architecture.kv_cache_elements_per_token(config, spec.layers),
        spec.context_length,
        options.max_kv_size,
        options.kv_bits,
        width,
    )
    return memory.MemoryEstimate.of(plan, rank, cache, draft.bytes if draft is not None else 0)


WAYS = ("auto", "off", "always")
