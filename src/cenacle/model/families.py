"""What differs between the Mixture-of-Experts families of mlx-lm and mlx-vlm.

Owns: the table of families, and how checkpoints name the tensors that hold experts.
Does not know: ranks, bytes on disk, collectives.
Invariant: the generic case needs no row. A block returns a sum over its experts (plus, perhaps,
shared experts) that is linear in each expert's output, so that the sum over ranks of what the ranks
compute is what one rank computes. A family that breaks this has a row that says where.
Next: `architecture.py`, which finds the blocks; `loader.py`, which applies the conversions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import mlx.core as mx
from mlx_lm.utils import MODEL_REMAPPING

from ..core.model_config import Config, text_config
from ..extras import is_installed
from .config_catalog import TINY_CONFIGS
from .zoo_repairs import REPAIRS

# transformers' name of the family that mlx-lm calls hunyuan.
MODEL_REMAPPING.setdefault("hunyuan_v1_moe", "hunyuan")

AllReduce = Callable[[mx.array], mx.array]
"""Adds up what every rank has of an array."""

OUTPUT_SCALE = "output_scale"
"""A parameter of quantized layers: see `scaled_layers.py`."""


# Names that families give to experts that every token goes through, inside the block.
SHARED_EXPERTS = ("shared_experts", "shared_expert", "share_expert", "shared_mlp")

# Tensors of a checkpoint that hold routed experts. One tensor per expert:
EXPERT_TENSOR = re.compile(r"(?P<head>.*\.(?:experts|moe\.mlp))\.(?P<expert>\d+)\.(?P<tail>.*)")
# or all experts of a layer stacked along the first axis:
STACKED_TENSOR = re.compile(
    r"(?!.*(?:norm|correction_bias))"  # beside the experts in some families
    r".*\.(?:"
    r"(?:experts|switch_mlp|switch_glu)\.(?!\d)"  # mlx's own, and the hub's fused ones
    r"|moe\.(?:gate|up|down)_proj\."  # step3p5
    r"|block_sparse_moe\.(?:input|output)_linear\."  # granitemoe, granitemoehybrid
    r").*"
)
# Tensors of what sees and hears beside the language model, and of what speaks.
_TOWER_TENSOR = re.compile(
    r"(?:model\.|thinker\.)?"
    r"(?:vision|visual|audio|speech|image|multi_modal|mm_|embed_vision|embed_audio|aligner|"
    r"vit_large_projector|patch_merge|pre_mm_projector|resampler|talker|code2wav)\w*\."
    # Experts of ernie4_5_moe_vl that only tokens of images choose.
    r"|.*\.mlp\.(?:switch_mlp_1|gate_1|e_score_correction_bias_1|gate\.weight_1)\b"
)
# Of the towers that `vision.py` loads.
VISION_PREFIXES = ("model.visual.", "visual.", "vision_tower.", "model.vision_tower.")
_LAYER_INDEX = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
_GPT_OSS_EXPERTS = re.compile(r"\.experts\.(gate_up|down)_proj$")


def layer_index(name: str) -> int | None:
    """The index of the layer in a tensor's or module's name."""
    match = _LAYER_INDEX.search(name)
    return int(match[1]) if match else None


class Zoo(Enum):
    """The package whose model classes run a family."""

    MLX_LM = "mlx-lm"
    MLX_VLM = "mlx-vlm"


class Positions(Enum):
    """How mlx-vlm's families with positions of images take those of text, three equal ones."""

    THREE_ROWS = "[3, batch, length]"
    THREE_COLUMNS = "[batch, length, 3]"
    ONE = "[batch, length]"


class Batching(Enum):
    """Which requests may share a pass, so that no answer depends on the requests beside it.

    mlx-lm pads prompts of one pass on the right, and shorter caches of one batch on the left.
    """

    PADDED = "prompts share passes, and generating requests too"
    UNPADDED_PROMPTS = "each prompt has its own passes; generating requests share theirs"
    ONE_BY_ONE = "each request has its own passes"


