"""Where each mlx-lm family keeps its Mixture-of-Experts block, and what is special about it.

Owns: finding the blocks of a loaded model, and the table of what differs between families.
Does not know: ranks, bytes on disk, collectives.
Invariant: the generic case needs no row. A block is a module whose child is a `SwitchGLU` or
`SwitchMLP`; it returns a sum over experts (plus, perhaps, shared experts) that is linear in each
expert's output, so that the sum over ranks of what ranks compute is what one rank computes.
A family that breaks this has a row that says where.
Next: `experts.py`, which replaces the blocks; `weights.py`, which reads what they need.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import dbrx
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.utils import _get_classes

from ..errors import CheckpointError

AllReduce = Callable[[mx.array], mx.array]

# Names that families give to experts every token goes through, where they sit inside the block.
SHARED_EXPERTS = ("shared_experts", "shared_expert", "share_expert", "shared_mlp")

# Keys of config.json that give the number of routed experts, at any depth.
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "num_selected_experts",
)
CONTEXT_LENGTH_KEYS = (
    "max_position_embeddings",
    "max_seq_len",
    "max_sequence_length",
    "model_max_length",
    "n_positions",
    "seq_length",
)

# Tensors of a checkpoint that hold routed experts. One tensor per expert:
EXPERT_TENSOR = re.compile(r"(?P<head>.*\.(?:experts|moe\.mlp))\.(?P<expert>\d+)\.(?P<tail>.*)")
# or all experts of a layer stacked along the first axis:
STACKED_TENSOR = re.compile(
    r"(?!.*(?:norm|correction_bias))"  # which families hang beside the experts
    r".*\.(?:"
    r"(?:experts|switch_mlp|switch_glu)\.(?!\d)"  # mlx's own, and the hub's fused ones
    r"|moe\.(?:gate|up|down)_proj\."  # step3p5
    r"|block_sparse_moe\.(?:input|output)_linear\."  # granitemoe, granitemoehybrid
    r").*"
)
_LAYER_INDEX = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")


@dataclass(frozen=True)
class Family:
    """What a family does differently.

    Args:
        forward: replaces the block's own forward: called with the block, its input and the sum
            over ranks, where the sum must happen in the middle of the block.
        sum_before: a module inside the block that is not linear and takes the experts' sum: ranks
            are summed before it, and what follows (shared experts too) runs on every rank.
        config: gives the config keys that mlx-lm needs and transformers 5 no longer writes.
        before: applied to the checkpoint's tensors before mlx-lm's own conversion.
        once: biases inside the block that follow the experts' sum: one rank adds them.
        heads: attention is plain: q, k and v projections (or one of all three), norms of single
            heads, attention over heads, an output projection. Then heads can be dealt to ranks.
        interleaved: fused gate and up projections on the hub alternate rows, others have halves.
        unsliceable_reason: why an expert's hidden width cannot be sliced: its output is not a
            sum over it.
        metal_only: mlx-lm's own code for it is written as Metal kernels.
        note: what is special, for `cenacle families`.
    """

    forward: Callable[..., mx.array] | None = None
    sum_before: str | None = None
    config: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    before: Callable[[dict[str, mx.array]], dict[str, mx.array]] | None = None
    once: tuple[str, ...] = ()
    heads: bool = False
    interleaved: bool = False
    unsliceable_reason: str | None = None
    metal_only: bool = False
    note: str = ""

    @property
    def refused(self) -> str | None:
        """Why this family cannot be run on this machine, or None."""
        if self.metal_only and not mx.metal.is_available():
            return "mlx-lm runs it with Metal kernels only, and there is no Metal here"
        return None


@dataclass(frozen=True)
class MoEBlock:
    """One MoE block of a model.

    Args:
        layer: index among all the model's layers.
        path: where the block is, such as "model.layers.3.mlp".
        switch: the attribute of the block that holds the routed experts.
        module: the block itself.
    """

    layer: int
    path: str
    switch: str
    module: nn.Module

    @property
    def experts(self) -> nn.Module:
        """The stacked routed experts, a `SwitchGLU` or `SwitchMLP`."""
        return self.module[self.switch]

    @property
    def linears(self) -> dict[str, nn.Module]:
        """The stacked linear layers of the experts by name."""
        names = ("gate_proj", "up_proj", "down_proj", "fc1", "fc2")
        return {n: self.experts[n] for n in names if n in self.experts}

    @property
    def count(self) -> int:
        """Number of routed experts."""
        return next(iter(self.linears.values())).weight.shape[0]

    @property
    def shared(self) -> tuple[str, ...]:
        """Attributes of the block that hold shared experts."""
        return tuple(n for n in SHARED_EXPERTS if isinstance(self.module.get(n), nn.Module))

    def sums_inside(self, family: Family) -> bool:
        """Whether the sum over ranks happens in the middle of this block."""
        return family.sum_before is not None and self.module.get(family.sum_before) is not None


class StackedDbrx(nn.Module):
    """mlx-lm's DBRX block with its experts prestacked (the paper's first optimisation).

    mlx-lm keeps a Python list of experts and synchronises with the host for every token; this is
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


