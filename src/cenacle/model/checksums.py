"""Whether ranks hold the weights that they should: checksums of the words in memory.

Owns: the checksums of a loaded model's parameters, and comparing ranks with the whole model.
Does not know: files, why anything differs, who asks (`verification.py`).
How: each parameter's bytes are read as unsigned words of an element's width and added modulo 2^32;
of stacked experts each expert has its own sum. A changed byte always changes the sum, and the sums
of slices add up to that of the whole, so one rank with everything and many with slices can be
compared. Two words that changed places are not noticed; the answers to prompts are.
Next: `verification.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from . import architecture
from .families import layer_index
from .slicing import RankSlices

Checksums = dict[str, list[int]]
"""Piece -> [number of elements, sum]. A piece is a parameter ("model.norm.weight"), or one routed
expert of a parameter that stacks experts ("model.layers.1.mlp.switch_mlp.up_proj.weight[7]")."""

MODULUS = 2**32
_CHUNK_ELEMENTS = 1 << 24  # summed at a time: they are widened to 4 bytes
_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint32}


def weight_checksums(model: nn.Module) -> Checksums:
    """The checksums of a model as `load_rank_model` returns it, before anything repacks it.

    Experts are named by the ids of the model's `rank_slices`.
    """
    slices: RankSlices = model.rank_slices
    stacked = tuple(
        f"{block.experts_path}.{name}."
        for block in architecture.find_blocks(model)
        for name in block.linears
    )
    checksums = {}
    for name, array in architecture.named_parameters(model):
        layer = layer_index(name)
        if layer is None or not name.startswith(stacked):
            checksums[name] = [array.size, _sum(array)]
            continue
        for expert, part in zip(slices.experts[layer], array, strict=True):
            checksums[f"{name}[{expert}]"] = [part.size, _sum(part)]
    return checksums


def _sum(array: mx.array) -> int:
    flat = array.reshape(-1)
    flat = flat.astype(mx.uint8) if array.dtype == mx.bool_ else flat.view(_WORDS[array.dtype.size])
    total = 0
    for start in range(0, flat.size, _CHUNK_ELEMENTS):
        chunk = flat[start : start + _CHUNK_ELEMENTS]
        total += cast(int, mx.sum(chunk.astype(mx.uint32)).item())
    return total % MODULUS


@dataclass(frozen=True)
class ChecksumComparison:
    """The result of a comparison.

    Args:
        mismatches: (piece, ranks of which at least one holds something else).
        matching: how many pieces are as they should be.
        incomparable: how many could not be compared because ranks' slices of them overlap.
    """

    mismatches: tuple[tuple[str, tuple[int, ...]], ...]
    matching: int
    incomparable: int


def compare_checksums(whole: Checksums, ranks: Sequence[Checksums]) -> ChecksumComparison:
    """Compare the checksums of a group's ranks with those of the whole model on one rank.

    Args:
        whole: of a model with all experts.
        ranks: in rank order.
    """
    mismatches: list[tuple[str, tuple[int, ...]]] = []
    matching = incomparable = 0
    for piece, (size, expected) in whole.items():
        held = {rank: (c[piece][0], c[piece][1]) for rank, c in enumerate(ranks) if piece in c}
        wrong = _find_wrong_ranks(size, expected, held) if held else tuple(range(len(ranks)))
        if wrong is None:
            incomparable += 1
        elif wrong:
            mismatches.append((piece, wrong))
        else:
            matching += 1
    return ChecksumComparison(tuple(mismatches), matching, incomparable)


def _find_wrong_ranks(
    size: int, expected: int, held: Mapping[int, tuple[int, int]]
) -> tuple[int, ...] | None:
    """Ranks that hold something else; of slices, all that hold one. None: it cannot be told."""
    copies = {rank: sum_ for rank, (elements, sum_) in held.items() if elements == size}
    slices = {rank: pair for rank, pair in held.items() if rank not in copies}
    wrong = tuple(rank for rank, sum_ in copies.items() if sum_ != expected)
    if slices:
        if sum(elements for elements, _ in slices.values()) != size:
            return wrong or None
        if sum(sum_ for _, sum_ in slices.values()) % MODULUS != expected:
            wrong += tuple(slices)
    return wrong