def is_tower_tensor(name: str) -> bool:
    """Whether a tensor of a checkpoint is not of its language model but of a vision tower, say."""
    return _TOWER_TENSOR.match(name) is not None


@dataclass(frozen=True)
class Family:
    """What a family does differently.

    Args:
        forward: replaces the block's own forward where the all-reduce must happen inside it: called
            with the block, its input and `all_reduce`.
        all_reduce_before: a module inside the block that is not linear and takes the sum of the
            experts. The all-reduce comes before it; what follows (shared experts too) runs on every
            rank.
        config_defaults: gives the config keys that mlx-lm needs and transformers 5 no longer
            writes.
        convert_weights: applied to the checkpoint's tensors before mlx-lm's own conversion.
        biases_after_sum: biases inside the block that follow the sum of the experts: one rank adds
            them.
        plain_attention: attention is q, k and v projections (or one of all three), norms of single
            heads, attention over heads, an output projection. Then its heads can be sharded.
        interleaved_gate_up: fused gate and up projections on the hub alternate rows; others have
            halves.
        unsliceable_reason: why an expert's hidden width cannot be sliced: its output is not a
            sum over it.
        metal_only: mlx-lm implements it with Metal kernels only.
        batching: what the model's layers can take; `tests/mlx/test_batching.py` shows it.
        request_attention: the attribute of layers whose attention is called for each request,
            because its caches cannot be merged; see `request_caches.py`.
        make_caches: replaces the model's own `make_cache`; called with the model.
        whole_shared_experts: each of the shared experts has a weight of its own for each token, so
            they are not one layer to slice by width.
        positions: see `Positions`.
        width_block: features of an expert's hidden width that stay together: a multiple of these
            is a slice.
        rename_tensor: gives a tensor of a published checkpoint another name, before anything else;
            called with its name and the config.
        own_formats: layers, by the ends of their paths, whose published format only mlx-vlm's
            conversion of this family knows.
        zoo: the package that has its model classes.
        aliases: other model_types that mlx-vlm runs with these classes.
        refused: why it cannot run at all.
        note: what is special, for `cenacle families`.
    """

    forward: Callable[..., mx.array] | None = None
    all_reduce_before: str | None = None
    config_defaults: Callable[[Config], Config] | None = None
    convert_weights: Callable[[dict[str, mx.array]], dict[str, mx.array]] | None = None
    biases_after_sum: tuple[str, ...] = ()
    plain_attention: bool = False
    interleaved_gate_up: bool = False
    unsliceable_reason: str | None = None
    metal_only: bool = False
    batching: Batching = Batching.PADDED
    request_attention: str = ""
    make_caches: Callable[[Any], list[Any]] | None = None
    whole_shared_experts: bool = False
    positions: Positions = Positions.THREE_ROWS
    width_block: int = 1
    rename_tensor: Callable[[str, Config], str] | None = None
    own_formats: tuple[str, ...] = ()
    zoo: Zoo = Zoo.MLX_LM
    aliases: tuple[str, ...] = ()
    refused: str | None = None
    note: str = ""

    @property
    def unsupported_reason(self) -> str | None:
        """Why this family cannot run on this machine, or None."""
        if self.refused is not None:
            return self.refused
        if self.zoo is Zoo.MLX_VLM and not is_installed("mlx_vlm"):
            return "it needs mlx-vlm: run `pip install 'cenacle[vlm]'`"
        if self.metal_only and not mx.metal.is_available():
            return "mlx-lm implements it with Metal kernels only, and this machine has no Metal"
        return None


def _longcat_forward(block: Any, x: mx.array, *, all_reduce: AllReduce) -> mx.array:
    """LongCat's zero-computation experts return the token itself: added once, after the sum."""
    ids, weights = block.router(x)
    identity = ids >= block.n_routed_experts
    # No rank holds expert E = n_routed_experts, so no rank computes it.
    y = block.switch_mlp(x, mx.where(identity, block.n_routed_experts, ids))
    y = (y * mx.where(identity, 0.0, weights)[..., None]).sum(axis=-2)
    return all_reduce(y) + x * mx.where(identity, weights, 0.0).sum(axis=-1, keepdims=True)


