"""Checkpoint + plan -> this rank's model, reading only this rank's bytes.

Owns: what a checkpoint's files say of themselves, and loading by byte range.
Does not know: how experts are computed (see `experts.py`), how ranks talk.
How: mlx-lm's own loading code does everything that depends on the family (renaming, stacking,
splitting, dequantising: its `sanitize`) and on the quantisation. It is given a checkpoint in which
only this rank's experts exist, numbered from 0, and a config with that many experts; so no family
needs code of its own here. Tensors with one expert each are MLX's lazy arrays, read when they are
evaluated; of a tensor that stacks a layer's experts only this rank's rows are read.
Where a plan cuts experts, their tensors are cut before `sanitize` if their names and shapes say
which axis is the hidden width (`cuts.py`), and after it if not: then each is read entirely, one at
a time. What is cut of the trunk passes through `sanitize` first; tensors that come out as they went
in are read by byte range, others cut lazily.
Next: `experts.py` wraps the loaded blocks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils

from ..core.model_spec import ModelSpec, MoELayer
from ..core.plan import Plan
from ..errors import CenacleError, CheckpointError, PlanError
from . import architecture, slicing, tensor_layout
from .byte_ranges import ByteRange, ColumnRange, append_range
from .checkpoint import Checkpoint, TensorInfo
from .expert_parallel import Zeros
from .tensor_reader import BLOCK_BYTES, gather_bytes, read_ranges, runs, to_array

Progress = Callable[[int, int], None]
"""Called with bytes of weights in memory so far and bytes in all."""


def build_model(checkpoint: Checkpoint, plan: Plan | None, rank: int) -> nn.Module:
    """mlx-lm's model with this rank's tensors, lazy: only rows of stacked tensors are read.

    Args:
        plan: whose experts; None: all of them, and then nothing is read.
        rank: which rank's.

    Raises:
        CheckpointError: unknown or dense family, or tensors missing, surplus or misshapen.
    """
    family = architecture.resolve_family(checkpoint.config)
    refused = architecture.FAMILIES.get(family, architecture.GENERIC).refused
    if refused is not None:
        raise CheckpointError(f"{checkpoint.folder}: {family} cannot be run: {refused}")
    try:
        with _discard_random_init():
            model, _ = mlx_lm_utils.load_model(
                checkpoint.folder,
                lazy=True,
                model_config=checkpoint.config,
                get_model_classes=lambda config: _partial(config, checkpoint, plan, rank),
            )
    except CenacleError:
        raise
    except KeyError as error:
        raise CheckpointError(
            f"{checkpoint.folder}: {family} needs {error}, which is missing from "
            f"the weights or from config.json"
        ) from error
    except Exception as error:  # mlx-lm raises what its families' code happens to raise
        raise CheckpointError(
            f"{checkpoint.folder}: the files do not fit {family}: {error}"
        ) from error
    return model


def build_dense_model(checkpoint: Checkpoint) -> nn.Module:
    """mlx-lm's model of a checkpoint without experts, lazy and whole.

    Raises:
        CheckpointError: unknown family, or tensors missing, surplus or misshapen.
    """
    family = architecture.resolve_family(checkpoint.config)
    try:
        with _discard_random_init():
            model, _ = mlx_lm_utils.load_model(
                checkpoint.folder, lazy=True, model_config=checkpoint.config
            )
    except Exception as error:  # as above
        raise CheckpointError(
            f"{checkpoint.folder}: the files do not fit {family}: {error}"
        ) from error
    return model


@contextmanager
def _discard_random_init() -> Iterator[None]:
    """Build a model and let go of its random weights, which were never computed but replaced.

    MLX's random state would stand at the end of the chain of all those draws and keep it: a
    megabyte for each small model, and a head builds several whenever it forms a group.
    """
    try:
        yield
    finally:
        mx.eval(cast("list[mx.array]", mx.random.state)[0])


def _partial(
    config: dict[str, Any], checkpoint: Checkpoint, plan: Plan | None, rank: int
) -> tuple[type[nn.Module], Any]:
    """mlx-lm's classes for `config`, of a model that holds one rank's experts only."""
    base, arguments = architecture.model_classes(config)
    family = architecture.FAMILIES.get(architecture.resolve_family(config), architecture.GENERIC)

    class Partial(base):  # type: ignore[valid-type, misc]
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            architecture.stack_dbrx_experts(self)
            found = architecture.find_blocks(self)
            if not found:
                raise CheckpointError(
                    f"{checkpoint.folder}: {config['model_type']} is a dense model, it has no "
                    f"experts to spread; mlx-lm runs it on one machine"
                )
            counts = {b.count for b in found}
            if len(counts) > 1:
                raise CheckpointError(
                    f"{checkpoint.folder}: layers with different numbers of experts "
                    f"({sorted(counts)}) are not supported"
                )
            self._count = counts.pop()
            self._held: dict[int, list[int]] = {b.layer: list(range(self._count)) for b in found}
            self._slices: dict[int, slicing.ExpertSlice] = {}
            self._cuts: dict[str, slicing.TensorSlice] = {}  # of the trunk and the shared experts
            self._absent: list[str] = []
            self._views: dict[str, tensor_layout.ExpertTensorView] = {}
            if plan is None:
                return
            _check_plan(plan, found)
            self._cuts = slicing.slice_trunk(self, plan, rank)
            for block, layer in zip(found, plan.layers, strict=True):
                held = self._held[block.layer] = list(layer.experts_of(rank))
                if len(held) < self._count:
                    for linear in block.linears.values():
                        _keep_experts(linear, len(held))
                start, stop = layer.slice_of(rank)
                if stop - start < plan.width:
                    self._slices[block.layer] = slicing.slice_experts(
                        block, (start, stop, plan.width)
                    )
                mine = layer.shared_slice_of(rank)
                for name in block.shared if not block.sums_inside(family) else ():
                    if mine is None:
                        block.module[name] = Zeros()
                        self._absent.append(f"{block.path}.{name}.")
                    elif len(layer.shared) > 1:
                        units = layer.shared[-1].stop
                        self._cuts |= slicing.slice_mlp(
                            self, f"{block.path}.{name}", (*mine, units)
                        )
            for by in (self._cuts, *(s.cuts for s in self._slices.values())):
                for path, cut in by.items():
                    _slice_module(self, path, cut)

            shapes = {name: t.shape for name, t in checkpoint.tensors.items()}
            self._views = tensor_layout.expert_tensor_views(
                shapes, self._slices, self._count, family
            )

        def pieces(self) -> dict[str, TensorPiece | None]:
            """What is read of the checkpoint's tensors; those that are not named entirely."""
            found = _pieces(checkpoint.tensors, self._held, self._count, self._views)
            absent = tuple(self._absent)
            return found | {n: None for n in checkpoint.tensors if n.startswith(absent)}

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            pieces = _pieces(checkpoint.tensors, self._held, self._count, self._views)
            own = _rank_tensors(weights, checkpoint, self._held, pieces)
            if family.before is not None:
                own = family.before(own)
            sizes = {len(held) for held in self._held.values()}
            if len(sizes) > 1:
                raise CheckpointError("a rank must hold equally many experts of every layer")
            local = architecture.with_expert_count(config, self._count, sizes.pop())
            namer = base(arguments.from_dict(local))  # type: ignore[call-arg]
            if hasattr(namer, "sanitize"):
                own = namer.sanitize(own)
            own = architecture.stack_dbrx_weights(own)
            by = dict(self._cuts)
            if not self._views:
                for part in self._slices.values():
                    by |= part.cuts
            names = {id(array): name for name, array in weights.items()}
            return {
                k: _slice_tensor(k, v, by, checkpoint.tensors.get(names.get(id(v), "")))
                for k, v in own.items()
                if not k.startswith(tuple(self._absent))
            }

    return Partial, arguments


