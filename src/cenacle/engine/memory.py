"""Memory that a rank needs for a plan and its engine options.

Owns: `estimate_memory`.
Does not know: what memory there is.
Next: `planning/memory.py`, the sizes of weights and caches.
"""

from __future__ import annotations

from typing import Any

from ..core.model_config import kv_cache_elements_per_token
from ..core.plan import Plan
from ..planning import memory
from .options import EngineOptions
from .speculative.draft_model import DraftModelConfig


def estimate_memory(
    config: dict[str, Any],
    plan: Plan,
    rank: int,
    options: EngineOptions,
    kernels: str,
    draft: DraftModelConfig | None = None,
) -> memory.MemoryEstimate:
    """Bytes for a rank's weights, the KV cache of one request, and a draft model.

    Args:
        config: config.json.
        kernels: see `model.expert_parallel.parallelize`; the native ones keep float32.
        draft: the draft model, which only rank 0 loads.
    """
    spec = plan.spec
    bytes_per_value = 4 if kernels == "native" or spec.dtype == "float32" else 2
    cache_bytes = memory.kv_cache_bytes(
        kv_cache_elements_per_token(config, spec.layers),
        spec.context_length,
        options.max_kv_size,
        options.kv_bits,
        bytes_per_value,
    )
    return memory.MemoryEstimate.of_rank(
        plan, rank, cache_bytes, draft.total_bytes if draft is not None else 0
    )