def _inkling_forward(block: Any, x: mx.array, *, all_reduce: AllReduce) -> mx.array:
    """mlx-vlm's own, which looks into the experts before it calls them."""
    tokens = x.reshape(-1, x.shape[-1])
    ids, weights, shared_weights = block._route(tokens @ block.gate_weight.astype(x.dtype).T)
    y = (block.switch_mlp(tokens, ids) * weights[..., None]).sum(axis=-2)
    y = y + block.shared_experts(tokens, shared_weights)
    return all_reduce(y).reshape(x.shape).astype(x.dtype)


def _deepseek_v41_forward(block: Any, x: mx.array, *args: Any, all_reduce: AllReduce) -> mx.array:
    """mlx-vlm's own. Each choice is a token of its own for the experts, with its weight beside it:
    they multiply by it before they round to FP8 (`zoo.WeightedExperts`)."""
    from mlx_vlm.models.deepseek_v41.fakequant import fake_quant_fp8_ue8m0

    ids, weights = block.gate(x, *args)
    tokens = fake_quant_fp8_ue8m0(x)[..., None, :]
    parts, rest = [], weights[..., None]
    for _ in range(3):  # three numbers of 8 bits are one of 24
        parts.append(rest.astype(x.dtype))
        rest = rest - parts[-1].astype(mx.float32)
    tokens = mx.broadcast_to(tokens, (*ids.shape, x.shape[-1]))
    y = block.switch_mlp(mx.concatenate([tokens, *parts], axis=-1), ids[..., None])
    y = y.squeeze(-2).astype(mx.float32).sum(axis=-2)
    return all_reduce(y + block.shared_experts(x).astype(mx.float32)).astype(x.dtype)


def _make_ngram_caches(model: Any) -> list[Any]:
    """The model's, with the tokens before the first one: caches of one width can share a batch.

    Token 0 adds nothing to the id of an n-gram, as a missing token does.
    """
    caches: list[Any] = type(model).make_cache(model)
    if "language_model" in model:  # mlx-vlm's
        length = model.language_model.args.oe_neighbor_num
    else:
        length = model.args.emb_neighbor_num
    caches[0][0] = mx.zeros((1, length - 1), mx.int64)
    return caches


