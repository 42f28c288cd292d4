"""."""

from __future__ import annotations

import os

import numpy as np

from ..core.plan import Plan
from ..errors import InputError
from ..planning import load_balancer

DRAWS = 2000  # random top-k choices from which the expected bytes of a token are found


def usable_cores() -> list[int]:
    """The cores that this process may use."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return list(range(os.cpu_count() or 1))


def split_cores(nodes: int, threads: int | None) -> tuple[list[list[int]] | None, int]:
    """Each node's cores, and its threads; None if there are too few for a set each.

    Raises:
        InputError: fewer than one thread.
    """
    cores = usable_cores()
    each = threads if threads is not None else max(1, len(cores) // nodes)
    if each < 1:
        raise InputError(f"--threads: expected at least 1, got {each}", "threads")
    if nodes * each > len(cores) or not hasattr(os, "sched_setaffinity"):
        return None, each
    return [cores[i * each : (i + 1) * each] for i in range(nodes)], each


def expected_experts(plan: Plan) -> tuple[list[float], float]:
    """Whole experts' weights that a rank reads in a layer for one token, all equally likely.

    Returns:
        For each rank the mean, and E[max], the mean of what the busiest rank reads, from `DRAWS`
        random choices; both of the first MoE layer.
    """
    layer = plan.layers[0]
    count = len(layer.experts)
    share = np.zeros((count, plan.nodes))
    for expert, parts in enumerate(layer.experts):
        for part in parts:
            share[expert, part.rank] = (part.stop - part.start) / plan.width
    holders = [tuple(p.rank for p in parts) for parts in layer.experts]
    speeds = load_balancer.integer_speeds(plan.nodes, plan.node_weights)
    rng = np.random.default_rng(0)
    read = np.zeros((DRAWS, plan.nodes))
    for draw in range(DRAWS):
        chosen = rng.permutation(count)[: plan.spec.top_k]
        if plan.placement == "replicated":
            counts = np.bincount(chosen, minlength=count).tolist()
            ranks = load_balancer.assign_experts(counts, holders, speeds)
            read[draw] = np.bincount([r for r in ranks if r >= 0], minlength=plan.nodes)
        else:
            read[draw] = share[chosen].sum(axis=0)
    # Exact where no dealing decides, so that ranks with as much have the same.
    replicated = plan.placement == "replicated"
    mean = read.mean(axis=0) if replicated else share.mean(axis=0) * plan.spec.top_k
    return mean.tolist(), float(read.max(axis=1).mean())


def expected_bytes(plan: Plan) -> tuple[list[int], list[int]]:
    """Bytes of weights that each rank reads for one token, if all experts are equally likely.

    Returns:
        For each rank the mean, and for each rank what it reads where it is the busiest of every
        layer: a token waits for that one.
    """
    spec = plan.spec
    common = spec.trunk_bytes - spec.embedding_bytes - sum(p.bytes for p in spec.dense_modules)
    own = [
        common
        + sum(plan.module_bytes(p, r) for p in spec.dense_modules)
        + plan.bytes_of(r)["shared"]
        for r in range(plan.nodes)
    ]
    mean, most = expected_experts(plan)
    each = sum(m.expert_bytes for m in spec.moe)
    return (
        [int(o + m * each) for o, m in zip(own, mean, strict=True)],
        [int(o + most * each) for o in own],
    )