def _longcat_forward(block: Any, x: mx.array, *, all_sum: AllReduce) -> mx.array:
    """LongCat's zero-computation experts return the token itself: added after the sum, once."""
    ids, weights = block.router(x)
    identity = ids >= block.n_routed_experts
    # Id E is nobody's expert: no rank computes it.
    y = block.switch_mlp(x, mx.where(identity, block.n_routed_experts, ids))
    y = (y * mx.where(identity, 0.0, weights)[..., None]).sum(axis=-2)
    return all_sum(y) + x * mx.where(identity, weights, 0.0).sum(axis=-1, keepdims=True)


def _rename_gpt_oss_experts(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """transformers saves unquantised gpt-oss experts as [experts, in, out] without ".weight"."""
    return {
        f"{k}.weight" if _UNNAMED.search(k) else k: v.swapaxes(1, 2) if _UNNAMED.search(k) else v
        for k, v in weights.items()
    }


_UNNAMED = re.compile(r"\.experts\.(gate_up|down)_proj$")


def _stack_experts(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Stack single experts for a family whose conversion in mlx-lm knows fused ones only."""
    found: dict[str, dict[int, mx.array]] = {}
    rest = {}
    for key, value in weights.items():
        one = EXPERT_TENSOR.fullmatch(key)
        if one is None or not one["head"].endswith(".experts"):
            rest[key] = value
            continue
        name = f"{one['head'].removesuffix('experts')}switch_mlp.{one['tail']}"
        found.setdefault(name, {})[int(one["expert"])] = value
    return rest | {k: mx.stack([v[e] for e in sorted(v)]) for k, v in found.items()}


def _head_dim(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


GENERIC = Family()
_PLAIN = Family(heads=True)
FAMILIES: dict[str, Family] = {
    "dbrx": Family(heads=True, note="experts come as a list and are prestacked on loading"),
    "exaone_moe": Family(
        heads=True,
        config=lambda c: {
            "head_dim": _head_dim(c),
            "is_moe_layer": [kind == "sparse" for kind in c.get("mlp_layer_types", ())],
        },
    ),
    "glm_moe_dsa": Family(
        config=lambda _: {
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "moe_layer_freq": 1,
        }
    ),
    "gpt_oss": Family(
        before=_rename_gpt_oss_experts,
        heads=True,
        interleaved=True,
        note="clipped SwiGLU, expert biases",
    ),
    "kimi_k3": Family(
        sum_before="routed_expert_norm", note="the sum of latent experts is normalised"
    ),
    "longcat_flash": Family(
        forward=_longcat_forward, note="zero-computation experts return the token"
    ),
    "longcat_flash_ngram": Family(forward=_longcat_forward, note="as longcat_flash"),
    "muse_spark": Family(
        metal_only=True,
        note="never run: needs Metal",
        # Zero stays zero, so whole experts on several ranks are right.
        unsliceable_reason="each expert's output is normalised before the weighted sum",
    ),
    "nemotron_h": Family(
        once=("fc2_latent_proj.bias",), heads=True, note="latent experts are projected back"
    ),
    "minimax_m2": Family(
        config=lambda c: {
            "shared_intermediate_size": 0,
            "rotary_dim": int(_head_dim(c) * c.get("partial_rotary_factor", 1)),
        }
    ),
    "qwen3_5_moe": Family(before=_stack_experts),
    "qwen3_next": Family(config=lambda _: {"norm_topk_prob": True}),
    "solar_open": Family(
        heads=True,
        config=lambda c: {
            "intermediate_size": c["moe_intermediate_size"],
            "first_k_dense_replace": 0,
            "partial_rotary_factor": 1.0,
        },
    ),
    # Nothing is special but that their heads can be dealt to ranks.
    **dict.fromkeys(
        (
            "Klear",
            "deepseek",
            "dots1",
            "ernie4_5_moe",
            "glm4_moe",
            "granitemoe",
            "granitemoehybrid",
            "jamba",
            "lfm2_moe",
            "llama4",
            "mellum",
            "mimo_v2_flash",
            "mixtral",
            "phimoe",
            "qwen2_moe",
            "qwen3_moe",
            "qwen3_vl_moe",
        ),
        _PLAIN,
    ),
}


def resolve_family(config: dict[str, Any]) -> str:
    """The mlx-lm module that runs this config's model_type.

    Raises:
        CheckpointError: the config has no model_type, or mlx-lm has no such family.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError("config.json: expected a model_type, got none")
    try:
        model, _ = _get_classes(config)
    except (ValueError, ImportError) as error:
        raise CheckpointError(
            f"config.json: mlx-lm knows no model_type {kind!r}; "
            f"`cenacle families` lists those that work"
        ) from error
    return model.__module__.rsplit(".", 1)[-1]


def model_classes(config: dict[str, Any]) -> tuple[type[nn.Module], Any]:
    """mlx-lm's model class and its arguments' class for a config."""
    return _get_classes(config)


def layer_index(name: str) -> int | None:
    """The layer index in a tensor's or module's name."""
    found = _LAYER_INDEX.search(name)
    return int(found[1]) if found else None


def stack_dbrx_experts(model: nn.Module) -> None:
    """Replace expert lists by stacked experts (DBRX)."""
    for path, module in list(model.named_modules()):
        if isinstance(module, dbrx.SparseMoeBlock):
            replace_module(model, path, StackedDbrx(module))


def stack_dbrx_weights(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Stack DBRX's per-expert tensors (`ffn.experts.0.w1.weight`, ...), lazily."""
    names = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}
    found: dict[str, dict[int, mx.array]] = {}
    rest = {}
    for key, value in weights.items():
        one = re.fullmatch(r"(.*\.ffn)\.experts\.(\d+)\.(w1|v1|w2)\.(\w+)", key)
        if one is None:
            rest[key] = value
            continue
        stacked = f"{one[1]}.switch_mlp.{names[one[3]]}.{one[4]}"
        found.setdefault(stacked, {})[int(one[2])] = value
    return rest | {k: mx.stack([v[e] for e in sorted(v)]) for k, v in found.items()}


def find_blocks(model: nn.Module) -> list[MoEBlock]:
    """The MoE blocks of a (prestacked) model, by layer."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, SwitchGLU | SwitchMLP):
            parent, _, switch = path.rpartition(".")
            layer = layer_index(path)
            if layer is None:
                raise CheckpointError(f"{path} holds experts outside any layer")
            found.append(MoEBlock(layer, parent, switch, get_module(model, parent)))
    return sorted(found, key=lambda b: b.layer)


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


def find_int(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    """The first of `keys` that is an integer in the config or in the configs nested in it."""
    nested: list[dict[str, Any]] = [config]
    while nested:
        level = nested.pop(0)
        for key in keys:
            value = level.get(key)
            if isinstance(value, list) and value and len(set(map(str, value))) == 1:
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        nested += [v for v in level.values() if isinstance(v, dict)]
    return None


def kv_cache_elements_per_token(config: dict[str, Any], layers: int) -> int:
    """How many numbers a KV cache keeps per position, all layers together.

    Exact for grouped-query and for latent attention; more than is needed where some layers have
    none (linear attention, state-space layers) or keep a window only, less than mlx-lm's
    deepseek_v2 keeps, which unfolds its latents.
    """
    latent = find_int(config, ("kv_lora_rank",))
    if latent is not None:
        return layers * (latent + (find_int(config, ("qk_rope_head_dim",)) or 0))
    heads = find_int(config, ("num_attention_heads", "n_heads", "num_heads")) or 1
    kept = find_int(config, ("num_key_value_heads", "kv_n_heads", "num_attention_groups")) or heads
    width = find_int(config, ("hidden_size", "d_model", "model_dim")) or 0
    return layers * 2 * kept * (find_int(config, ("head_dim",)) or width // heads)


def complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the keys that mlx-lm looks for, taken from transformers 5's names.

    transformers 5 saves `rope_theta` inside `rope_parameters` and renames counts of experts;
    mlx-lm 0.32.2 then refuses the config or, worse, uses its own default base in silence.
    """
    full = {k: complete_config(v) if k == "text_config" else v for k, v in config.items()}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and not any(isinstance(v, dict) for v in rope.values()):
        for key in ("rope_theta", "partial_rotary_factor"):
            if rope.get(key) is not None:
                full.setdefault(key, rope[key])
        scaled = rope.get("rope_type", "default") != "default"
        if full.get("rope_scaling") is None:
            full["rope_scaling"] = dict(rope) if scaled else None
    counts = [config[k] for k in EXPERT_COUNT_KEYS if isinstance(config.get(k), int)]
    for key in EXPERT_COUNT_KEYS[:3] if counts else ():
        full.setdefault(key, counts[0])
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and "full_attention" in kinds:
        full.setdefault("full_attention_interval", kinds.index("full_attention") + 1)
    kinds = config.get("mlp_layer_types")
    if isinstance(kinds, list) and "first_k_dense_replace" not in config and "sparse" in kinds:
        full["first_k_dense_replace"] = kinds.index("sparse")
    family = FAMILIES.get(str(config.get("model_type")), GENERIC)
    if family.config is not None and isinstance(rope, dict):
        full = family.config(full) | full
    return full


def with_expert_count(config: Any, count: int, local: int) -> Any:
    """The config with `local` in place of every number of routed experts that is `count`."""
    if isinstance(config, dict):
        return {
            k: local
            if k in EXPERT_COUNT_KEYS and v == count
            else with_expert_count(v, count, local)
            for k, v in config.items()
        }
    return config
