"""Where a model keeps its Mixture-of-Experts blocks.

Owns: finding the blocks of a model, completing its config, and bringing experts into one form.
Does not know: ranks, bytes on disk, collectives; what differs between families (`families.py`).
Invariant: a block is a module with a child that is a `SwitchGLU` or `SwitchMLP`.
Next: `expert_parallel.py`, which replaces the blocks; `loader.py`, which reads what they need.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import dbrx
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from ..core.model_config import EXPERT_COUNT_KEYS, Config
from ..errors import CheckpointError
from . import zoo
from .families import (
    EXPERT_TENSOR,
    SHARED_EXPERTS,
    Family,
    family_of,
    layer_index,
    stack_tensors,
    vlm_family_name,
)
from .rotary import complete_rope

STACKED_LAYERS = ("gate_proj", "up_proj", "fc1", "down_proj", "fc2")  # the last one comes last
OUTPUT_LAYERS = ("down_proj", "fc2")
_PROJECTIONS = {"w1": "gate_proj", "v1": "up_proj", "w3": "up_proj", "w2": "down_proj"}
_WITHOUT_GATE = {"up_proj": "fc1", "down_proj": "fc2"}


@dataclass(frozen=True)
class MoEBlock:
    """One MoE block of a model.

    Args:
        layer: index among all the model's layers.
        path: of the block, such as "model.layers.3.mlp".
        experts_name: the attribute of the block that holds the routed experts.
        module: the block itself.
    """

    layer: int
    path: str
    experts_name: str
    module: nn.Module

    @property
    def experts(self) -> nn.Module:
        """The stacked routed experts, a `SwitchGLU` or `SwitchMLP`."""
        return self.module[self.experts_name]

    @property
    def experts_path(self) -> str:
        """The path of `experts`."""
        return f"{self.path}.{self.experts_name}"

    @property
    def linears(self) -> dict[str, nn.Module]:
        """The stacked linear layers of the experts by name, the output layer last."""
        return {n: self.experts[n] for n in STACKED_LAYERS if n in self.experts}

    @property
    def output(self) -> nn.Module:
        """The last of `linears`, which gives the experts' output."""
        return next(self.experts[n] for n in OUTPUT_LAYERS if n in self.experts)

    @property
    def expert_count(self) -> int:
        """Number of routed experts."""
        return self.output.weight.shape[0]

    @property
    def shared_names(self) -> tuple[str, ...]:
        """Attributes of the block that hold shared experts."""
        return tuple(n for n in SHARED_EXPERTS if isinstance(self.module.get(n), nn.Module))

    def all_reduces_inside(self, family: Family) -> bool:
        """Whether the all-reduce happens in the middle of this block."""
        name = family.all_reduce_before
        return name is not None and self.module.get(name) is not None


class StackedDbrx(nn.Module):
    """mlx-lm's DBRX block with stacked experts (the paper's first optimization).

    mlx-lm keeps a Python list of experts and synchronizes with the host for every token; this is
    the same routing over one stacked `SwitchGLU`. Input and output: [batch, length, d_model].
    """

    def __init__(self, block: dbrx.SparseMoeBlock) -> None:
        super().__init__()
        self.router = block.router
        self.top_k = block.num_experts_per_tok
        self.switch_mlp = SwitchGLU(block.d_model, block.ffn_dim, block.num_experts)

    def __call__(self, x: mx.array) -> mx.array:
        """[batch, length, d_model] -> the same."""
        gates = mx.softmax(self.router(x).astype(mx.float32), axis=-1)
        k = self.top_k
        ids = mx.argpartition(-gates, kth=k - 1, axis=-1)[..., :k]
        scores = mx.take_along_axis(gates, ids, axis=-1)
        scores = scores / mx.linalg.norm(scores, ord=1, axis=-1, keepdims=True)
        y = self.switch_mlp(x, ids)
        return (y * scores.astype(x.dtype)[..., None]).sum(axis=-2)


def resolve_family(config: Config) -> str:
    """The family, which is a module of mlx-lm or mlx-vlm, that runs this config's model_type.

    Raises:
        CheckpointError, InputError: see `zoo.find_classes`.
    """
    return zoo.find_classes(config).family


def model_classes(config: Config) -> tuple[type[nn.Module], Any]:
    """The model class and its arguments' class for a config."""
    classes = zoo.find_classes(config)
    return classes.model, classes.arguments


@contextmanager
def discard_random_init() -> Iterator[None]:
    """Build a model and discard its lazy random weights, which others will replace.

    MLX's random state would stand at the end of the chain of all those draws and keep them alive:
    a megabyte for each small model, and a head builds one whenever it forms a group.
    """
    try:
        yield
    finally:
        mx.eval(cast("list[mx.array]", mx.random.state)[0])