def _check_plan(plan: Plan, found: list[architecture.MoEBlock]) -> None:
    """The plan must be one of this model: with another's, wrong experts would answer."""
    got = [(p.layer, len(p.experts)) for p in plan.layers]
    expected = [(b.layer, b.count) for b in found]
    if got != expected:
        raise PlanError(
            f"the plan is of another model: expected (layer, experts) {expected}, got {got}"
        )


def _keep_experts(linear: nn.Module, rows: int) -> None:
    """Give a stacked layer of an unloaded model fewer experts."""
    for name in ("weight", "bias"):
        if name in linear:
            linear[name] = linear[name][:rows]


def _slice_module(model: nn.Module, path: str, cut: slicing.TensorSlice) -> None:
    """Give a module of an unloaded model the shapes of its slice."""
    node = architecture.get_module(model, path)
    if isinstance(node, mx.array):  # a vector with an entry per head
        architecture.replace_module(model, path, cut.apply(node, "weight"))
        return
    for name in ("weight", "bias"):
        if name in node:
            node[name] = cut.apply(node[name], name)


def _slice_tensor(
    name: str, array: mx.array, by: dict[str, slicing.TensorSlice], tensor: TensorInfo | None
) -> mx.array:
    """The rank's part of a converted tensor; `tensor`: where it is, if it was not converted."""
    path, _, leaf = name.rpartition(".")
    cut, leaf = (by[name], "weight") if name in by else (by.get(path), leaf)
    axis = cut.axis_of(leaf, array.ndim) if cut is not None else None
    if cut is None or axis is None:
        return array
    if tensor is None or tensor.shape != tuple(array.shape):
        return cut.apply(array, leaf)
    ranges = cut.ranges_in(array.shape[axis])
    return read_ranges(tensor, (1, *tensor.shape), [0], axis + 1, ranges)[0]


