"""How a model's layers are cut for ranks: which rows and columns of which tensors.

Owns: `Cut`, a slice of one layer's parameters by name; what of a model can be cut and at which
borders; and the guess, from names and shapes, of how a checkpoint's own tensors hold experts.
Does not know: files, which rank gets what (`plan.py` says), how ranks talk.
A linear layer's output features are rows, its inputs columns. Experts and dense layers are cut by
hidden width: rows of what makes it, columns of what takes it, so that ranks' outputs add up to the
whole; attention by heads; the head by rows of the vocabulary.
Invariant: a cut lies on a border of quantisation groups, or is refused. An output bias is not cut:
ranks but the first have zeros there (`experts.parallelize`).
Next: `weights.py`, which reads what is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..core.model_spec import DenseModule
from ..core.plan import HeadSlice, Plan
from ..errors import CheckpointError, PlanError
from . import architecture
from .architecture import Family, MoEBlock

UnitRange = tuple[int, int, int]
"""[start, stop) of so many equal units."""

_ROWS, _COLUMNS = -2, -1
_INPUTS = ("gate_proj", "up_proj", "fc1")
_OUTPUTS = ("down_proj", "fc2")
_MLP = {"gate_proj", "up_proj", "down_proj"}
_HEADS = ("n_heads", "num_heads", "num_attention_heads")
_KV_HEADS = ("n_kv_heads", "num_kv_heads", "num_key_value_heads")
_GROUPS = ("num_key_value_groups", "n_rep")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embeddings", "embd")
_PER_HEAD = ("sinks", "attention_sink_bias")
O_PROJ = ("o_proj", "out_proj")


@dataclass(frozen=True)
class TensorSlice:
    """Which part of a layer's parameters a rank holds.

    Args:
        axis: -2, rows (output features), or -1, columns (inputs).
        ranges: [start, stop) in features.
        size: features of the whole layer along the axis.
    """

    axis: int
    ranges: tuple[tuple[int, int], ...]
    size: int

    def axis_of(self, leaf: str, ndim: int) -> int | None:
        """The axis of parameter `leaf` that is cut, from 0; None: it stays whole.

        Raises:
            CheckpointError: a parameter of a format that is not known here.
        """
        if leaf in ("weight", "scales", "biases"):
            return max(ndim + self.axis, 0)
        if leaf == "bias":
            return ndim - 1 if self.axis == _ROWS else None
        if leaf == "global_scale":
            return None
        raise CheckpointError(
            f"a parameter named {leaf} cannot be cut; use --placement whole --trunk replicated"
        )

    def ranges_in(self, length: int) -> list[tuple[int, int]]:
        """The ranges in an axis of `length`, which packs or groups the features.

        Raises:
            CheckpointError: a border falls inside a packed word or a group.
        """
        if any(n * length % self.size for pair in self.ranges for n in pair):
            raise CheckpointError(
                f"features {list(self.ranges)} of {self.size} are not at borders of an axis of "
                f"{length}; use --placement whole --trunk replicated"
            )
        return [(a * length // self.size, b * length // self.size) for a, b in self.ranges]

    def apply(self, array: mx.array, leaf: str) -> mx.array:
        """The rank's part of a parameter, lazily."""
        axis = self.axis_of(leaf, array.ndim)
        if axis is None:
            return array
        around = (slice(None),) * axis
        pieces = [array[(*around, slice(a, b))] for a, b in self.ranges_in(array.shape[axis])]
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=axis)


