"""Whether a rank's weights and cache fit its machine's memory, and stay there.

Owns: the decision, from the machine's facts and the plan's bytes, before anything is loaded.
Does not know: MLX, files, how anything is loaded; `engine/worker.py` applies what is decided.
Why: Metal wires memory when it is used and lets it go when it is not; the paper spent a good part
of a token on that (arXiv:2506.23635, section 4). A wired limit keeps all of it resident from the
first token on. On a CPU there is nothing to wire, but the kernel ends a process that takes more
than there is, without a word.
Invariant: nothing here reads or changes the machine. Never run on Metal; the tests use facts that
Macs have reported.
Next: `engine/worker.py`, where the two lines are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.plan import Plan
from ..core.units import format_bytes
from ..errors import PlanError
from .perf_model import wired_limit_command

PLANNED_CONTEXT = 8192  # of one request; longer contexts and more requests take what is left
WORKSPACE_BYTES = 256 * 2**20  # activations of a chunk of prompt, buffers between steps


@dataclass(frozen=True)
class MemoryEstimate:
    """What a rank keeps in memory, in bytes.

    Args:
        rank: whose.
        weights: what the plan gives it.
        cache: keys and values of the positions that are planned for.
        beside: what other ranks on the same machine keep.
        draft: a draft model, with its cache.
    """

    rank: int
    weights: int
    cache: int
    beside: int = 0
    draft: int = 0

    @classmethod
    def of(cls, plan: Plan, rank: int, cache: int, draft: int = 0) -> MemoryEstimate:
        """What `rank` keeps, where all ranks of the plan are on one machine; the draft model is
        rank 0's."""
        others = [r for r in range(plan.nodes) if r != rank]
        beside = sum(plan.bytes_of(r)["total"] + cache + WORKSPACE_BYTES for r in others)
        own = draft if rank == 0 else 0
        return cls(rank, plan.bytes_of(rank)["total"], cache, beside + draft - own, own)

    @property
    def own(self) -> int:
        """Bytes of this rank alone."""
        return self.weights + self.cache + self.draft + WORKSPACE_BYTES

    @property
    def total(self) -> int:
        """Bytes of all ranks of the machine."""
        return self.own + self.beside

    def __str__(self) -> str:
        """For messages."""
        beside = f" and {format_bytes(self.beside)} of its neighbours" if self.beside else ""
        draft = f"draft model {format_bytes(self.draft)}, " if self.draft else ""
        return (
            f"rank {self.rank} needs {format_bytes(self.total)} of memory (weights "
            f"{format_bytes(self.weights)}, cache {format_bytes(self.cache)}, {draft}workspace "
            f"{format_bytes(WORKSPACE_BYTES)}{beside})"
        )


def kv_cache_bytes(
    kept: int, context: int | None, max_kv_size: int | None, kv_bits: int | None, width: int
) -> int:
    """Bytes of keys and values of one long request.

    Args:
        kept: numbers kept per position, see `model_config.kv_cache_elements_per_token`.
        context: the model's, None if unknown.
        max_kv_size: most positions that are kept, None: all.
        kv_bits: of a quantised cache (with 32 bits of scale and bias for 64 numbers), or None.
        width: bytes of a number that is not quantised.
    """
    positions = min(max_kv_size or PLANNED_CONTEXT, context or PLANNED_CONTEXT)
    bits = kv_bits + 0.5 if kv_bits else 8 * width
    return math.ceil(kept * positions * bits / 8)


def kv_cache_budget(left: int, ranks: int, cache: int) -> int:
    """Bytes that a rank's caches of running requests may take, unless it is told otherwise.

    Half of what is left, as joining and leaving a batch copies a layer's caches, and others want
    memory too.

    Args:
        left: what the machine has when its ranks' weights are there.
        ranks: how many share the machine.
        cache: of one long request, which is what was planned for; never less.
    """
    return max(cache, (left // ranks - WORKSPACE_BYTES) // 2)


def wired_limit(facts: Mapping[str, Any], need: MemoryEstimate) -> int:
    """The wired limit to set on a Mac before loading, in bytes.

    Args:
        facts: `mx.device_info()` on Metal: "memory_size" and "max_recommended_working_set_size",
            which is the system's limit, by its own choice or as set by `iogpu.wired_limit_mb`.
        need: what is to stay resident.

    Raises:
        PlanError: it is more than the system wires; says what raises the limit, if anything does.
    """
    memory, allowed = facts["memory_size"], facts["max_recommended_working_set_size"]
    if need.total <= allowed:
        return need.own
    said = (
        f"{need}, but this machine wires at most {format_bytes(allowed)} of its "
        f"{format_bytes(memory)}"
    )
    setting = wired_limit_command(memory, need.total)
    if setting is None:
        raise PlanError(f"{said}: use more nodes, other shares or a smaller quantisation")
    raise PlanError(f"{said}; `{setting}` raises that until the next restart, or use more nodes")


def check_available(available_bytes: int, need: MemoryEstimate) -> None:
    """Refuse what a machine has no room for.

    Args:
        available_bytes: memory that is available now.
        need: what is to be loaded.

    Raises:
        PlanError: it is more than is available now.
    """
    if need.total > available_bytes:
        raise PlanError(
            f"{need}, but {format_bytes(available_bytes)} are available on this machine: "
            f"end other programs, use more machines or a smaller quantisation"
        )
