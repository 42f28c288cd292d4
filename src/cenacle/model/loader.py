"""Checkpoint + plan -> this rank's model, reading only this rank's bytes.

Owns: building mlx-lm's model of what a rank holds, and reading its weights.
Does not know: which bytes those are (`slicing.py`), how experts are computed, how ranks talk.
How: mlx-lm's own loading code does everything that depends on the family (renaming, stacking,
splitting, dequantizing: its `sanitize`) and on the quantization. It gets a checkpoint in which only
this rank's experts exist, numbered from 0, and a config with that many experts; so no family needs
code of its own here. Tensors that are read whole are MLX's lazy arrays, read when they are
evaluated; of the others only the rank's pieces are read. What `slicing.py` could not slice in the
checkpoint is sliced after `sanitize`: tensors that come out as they went in are read by byte range,
others are sliced lazily.
Next: `expert_parallel.py` wraps the loaded blocks.
"""

from __future__ import annotations

import glob
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils

from .. import native
from ..core.plan import Plan
from ..errors import CenacleError, CheckpointError
from . import architecture, mtp, zoo
from .checkpoint import Checkpoint
from .disk_tables import install_disk_tables, is_table_tensor
from .expert_parallel import Zeros
from .families import EXPERT_TENSOR, STACKED_TENSOR, family_of, layer_index
from .fp8_layers import install_fp8_layers
from .gguf_transforms import Parts
from .quantized_conversion import LoadedLayer, convert_quantized
from .quantized_layers import Check, QuantizedLayers, StoredLayer
from .scaled_layers import install_output_scales
from .slicing import (
    GROUP_SIZE_NAMES,
    HEAD_NAMES,
    KV_HEAD_NAMES,
    ModelLayout,
    RankSlices,
    slices_for,
)
from .tensor_info import TensorInfo
from .tensor_layout import quantized_slice
from .tensor_reader import TensorPiece, TensorView, read_piece, read_together
from .tensor_slice import ROWS, TensorSlice
from .zoo_drafters import PREFIX_KEY

Progress = Callable[[int, int], None]
"""Called with bytes of weights in memory so far and bytes in all."""


TRIM_BYTES = 64 << 20


class _Trimmer:
    """Gives freed memory back now and then: single experts leave holes that no stack fits into."""

    def __init__(self) -> None:
        self._since = 0

    def add(self, nbytes: int) -> None:
        """Count what was made."""
        self._since += nbytes
        if self._since >= TRIM_BYTES:
            native.trim()
            self._since = 0


def build_model(checkpoint: Checkpoint, plan: Plan | None, rank: int) -> nn.Module:
    """mlx-lm's model with this rank's tensors, lazy: only rows of stacked tensors are read.

    Its attribute `rank_slices` is what the rank holds.

    Args:
        plan: whose experts; None: all of them, and then nothing is read.
        rank: which rank's.

    Raises:
        CheckpointError: unknown or dense family, or tensors missing, surplus or misshapen.
        PlanError: the plan is of another model.
    """
    family = architecture.resolve_family(checkpoint.config)
    reason = family_of(family).unsupported_reason
    if reason is not None:
        raise CheckpointError(f"{checkpoint.folder}: {family} cannot run: {reason}")
    try:
        with architecture.discard_random_init(), _only_files_of(checkpoint):
            if checkpoint.gguf is not None:
                return _load_gguf(checkpoint, plan, rank)
            model, _ = mlx_lm_utils.load_model(
                checkpoint.folder,
                lazy=True,
                model_config=checkpoint.config,
                get_model_classes=lambda config: _partial_classes(config, checkpoint, plan, rank),
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
            f"{checkpoint.folder}: the files do not fit {family}: {error!s:.500}"
        ) from error
    return model


def _load_gguf(checkpoint: Checkpoint, plan: Plan | None, rank: int) -> nn.Module:
    model_class, arguments = _partial_classes(checkpoint.config, checkpoint, plan, rank)
    model = model_class(arguments.from_dict(checkpoint.config))  # type: ignore[call-arg]
    return _fill_from_gguf(model, checkpoint, model.rank_slices, is_read=plan is not None)


