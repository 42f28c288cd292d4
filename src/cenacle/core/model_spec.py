"""Facts about a model, before a byte of its weights is read.

Owns: `ModelSpec`, what a checkpoint is and how many bytes each part of it takes in memory.
Does not know: ranks, placements, MLX.
Invariant: `total_bytes == trunk_bytes + sum of all layers' expert and shared bytes`.
Next: `plan.py` deals these bytes to ranks; `model/weights.py` makes the spec of a checkpoint.
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
        shared_bytes: bytes of the shared experts that are computed inside the block (0: none).
        units: into how many equal pieces an expert's hidden width can be cut, at the borders of
            quantisation groups (1: not at all).
        shared_units: the same for the shared experts.
        unsliced_bytes: of `expert_bytes`, what each rank with a slice holds whole (output biases).
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
    """A module that every rank needs and that can be divided among ranks: see `Plan.trunk`.

    Args:
        path: where it is in the model, such as "model.layers.3.self_attn".
        kind: "attention" (by heads), "mlp" (a dense layer, by hidden width), "head" (the output
            head, by rows of the vocabulary) or "tied" (a head that is the embedding: divided when
            it is read, whole in memory).
        units: query heads, pieces of the width, or rows.
        unit_bytes: bytes of one unit.
        groups: key and value heads (attention only).
        group_bytes: bytes of one key head and one value head.
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
        family: mlx-lm's model_type.
        layers: number of decoder layers, dense ones included.
        moe: the MoE layers, in order.
        top_k: experts chosen per token.
        trunk_bytes: bytes in memory of everything that every rank holds.
        context_length: most tokens of prompt and answer together (None: the config does not say).
        vocab_size: number of token ids.
        dtype: element type of the unquantised tensors, such as "bfloat16".
        quantization: for instance "affine 4-bit, groups of 64", or None.
        dense_modules: what of the trunk can be divided among ranks.
        embedding_bytes: of `trunk_bytes`, the embedding table, of which a token reads one row.
        unsliceable_reason: why no expert can be cut, or None.
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
        return self.trunk_bytes + self.expert_bytes + self.shared_bytes

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the fields above and the sums."""
        sums = {"expert_bytes": self.expert_bytes, "total_bytes": self.total_bytes}
        return {**asdict(self), **sums}
