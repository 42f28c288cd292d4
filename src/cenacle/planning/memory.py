"""Whether the weights and cache of a rank fit its machine's memory, and stay there.

Owns: the decision, from facts about the machine and the plan's bytes, before anything is loaded.
Does not know: MLX, files, how anything is loaded.
Why: Metal wires memory when it is used and releases it when it is not; the paper spent a good part
of a token on that (arXiv:2506.23635, section 4). A wired limit keeps all of it resident from the
first token on. A CPU has nothing to wire, but the Linux kernel kills a process that takes more than
there is, without a message.
Invariant: nothing here reads or changes the machine. Never run on Metal; the tests use facts that
owners of Macs have reported.
Next: `ranks/worker.py` sets the limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.plan import Plan
from ..core.units import format_bytes
from ..errors import PlanError

PLANNED_CONTEXT = 8192  # of one request; longer contexts and more requests take what is left
WORKSPACE_BYTES = 256 * 2**20  # activations of a chunk of prompt, buffers between steps
REST_BYTES = 150 * 10**6  # of a rank beside weights and caches, while no prompt is computed
SYSTEM_FRACTION = 1 / 16  # of a Mac's memory that no setting should take from the system,
SYSTEM_BYTES = 4 * 2**30  # nor less than this


@dataclass(frozen=True)
class MemoryEstimate:
    """What a rank keeps in memory, in bytes.

    Args:
        rank: its number.
        weights: of the plan.
        kv_cache: for the context that is planned for.
        neighbors: what other ranks on the same machine keep.
        draft_model: its weights and cache.
        loading: what it needs beside the weights while it loads them, and before there is a cache.
    """

    rank: int
    weights: int
    kv_cache: int
    neighbors: int = 0
    draft_model: int = 0
    loading: int = 0

    @classmethod
    def of_rank(cls, plan: Plan, rank: int, kv_cache: int, draft_model: int = 0) -> MemoryEstimate:
        """What `rank` keeps if all ranks are on one machine; the draft model is rank 0's."""
        weights = [plan.bytes_of(r)["total"] for r in range(plan.nodes)]
        own_draft = draft_model if rank == 0 else 0
        loading = [plan.loading_bytes_of(r) for r in range(plan.nodes)]
        cache = [max(kv_cache, at_start) + WORKSPACE_BYTES for at_start in loading]
        neighbors = sum(weights) + sum(cache) - weights[rank] - cache[rank]
        neighbors += draft_model - own_draft
        return cls(rank, weights[rank], kv_cache, neighbors, own_draft, loading[rank])

    @property
    def unshared(self) -> int:
        """Bytes of this rank alone."""
        cache = max(self.kv_cache, self.loading)
        return self.weights + cache + self.draft_model + WORKSPACE_BYTES

    @property
    def total(self) -> int:
        """Bytes of all ranks of the machine."""
        return self.unshared + self.neighbors

    def __str__(self) -> str:
        """For messages."""
        others = f" and {format_bytes(self.neighbors)} of its neighbors" if self.neighbors else ""
        draft = f"draft model {format_bytes(self.draft_model)}, " if self.draft_model else ""
        cache = f"KV cache {format_bytes(self.kv_cache)}"
        if self.loading > self.kv_cache:
            cache = f"loading them {format_bytes(self.loading)}"
        return (
            f"rank {self.rank} needs {format_bytes(self.total)} of memory (weights "
            f"{format_bytes(self.weights)}, {cache}, {draft}"
            f"workspace {format_bytes(WORKSPACE_BYTES)}{others})"
        )


@dataclass(frozen=True)
class MemoryUse:
    """What a running rank's resident memory is made of, in bytes.

    Args:
        resident: as the system says.
        weights: of the plan; those of a draft model are not counted.
        caches: of running requests at full length, and of ended ones.
    """

    resident: int
    weights: int
    caches: int

    @property
    def rest(self) -> int:
        """The program, its libraries, buffers, and what it ought not to keep."""
        return max(0, self.resident - self.weights - self.caches)

    @property
    def limit(self) -> int:
        """What is expected at most; activations of a prompt come on top while it is computed."""
        return self.weights + self.caches + REST_BYTES