def _fill_from_gguf(
    model: nn.Module, checkpoint: Checkpoint, slices: RankSlices, *, is_read: bool
) -> nn.Module:
    tensors: dict[str, mx.array] = {}
    waiting: dict[str, dict[str, Parts]] = {}
    trimmer = _Trimmer()
    assert checkpoint.gguf is not None
    for piece in slices.tensors:
        parts = _read_gguf_piece(checkpoint, piece, is_read=is_read)
        for name, array in checkpoint.gguf.parameters(piece.tensor, parts, waiting).items():
            sliced = _slice_tensor(name, array, slices.unread, None, None)
            if is_read:
                mx.eval(sliced)  # so that the whole tensor can be freed
                trimmer.add(sliced.nbytes)
            tensors[name] = sliced
    nn.quantize(
        model,
        class_predicate=lambda path, module: (
            hasattr(module, "to_quantized")
            and f"{path}.scales" in tensors
            and mlx_lm_utils.infer_quant_config(path, module, tensors)
        ),
    )
    model.checks, model.unpacked = [], ()
    model.eval()
    model.load_weights(list(tensors.items()), strict=True)
    return model


def _read_gguf_piece(checkpoint: Checkpoint, piece: TensorPiece, *, is_read: bool) -> Parts:
    assert checkpoint.gguf is not None
    tensor, view = piece.tensor, piece.view
    shape = tensor.shape if view is None else piece.shape
    if view is not None and len(view.shape) > len(tensor.shape):
        shape = (shape[0] * shape[1], *shape[2:])
    if not is_read:
        return checkpoint.gguf.describe(tensor, shape)
    return checkpoint.gguf.read_parts(piece, shape)


_LOADED_FILES: ContextVar[list[str] | None] = ContextVar("loaded files", default=None)


def _find_files(pattern: str) -> list[str]:
    files = _LOADED_FILES.get()
    return glob.glob(pattern) if files is None else files  # noqa: PTH207 (mlx-lm's own call)


# mlx-lm loads every file named model*.safetensors; let it find only the checkpoint's. For good, and
# by context, because several threads may build models at once.
mlx_lm_utils.glob = cast("Any", SimpleNamespace(glob=_find_files))
# Its own reading of config.json is not needed then: it gets the checkpoint's config.
_load_config = mlx_lm_utils.load_config
mlx_lm_utils.load_config = lambda model_path: (
    {} if _LOADED_FILES.get() else _load_config(model_path)
)


@contextmanager
def _only_files_of(checkpoint: Checkpoint) -> Iterator[None]:
    token = _LOADED_FILES.set([str(file) for file in checkpoint.files])
    try:
        yield
    finally:
        _LOADED_FILES.reset(token)


def build_dense_model(
    checkpoint: Checkpoint, *, is_read: bool = False, classes: zoo.ModelClasses | None = None
) -> nn.Module:
    """A model of a checkpoint without experts, lazy and whole.

    Args:
        classes: of the model; None: mlx-lm's for its config.
        is_read: read a GGUF file now, whose blocks are decoded before MLX has them. Without it
            nothing is read of one, and its values are not to be used.

    Raises:
        CheckpointError: unknown family, or tensors missing, surplus or misshapen.
    """
    classes = classes or zoo.find_classes(checkpoint.config)
    family, own = classes.family, (classes.model, classes.arguments)
    try:
        with architecture.discard_random_init(), _only_files_of(checkpoint):
            if checkpoint.gguf is not None:
                model_class, arguments = own
                model = model_class(arguments.from_dict(checkpoint.config))  # type: ignore[call-arg]
                whole = RankSlices(tuple(map(TensorPiece, checkpoint.tensors.values())), {})
                return _fill_from_gguf(model, checkpoint, whole, is_read=is_read)
            model, _ = mlx_lm_utils.load_model(
                checkpoint.folder,
                lazy=True,
                model_config=checkpoint.config,
                get_model_classes=lambda **_: _dense_classes(own, checkpoint),
            )
    except CenacleError:
        raise
    except Exception as error:  # as above
        raise CheckpointError(
            f"{checkpoint.folder}: the files do not fit {family}: {error!s:.500}"
        ) from error
    return model


def load_rank_model(checkpoint: Checkpoint, plan: Plan, rank: int, progress: Progress) -> nn.Module:
    """This rank's model, in memory; its blocks are still mlx-lm's.

    `expert_parallel.parallelize` replaces the blocks.

    Raises:
        CheckpointError, PlanError: see `build_model`; or a file could not be read to its end.
    """
    with open_rank_model(checkpoint, plan, rank, progress) as (model, _):
        return model


