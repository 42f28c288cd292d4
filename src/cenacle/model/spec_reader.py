"""What a checkpoint is and how finely it can be divided, before any weights are read.

Owns: `read_model_spec`: bytes of each part of a model, and the units in which a plan may divide it.
Does not know: plans, ranks.
Next: `core/plan.py`, which places what is described here.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..core.model_config import (
    CONTEXT_LENGTH_KEYS,
    TOP_K_KEYS,
    VOCAB_SIZE_KEYS,
    Config,
    find_int,
)
from ..core.model_spec import DenseModule, ModelSpec, MoELayer
from ..errors import CheckpointError
from . import architecture
from .architecture import MoEBlock
from .checkpoint import Checkpoint
from .disk_tables import DiskTable
from .drafter_config import DFLASH, DSPARK, EAGLE3, find_form
from .families import Family, family_of, layer_index
from .image_settings import IMAGE_FAMILIES, ImageSettings, needs_extra
from .loader import build_model
from .slicing import O_PROJ, PER_HEAD_VECTORS, head_counts
from .tensor_slice import feature_counts, input_units, is_mlp, unsliced_bytes
from .vision import tower_bytes

log = logging.getLogger(__name__)

TABLE_UNITS = 64  # into which the rows of a table on disk can be divided
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embeddings", "embd")


def read_model_spec(checkpoint: Checkpoint, *, images: bool = False) -> ModelSpec:
    """What the checkpoint is and how much memory each part of it takes; reads no weights.

    The sizes are those of the model that mlx-lm would build, after its own conversions.

    Args:
        images: with the tower for images, if it has one that can be used.

    Raises:
        CheckpointError: see `build_model`, or it is a drafter.
    """
    if (form := find_form(checkpoint.config)) in (EAGLE3, DFLASH, DSPARK):
        raise CheckpointError(
            f"{checkpoint.folder}: expected a model, got a drafter ({form}); give the model for "
            f"which it was made, and this folder with --draft-model"
        )
    name = architecture.resolve_family(checkpoint.config)
    sees = images and image_obstacle(checkpoint, name) is None
    if not sees:
        _report_towers(checkpoint.folder, len(checkpoint.tensors) - len(checkpoint.text_tensors))
    model = build_model(checkpoint, None, 0)
    family, config = family_of(name), checkpoint.config
    layers = tuple(
        _describe_layer(b, family, _width_blocks(checkpoint, b))
        for b in architecture.find_blocks(model)
    )
    placed_bytes = sum(m.experts * m.expert_bytes + m.shared_bytes for m in layers)
    modules = find_dense_modules(model, family)
    dtypes: Counter[str] = Counter()
    for _, value in architecture.named_parameters(model):
        if mx.issubdtype(value.dtype, mx.floating):
            dtypes[str(value.dtype).removeprefix("mlx.core.")] += value.size
    return ModelSpec(
        family=name,
        layers=len(model.layers),
        moe=layers,
        top_k=find_int(config, TOP_K_KEYS) or 1,
        trunk_bytes=_nbytes(model) - placed_bytes,
        context_length=find_int(config, CONTEXT_LENGTH_KEYS),
        vocab_size=find_int(config, VOCAB_SIZE_KEYS) or 0,
        dtype=dtypes.most_common(1)[0][0],
        quantization=(checkpoint.gguf or checkpoint.quantized).description
        or _describe_quantization(config),
        dense_modules=modules,
        embedding_bytes=_embedding_bytes(model, modules),
        unsliceable_reason=family.unsliceable_reason,
        tower_bytes=tower_bytes(checkpoint) if sees else 0,
    )


def image_obstacle(checkpoint: Checkpoint, family: str) -> str | None:
    """Why a checkpoint cannot be shown images, as the end of a sentence; None: it can.

    Raises:
        CheckpointError: its sizes of images make no sense.
    """
    if family not in IMAGE_FAMILIES:
        return f"of family {family}, which this server cannot show images"
    settings = ImageSettings.read(checkpoint.folder, checkpoint.config, family)
    if settings is None or not checkpoint.vision_tensors:
        return f"of family {family}, but its files are without a vision tower"
    if needs_extra():
        return "served without mlx-vlm, which sees images: run `pip install 'cenacle[vlm]'`"
    return None


@cache
def _report_towers(folder: Path, count: int) -> None:
    if count:
        log.info(
            "%s: ignoring %d tensors of image or audio towers; only text is supported",
            folder,
            count,
        )


def _nbytes(module: nn.Module) -> int:
    return sum(value.nbytes for _, value in architecture.named_parameters(module))


def _describe_quantization(config: Config) -> str | None:
    q = config.get("quantization") or config.get("quantization_config")
    if not isinstance(q, dict):
        return None
    if "bits" in q:
        return f"{q.get('mode', 'affine')} {q['bits']}-bit, groups of {q.get('group_size')}"
    return str(q.get("quant_method", "unknown"))


def _width_blocks(checkpoint: Checkpoint, block: MoEBlock) -> int:
    """GGUF's blocks in an expert's hidden width; 0: MLX's own groups."""
    tensor = checkpoint.tensors.get(f"{block.experts_path}.down_proj.weight")
    is_blocks = checkpoint.gguf is not None and tensor is not None and len(tensor.shape) == 4
    return tensor.shape[2] if is_blocks and tensor is not None else 0