@dataclass(frozen=True)
class MemoryShare:
    """What one of several models may take of the memory that a machine has left.

    Args:
        parts: into so many the memory for caches is divided.
        reserved_bytes: that others were promised and do not use yet.
        limit_bytes: for all of this model; None: no limit.
    """

    parts: int = 1
    reserved_bytes: int = 0
    limit_bytes: int | None = None

    def of(self, available_bytes: int, weights: int) -> int:
        """Bytes for caches and workspace, of those that are available once weights are loaded."""
        free = available_bytes - self.reserved_bytes
        if self.limit_bytes is not None:
            free = min(free, self.limit_bytes - weights)
        return max(0, free) // self.parts


def kv_cache_bytes(
    elements_per_token: int,
    context_length: int | None,
    max_kv_size: int | None,
    kv_bits: int | None,
    element_bytes: int,
) -> int:
    """Bytes of keys and values of one long request.

    Args:
        elements_per_token: see `model_config.kv_cache_elements_per_token`.
        context_length: the model's; None: unknown.
        max_kv_size: most positions that are kept; None: all.
        kv_bits: of a quantized cache (with 32 bits of scale and bias for 64 elements), or None.
        element_bytes: of an element that is not quantized.
    """
    positions = min(max_kv_size or PLANNED_CONTEXT, context_length or PLANNED_CONTEXT)
    bits = kv_bits + 0.5 if kv_bits else 8 * element_bytes
    return math.ceil(elements_per_token * positions * bits / 8)


def kv_cache_budget(available_bytes: int, ranks: int, planned_bytes: int) -> int:
    """Bytes that a rank's caches of running requests may take, unless configured.

    Half of what is available: joining and leaving a batch copies a layer's caches, and other
    programs need memory too.

    Args:
        available_bytes: of the machine, after the weights of its ranks were loaded.
        ranks: how many share the machine.
        planned_bytes: of one long request, which was planned for; never less.
    """
    return max(planned_bytes, (available_bytes // ranks - WORKSPACE_BYTES) // 2)


def wired_limit(device_info: Mapping[str, Any], estimate: MemoryEstimate) -> int:
    """The wired limit to set on a Mac before loading, in bytes.

    Args:
        device_info: `mx.device_info()` on Metal: "memory_size" and
            "max_recommended_working_set_size", the system's limit, by its own choice or as set by
            `iogpu.wired_limit_mb`.
        estimate: what is to stay resident.

    Raises:
        PlanError: it is more than the system wires; says what raises the limit, if anything does.
    """
    memory, allowed = device_info["memory_size"], device_info["max_recommended_working_set_size"]
    if estimate.total <= allowed:
        return estimate.unshared
    shortage = (
        f"{estimate}, but this machine wires at most {format_bytes(allowed)} of its "
        f"{format_bytes(memory)}"
    )
    command = wired_limit_command(memory, estimate.total)
    if command is None:
        raise PlanError(f"{shortage}: use more nodes, other node weights or a lower quantization")
    raise PlanError(
        f"{shortage}; `{command}` raises the limit until the next restart, or use more nodes"
    )


def wired_limit_command(memory_bytes: float, needed_bytes: float) -> str | None:
    """The command that lets a Mac wire `needed_bytes`, or None if its memory is too small.

    By default Metal wires about 75 % of memory at most. A sixteenth, at least 4 GiB, is left to the
    system whatever is set.
    """
    if needed_bytes > memory_bytes - max(SYSTEM_BYTES, memory_bytes * SYSTEM_FRACTION):
        return None
    return f"sudo sysctl iogpu.wired_limit_mb={math.ceil(needed_bytes / 2**20)}"


def check_available(available_bytes: int, estimate: MemoryEstimate) -> None:
    """Refuse a plan that does not fit the memory that is available.

    Raises:
        PlanError: it needs more.
    """
    if estimate.total > available_bytes:
        raise PlanError(
            f"{estimate}, but {format_bytes(available_bytes)} are available on this machine: stop "
            f"other programs, use more machines or a lower quantization"
        )