@contextmanager
def open_rank_model(
    checkpoint: Checkpoint, plan: Plan, rank: int, progress: Progress
) -> Iterator[tuple[nn.Module, WeightReader]]:
    """As `load_rank_model`, but whole tensors are read when the reader is asked for them, or when
    the `with` block ends: so a layer's weights can be packed, and freed, before the next are read.

    Raises:
        CheckpointError, PlanError: as `load_rank_model`, also at the block's end.
    """
    with _BUFFER_CACHE.disabled():
        try:
            model = build_model(checkpoint, plan, rank)
            require_checks(checkpoint, model)
        except RuntimeError as error:
            raise CheckpointError(
                f"{checkpoint.folder}: reading the weights failed: {error}"
            ) from error
        reader = WeightReader(checkpoint, model, progress)
        yield model, reader
        reader.read_all()
        native.trim()


class WeightReader:
    """Reads the weights of a model that was built lazily, layer by layer.

    Args:
        checkpoint: the model's.
        model: as `build_model` gives it.
        progress: told how far it is.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, progress: Progress) -> None:
        self._folder, self._progress = checkpoint.folder, progress
        self._total = sum(a.nbytes for _, a in architecture.named_parameters(model))
        self._done, self._trimmer = 0, _Trimmer()
        self._left = {id(module): (path, module) for path, module in model.named_modules()}

    def read(self, module: nn.Module) -> None:
        """Read a module's own parameters, not those of modules inside it.

        Raises:
            CheckpointError: a file could not be read to its end, or a scale is not a number.
        """
        path, is_new = "", True
        if id(module) in self._left:
            (path, _), is_new = self._left.pop(id(module)), False
        try:
            for name, array in _own_parameters(module):
                mx.eval(array)
                if not _is_finite(module, name, array):
                    raise CheckpointError(
                        f"{self._folder}: {path}.{name}: a scale is not a number; download it again"
                    )
                self._trimmer.add(array.nbytes)
                if not is_new:
                    self._done += array.nbytes
                    self._progress(self._done, self._total)
        except RuntimeError as error:
            raise CheckpointError(f"{self._folder}: reading the weights failed: {error}") from error

    def read_all(self) -> None:
        """Read what has not been read yet; raises as `read`."""
        for _, module in list(self._left.values()):
            self.read(module)


class _BufferCache:
    """MLX's freed buffers: kept for reuse, they would count twice while a model is loaded, as the
    tensors read and as the model made of them. Several threads may load models at once."""

    def __init__(self) -> None:
        self._lock, self._loading, self._limit = threading.Lock(), 0, 0

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with self._lock:
            self._loading += 1
            if self._loading == 1:
                self._limit = mx.set_cache_limit(0)
        try:
            yield
        finally:
            with self._lock:
                self._loading -= 1
                if not self._loading:
                    mx.set_cache_limit(self._limit)


_BUFFER_CACHE = _BufferCache()


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, mx.array]]:
    """As `module.parameters()`, without those of modules inside it."""
    own = {name: value for name, value in module.items() if not name.startswith("_")}
    leaves: Any = tree_flatten(own, is_leaf=lambda value: isinstance(value, nn.Module))
    for name, value in leaves:
        if isinstance(value, mx.array):
            yield name, value


def _is_finite(module: nn.Module, name: str, array: mx.array) -> bool:
    """Whether scales and biases of a quantized layer are numbers; other parameters are believed."""
    if name not in ("scales", "biases") or not array.size:
        return True
    if array.dtype == mx.uint8:
        nan = 0x7F if getattr(module, "mode", "") == "nvfp4" else 0xFF
        return bool(mx.all((array & nan) != nan).item())
    if array.dtype not in _EXPONENTS:
        return bool(mx.all(mx.isfinite(array)).item())
    # NumPy needs a tenth of the time of `mx.isfinite`, which composes it of small operations.
    bits, exponent = _EXPONENTS[array.dtype]
    words = np.asarray(mx.contiguous(array).view(bits)).reshape(-1)
    return all(
        int((words[i : i + _CHUNK_WORDS] & exponent).max()) < exponent
        for i in range(0, words.size, _CHUNK_WORDS)
    )


# The bits of the exponent, which are all set in infinities and NaN.
_EXPONENTS: dict[mx.Dtype, tuple[mx.Dtype, int]] = {
    mx.bfloat16: (mx.uint16, 0x7F80),
    mx.float16: (mx.uint16, 0x7C00),
    mx.float32: (mx.uint32, 0x7F800000),
}
_CHUNK_WORDS = 1 << 18  # of which the copy without the other bits stays in the cache


def require_checks(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Read the scales of a model that was built lazily.

    Raises:
        CheckpointError: values that no tool writes, damaged or of another config.json.
    """
    mx.eval([is_right for _, is_right in model.checks])
    for message, is_right in model.checks:
        if not is_right.item():
            raise CheckpointError(f"{checkpoint.folder}: {message}; download it again")