@dataclass(frozen=True)
class TensorPiece:
    """What a rank reads of a tensor: as the arguments of `read_parts`."""

    shape: tuple[int, ...]
    wanted: tuple[int, ...]
    axis: int
    ranges: tuple[tuple[int, int], ...]

    def bytes_in(self, tensor: TensorInfo, apart: int) -> Iterator[ByteRange]:
        """The bytes of the tensor's file, ascending.

        Args:
            apart: pieces of a row with so many bytes between them, or fewer, are given as columns,
                since there may be millions of them.
        """
        item = (tensor.stop - tensor.start) // self.shape[0]
        across = math.prod(self.shape[1 : self.axis]) if self.axis else 1
        row = item // across
        each = row // self.shape[self.axis] if self.axis else row
        kept = tuple((a * each, b * each) for a, b in self.ranges) if self.axis else ((0, row),)
        gaps = [a - b for (_, b), (a, _) in pairwise([*kept, (row + kept[0][0], 0)])]
        for first, count in runs(list(self.wanted)):
            start, stop = tensor.start + first * item, tensor.start + (first + count) * item
            if max(gaps) == 0:
                yield start, stop
            elif max(gaps) <= apart and row <= BLOCK_BYTES:
                yield ColumnRange(start, stop, row, kept)
            else:
                for at in range(start, stop, row):
                    yield from ((at + a, at + b) for a, b in kept)


