"""Whether ranks hold the weights that they should: sums of the words in memory, and comparing them.

Owns: the sums of a loaded model's tensors, and what differs between those of ranks and those of the
whole model.
Does not know: files, why anything differs, who asks (`selftest.py`).
How: each tensor's bytes are read as unsigned words of an element's width and added modulo 2^32, for
stacked experts each by itself. A byte that is another always changes the sum; and the sums of parts
add up to that of the whole, so one rank with everything and many with slices can be compared. Two
words that changed places are not seen; that is for the self-test's answers to find.
Next: `selftest.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ..core.plan import Plan
from . import architecture
from .loader import named_parameters

Checksums = dict[str, list[int]]
"""Parameter -> how many elements a piece of it has, then the sum of each: of each expert that this
rank holds, ascending, if the parameter stacks experts; else there is one piece."""

MODULUS = 2**32
_PIECE = 1 << 24  # elements at a time: they are widened to 4 bytes
_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint32}


def weight_checksums(model: nn.Module) -> Checksums:
    """The sums of all parameters of a model as `weights.load` gives it, before it is packed."""
    stacked = tuple(
        f"{block.path}.{block.switch}.{name}."
        for block in architecture.find_blocks(model)
        for name in block.linears
    )
    found = {}
    for name, array in named_parameters(model):
        pieces = list(array) if name.startswith(stacked) else [array]
        found[name] = [pieces[0].size, *map(_sum, pieces)]
    return found


def _sum(array: mx.array) -> int:
    flat = array.reshape(-1)
    flat = flat.astype(mx.uint8) if array.dtype == mx.bool_ else flat.view(_WORDS[array.dtype.size])
    total = 0
    for at in range(0, flat.size, _PIECE):
        total += cast(int, mx.sum(flat[at : at + _PIECE].astype(mx.uint32)).item())
    return total % MODULUS


@dataclass(frozen=True)
class ChecksumComparison:
    """What comparing gave.

    Args:
        wrong: (parameter, expert or None, ranks of which at least one holds something else).
        same: how many pieces are what they should be.
        unknown: how many could not be compared: ranks' parts of them overlap.
    """

    wrong: tuple[tuple[str, int | None, tuple[int, ...]], ...]
    same: int
    unknown: int


def compare_checksums(
    whole: Checksums, plan: Plan, ranks: Sequence[Checksums]
) -> ChecksumComparison:
    """The sums of a group's ranks against those of the whole model on one rank.

    Args:
        whole: of a model with all experts.
        plan: which experts each rank holds.
        ranks: in rank order.
    """
    held = {
        layer.layer: [layer.experts_of(rank) for rank in range(plan.nodes)] for layer in plan.layers
    }
    wrong: list[tuple[str, int | None, tuple[int, ...]]] = []
    same = unknown = 0
    for name, (size, *expected) in whole.items():
        layer = architecture.layer_index(name)
        for piece, sum_ in enumerate(expected):
            found: dict[int, tuple[int, int]] = {}  # rank -> elements, sum
            for rank, sums in enumerate(ranks):
                if name not in sums:
                    continue
                own, *parts = sums[name]
                if len(expected) == 1:
                    found[rank] = own, parts[0]
                elif layer is not None and piece in (mine := held[layer][rank]):
                    found[rank] = own, parts[mine.index(piece)]
            bad = _differ(size, sum_, found)
            if bad is None:
                unknown += 1
            elif bad:
                wrong.append((name, piece if len(expected) > 1 else None, bad))
            else:
                same += 1
    return ChecksumComparison(tuple(wrong), same, unknown)


def _differ(
    size: int, expected: int, found: Mapping[int, tuple[int, int]]
) -> tuple[int, ...] | None:
    """Ranks that hold something else; of slices, all that hold one. None: it cannot be told."""
    copies = {rank: sum_ for rank, (own, sum_) in found.items() if own == size}
    slices = {rank: pair for rank, pair in found.items() if rank not in copies}
    bad = tuple(rank for rank, sum_ in copies.items() if sum_ != expected)
    if slices:
        elements = sum(own for own, _ in slices.values())
        if elements != size:
            return bad or None
        if sum(sum_ for _, sum_ in slices.values()) % MODULUS != expected:
            bad += tuple(slices)
    return bad if found else None


__all__ = ["ChecksumComparison", "Checksums", "compare_checksums", "weight_checksums"]
