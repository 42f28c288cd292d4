"""What a model is, before any of its weights are read.

Owns: `ModelSpec`: family, layers, and how much memory each part takes.
Does not know: ranks, placements, MLX.
Invariant: `total_bytes == trunk_bytes + tower_bytes + sum of all layers' expert and shared bytes`.
Next: `plan.py` places these bytes on ranks; `model/spec_reader.py` reads the spec of a checkpoint.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MoELayer:
    """One Mixture-of-Experts layer.

    Args:
        layer: index among all the model's layers (dense ones counted).
        experts: number of routed experts.
        expert_bytes: bytes in memory of one routed expert.
        shared_bytes: bytes of the shared experts inside the block (0: none).
        units: into how many equal slices an expert's hidden width can be divided, at borders of
            quantization groups (1: it cannot).
        shared_units: the same for the shared experts.
        unsliced_bytes: part of `expert_bytes` that every rank with a slice holds (output biases).
        shared_unsliced_bytes: the same of `shared_bytes`.
    """

    layer: int
    experts: int
    expert_bytes: int
    shared_bytes: int = 0
    units: int = 1
    shared_units: int = 1
    unsliced_bytes: int = 0
    shared_unsliced_bytes: int = 0


@dataclass(frozen=True)
class DenseModule:
    """A module of the trunk that can be divided among ranks: see `Plan.trunk`.

    Args:
        path: in the model, such as "model.layers.3.self_attn".
        kind: "attention" (by heads), "mlp" (a dense layer, by hidden width), "head" (the output
            head, by rows of the vocabulary), "tied" (a head that is the embedding: divided when
            it is computed, whole in memory) or "table" (of n-grams, on disk, by rows).
        units: query heads, slices of the width, or groups of rows.
        unit_bytes: bytes of one unit.
        groups: key and value heads (attention only).
        group_bytes: bytes of one key and one value head.
    """

    path: str
    kind: str
    units: int
    unit_bytes: int
    groups: int = 0
    group_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of all units and groups."""
        return self.units * self.unit_bytes + self.groups * self.group_bytes


@dataclass(frozen=True)
class ModelSpec:
    """What a checkpoint is.

    Args:
        family: mlx-lm's module.
        layers: number of decoder layers, dense ones included.
        moe: the MoE layers, in order.
        top_k: experts chosen per token.
        trunk_bytes: bytes in memory of everything that every rank holds.
        context_length: most tokens of prompt and output together (None: the config does not say).
        vocab_size: number of token ids.
        dtype: element type of the unquantized tensors, such as "bfloat16".
        quantization: for instance "affine 4-bit, groups of 64", or None.
        dense_modules: the modules of the trunk that can be divided among ranks.
        embedding_bytes: part of `trunk_bytes`: the embedding table, of which a token reads one row.
        unsliceable_reason: why no expert can be sliced, or None.
        tower_bytes: bytes in memory of what sees images; rank 0 loads it if there are any.
    """

    family: str
    layers: int
    moe: tuple[MoELayer, ...]
    top_k: int
    trunk_bytes: int
    context_length: int | None
    vocab_size: int
    dtype: str
    quantization: str | None = None
    dense_modules: tuple[DenseModule, ...] = ()
    embedding_bytes: int = 0
    unsliceable_reason: str | None = None
    tower_bytes: int = 0

    @property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts of all layers."""
        return sum(m.experts * m.expert_bytes for m in self.moe)

    @property
    def shared_bytes(self) -> int:
        """Bytes of all shared experts of all layers."""
        return sum(m.shared_bytes for m in self.moe)

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole model on one rank."""
        return self.trunk_bytes + self.expert_bytes + self.shared_bytes + self.tower_bytes

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the fields and the totals."""
        totals = {"expert_bytes": self.expert_bytes, "total_bytes": self.total_bytes}
        return {**asdict(self), **totals}