def _pieces(
    tensors: dict[str, TensorInfo],
    held: dict[int, list[int]],
    count: int,
    views: dict[str, tensor_layout.ExpertTensorView],
) -> dict[str, TensorPiece | None]:
    """What to read of tensors that hold routed experts; None: nothing. Others are not named: they
    are read entirely."""
    found: dict[str, TensorPiece | None] = {}
    for name, tensor in tensors.items():
        layer = architecture.layer_index(name)
        mine = held.get(layer) if layer is not None else None
        single = architecture.EXPERT_TENSOR.fullmatch(name)
        view = views.get(name)
        if mine is None or (len(mine) == count and view is None):
            continue
        if single is not None and int(single["expert"]) not in mine:
            found[name] = None
        elif view is not None:
            wanted = (0,) if single is not None else tuple(mine)
            found[name] = TensorPiece(view.shape, wanted, view.axis, tuple(view.ranges))
        elif single is None and architecture.STACKED_TENSOR.fullmatch(name) and tensor.shape:
            rows, rest = divmod(tensor.shape[0], count)
            if not rest:
                shape = (count, rows, *tensor.shape[1:])
                found[name] = TensorPiece(shape, tuple(mine), 0, ((0, count),))
    return found


def required_ranges(
    checkpoint: Checkpoint, plan: Plan, rank: int, apart: int = 1 << 16
) -> dict[str, list[ByteRange]]:
    """The bytes of each file that a rank reads, ascending, each once: what it must have.

    Of a sharded trunk all is counted, since what is cut of it may be converted first.

    Args:
        apart: see `Piece.bytes_in`.

    Returns:
        By the file's name.

    Raises:
        CheckpointError, PlanError: see `build`.
    """
    config = checkpoint.config
    made, arguments = _partial(config, checkpoint, plan, rank)
    pieces = made(arguments.from_dict(config)).pieces()  # type: ignore[call-arg]
    found: dict[str, list[ByteRange]] = {}
    for name, tensor in sorted(checkpoint.tensors.items(), key=lambda t: (t[1].file, t[1].start)):
        piece = pieces.get(name, TensorPiece((1,), (0,), 0, ((0, 1),)))
        wanted = found.setdefault(tensor.file.name, [])
        for more in piece.bytes_in(tensor, apart) if piece is not None else ():
            append_range(wanted, more)
    return found


def _rank_tensors(
    weights: dict[str, mx.array],
    checkpoint: Checkpoint,
    held: dict[int, list[int]],
    pieces: dict[str, TensorPiece | None],
) -> dict[str, mx.array]:
    """The checkpoint as if only the held experts existed, numbered from 0 in every layer, and only
    the `pieces` of them."""
    own = {}
    together: dict[tuple[str, str, TensorPiece], dict[str, str]] = {}
    for name, array in weights.items():
        layer = architecture.layer_index(name)
        mine = held.get(layer, []) if layer is not None else []
        single = architecture.EXPERT_TENSOR.fullmatch(name)
        piece = pieces.get(name, ...)
        if piece is None:
            continue
        if single is not None and int(single["expert"]) in mine:
            expert = mine.index(int(single["expert"]))
            local = f"{single['head']}.{expert}.{single['tail']}"
            own[local] = array
            if isinstance(piece, TensorPiece):
                together.setdefault((single["head"], single["tail"], piece), {})[local] = name
        elif isinstance(piece, TensorPiece):
            tensor = checkpoint.tensors[name]
            got = read_ranges(tensor, piece.shape, list(piece.wanted), piece.axis, piece.ranges)
            # Several rows of an expert may share the first axis with experts: give it back so.
            flat = len(piece.shape) > len(array.shape)
            own[name] = got.reshape(-1, *got.shape[2:]) if flat else got
        else:
            own[name] = array
    for (_, _, piece), names in together.items():
        array = _read_together([checkpoint.tensors[n] for n in names.values()], piece)
        for i, name in enumerate(names):
            own[name] = array[i]
    return own


def _read_together(tensors: list[TensorInfo], piece: TensorPiece) -> mx.array:
    """The same part of several tensors, [tensors, ...].

    In one array, because it is freed as a whole when experts have been stacked; many small ones
    would stay with the process.
    """
    if len({t.dtype for t in tensors}) > 1:
        raise CheckpointError(
            f"{tensors[0].file}: {tensors[0].name} and its like have different types"
        )
    parts = [gather_bytes(t, piece.shape, [0], piece.axis, piece.ranges) for t in tensors]
    cut = tensor_layout.ExpertTensorView(piece.shape, piece.axis, piece.ranges).cut
    return to_array(tensors[0], np.concatenate(parts), [len(parts), *cut[1:]])


