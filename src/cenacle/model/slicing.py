"""What a rank holds of a model, worked out once.

Owns: `slices_for`, which turns a plan and a model's layout into the flat list of tensor pieces that
a rank reads, and the slices of the modules that the pieces go to.
Does not know: how bytes are read or fetched, how ranks talk.
Experts and dense layers are sliced by hidden width: rows of the layers that make it, columns of the
layer that takes it, so that the ranks' outputs add up to the whole; attention by heads; the output
head by rows of the vocabulary.
Invariant: every byte of a sliced expert is in the list of exactly one rank (of every rank that
holds a replica). The loader, the download and the checksums use this list and nothing else.
Next: `loader.py` reads it, `cluster/download/distribution.py` fetches what a node lacks of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from ..core.plan import HeadSlice, Plan
from ..errors import CheckpointError, PlanError
from . import architecture
from .architecture import OUTPUT_LAYERS, MoEBlock
from .byte_ranges import ByteRange, append_range
from .checkpoint import Checkpoint
from .disk_tables import is_table_tensor, rows_of_tensor
from .families import EXPERT_TENSOR, STACKED_TENSOR, Family, family_of, layer_index
from .mtp import is_mtp_tensor
from .quantized_layers import QuantizedLayers
from .tensor_info import TensorInfo
from .tensor_layout import ExpertSlice, expert_tensor_views
from .tensor_reader import TensorPiece, TensorView
from .tensor_slice import (
    COLUMNS,
    ROWS,
    TensorSlice,
    UnitRange,
    feature_counts,
    scale_range,
    slice_mlp,
)

HEAD_NAMES = ("n_heads", "num_heads", "num_attention_heads")
KV_HEAD_NAMES = ("n_kv_heads", "num_kv_heads", "num_key_value_heads")
GROUP_SIZE_NAMES = ("num_key_value_groups", "n_rep")
PER_HEAD_VECTORS = ("sinks", "attention_sink_bias")
O_PROJ = ("o_proj", "out_proj")


@dataclass(frozen=True)
class ModelLayout:
    """A whole model before it is divided: mlx-lm's modules, unloaded, and the checkpoint's tensors.

    Args:
        model: mlx-lm's model with stacked experts; its arrays are never evaluated.
        family: what is special about it.
        blocks: its MoE blocks, by layer.
        tensors: the checkpoint's of the language model, by name.
        quantized: those of its layers that have another format than MLX's own.
        tower: tensors of what sees images.
    """

    model: nn.Module
    family: Family
    blocks: tuple[MoEBlock, ...]
    tensors: Mapping[str, TensorInfo]
    quantized: QuantizedLayers
    tower: Mapping[str, TensorInfo] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, checkpoint: Checkpoint) -> ModelLayout:
        """The layout of a whole model with stacked experts.

        Raises:
            CheckpointError: the model has no experts, or not equally many in every layer.
        """
        blocks = architecture.find_blocks(model)
        if not blocks:
            raise CheckpointError(
                f"{checkpoint.folder}: {checkpoint.config['model_type']} is a dense model, it has "
                f"no experts to distribute; mlx-lm runs it on one machine"
            )
        counts = {b.expert_count for b in blocks}
        if len(counts) > 1:
            raise CheckpointError(
                f"{checkpoint.folder}: layers with different numbers of experts "
                f"({sorted(counts)}) are not supported"
            )
        name_of_family = architecture.resolve_family(checkpoint.config)
        family = family_of(name_of_family)
        needed = {
            name: info
            for name, info in checkpoint.text_tensors.items()
            if name not in checkpoint.quantized.ignored
            and not _is_image_expert(name, counts)
            and not is_mtp_tensor(name, name_of_family, checkpoint.config)
        }
        tower = checkpoint.vision_tensors
        return cls(model, family, tuple(blocks), needed, checkpoint.quantized, tower)

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> ModelLayout:
        """The layout of a checkpoint; reads no weights.

        Raises:
            CheckpointError: see `of`; or an unknown family.
        """
        with architecture.discard_random_init():
            model_class, args_class = architecture.model_classes(checkpoint.config)
            model = model_class(args_class.from_dict(checkpoint.config))  # type: ignore[call-arg]
            architecture.unify_experts(model)
        return cls.of(model, checkpoint)

    @property
    def expert_count(self) -> int:
        """Routed experts of every layer."""
        return self.blocks[0].expert_count


def _is_image_expert(name: str, counts: set[int]) -> bool:
    """Whether a tensor is an expert after those of text, which only tokens of images choose."""
    single = EXPERT_TENSOR.fullmatch(name)
    return single is not None and int(single["expert"]) >= max(counts)


@dataclass(frozen=True)
class LocalHeads:
    """A rank's heads of an attention module.

    Args:
        heads, kv_heads: how many.
        query_width: features of its queries where q, k and v are one projection, else None.
    """

    heads: int
    kv_heads: int
    query_width: int | None = None


@dataclass(frozen=True)
class RankSlices:
    """What one rank holds of a model.

    Args:
        tensors: what it reads of the checkpoint, by file and position. All of a sharded trunk is
            listed, since mlx-lm may convert it before it is sliced.
        experts: by layer the ids of the routed experts that it holds, ascending.
        modules: slices of modules, by path.
        unread: those of `modules` that `tensors` does not slice: applied after the conversion.
        attention: attention modules with fewer heads, by path.
        absent: paths of shared experts that other ranks hold.
        expert_slices: by layer the slice of experts that `tensors` has.
        tables: by path the units of the rows of tables on disk: first, end, of how many.
        tower: what it reads of the vision tower, which is no part of the model.
    """

    tensors: tuple[TensorPiece, ...]
    experts: Mapping[int, tuple[int, ...]]
    modules: Mapping[str, TensorSlice] = field(default_factory=dict)
    unread: Mapping[str, TensorSlice] = field(default_factory=dict)
    attention: Mapping[str, LocalHeads] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    expert_slices: Mapping[int, ExpertSlice] = field(default_factory=dict)
    tables: Mapping[str, UnitRange] = field(default_factory=dict)
    tower: tuple[TensorPiece, ...] = ()

    @classmethod
    def whole(cls, layout: ModelLayout) -> RankSlices:
        """Those of a rank that holds the whole model."""
        experts = {b.layer: tuple(range(layout.expert_count)) for b in layout.blocks}
        return cls(_list_pieces(layout, experts, {}, (), {}), experts)

    def is_absent(self, name: str) -> bool:
        """Whether a tensor or parameter belongs to shared experts that another rank holds."""
        return _is_in(name, self.absent)


def _is_in(name: str, paths: tuple[str, ...]) -> bool:
    """Whether a name is that of shared experts at one of the paths, whatever comes before them."""
    layer = layer_index(name)
    return any(f".{p.rpartition('.')[2]}." in name and layer_index(p) == layer for p in paths)


def slices_for(plan: Plan, rank: int, layout: ModelLayout) -> RankSlices:
    """What `rank` holds of a model.

    Raises:
        PlanError: the plan is of another model; with it, wrong experts would answer.
        CheckpointError: a slice does not end at a border of quantization groups.
    """
    expected = [(b.layer, b.expert_count) for b in layout.blocks]
    got = [(p.layer, len(p.experts)) for p in plan.layers]
    if got != expected:
        raise PlanError(
            f"the plan is of another model: expected (layer, experts) {expected}, got {got}"
        )
    trunk, attention = _slice_trunk(layout.model, plan, rank)
    tables = {
        part.path: (*plan.rows_of(part, rank), part.units)
        for part in plan.spec.dense_modules
        if part.kind == "table" and plan.is_sharded(part)
    }
    experts: dict[int, tuple[int, ...]] = {}
    stacked: dict[str, TensorSlice] = {}
    sliced_layers: dict[int, ExpertSlice] = {}
    absent: list[str] = []
    for block, layer in zip(layout.blocks, plan.layers, strict=True):
        experts[block.layer] = layer.experts_of(rank)
        start, stop = layer.slice_of(rank)
        if stop - start < plan.width:
            units = (start, stop, plan.width)
            outputs, width = feature_counts(block.output)
            sliced_layers[block.layer] = ExpertSlice(units, width, outputs)
            for name in block.linears:
                axis = COLUMNS if name in OUTPUT_LAYERS else ROWS
                path = f"{block.experts_path}.{name}"
                stacked[path] = TensorSlice(axis, scale_range(units, width), width)
        span = layer.shared_slice_of(rank)
        for name in block.shared_names if not block.all_reduces_inside(layout.family) else ():
            path = f"{block.path}.{name}"
            if span is None:
                absent.append(path)
            elif len(layer.shared) > 1:
                trunk |= slice_mlp(path, block.module[name], (*span, layer.shared[-1].stop))
    has_tower = rank == 0 and plan.spec.tower_bytes
    tower = tuple(map(TensorPiece, layout.tower.values())) if has_tower else ()
    shapes = {name: t.shape for name, t in layout.tensors.items()}
    views = expert_tensor_views(
        shapes, sliced_layers, layout.expert_count, layout.family, layout.quantized
    )
    return RankSlices(
        _list_pieces(layout, experts, views, tuple(absent), tables),
        experts,
        modules=trunk | stacked,
        unread=trunk if views else trunk | stacked,
        attention=attention,
        absent=tuple(absent),
        expert_slices=sliced_layers if views else {},
        tables=tables,
        tower=tower,
    )


def required_ranges(
    slices: RankSlices, column_gap_bytes: int = 1 << 16
) -> dict[str, list[ByteRange]]:
    """The bytes of each file that a rank reads, ascending, each once.

    Args:
        column_gap_bytes: see `TensorPiece.byte_ranges`.

    Returns:
        By the file's name.
    """
    ranges: dict[str, list[ByteRange]] = {}
    pieces = (*slices.tensors, *slices.tower)
    for piece in sorted(pieces, key=lambda p: (p.tensor.file.name, p.tensor.start)):
        of_file = ranges.setdefault(piece.tensor.file.name, [])
        for byte_range in piece.byte_ranges(column_gap_bytes):
            append_range(of_file, byte_range)
    return ranges


def _list_pieces(
    layout: ModelLayout,
    experts: Mapping[int, tuple[int, ...]],
    views: Mapping[str, TensorView],
    absent: tuple[str, ...],
    tables: Mapping[str, UnitRange],
) -> tuple[TensorPiece, ...]:
    rows = {layer_index(path): units for path, units in tables.items()}
    pieces = []
    for name, tensor in layout.tensors.items():
        layer = layer_index(name)
        held = experts.get(layer) if layer is not None else None
        if is_table_tensor(name):
            pieces.append(_table_piece(tensor, rows.get(layer)))
            continue
        piece = _piece_of(tensor, held, layout.expert_count, views.get(name))
        if piece is not None and not _is_in(name, absent):
            pieces.append(piece)
    return tuple(sorted(pieces, key=lambda p: (p.tensor.file.name, p.tensor.start)))


def _table_piece(tensor: TensorInfo, units: UnitRange | None) -> TensorPiece:
    """The rows of a table that a rank must have on its disk."""
    if units is None or len(tensor.shape) < 2:
        return TensorPiece(tensor)
    view = TensorView((1, *tensor.shape), 1, (rows_of_tensor(tensor.shape[0], units),))
    return TensorPiece(tensor, view)


def _piece_of(
    tensor: TensorInfo, held: tuple[int, ...] | None, count: int, view: TensorView | None
) -> TensorPiece | None:
    """What is read of a tensor; None: nothing, it is another rank's expert.

    Args:
        held: ids of the experts that the rank holds of the tensor's layer; None: it has none.
    """
    if held is None or (len(held) == count and view is None):
        return TensorPiece(tensor)
    single = EXPERT_TENSOR.fullmatch(tensor.name)
    if single is not None:
        if int(single["expert"]) not in held:
            return None
        return TensorPiece(tensor, view)
    if view is None and STACKED_TENSOR.fullmatch(tensor.name) and tensor.shape:
        rows, rest = divmod(tensor.shape[0], count)
        if not rest:
            view = TensorView((count, rows, *tensor.shape[1:]))
    return TensorPiece(tensor, view, held if view is not None else (0,))


def _slice_trunk(
    model: nn.Module, plan: Plan, rank: int
) -> tuple[dict[str, TensorSlice], dict[str, LocalHeads]]:
    slices: dict[str, TensorSlice] = {}
    attention: dict[str, LocalHeads] = {}
    for part in plan.spec.dense_modules:
        if not plan.is_sharded(part):
            continue
        try:
            module = architecture.get_module(model, part.path)
        except (AttributeError, KeyError, IndexError) as error:
            raise PlanError(f"the plan is of another model: it has no {part.path}") from error
        if part.kind == "attention":
            heads = plan.heads_of(part, rank)
            sliced, attention[part.path] = _slice_attention(part.path, module, heads, part.units)
            slices |= sliced
        elif part.kind == "mlp":
            slices |= slice_mlp(part.path, module, (*plan.rows_of(part, rank), part.units))
        elif part.kind == "head":
            rows = module.weight.shape[0]
            units = (*plan.rows_of(part, rank), part.units)
            slices[part.path] = TensorSlice(ROWS, scale_range(units, rows), rows)
    return slices, attention


def head_counts(attention: nn.Module) -> tuple[int, int]:
    """Query heads and key/value heads of an attention module."""
    heads = next(getattr(attention, n) for n in HEAD_NAMES if hasattr(attention, n))
    return heads, next(getattr(attention, n) for n in KV_HEAD_NAMES if hasattr(attention, n))


def _slice_attention(
    path: str, module: nn.Module, held: HeadSlice, units: int
) -> tuple[dict[str, TensorSlice], LocalHeads]:
    heads, kv_heads = head_counts(module)
    heads_per_unit = heads // units
    start, stop = held.query_start * heads_per_unit, held.query_stop * heads_per_unit
    queries, keys = (start, stop, heads), (held.kv_start, held.kv_stop, kv_heads)
    o_name = next(n for n in O_PROJ if n in module)
    inputs = feature_counts(module[o_name])[1]
    slices = {f"{path}.{o_name}": TensorSlice(COLUMNS, scale_range(queries, inputs), inputs)}
    query_width = None
    if "Wqkv" in module:
        size = feature_counts(module.Wqkv)[0]
        head_dim = size // (heads + 2 * kv_heads)
        q, kv = heads * head_dim, kv_heads * head_dim
        ((a, b),) = scale_range(keys, kv)
        ranges = (*scale_range(queries, q), (q + a, q + b), (q + kv + a, q + kv + b))
        slices[f"{path}.Wqkv"] = TensorSlice(ROWS, ranges, size)
        query_width = (stop - start) * head_dim
    else:
        for name, part in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            size = feature_counts(module[name])[0]
            slices[f"{path}.{name}"] = TensorSlice(ROWS, scale_range(part, size), size)
    for name in PER_HEAD_VECTORS:
        if isinstance(module.get(name), mx.array):
            slices[f"{path}.{name}"] = TensorSlice(COLUMNS, ((start, stop),), heads)
    return slices, LocalHeads(stop - start, held.kv_stop - held.kv_start, query_width)