def _describe_layer(block: MoEBlock, family: Family, width_blocks: int) -> MoELayer:
    experts_bytes = sum(_nbytes(linear) for linear in block.linears.values())
    shared = (
        [] if block.all_reduces_inside(family) else [block.module[n] for n in block.shared_names]
    )
    shared_bytes = sum(_nbytes(m) for m in shared)
    units, unsliced = (1, 0) if family.unsliceable_reason is not None else _expert_units(block)
    units = math.gcd(units, width_blocks)
    if family.width_block > 1:
        units = math.gcd(units, feature_counts(block.output)[1] // family.width_block)
    shared_units, shared_unsliced = (1, 0) if family.whole_shared_experts else _shared_units(shared)
    return MoELayer(
        layer=block.layer,
        experts=block.expert_count,
        expert_bytes=experts_bytes // block.expert_count,
        shared_bytes=shared_bytes,
        units=units,
        shared_units=shared_units if shared_bytes else 1,
        unsliced_bytes=unsliced,
        shared_unsliced_bytes=shared_unsliced,
    )


def _expert_units(block: MoEBlock) -> tuple[int, int]:
    """Units of an expert's hidden width, and bytes of one expert that are not sliced."""
    unsliced = unsliced_bytes(block.output)
    unsliced += sum(v.global_scale.nbytes for v in block.linears.values() if "global_scale" in v)
    return input_units(block.output), unsliced // block.expert_count


def _shared_units(modules: Sequence[nn.Module]) -> tuple[int, int]:
    """The same of a block's shared experts; 1 unit if they are not plain MLPs."""
    if not modules or not all(is_mlp(m) for m in modules):
        return 1, 0
    units = math.gcd(*(input_units(m.down_proj) for m in modules))
    return units, sum(unsliced_bytes(m.down_proj) for m in modules)


def find_dense_modules(model: nn.Module, family: Family) -> tuple[DenseModule, ...]:
    """What a sharded trunk divides: dense layers, the head, and attention where it is plain."""
    blocks = architecture.find_blocks(model)
    inside_blocks = tuple(f"{b.path}." for b in blocks if b.path) + tuple(
        b.experts_path for b in blocks
    )
    modules: list[DenseModule] = []
    has_head = False
    for path, module in model.named_modules():
        name = path.rsplit(".", 1)[-1]
        in_layer = layer_index(f"{path}.") is not None
        if isinstance(module, DiskTable):
            modules.append(DenseModule(path, "table", min(TABLE_UNITS, module.rows), 0))
        elif in_layer and family.plain_attention and _is_attention(module):
            described = _describe_attention(path, module)
            modules += [described] if described is not None else []
        elif in_layer and not path.startswith(inside_blocks) and is_mlp(module):
            units = input_units(module.down_proj)
            size = _nbytes(module) - unsliced_bytes(module.down_proj)
            modules.append(DenseModule(path, "mlp", units, size // units))
        elif name == "lm_head" and isinstance(module, nn.Linear | nn.QuantizedLinear):
            has_head = True
            modules.append(_describe_rows(path, "head", module))
    tied = _find_embedding(model)
    if not has_head and tied is not None and not _has_other_head(model):
        modules.append(_describe_rows(tied[0], "tied", tied[1]))
    return tuple(sorted(modules, key=lambda m: (layer_index(f"{m.path}.") or 0, m.path)))


def _embedding_bytes(model: nn.Module, modules: Sequence[DenseModule]) -> int:
    """Bytes of the embedding table, of which a token needs one row; 0 if it is the head too."""
    embedding = _find_embedding(model)
    if embedding is None or any(m.kind == "tied" for m in modules):
        return 0
    return _nbytes(embedding[1])


def _find_embedding(model: nn.Module) -> tuple[str, nn.Module] | None:
    for path, module in model.named_modules():
        if path.rsplit(".", 1)[-1] in _EMBEDDINGS and "weight" in module:
            return path, module
    return None


def _has_other_head(model: nn.Module) -> bool:
    return any(
        path.rsplit(".", 1)[-1] in ("lm_head", "output", "head")
        for path, _ in model.named_modules()
    )


def _describe_rows(path: str, kind: str, linear: nn.Module) -> DenseModule:
    rows = linear.weight.shape[0]
    units = rows // math.gcd(rows, 16)
    return DenseModule(path, kind, units, _nbytes(linear) // units)


def _is_attention(module: nn.Module) -> bool:
    children = module.children()
    return any(o in children for o in O_PROJ) and (
        "Wqkv" in children or {"q_proj", "k_proj", "v_proj"} <= set(children)
    )


def _describe_attention(path: str, module: nn.Module) -> DenseModule | None:
    """None: heads do not end at borders of quantization groups."""
    heads, kv_heads = head_counts(module)
    output = next(module[n] for n in O_PROJ if n in module)
    head_dim = feature_counts(output)[1] // heads
    group = output.group_size if "scales" in output else 1
    units = heads
    if head_dim % group:
        units = kv_heads if head_dim * (heads // kv_heads) % group == 0 else 0
    if not units:
        return None
    query_bytes = sum(v.nbytes for n, v in architecture.named_parameters(output) if n != "bias")
    query_bytes += sum(
        module[n].nbytes for n in PER_HEAD_VECTORS if isinstance(module.get(n), mx.array)
    )
    if "Wqkv" in module:
        head_bytes = _nbytes(module.Wqkv) // (heads + 2 * kv_heads)
        unit_bytes = (query_bytes + heads * head_bytes) // units
        return DenseModule(path, "attention", units, unit_bytes, kv_heads, 2 * head_bytes)
    query_bytes += _nbytes(module.q_proj)
    kv_bytes = _nbytes(module.k_proj) + _nbytes(module.v_proj)
    return DenseModule(
        path, "attention", units, query_bytes // units, kv_heads, kv_bytes // kv_heads
    )