def unify_experts(model: nn.Module) -> None:
    """Replace other forms of stacked experts by `SwitchGLU`, in place: lists of DBRX, mlx-vlm's."""
    zoo.drop_image_experts(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, dbrx.SparseMoeBlock):
            replace_module(model, path, StackedDbrx(module))
        elif zoo.is_vlm_stack(module):
            replace_module(model, path, zoo.as_mlx_lm_experts(module))


def unify_expert_weights(
    weights: dict[str, mx.array], blocks: Iterable[MoEBlock]
) -> dict[str, mx.array]:
    """Converted weights as `unify_experts` names them, lazily.

    Single experts that the family's own conversion left alone are stacked.
    """
    by_layer = {block.layer: block for block in blocks}

    def stacked_name(name: str) -> tuple[str, int] | None:
        match = EXPERT_TENSOR.fullmatch(name)
        block = by_layer.get(layer_index(name) or 0)
        if match is None or block is None:
            return None
        projection, _, leaf = match["tail"].rpartition(".")
        projection = _PROJECTIONS.get(projection, projection)
        if "fc1" in block.linears:
            projection = _WITHOUT_GATE.get(projection, projection)
        if projection not in block.linears:
            return None
        return f"{block.experts_path}.{projection}.{leaf}", int(match["expert"])

    stacked = stack_tensors(weights, stacked_name)
    return zoo.fold_expert_scales(zoo.split_fused_experts(stacked))


def named_parameters(model: nn.Module) -> list[tuple[str, mx.array]]:
    """A module's parameters with their dotted names."""
    return cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))


def input_width(experts: nn.Module) -> int:
    """Input features of stacked experts."""
    first = experts["gate_proj"] if "gate_proj" in experts else experts["fc1"]
    return first.input_dims


def find_blocks(model: nn.Module) -> list[MoEBlock]:
    """The MoE blocks of a model with stacked experts, by layer."""
    blocks = []
    for path, module in model.named_modules():
        if isinstance(module, SwitchGLU | SwitchMLP):
            parent, _, name = path.rpartition(".")
            layer = layer_index(path)
            if layer is None:
                raise CheckpointError(f"{path} holds experts outside any layer")
            blocks.append(MoEBlock(layer, parent, name, get_module(model, parent)))
    return sorted(blocks, key=lambda b: b.layer)


def get_module(root: nn.Module, path: str) -> Any:
    """The attribute or list item at a dotted path."""
    node: Any = root
    for name in path.split("."):
        node = node[int(name)] if name.isdigit() else getattr(node, name)
    return node


def replace_module(root: nn.Module, path: str, value: Any) -> None:
    """Put `value` at a dotted path."""
    parent, _, name = path.rpartition(".")
    node = get_module(root, parent) if parent else root
    if name.isdigit():
        node[int(name)] = value
    else:
        setattr(node, name, value)


def complete_config(config: Config) -> Config:
    """A config.json with the keys that mlx-lm looks for, taken from transformers 5's names.

    transformers 5 saves `rope_theta` inside `rope_parameters` and renames counts of experts;
    mlx-lm 0.32.2 then rejects the config or, worse, silently uses its own default base. mlx-vlm
    knows them but for `rope_parameters`, of which some of its families know nothing.
    """
    if vlm_family_name(str(config.get("model_type"))) is not None:
        return _complete_vlm_config(config)
    full = {k: complete_config(v) if k == "text_config" else v for k, v in config.items()}
    full = complete_rope(full)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and not any(isinstance(v, dict) for v in rope.values()):
        full.setdefault("rope_scaling", None)
    counts = [config[k] for k in EXPERT_COUNT_KEYS if isinstance(config.get(k), int)]
    for key in EXPERT_COUNT_KEYS[:3] if counts else ():
        full.setdefault(key, counts[0])
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and "full_attention" in kinds:
        full.setdefault("full_attention_interval", kinds.index("full_attention") + 1)
    kinds = config.get("mlp_layer_types")
    if isinstance(kinds, list) and "first_k_dense_replace" not in config and "sparse" in kinds:
        full["first_k_dense_replace"] = kinds.index("sparse")
    family = family_of(str(config.get("model_type")))
    if family.config_defaults is not None and isinstance(rope, dict):
        defaults = family.config_defaults(full)
        full |= {key: value for key, value in defaults.items() if full.get(key) is None}
    return full


def _complete_vlm_config(config: Config) -> Config:
    parts = ("text_config", "thinker_config")
    full = {
        k: _complete_vlm_config(v) if k in parts and isinstance(v, dict) else v
        for k, v in config.items()
    }
    return complete_rope(full)


def with_expert_count(config: Any, count: int, local: int) -> Any:
    """The config with `local` in place of every number of routed experts that is `count`."""
    if isinstance(config, dict):
        return {
            k: _replace_count(v, count, local)
            if k in EXPERT_COUNT_KEYS
            else with_expert_count(v, count, local)
            for k, v in config.items()
        }
    return config


def _replace_count(value: Any, count: int, local: int) -> Any:
    if isinstance(value, list):  # experts for text and for images
        return [_replace_count(v, count, local) for v in value]
    return local if value == count else value