def _dense_classes(
    classes: tuple[type[nn.Module], Any], checkpoint: Checkpoint
) -> tuple[type[nn.Module], Any]:
    """A model's classes, of a model without experts, for a checkpoint."""
    base, arguments = classes
    needed = (t for n, t in checkpoint.tensors.items() if n not in checkpoint.quantized.ignored)
    slices = RankSlices(tuple(TensorPiece(tensor) for tensor in needed), {})

    class DenseModel(base):  # type: ignore[valid-type, misc]
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            if (names := checkpoint.renamed) is not None:
                weights = {names[name]: weights[name] for name in weights if name in names}
            tensors, layers = _read_rank_tensors(weights, slices, checkpoint, is_read=False)
            convert = getattr(super(), "sanitize", lambda tensors: tensors)
            converted = convert_quantized(
                self, tensors, layers, convert, lambda _, array, __: array
            )
            self.checks = [check for layer in layers.values() for check in layer.checks]
            return converted.tensors

        def load_weights(self, weights: Any, strict: bool = True) -> nn.Module:
            install_output_scales(self, weights)
            install_fp8_layers(self, weights)
            return cast("nn.Module", super().load_weights(weights, strict))

    return DenseModel, arguments


def _partial_classes(
    config: dict[str, Any], checkpoint: Checkpoint, plan: Plan | None, rank: int
) -> tuple[type[nn.Module], Any]:
    """mlx-lm's classes for `config`, of a model that holds what one rank does."""
    base, arguments = architecture.model_classes(config)
    family = family_of(architecture.resolve_family(config))
    if checkpoint.renamed is not None and PREFIX_KEY not in config:
        base = mtp.with_mtp_input(base)

    class PartialModel(base):  # type: ignore[valid-type, misc]
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            architecture.unify_experts(self)
            layout = ModelLayout.of(self, checkpoint)
            self._expert_count = layout.expert_count
            self.rank_slices = (
                slices_for(plan, rank, layout) if plan is not None else RankSlices.whole(layout)
            )
            _shrink(layout, self.rank_slices)
            install_disk_tables(self, checkpoint.tensors.values(), self.rank_slices.tables)
            if plan is not None:
                zoo.prepare_engram(self, checkpoint.folder)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            if (names := checkpoint.renamed) is not None:
                weights = {names[name]: weights[name] for name in weights if name in names}
            if (rename := family.rename_tensor) is not None:
                weights = {rename(name, config): array for name, array in weights.items()}
            slices = self.rank_slices
            tensors, layers = _read_rank_tensors(
                weights, slices, checkpoint, is_read=plan is not None
            )
            local_count = len(next(iter(slices.experts.values())))
            local = architecture.with_expert_count(config, self._expert_count, local_count)
            blocks = architecture.find_blocks(self)

            def convert(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
                if family.convert_weights is not None:
                    tensors = family.convert_weights(tensors)
                converter = base(arguments.from_dict(local))  # type: ignore[call-arg]
                low_norms = {name: tensors[name] for name in checkpoint.low_norms}
                if hasattr(converter, "sanitize"):
                    tensors = converter.sanitize(tensors)
                mtp.raise_norms(tensors, low_norms)
                return architecture.unify_expert_weights(tensors, blocks)

            unconverted = {id(array): name for name, array in weights.items()}

            def cut(name: str, array: mx.array, layer: LoadedLayer | None) -> mx.array:
                tensor = checkpoint.tensors.get(unconverted.get(id(array), ""))
                return _slice_tensor(name, array, slices.unread, tensor, layer)

            converted = convert_quantized(self, tensors, layers, convert, cut)
            self.checks = [
                check
                for path, layer in layers.items()
                if not slices.is_absent(f"{path}.weight")
                for check in layer.checks
            ]
            self.unpacked = converted.unpacked
            return {
                name: _require_floats(name, array, converted.tensors)
                for name, array in converted.tensors.items()
                if not slices.is_absent(name)
            }

        def load_weights(self, weights: Any, strict: bool = True) -> nn.Module:
            install_output_scales(self, weights)
            install_fp8_layers(self, weights)
            return cast("nn.Module", super().load_weights(weights, strict))

    return PartialModel, arguments


def _shrink(layout: ModelLayout, slices: RankSlices) -> None:
    """Give an unloaded model the shapes of what a rank holds, in place."""
    for block in layout.blocks:
        held = len(slices.experts[block.layer])
        if held < block.expert_count:
            for linear in block.linears.values():
                for name in ("weight", "bias"):
                    if name in linear:
                        linear[name] = linear[name][:held]
    for path in slices.absent:
        architecture.replace_module(layout.model, path, Zeros())
    for path, part in slices.modules.items():
        node = architecture.get_module(layout.model, path)
        if isinstance(node, mx.array):  # a vector with an entry per head
            architecture.replace_module(layout.model, path, part.apply(node, "weight"))
            continue
        for name in ("weight", "bias"):
            if name in node:
                node[name] = part.apply(node[name], name)
    for path, local in slices.attention.items():
        module = architecture.get_module(layout.model, path)
        for names, value in (
            (HEAD_NAMES, local.heads),
            (KV_HEAD_NAMES, local.kv_heads),
            (GROUP_SIZE_NAMES, local.heads // local.kv_heads),
        ):
            for name in names:
                if hasattr(module, name):
                    setattr(module, name, value)
        if local.query_width is not None:
            module.d_model = local.query_width  # where mlx-lm splits off the queries


def _read_rank_tensors(
    weights: dict[str, mx.array], slices: RankSlices, checkpoint: Checkpoint, *, is_read: bool
) -> tuple[dict[str, mx.array], dict[str, LoadedLayer]]:
    """The checkpoint as if only the rank's pieces existed, experts numbered from 0.

    Args:
        is_read: the weights are for use, not for their shapes.

    Returns:
        Its tensors by name, and its quantized layers by path.
    """
    pieces = {piece.tensor.name: piece for piece in slices.tensors}
    quantized = checkpoint.quantized
    tensors: dict[str, mx.array] = {}
    together: dict[tuple[str, str, TensorView], dict[str, TensorPiece]] = {}
    for name, array in weights.items():
        if name in quantized.roles or name in quantized.ignored or is_table_tensor(name):
            continue
        piece = pieces.get(name)
        if piece is None:
            if slices.is_absent(name):  # the conversion may look for it; never evaluated
                tensors[name] = array
            continue
        local = _local_name(name, slices)
        if local != name and piece.view is not None:
            match = EXPERT_TENSOR.fullmatch(name)
            assert match is not None
            together.setdefault((match["head"], match["tail"], piece.view), {})[local] = piece
            tensors[local] = array
        elif piece.view is not None:
            read = read_piece(piece)
            # Where experts and an expert's rows share the first axis, they do so again.
            merged = len(piece.view.shape) > len(array.shape)
            tensors[name] = read.reshape(-1, *read.shape[2:]) if merged else read
        else:
            tensors[local] = array
    for same in together.values():
        arrays = read_together(list(same.values()))
        for i, name in enumerate(same):
            tensors[name] = arrays[i]
    # Of experts that are sliced after the conversion the whole must not be made.
    late = any(STACKED_TENSOR.fullmatch(f"{path}.weight") for path in slices.unread)
    return tensors, _read_rank_layers(
        weights, slices, pieces, quantized, decode=is_read and not late
    )


def _local_name(name: str, slices: RankSlices) -> str:
    """A tensor's name with the expert's number among those that the rank holds."""
    match = EXPERT_TENSOR.fullmatch(name)
    layer = layer_index(name)
    held = slices.experts.get(layer, ()) if layer is not None else ()
    if match is None or int(match["expert"]) not in held:
        return name
    return f"{match['head']}.{held.index(int(match['expert']))}.{match['tail']}"


def _read_rank_layers(
    weights: dict[str, mx.array],
    slices: RankSlices,
    pieces: Mapping[str, TensorPiece],
    quantized: QuantizedLayers,
    *,
    decode: bool,
) -> dict[str, LoadedLayer]:
    """The quantized layers of which the rank holds something, by their paths there.

    Args:
        decode: decode experts now, one after the other, where that takes several times their bytes:
            a stack of them is evaluated at once.
    """
    loaded: dict[str, LoadedLayer] = {}
    trimmer = _Trimmer()
    together: dict[Any, dict[str, StoredLayer]] = {}
    for path, stored in quantized.layers.items():
        first = next(iter(stored.tensors.values())).info.name
        if first not in pieces and not slices.is_absent(first):
            continue
        local = _local_name(f"{path}.weight", slices).removesuffix(".weight")
        piece = pieces.get(first)
        if piece is None or piece.view is None:
            is_expert = EXPERT_TENSOR.fullmatch(f"{path}.weight") is not None
            now = decode and is_expert and stored.is_decoded_at_once
            # MLX keeps what it has read of `weights` until all is loaded.
            arrays = {
                role: read_piece(TensorPiece(t.info)) if now else weights[t.info.name]
                for role, t in stored.tensors.items()
            }
            loaded[local] = _decode_layer(stored, arrays, ROWS, (0, stored.outputs), is_now=now)
            if now:
                trimmer.add(loaded[local].nbytes)
        else:
            match = EXPERT_TENSOR.fullmatch(f"{path}.weight")
            assert match is not None
            key = (match["head"], match["tail"], stored.signature)
            together.setdefault(key, {})[local] = stored
    for (head, _, _), same in together.items():
        first_layer = next(iter(same.values()))
        layer = layer_index(f"{head}.")
        assert layer is not None
        part = quantized_slice(first_layer.path, slices.expert_slices[layer])
        assert part is not None
        arrays = {
            role: read_together(
                [pieces[stored.tensors[role].info.name] for stored in same.values()]
            )
            for role in first_layer.tensors
        }
        if decode and first_layer.is_decoded_at_once:
            for i, (local, stored) in enumerate(same.items()):
                one = {role: array[i] for role, array in arrays.items()}
                loaded[local] = _decode_layer(stored, one, part.axis, part.ranges[0], is_now=True)
                trimmer.add(loaded[local].nbytes)
            continue
        checks: list[Check] = []
        parts = first_layer.decode(arrays, part.axis, part.ranges[0], checks)
        for i, (local, stored) in enumerate(same.items()):
            loaded[local] = LoadedLayer(
                stored, {name: array[i] for name, array in parts.items()}, checks if not i else []
            )
    return loaded


def _decode_layer(
    stored: StoredLayer,
    arrays: Mapping[str, mx.array],
    axis: int,
    span: tuple[int, int],
    *,
    is_now: bool,
) -> LoadedLayer:
    checks: list[Check] = []
    parts = stored.decode(arrays, axis, span, checks)
    if is_now:
        mx.eval(parts, [is_right for _, is_right in checks])
    return LoadedLayer(stored, parts, checks)


def _slice_tensor(
    name: str,
    array: mx.array,
    slices: Mapping[str, TensorSlice],
    tensor: TensorInfo | None,
    layer: LoadedLayer | None,
) -> mx.array:
    """The rank's part of a converted tensor.

    Args:
        tensor: where it is, if it was not converted.
        layer: whose floats or part it is, if it was not converted.
    """
    path, _, leaf = name.rpartition(".")
    part: TensorSlice | None
    part, leaf = (slices[name], "weight") if name in slices else (slices.get(path), leaf)
    axis = part.axis_of(leaf, array.ndim) if part is not None else None
    if part is None or axis is None:
        return array
    ranges = tuple(part.ranges_in(array.shape[axis]))
    if layer is not None:
        is_dense = leaf == "weight" and array.dtype != mx.uint32
        layer.read_slice(part)
        return layer.stored.dequantize(layer.parts) if is_dense else layer.parts[leaf]
    if tensor is None or tensor.shape != tuple(array.shape):
        return part.apply(array, leaf)
    return read_piece(TensorPiece(tensor, TensorView((1, *tensor.shape), axis + 1, ranges)))[0]


def _require_floats(name: str, array: mx.array, tensors: Mapping[str, mx.array]) -> mx.array:
    """Refuse weights that are codes of a format that nobody has decoded."""
    path, _, leaf = name.rpartition(".")
    is_code = array.dtype in (mx.uint8, mx.int8, mx.uint32, mx.int32)
    if leaf == "weight" and is_code and f"{path}.scales" not in tensors:
        raise CheckpointError(
            f"{name}: expected floats, or integers with scales, got "
            f"{str(array.dtype).removeprefix('mlx.core.')} alone; the format is not supported"
        )
    return array
