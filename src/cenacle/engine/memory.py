"""Memory that a rank needs for a plan and its engine options.

Owns: `estimate_memory`.
Does not know: what memory there is.
Next: `planning/memory.py`, the sizes of weights and caches.
"""

from __future__ import annotations

from typing import Any

from ..core.model_config import find_int, kv_cache_elements_per_token
from ..core.plan import Plan
from ..model.families import family_of
from ..planning import memory
from .options import EngineOptions
from .speculative.draft_model import DraftModelConfig

# Beside those with latent attention, and those whose attention is called for each request.
FLOAT32_FAMILIES = ("deepseek_v41", "glm5_next", "inkling")


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
        kernels: see `model.expert_parallel.parallelize`.
        draft: the draft model, which only rank 0 loads.
    """
    spec = plan.spec
    if kernels == "mlx":
        dtype = spec.dtype
    elif _keeps_float32(config, spec.family):
        dtype = "float32"
    else:
        dtype = options.kept_dtype(spec.dtype)
    bytes_per_value = 4 if dtype == "float32" else 2
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


def _keeps_float32(config: dict[str, Any], family: str) -> bool:
    """Whether native attention is not all that a family does with its caches: see
    `model.kv_dtype.find_plain_attention`, which looks at the model."""
    own = family in FLOAT32_FAMILIES or bool(family_of(family).request_attention)
    latent = find_int(config, ("kv_lora_rank",)) is not None and family != "deepseek_v2"
    return own or latent
