"""Tables of n-gram embeddings that stay on disk: a token needs a few rows of hundreds of gigabytes.

Owns: which tensors are such tables, and `DiskTable`, which takes the place of the embedding.
Does not know: plans, how ranks talk.
Invariant: no table is read when a model is loaded, nor counted as memory. A rank that has only some
rows gives zeros for the others, so that the sum over the ranks is the whole table's.
Next: `slicing.py` lists the rows that a rank must have on its disk; `tensor_parallel.py` adds the
all-reduce where they are divided.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .families import layer_index
from .tensor_info import DTYPES, TensorInfo

_TENSOR = re.compile(
    r".*\.(?:engram\.embed|ngram_embedding(?:\.shards?[._](?P<shard>\d+))?)\.(?P<leaf>\w+)"
)
_MODULE = re.compile(r".*\.(?:engram\.embed|ngram_embedding)")
_LEAVES = {
    **{"weight": "weight", "scale": "scales", "scales": "scales", "biases": "biases"},
    "weight_scale": "factor",  # of all shards, which are FP8
}


@dataclass(frozen=True)
class StoredShard:
    """Tensors of some rows of a table, by the names that MLX's quantized layers have."""

    leaves: Mapping[str, TensorInfo]

    @property
    def rows(self) -> int:
        """How many rows."""
        return self.leaves["weight"].shape[0]


def is_table_tensor(name: str) -> bool:
    """Whether a tensor of a checkpoint is of a table that stays on disk."""
    match = _TENSOR.fullmatch(name)
    return match is not None and match["leaf"] in _LEAVES


def rows_of_tensor(rows: int, units: tuple[int, int, int]) -> tuple[int, int]:
    """[start, stop) of the rows of a tensor that a rank holds, given its units of all units."""
    start, stop, count = units
    return rows * start // count, rows * stop // count


def install_disk_tables(
    model: nn.Module, tensors: Iterable[TensorInfo], held: Mapping[str, tuple[int, int, int]]
) -> None:
    """Replace the embeddings whose tensors are tables, in place.

    Args:
        tensors: the checkpoint's.
        held: by path of a table, the rank's units of its rows; those that are missing are whole.
    """
    tables: dict[int | None, dict[int, dict[str, TensorInfo]]] = {}
    for tensor in tensors:
        match = _TENSOR.fullmatch(tensor.name)
        if match is not None and match["leaf"] in _LEAVES:
            shards = tables.setdefault(layer_index(tensor.name), {})
            leaves = shards.setdefault(int(match["shard"] or 0), {})
            leaves[_LEAVES[match["leaf"]]] = tensor
    for shards in tables.values():
        if (factor := shards[0].get("factor")) is not None:
            for leaves in shards.values():
                leaves["factor"] = factor
    for path, module in list(model.named_modules()):
        shards = tables.get(layer_index(f"{path}."), {}) if _MODULE.fullmatch(path) else {}
        if shards:
            parent, _, name = path.rpartition(".")
            width = module.dims if "shards" in module else module.weight.shape[-1]
            stored = [StoredShard(shards[number]) for number in sorted(shards)]
            owner = model
            for step in parent.split("."):
                owner = owner[int(step)] if step.isdigit() else getattr(owner, step)
            # mlx-vlm dequantizes Engram's tables to bfloat16, others as MLX's layers do.
            dtype = mx.bfloat16 if name == "embed" else None
            setattr(owner, name, DiskTable(stored, width, held.get(path, (0, 1, 1)), dtype))


class DiskTable(nn.Module):
    """An embedding whose rows are read from a checkpoint's files when they are asked for.

    Args:
        shards: the tensors, in order of their rows.
        width: of a row.
        units: which of the rows of each shard this rank has: first, end, of how many.
        dtype: of dequantized rows; None: that of their scales.
    """

    def __init__(
        self,
        shards: list[StoredShard],
        width: int,
        units: tuple[int, int, int],
        dtype: mx.Dtype | None = None,
    ) -> None:
        super().__init__()
        self._dtype = dtype
        self._shards, self._width, self._units = shards, width, units
        self._borders = np.cumsum([0, *(shard.rows for shard in shards)])
        self._maps: dict[tuple[int, str], np.ndarray] = {}

    @property
    def rows(self) -> int:
        """Rows of the whole table."""
        return int(self._borders[-1])

    def __call__(self, ids: mx.array) -> mx.array:
        """Rows [...] -> [..., width]; evaluates the ids."""
        positions = np.asarray(ids).reshape(-1)
        numbers = np.searchsorted(self._borders, positions, side="right") - 1
        result: mx.array | None = None
        for number in np.unique(numbers).tolist():
            shard = self._shards[number]
            local = positions - self._borders[number]
            first, end = rows_of_tensor(shard.rows, self._units)
            held = np.flatnonzero((numbers == number) & (local >= first) & (local < end))
            rows = self._read(number, local[held])
            if result is None:
                result = mx.zeros((positions.size, self._width), rows.dtype)
            if held.size:
                result[mx.array(held)] = rows
        assert result is not None, "an embedding is asked for at least one row"
        return result.reshape(*ids.shape, self._width)

    def _read(self, number: int, rows: np.ndarray) -> mx.array:
        shard = self._shards[number]
        leaves = {}
        for leaf, tensor in shard.leaves.items():
            if leaf == "factor":
                continue
            # Scales of FP8 may be those of several rows.
            per_row = -(-shard.rows // tensor.shape[0])
            read = mx.array(self._map(number, leaf)[rows // per_row])
            leaves[leaf] = read.view(DTYPES[tensor.dtype][2])
        if (factor := shard.leaves.get("factor")) is not None:
            scale = mx.array(self._map(number, "factor")).view(DTYPES[factor.dtype][2])
            return mx.from_fp8(leaves["weight"], dtype=mx.bfloat16) * scale.reshape(())
        if "scales" not in leaves:
            return leaves["weight"]
        words = leaves["weight"].view(mx.uint32)
        scales = leaves["scales"]
        size = words.shape[-1] * 32 // self._width, self._width // scales.shape[-1]
        modes = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}
        mode = modes[size] if scales.dtype == mx.uint8 else "affine"
        biases = leaves.get("biases")
        return mx.dequantize(words, scales, biases, size[1], size[0], mode, dtype=self._dtype)

    def _map(self, number: int, leaf: str) -> np.ndarray:
        """A tensor's rows as they are in the file."""
        if (number, leaf) not in self._maps:
            tensor = self._shards[number].leaves[leaf]
            self._maps[number, leaf] = np.memmap(
                tensor.file, DTYPES[tensor.dtype][1], "r", tensor.start, tensor.shape
            )
        return self._maps[number, leaf]