def _rename_gpt_oss_experts(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """transformers saves unquantized gpt-oss experts as [experts, in, out] without ".weight"."""
    return {
        (f"{name}.weight" if _GPT_OSS_EXPERTS.search(name) else name): (
            array.swapaxes(1, 2) if _GPT_OSS_EXPERTS.search(name) else array
        )
        for name, array in weights.items()
    }


def stack_tensors(
    weights: dict[str, mx.array], stacked_name: Callable[[str], tuple[str, int] | None]
) -> dict[str, mx.array]:
    """Stack tensors lazily.

    Args:
        stacked_name: gives for a tensor the name of its stack and its index there, or None: the
            tensor stays as it is.
    """
    stacks: dict[str, dict[int, mx.array]] = {}
    rest = {}
    for name, array in weights.items():
        place = stacked_name(name)
        if place is None:
            rest[name] = array
        else:
            stacks.setdefault(place[0], {})[place[1]] = array
    return rest | {k: mx.stack([v[e] for e in sorted(v)]) for k, v in stacks.items()}


def _rename_minimax_m3_tensor(name: str, config: Config) -> str:
    """mlx-vlm packs the shared expert behind the routed ones: then it is placed like these."""
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    match = re.fullmatch(r"(.*\.block_sparse_moe)\.shared_experts\.(\w+)\.(.*)", name)
    if match is None or match[2] not in names:
        return name
    index = text_config(config)["num_local_experts"]
    return f"{match[1]}.experts.{index}.{names[match[2]]}.{match[3]}"


def _head_dim(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


_DIFFUSION = "it writes blocks of tokens by diffusion, and requests here grow token by token"
_OWN_EXPERTS = "its experts are of a form of their own, which cannot be divided"
_GENERIC = Family()
_PLAIN = Family(plain_attention=True)
FAMILIES: dict[str, Family] = {
    "dbrx": Family(plain_attention=True, note="experts come as a list and are stacked on loading"),
    "deepseek_v41": Family(
        zoo=Zoo.MLX_VLM,
        aliases=("deepseek_v41_text",),
        forward=_deepseek_v41_forward,
        width_block=32,
        whole_shared_experts=True,
        note="Engram's tables stay on disk",
    ),
    "exaone_moe": Family(
        plain_attention=True,
        config_defaults=lambda c: {
            "head_dim": _head_dim(c),
            "is_moe_layer": [kind == "sparse" for kind in c.get("mlp_layer_types", ())],
        },
    ),
    "glm_moe_dsa": Family(
        config_defaults=lambda _: {
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "moe_layer_freq": 1,
        }
    ),
    "gpt_oss": Family(
        convert_weights=_rename_gpt_oss_experts,
        plain_attention=True,
        interleaved_gate_up=True,
        note="clipped SwiGLU, expert biases",
    ),
    "hunyuan_v1_moe": Family(
        config_defaults=lambda _: {
            "use_cla": False,
            "cla_share_factor": 1,
            "num_shared_expert": 1,
            "use_mixed_mlp_moe": True,
            "use_qk_norm": True,
            "rope_scaling": {"type": "default", "factor": 1.0, "alpha": 1.0},
        }
    ),
    "kimi_k3": Family(
        all_reduce_before="routed_expert_norm", note="the sum of latent experts is normalized"
    ),
    "longcat_flash": Family(
        forward=_longcat_forward, note="zero-computation experts return the token"
    ),
    "longcat_flash_ngram": Family(
        forward=_longcat_forward,
        # Padding would take the place of the last tokens in the context of n-grams.
        batching=Batching.UNPADDED_PROMPTS,
        make_caches=_make_ngram_caches,
        note="as longcat_flash",
    ),
    # The last state of recurrent layers would include the padding after the prompt.
    "bailing_moe_linear": Family(batching=Batching.UNPADDED_PROMPTS),
    "jamba": Family(batching=Batching.UNPADDED_PROMPTS, plain_attention=True),
    "minimax_m3_vl": Family(
        # Padding would move the borders of the blocks that sparse attention chooses from.
        request_attention="self_attn",
        batching=Batching.UNPADDED_PROMPTS,
    ),
    "muse_spark": Family(
        metal_only=True,
        note="never run: needs Metal",
        # The norm of zero is zero, so whole experts on several ranks are correct.
        unsliceable_reason="each expert's output is normalized before the weighted sum",
    ),
    "nemotron_h": Family(
        biases_after_sum=("fc2_latent_proj.bias",),
        plain_attention=True,
        batching=Batching.UNPADDED_PROMPTS,
        note="latent experts are projected back",
    ),
    "minimax_m2": Family(
        config_defaults=lambda c: {
            "shared_intermediate_size": 0,
            "rotary_dim": int(_head_dim(c) * c.get("partial_rotary_factor", 1)),
        }
    ),
    "qwen3_next": Family(config_defaults=lambda _: {"norm_topk_prob": True}),
    "solar_open": Family(
        plain_attention=True,
        config_defaults=lambda c: {
            "intermediate_size": c["moe_intermediate_size"],
            "first_k_dense_replace": 0,
            "partial_rotary_factor": 1.0,
        },
    ),
    "cohere2_moe": Family(zoo=Zoo.MLX_VLM, aliases=("cohere2moe",), plain_attention=True),
    # The window before a pass (`zoo_repairs.py`) is one request's.
    "deepseek_v4": Family(
        zoo=Zoo.MLX_VLM, request_attention="attn", batching=Batching.UNPADDED_PROMPTS
    ),
    # Padding would change the pooled keys that a prompt of few tokens has.
    "glm5_next": Family(zoo=Zoo.MLX_VLM, batching=Batching.UNPADDED_PROMPTS),
    "glm4v_moe": Family(zoo=Zoo.MLX_VLM, plain_attention=True),
    "hy_v4": Family(zoo=Zoo.MLX_VLM, own_formats=(".self_attn.kv_b_proj",)),
    "ernie4_5_moe_vl": Family(
        zoo=Zoo.MLX_VLM,
        plain_attention=True,
        positions=Positions.THREE_COLUMNS,
        note="experts for text only",
    ),
    "inkling": Family(
        zoo=Zoo.MLX_VLM,
        aliases=("inkling_mm_model",),
        forward=_inkling_forward,
        interleaved_gate_up=True,
        whole_shared_experts=True,
    ),
    "longcat_flash_sparse": Family(
        zoo=Zoo.MLX_VLM,
        forward=_longcat_forward,
        # In a batch the masks of its sparse attention would have a wrong shape.
        request_attention="self_attn",
        batching=Batching.UNPADDED_PROMPTS,
        make_caches=_make_ngram_caches,
        note="as longcat_flash, with sparse attention",
    ),
    "minimax_m3": Family(
        zoo=Zoo.MLX_VLM,
        positions=Positions.ONE,
        request_attention="self_attn",
        batching=Batching.UNPADDED_PROMPTS,
        rename_tensor=_rename_minimax_m3_tensor,
    ),
    "mistral_large3": Family(zoo=Zoo.MLX_VLM),
    "qwen3_omni_moe": Family(zoo=Zoo.MLX_VLM, plain_attention=True),
    "mimo_v2": Family(zoo=Zoo.MLX_VLM, plain_attention=True, own_formats=(".self_attn.qkv_proj",)),
    # As minimax_m3_vl: its sparse attention chooses among blocks.
    "qwen4_exp": Family(
        zoo=Zoo.MLX_VLM, request_attention="self_attn", batching=Batching.UNPADDED_PROMPTS
    ),
    "step3p7": Family(zoo=Zoo.MLX_VLM),
    "diffusion_gemma": Family(zoo=Zoo.MLX_VLM, refused=_DIFFUSION),
    "llada2_moe": Family(zoo=Zoo.MLX_VLM, refused=_DIFFUSION),
    "moondream3": Family(zoo=Zoo.MLX_VLM, refused=_OWN_EXPERTS),
    "zaya1_vl": Family(zoo=Zoo.MLX_VLM, refused=_OWN_EXPERTS),
    # Special only in that their attention heads can be sharded.
    **dict.fromkeys(
        (
            "Klear",
            "deepseek",
            "dots1",
            "ernie4_5_moe",
            "glm4_moe",
            "granitemoe",
            "granitemoehybrid",
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


def family_of(name: str) -> Family:
    """The row of a module's name."""
    return FAMILIES.get(name, _GENERIC)


def vlm_family_name(model_type: str) -> str | None:
    """The family of mlx-vlm that runs a model_type; None: no row says that one does."""
    for name, family in FAMILIES.items():
        if family.zoo is Zoo.MLX_VLM and model_type in (name, *family.aliases):
            return name
    return None


@dataclass(frozen=True)
class FamilyInfo:
    """One family as `cenacle families` lists it.

    Args:
        name: the module of mlx-lm or mlx-vlm.
        zoo: which of the two.
        aliases: other model_types that it runs.
        note: what is special.
        refused: why it cannot run on this machine, or None.
    """

    name: str
    zoo: str
    aliases: tuple[str, ...]
    note: str
    refused: str | None

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the fields above."""
        return asdict(self)


def list_families() -> list[FamilyInfo]:
    """Every family with experts, by name."""
    names = {p.stem for p in TINY_CONFIGS.glob("*.json")} | set(FAMILIES) - set(MODEL_REMAPPING)
    rows = []
    for name in sorted(names, key=str.lower):
        family = family_of(name)
        aliases = set(family.aliases)
        if family.zoo is Zoo.MLX_LM:
            aliases |= {a for a, module in MODEL_REMAPPING.items() if module == name}
        reason = family.unsupported_reason
        repaired = f"{family.zoo.value}'s fault repaired" if name in REPAIRS else ""
        note = "; ".join(filter(None, (family.note, repaired)))
        rows.append(FamilyInfo(name, family.zoo.value, tuple(sorted(aliases)), note, reason))
    return rows