def _scaled(part: UnitRange, size: int) -> tuple[tuple[int, int], ...]:
    start, stop, units = part
    return ((start * size // units, stop * size // units),)


def feature_counts(linear: nn.Module) -> tuple[int, int]:
    """Output and input features of a linear layer, quantised or not, stacked or not."""
    if "scales" in linear:
        return linear.weight.shape[-2], linear.scales.shape[-1] * linear.group_size
    return linear.weight.shape[-2], linear.weight.shape[-1]


def _units(linear: nn.Module) -> int:
    """Into how many pieces a layer's inputs can be cut: quantisation groups, or a few features."""
    _, inputs = feature_counts(linear)
    if "scales" in linear:
        return int(linear.scales.shape[-1])
    return inputs // math.gcd(inputs, 16 if inputs >= 256 else 4)


def _kept(linear: nn.Module) -> int:
    """Bytes of a layer that is cut by columns which every rank holds."""
    return sum(linear[n].nbytes for n in ("bias", "global_scale") if n in linear)


# Experts and dense layers


def expert_units(block: MoEBlock) -> tuple[int, int]:
    """Pieces of an expert's hidden width, and bytes of one expert that are not cut."""
    down = next(block.linears[n] for n in _OUTPUTS if n in block.linears)
    kept = _kept(down)
    kept += sum(v.global_scale.nbytes for v in block.linears.values() if "global_scale" in v)
    return _units(down), kept // block.count


def shared_units(modules: Sequence[nn.Module]) -> tuple[int, int]:
    """The same of a block's shared experts; 1 piece if they are not plain."""
    if not modules or not all(_is_mlp(m) for m in modules):
        return 1, 0
    units = math.gcd(*(_units(m.down_proj) for m in modules))
    return units, sum(_kept(m.down_proj) for m in modules)


def _is_mlp(module: nn.Module) -> bool:
    """Whether a module is down(act(up)) or down(act(gate) * up), nothing more."""
    children = module.children()
    linears = {n for n, c in children.items() if isinstance(c, nn.Linear | nn.QuantizedLinear)}
    return linears in (_MLP, _MLP - {"gate_proj"}) and set(children) <= linears | {"activation"}


def slice_mlp(model: nn.Module, path: str, part: UnitRange) -> dict[str, TensorSlice]:
    """The cuts of a dense layer (or shared experts) by hidden width, by the layers' paths."""
    module = architecture.get_module(model, path)
    width = feature_counts(module.down_proj)[1]
    ranges = _scaled(part, width)
    return {
        f"{path}.{n}": TensorSlice(_COLUMNS if n == "down_proj" else _ROWS, ranges, width)
        for n in _MLP
        if n in module
    }


@dataclass(frozen=True)
class ExpertSlice:
    """A rank's slice of a layer's experts.

    Args:
        part: which.
        cuts: the stacked layers' cuts, by path.
        width: hidden width of a whole expert.
        model_width: features that experts take and give.
    """

    part: UnitRange
    cuts: dict[str, TensorSlice]
    width: int
    model_width: int


def slice_experts(block: MoEBlock, part: UnitRange) -> ExpertSlice:
    """The cuts of a layer's experts."""
    down = next(block.linears[n] for n in _OUTPUTS if n in block.linears)
    outputs, width = feature_counts(down)
    ranges = _scaled(part, width)
    at = f"{block.path}.{block.switch}"
    made = {
        f"{at}.{n}": TensorSlice(_COLUMNS if n in _OUTPUTS else _ROWS, ranges, width)
        for n in block.linears
    }
    return ExpertSlice(part, made, width, outputs)


# How a checkpoint's own tensors hold experts


# The trunk


def dense_modules(model: nn.Module, family: Family) -> tuple[DenseModule, ...]:
    """What a sharded trunk divides: dense layers, the head, and attention where it is plain."""
    blocks = architecture.find_blocks(model)
    inside = tuple(f"{b.path}." for b in blocks if b.path) + tuple(
        f"{b.path}.{b.switch}" for b in blocks
    )
    parts = []
    head = False
    for path, module in model.named_modules():
        name = path.rsplit(".", 1)[-1]
        in_layer = architecture.layer_index(f"{path}.") is not None
        if in_layer and family.heads and _attention_layers(module):
            part = _attention(path, module)
            parts += [part] if part else []
        elif in_layer and not path.startswith(inside) and _is_mlp(module):
            units = _units(module.down_proj)
            size = sum(v.nbytes for _, v in _arrays(module)) - _kept(module.down_proj)
            parts.append(DenseModule(path, "mlp", units, size // units))
        elif name == "lm_head" and isinstance(module, nn.Linear | nn.QuantizedLinear):
            head = True
            parts.append(_rows(path, "head", module))
    tied = _embedding(model)
    if not head and tied is not None and not _other_head(model):
        parts.append(_rows(tied[0], "tied", tied[1]))
    return tuple(sorted(parts, key=lambda p: (architecture.layer_index(f"{p.path}.") or 0, p.path)))


def embedding_bytes(model: nn.Module, parts: Iterable[DenseModule]) -> int:
    """Bytes of the embedding table, of which a token needs one row; 0 if it is the head too."""
    found = _embedding(model)
    if found is None or any(p.kind == "tied" for p in parts):
        return 0
    return sum(v.nbytes for _, v in _arrays(found[1]))


def _arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return list(tree_flatten(module.parameters()))  # type: ignore[arg-type]


def _embedding(model: nn.Module) -> tuple[str, nn.Module] | None:
    for path, module in model.named_modules():
        if path.rsplit(".", 1)[-1] in _EMBEDDINGS and "weight" in module:
            return path, module
    return None


def _other_head(model: nn.Module) -> bool:
    return any(
        path.rsplit(".", 1)[-1] in ("lm_head", "output") for path, _ in model.named_modules()
    )


def _rows(path: str, kind: str, linear: nn.Module) -> DenseModule:
    rows = linear.weight.shape[0]
    units = rows // math.gcd(rows, 16)
    return DenseModule(path, kind, units, sum(v.nbytes for _, v in _arrays(linear)) // units)


def _attention_layers(module: nn.Module) -> bool:
    children = module.children()
    return any(o in children for o in O_PROJ) and (
        "Wqkv" in children or {"q_proj", "k_proj", "v_proj"} <= set(children)
    )


def _counts(module: nn.Module) -> tuple[int, int]:
    heads = next(getattr(module, n) for n in _HEADS if hasattr(module, n))
    return heads, next(getattr(module, n) for n in _KV_HEADS if hasattr(module, n))


def _attention(path: str, module: nn.Module) -> DenseModule | None:
    """None: heads are not at borders of quantisation groups."""
    heads, groups = _counts(module)
    o = next(module[n] for n in O_PROJ if n in module)
    dim = feature_counts(o)[1] // heads
    size = o.group_size if "scales" in o else 1
    units = heads if dim % size == 0 else groups if dim * (heads // groups) % size == 0 else 0
    if not units:
        return None
    whole = sum(v.nbytes for n, v in _arrays(o) if n != "bias")
    whole += sum(module[n].nbytes for n in _PER_HEAD if isinstance(module.get(n), mx.array))
    if "Wqkv" in module:
        rows = sum(v.nbytes for _, v in _arrays(module.Wqkv)) // (heads + 2 * groups)
        return DenseModule(
            path, "attention", units, (whole + heads * rows) // units, groups, 2 * rows
        )
    whole += sum(v.nbytes for _, v in _arrays(module.q_proj))
    other = sum(v.nbytes for n in ("k_proj", "v_proj") for _, v in _arrays(module[n]))
    return DenseModule(path, "attention", units, whole // units, groups, other // groups)


def slice_trunk(model: nn.Module, plan: Plan, rank: int) -> dict[str, TensorSlice]:
    """This rank's cuts of an unloaded model's trunk, by path; attention learns of its heads.

    Raises:
        PlanError: the plan names a part that the model does not have.
    """
    made: dict[str, TensorSlice] = {}
    for part in plan.spec.dense_modules:
        if not plan.is_sharded(part):
            continue
        try:
            module = architecture.get_module(model, part.path)
        except (AttributeError, KeyError, IndexError) as error:
            raise PlanError(f"the plan is of another model: it has no {part.path}") from error
        if part.kind == "attention":
            made |= _heads(part.path, module, plan.heads_of(part, rank), part.units)
        elif part.kind == "mlp":
            made |= slice_mlp(model, part.path, (*plan.rows_of(part, rank), part.units))
        elif part.kind == "head":
            rows = module.weight.shape[0]
            made[part.path] = TensorSlice(
                _ROWS, _scaled((*plan.rows_of(part, rank), part.units), rows), rows
            )
    return made


def _heads(path: str, module: nn.Module, mine: HeadSlice, units: int) -> dict[str, TensorSlice]:
    heads, groups = _counts(module)
    each = heads // units
    start, stop = mine.query_start * each, mine.query_stop * each
    o_name = next(n for n in O_PROJ if n in module)
    inputs = feature_counts(module[o_name])[1]

    def rows(first: int, last: int, of: int, size: int, at: int = 0) -> tuple[int, int]:
        return at + first * size // of, at + last * size // of

    made = {f"{path}.{o_name}": TensorSlice(_COLUMNS, (rows(start, stop, heads, inputs),), inputs)}
    if "Wqkv" in module:
        size = feature_counts(module.Wqkv)[0]
        each_head = size // (heads + 2 * groups)
        q, kv = heads * each_head, groups * each_head
        ranges = (
            rows(start, stop, heads, q),
            rows(mine.kv_start, mine.kv_stop, groups, kv, q),
            rows(mine.kv_start, mine.kv_stop, groups, kv, q + kv),
        )
        made[f"{path}.Wqkv"] = TensorSlice(_ROWS, ranges, size)
        module.d_model = (stop - start) * each_head  # where mlx-lm splits queries off
    else:
        size = feature_counts(module.q_proj)[0]
        made[f"{path}.q_proj"] = TensorSlice(_ROWS, (rows(start, stop, heads, size),), size)
        for name in ("k_proj", "v_proj"):
            size = feature_counts(module[name])[0]
            made[f"{path}.{name}"] = TensorSlice(
                _ROWS, (rows(mine.kv_start, mine.kv_stop, groups, size),), size
            )
    for name in _PER_HEAD:
        if isinstance(module.get(name), mx.array):
            made[f"{path}.{name}"] = TensorSlice(_COLUMNS, ((start, stop),), heads)
    local: dict[tuple[str, ...], int] = {
        _HEADS: stop - start,
        _KV_HEADS: mine.kv_stop - mine.kv_start,
        _GROUPS: (stop - start) // (mine.kv_stop - mine.kv_start),
    }
    for names, value in local.items():
        for name in names:
            if hasattr(module, name):
                setattr(module, name, value)
    return made