def named_parameters(model: nn.Module) -> list[tuple[str, mx.array]]:
    """A model's parameters with their dotted names."""
    return cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))


def read_model_spec(checkpoint: Checkpoint) -> ModelSpec:
    """What the checkpoint is and what each part of it takes in memory; reads no weights.

    The sizes are those of the model that mlx-lm would build, after its own conversions.

    Raises:
        CheckpointError: see `build`.
    """
    model = build_model(checkpoint, None, 0)
    family = architecture.resolve_family(checkpoint.config)
    row = architecture.FAMILIES.get(family, architecture.GENERIC)
    sizes = {name: value.nbytes for name, value in named_parameters(model)}

    def under(path: str) -> int:
        return sum(size for name, size in sizes.items() if name.startswith(path + "."))

    layers = []
    for block in architecture.find_blocks(model):
        experts = sum(under(f"{block.path}.{block.switch}.{n}") for n in block.linears)
        names = () if block.sums_inside(row) else block.shared
        shared = sum(under(f"{block.path}.{n}") for n in names)
        units, kept = slicing.expert_units(block) if row.unsliceable_reason is None else (1, 0)
        shared_units, shared_kept = slicing.shared_units([block.module[n] for n in names])
        layers.append(
            MoELayer(
                block.layer,
                block.count,
                experts // block.count,
                shared,
                units,
                shared_units if shared else 1,
                kept,
                shared_kept,
            )
        )
    modules = slicing.dense_modules(model, row)
    spread = sum(m.experts * m.expert_bytes + m.shared_bytes for m in layers)
    config = checkpoint.config
    dtypes: Counter[str] = Counter()
    for _, value in named_parameters(model):
        if mx.issubdtype(value.dtype, mx.floating):
            dtypes[str(value.dtype).removeprefix("mlx.core.")] += value.size
    return ModelSpec(
        family=family,
        layers=len(model.layers),
        moe=tuple(layers),
        top_k=architecture.find_int(config, architecture.TOP_K_KEYS) or 1,
        trunk_bytes=sum(sizes.values()) - spread,
        context_length=architecture.find_int(config, architecture.CONTEXT_LENGTH_KEYS),
        vocab_size=architecture.find_int(config, ("vocab_size",)) or 0,
        dtype=dtypes.most_common(1)[0][0],
        quantization=_describe_quantization(config),
        dense_modules=modules,
        embedding_bytes=slicing.embedding_bytes(model, modules),
        unsliceable_reason=row.unsliceable_reason,
    )


def _describe_quantization(config: dict[str, Any]) -> str | None:
    q = config.get("quantization") or config.get("quantization_config")
    if not isinstance(q, dict):
        return None
    if "bits" in q:
        return f"{q.get('mode', 'affine')} {q['bits']}-bit, groups of {q.get('group_size')}"
    return str(q.get("quant_method", "unknown"))


def load_rank_model(checkpoint: Checkpoint, plan: Plan, rank: int, progress: Progress) -> nn.Module:
    """This rank's model, in memory; its blocks are still mlx-lm's (see `experts.parallelize`).

    Raises:
        CheckpointError: see `build`; or a file could not be read to its end.
    """
    # A buffer kept for reuse would count twice: the tensors read and the model made of them.
    limit = mx.set_cache_limit(0)
    try:
        model = build_model(checkpoint, plan, rank)
        arrays = [value for _, value in named_parameters(model)]
        total, done = sum(a.nbytes for a in arrays), 0
        for array in arrays:
            mx.eval(array)
            done += array.nbytes
            progress(done, total)
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint.folder}: reading the weights failed: {error}"
        ) from error
    finally:
        mx.set_cache_limit(limit)
    return model
