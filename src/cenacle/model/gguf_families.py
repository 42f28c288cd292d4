"""Which of llama.cpp's architectures are served, and as which families.

Owns: `FAMILIES`: each one's config.json from GGUF's metadata, its modules by GGUF's names, and
which of its tensors llama.cpp's convert script changed.
Does not know: where bytes are, ranks.
Invariant: what a family's model class cannot compute is refused by the name of the value.
Next: `gguf_checkpoint.py` writes the config and reads the tensors; `gguf_transforms.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..gguf.file import GgufTensor, Metadata
from . import gguf_transforms as transforms
from .gguf_transforms import Transform

PLAIN_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{n}": f"self_attn.{n}_proj" for n in ("q", "k", "v")},
    "attn_output": "self_attn.o_proj",
}
OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_MATRICES = ("gate", "up", "down")


def _moe_names(
    block: str, shared: str | None = None, experts: str = "switch_mlp"
) -> dict[str, str]:
    names = {"ffn_gate_inp": f"{block}.gate"}
    names |= {f"ffn_{n}_exps": f"{block}.{experts}.{n}_proj" for n in _MATRICES}
    names |= {f"ffn_{n}": f"{block}.{n}_proj" for n in _MATRICES}
    if shared is not None:
        names |= {f"ffn_{n}_shexp": f"{block}.{shared}.{n}_proj" for n in _MATRICES}
    return names


class Values:
    """Metadata of one architecture, and the names of the file's tensors."""

    def __init__(
        self,
        path: Path,
        architecture: str,
        metadata: Metadata,
        tensors: Mapping[str, tuple[Path, GgufTensor]] | None = None,
    ) -> None:
        self.path, self.architecture, self.metadata = path, architecture, metadata
        self.tensors = {} if tensors is None else tensors

    def has(self, part: str) -> bool:
        """Whether a tensor of a layer has this name."""
        return any(name.split(".")[2:3] == [part] for name in self.tensors)

    def has_bias(self, part: str) -> bool:
        """Whether a module of a layer of this name has a bias."""
        return any(name.split(".")[2:] == [part, "bias"] for name in self.tensors)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        if (embedding := self.tensors.get("token_embd.weight")) is not None:
            return embedding[1].shape[0]
        return len(self.metadata.get("tokenizer.ggml.tokens") or ())

    def floats(self, name: str) -> np.ndarray | None:
        """A short vector of the file; None: there is none."""
        path, tensor = self.tensors.get(name, (self.path, None))
        if tensor is None or tensor.type != "F32" or tensor.stop - tensor.start > 1 << 16:
            return None
        with path.open("rb") as file:
            file.seek(tensor.start)
            data = file.read(tensor.stop - tensor.start)
        return np.frombuffer(data, "<f4")

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture, of any type."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float | None = None) -> Any:
        """A number that is not negative.

        Raises:
            CheckpointError: it is none, or missing without a default.
        """
        value = self.get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not 0 <= value < 2**53:
            raise CheckpointError(
                f"{self.path}: {self.architecture}.{key}: expected a number, got {value!r:.100}; "
                "download it again"
            )
        return value

    def require(self, key: str, expected: float, *, tolerance: float = 1e-6) -> None:
        """Refuse a number that is there and is another one.

        Raises:
            CheckpointError: it is.
        """
        value = self.number(key, expected)
        if abs(value - expected) > tolerance:
            raise self.unsupported(key, str(expected), value)

    def unsupported(self, key: str, expected: str, got: Any) -> CheckpointError:
        """The error of a value that the family's model cannot compute."""
        return CheckpointError(
            f"{self.path}: {self.architecture}.{key}: expected {expected}, got {got!r:.100}; use "
            "the model in another format"
        )


@dataclass(frozen=True)
class GgufFamily:
    """One of llama.cpp's architectures.

    Args:
        model_type: mlx-lm's.
        names: a layer's modules, by GGUF's names.
        config: entries of config.json beside those of every family.
        parameters: full names in the layer of tensors that are no module's "weight" or "bias", by
            GGUF's names in the layer. A transform may make a parameter of several.
        transforms: by a module's path in the layer, or by a parameter's name there.
        prefix: of all names of the model class.
        layers, outer: where it has layers, and what is outside them, after the prefix.
        skipped: tensors of which nothing is needed.
        norm_key: the epsilon of norms.
        rope_scalings: of rotary positions, that llama.cpp and `rotary.py` compute alike.
        text_type: where config.json describes the language model apart, the model_type there.
    """

    model_type: str
    names: Mapping[str, str]
    config: Callable[[Values], dict[str, Any]]
    parameters: Mapping[str, str] = field(default_factory=dict)
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    prefix: str = ""
    layers: str = "model.layers"
    outer: Mapping[str, str] = field(default_factory=lambda: OUTER_NAMES)
    skipped: tuple[str, ...] = ()
    norm_key: str = "attention.layer_norm_rms_epsilon"
    rope_scalings: tuple[str, ...] = ()
    text_type: str | None = None

    @property
    def is_dense(self) -> bool:
        """Whether it has no experts: it can draft, and is not served."""
        return "ffn_gate_exps" not in self.names


def _llama(values: Values) -> dict[str, Any]:
    return _dense(values) | {"rope_scaling": _llama3_rope_scaling(values)}


def _dense(values: Values) -> dict[str, Any]:
    return {
        "intermediate_size": values.number("feed_forward_length"),
        "attention_bias": values.has_bias("attn_q"),
        "rope_scaling": None,
    }


def _mixtral(values: Values) -> dict[str, Any]:
    return {
        "intermediate_size": values.number("feed_forward_length"),
        "num_local_experts": values.number("expert_count"),
    }


def _qwen2_moe(values: Values) -> dict[str, Any]:
    width = values.number("expert_feed_forward_length")
    return {
        "num_experts": values.number("expert_count"),
        "intermediate_size": values.number("feed_forward_length", width),
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": values.number(
            "expert_shared_feed_forward_length", values.number("feed_forward_length", width)
        ),
    }


def _qwen3_moe(values: Values) -> dict[str, Any]:
    width = values.number("expert_feed_forward_length")
    return {
        "num_experts": values.number("expert_count"),
        "intermediate_size": values.number("feed_forward_length", width),
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _granite_moe(values: Values) -> dict[str, Any]:
    return _mixtral(values) | {
        "attention_bias": False,
        "attention_multiplier": values.number("attention.scale"),
        "embedding_multiplier": values.number("embedding_scale"),
        "residual_multiplier": values.number("residual_scale"),
        "logits_scaling": values.number("logit_scale"),
    }


def _glm4_moe(values: Values) -> dict[str, Any]:
    head_dim = values.number("attention.key_length")
    return {
        "attention_bias": True,
        "first_k_dense_replace": values.number("leading_dense_block_count", 0),
        "intermediate_size": values.number("feed_forward_length"),
        "moe_intermediate_size": values.number("expert_feed_forward_length"),
        "n_group": 1,
        "n_routed_experts": values.number("expert_count"),
        "n_shared_experts": values.number("expert_shared_count"),
        "norm_topk_prob": bool(values.get("expert_weights_norm", True)),
        "partial_rotary_factor": values.number("rope.dimension_count") / max(head_dim, 1),
        "rope_scaling": None,
        "routed_scaling_factor": values.number("expert_weights_scale", 1.0),
        "topk_group": 1,
        "use_qk_norm": values.has("attn_q_norm"),
    }


def _gpt_oss(values: Values) -> dict[str, Any]:
    layers = values.number("block_count")
    period = values.get("attention.sliding_window_pattern", 2)
    if period != 2:  # llama.cpp writes none: every second layer sees all tokens
        raise values.unsupported("attention.sliding_window_pattern", "2", period)
    values.require("expert_weights_scale", 1.0)
    kinds = ("sliding_attention", "full_attention")
    # GGUF has no value for it; every published model says so. llama.cpp truncates.
    is_scaled = values.get("rope.scaling.type", "none") == "yarn"
    return {
        "rope_scaling": {"truncate": False} if is_scaled else None,
        "attention_bias": True,
        "intermediate_size": values.number("expert_feed_forward_length"),
        "layer_types": [kinds[i % 2] for i in range(min(int(layers), 1000))],
        "num_local_experts": values.number("expert_count"),
        "sliding_window": values.number("attention.sliding_window"),
    }


# Groups of experts that the Hub's config has and older files lack: by layers and experts.
_KNOWN_GROUPS = {(61, 256): (8, 4), (60, 160): (8, 3)}


def _deepseek(values: Values) -> dict[str, Any]:
    if values.has("attn_kv_b") and values.has("attn_k_b"):
        raise CheckpointError(
            f"{values.path}: expected attn_kv_b or attn_k_b, got both, which llama.cpp does not "
            "write; use the model in another format"
        )
    values.require("attention.temperature_scale", 0.0)
    heads, rotary = values.number("attention.head_count"), values.number("rope.dimension_count")
    key_width = values.number("attention.key_length_mla", values.number("attention.key_length"))
    layers, experts = values.number("block_count"), values.number("expert_count")
    groups, chosen = _KNOWN_GROUPS.get((layers, experts), (1, 1))
    return {
        "attention_bias": False,
        "first_k_dense_replace": values.number("leading_dense_block_count", 0),
        "head_dim": key_width,
        "intermediate_size": values.number("feed_forward_length"),
        "kv_lora_rank": values.number("attention.kv_lora_rank"),
        "moe_intermediate_size": values.number("expert_feed_forward_length"),
        "moe_layer_freq": 1,
        "n_group": values.number("expert_group_count", groups) or 1,
        "n_routed_experts": experts,
        "n_shared_experts": values.number("expert_shared_count"),
        "norm_topk_prob": bool(values.get("expert_weights_norm", False)),
        "num_key_value_heads": heads,
        "q_lora_rank": values.number("attention.q_lora_rank") if values.has("attn_q_a") else None,
        "qk_nope_head_dim": key_width - rotary,
        "qk_rope_head_dim": rotary,
        "rope_scaling": _latent_rope_scaling(values),
        "routed_scaling_factor": values.number("expert_weights_scale", 1.0) or 1.0,
        "topk_group": values.number("expert_group_used_count", chosen) or 1,
        "v_head_dim": values.number(
            "attention.value_length_mla", values.number("attention.value_length")
        ),
    }


def _latent_rope_scaling(values: Values) -> dict[str, Any] | None:
    if values.get("rope.scaling.type", "none") == "none":
        return None
    # A tenth of mscale_all_dim; mscale is the same in every published model.
    scale = round(values.number("rope.scaling.yarn_log_multiplier") * 10, 5)
    return {"mscale": scale, "mscale_all_dim": scale}


def _deepseek_v3(values: Values) -> dict[str, Any]:
    return _deepseek(values) | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def _deepseek_v2(values: Values) -> dict[str, Any]:
    config = _deepseek(values)
    if config["norm_topk_prob"]:
        raise values.unsupported("expert_weights_norm", "False with softmax", True)
    return config | {
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy" if config["n_group"] > 1 else "greedy",
    }


def _linear_attention(values: Values) -> dict[str, Any]:
    layers = int(values.number("block_count") - values.number("nextn_predict_layers", 0))
    interval = int(values.number("full_attention_interval", 4)) or 1
    kinds = values.get("attention.recurrent_layers")
    expected = [bool((i + 1) % interval) for i in range(min(layers, 1000))]
    if kinds is not None and (not isinstance(kinds, list) or kinds[:layers] != expected):
        raise values.unsupported(
            "attention.recurrent_layers", f"all layers but every {interval}th", kinds
        )
    value_heads = values.number("ssm.time_step_rank")
    return {
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "full_attention_interval": interval,
        "intermediate_size": values.number(
            "feed_forward_length", values.number("expert_feed_forward_length")
        ),
        "linear_conv_kernel_dim": values.number("ssm.conv_kernel"),
        "linear_key_head_dim": values.number("ssm.state_size"),
        "linear_num_key_heads": values.number("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": values.number("ssm.inner_size") // max(int(value_heads), 1),
        "mlp_only_layers": [],
        "moe_intermediate_size": values.number("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "num_experts": values.number("expert_count"),
        "partial_rotary_factor": values.number("rope.dimension_count")
        / max(values.number("attention.key_length"), 1),
        "shared_expert_intermediate_size": values.number("expert_shared_feed_forward_length"),
    }


def _qwen3_5_moe(values: Values) -> dict[str, Any]:
    config = _linear_attention(values)
    # Sections of rows, columns and times matter to images only: of text all three are equal.
    rope = {"rope_type": "default", "rope_theta": values.number("rope.freq_base", 10000.0)}
    rope["partial_rotary_factor"] = config["partial_rotary_factor"]
    return config | {"rope_parameters": rope}


def _minimax_m2(values: Values) -> dict[str, Any]:
    values.require("expert_gating_func", SIGMOID)
    values.require("expert_weights_scale", 1.0)
    return {
        "intermediate_size": values.number("expert_feed_forward_length"),
        "num_local_experts": values.number("expert_count"),
        "rotary_dim": values.number("rope.dimension_count"),
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "use_qk_norm": True,
    }


def _llama4(values: Values) -> dict[str, Any]:
    if values.get("attention.sliding_window") == 0:
        raise values.unsupported("attention.sliding_window", "chunks of 8192 tokens", 0)
    values.require("expert_used_count", 1)
    values.require("expert_weights_scale", 1.0)
    experts = values.number("expert_count")
    return {
        "attention_bias": False,
        # GGUF has none of these; llama.cpp too takes what both published models have.
        "attention_chunk_size": 8192,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "use_qk_norm": experts != 128,
        "interleave_moe_layer_step": values.number("interleave_moe_layer_step"),
        "intermediate_size": values.number("expert_feed_forward_length"),
        "intermediate_size_mlp": values.number("feed_forward_length"),
        "num_local_experts": experts,
        "rope_scaling": _llama3_rope_scaling(values),
    }


def _llama3_rope_scaling(values: Values) -> dict[str, Any] | None:
    """The scaling whose factors by frequency are the file's."""
    stored = values.floats("rope_freqs.weight")
    if stored is None:
        return None
    factor = float(stored.max())
    count, base = len(stored), values.number("rope.freq_base", 10000.0)
    wavelengths = 2 * math.pi * max(base, 1.0) ** (np.arange(count) / count)
    for high in (1.0, 4.0) if factor >= 1 else ():
        turns = _LLAMA_CONTEXT / wavelengths
        smooth = (turns - 1) / (high - 1) if high > 1 else np.where(turns < 1, 0.0, 1.0)
        factors = 1 / ((1 - np.clip(smooth, 0, 1)) / factor + np.clip(smooth, 0, 1))
        if np.allclose(factors, stored, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "high_freq_factor": high,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": _LLAMA_CONTEXT,
            }
    raise CheckpointError(
        f"{values.path}: rope_freqs.weight: expected factors of Llama's scaling of "
        f"{_LLAMA_CONTEXT} tokens, got others; use the model in another format"
    )


_LLAMA_CONTEXT = 8192


def _dbrx(values: Values) -> dict[str, Any]:
    values.require("attention.layer_norm_epsilon", 1e-5)
    values.require("expert_weights_scale", 1.0)
    heads = values.number("attention.head_count")
    return {
        "d_model": values.number("embedding_length"),
        "n_heads": heads,
        "n_layers": values.number("block_count"),
        "max_seq_len": values.number("context_length"),
        "attn_config": {
            "clip_qkv": values.number("attention.clamp_kqv"),
            "kv_n_heads": values.number("attention.head_count_kv", heads),
            "rope_theta": values.number("rope.freq_base", 10000.0),
        },
        "ffn_config": {
            "ffn_hidden_size": values.number("feed_forward_length"),
            "moe_num_experts": values.number("expert_count"),
            "moe_top_k": values.number("expert_used_count"),
        },
    }


def rope_scaling(values: Values, family: GgufFamily) -> dict[str, Any] | None:
    """How rotary positions are scaled, as config.json has it; None: they are not.

    Raises:
        CheckpointError: in a way that the family's class does not have.
    """
    kind = values.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in family.rope_scalings:
        expected = " or ".join(map(repr, ("none", *family.rope_scalings)))
        raise values.unsupported("rope.scaling.type", expected, kind)
    scaling = {"type": kind, "factor": values.number("rope.scaling.factor")}
    if kind == "linear":
        return scaling
    scaling["original_max_position_embeddings"] = values.number(
        "rope.scaling.original_context_length"
    )
    for name in ("beta_fast", "beta_slow"):
        if values.get(f"rope.scaling.yarn_{name}") is not None:
            scaling[name] = values.number(f"rope.scaling.yarn_{name}")
    for name in ("yarn_ext_factor", "yarn_attn_factor", "attn_factor"):
        values.require(f"rope.scaling.{name}", 1.0)
    return scaling


_DENSE_NAMES = {f"ffn_{n}": f"mlp.{n}_proj" for n in _MATRICES}
_GLM_NAMES = _moe_names("mlp", "shared_experts") | {
    "post_attention_norm": "post_attention_layernorm"
}
_GPT_OSS_NAMES = _moe_names("mlp", experts="experts") | {
    "ffn_gate_inp": "mlp.router",
    "post_attention_norm": "post_attention_layernorm",
}
_GRANITE_NAMES = _moe_names("block_sparse_moe") | {"ffn_gate_inp": "block_sparse_moe.router.layer"}
_QWEN2_NAMES = _moe_names("mlp", "shared_expert") | {"ffn_gate_inp_shexp": "mlp.shared_expert_gate"}
_NORMS = {f"attn_{n}_norm": f"self_attn.{n}_norm" for n in "qk"}
_PAIRED_HEADS = {
    "self_attn.q_proj": transforms.split_pairs("num_attention_heads"),
    "self_attn.k_proj": transforms.split_pairs("num_key_value_heads"),
}

_LATENT_NAMES = _moe_names("mlp", "shared_experts") | {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
}
_LINEAR_NAMES = _QWEN2_NAMES | {
    **_NORMS,
    "post_attention_norm": "post_attention_layernorm",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_LINEAR_PARAMETERS = {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}
_LLAMA4_NAMES = _moe_names("feed_forward", "shared_expert", "experts") | {
    "ffn_gate_inp": "feed_forward.router"
}
_DBRX_NAMES = _moe_names("ffn") | {
    "attn_norm": "norm_attn_norm.norm_1",
    "attn_qkv": "norm_attn_norm.attn.Wqkv",
    "attn_output": "norm_attn_norm.attn.out_proj",
    "attn_output_norm": "norm_attn_norm.norm_2",
    "ffn_gate_inp": "ffn.router.layer",
}
_BIAS_NAME = "e_score_correction_bias"
SOFTMAX, SIGMOID = 1, 2
"""Values of expert_gating_func."""
_GLM_LAYERS, _GLM_VOCABULARY = (47, 48), 154880  # llama.cpp too tells GLM-4.7-Flash by these

FAMILIES = {
    "dbrx": GgufFamily(
        "dbrx",
        _DBRX_NAMES,
        _dbrx,
        layers="transformer.blocks",
        outer={
            "token_embd": "transformer.wte",
            "output_norm": "transformer.norm_f",
            "output": "lm_head",
        },
        norm_key="attention.layer_norm_epsilon",
    ),
    "deepseek2": GgufFamily(
        "deepseek_v3",
        _LATENT_NAMES | {"attn_k_b": "self_attn.embed_q", "attn_v_b": "self_attn.unembed_out"},
        _deepseek_v3,
        parameters={
            "attn_kv_b.weight": "self_attn.kv_b",
            "exp_probs_b.bias": f"mlp.gate.{_BIAS_NAME}",
        },
        transforms={"self_attn.kv_b": transforms.split_latent_projection},
        rope_scalings=("yarn",),
    ),
    "deepseek2:glm": GgufFamily(
        "glm4_moe_lite",
        _LATENT_NAMES | {"attn_k_b": "self_attn.embed_q", "attn_v_b": "self_attn.unembed_out"},
        _deepseek_v3,
        parameters={
            "attn_kv_b.weight": "self_attn.kv_b",
            "exp_probs_b.bias": f"mlp.gate.{_BIAS_NAME}",
        },
        transforms={"self_attn.kv_b": transforms.split_latent_projection},
        rope_scalings=("yarn",),
    ),
    "deepseek2:softmax": GgufFamily(
        "deepseek_v2",
        _LATENT_NAMES | {"attn_kv_b": "self_attn.kv_b_proj"},
        _deepseek_v2,
        parameters={
            "attn_k_b.weight": "self_attn.kv_b_proj.k_b",
            "attn_v_b.weight": "self_attn.kv_b_proj.v_b",
        },
        transforms={"self_attn.kv_b_proj": transforms.join_latent_projection},
        rope_scalings=("yarn",),
    ),
    "glm4moe": GgufFamily(
        "glm4_moe",
        _GLM_NAMES | _NORMS,
        _glm4_moe,
        parameters={"exp_probs_b.bias": f"mlp.gate.{_BIAS_NAME}"},
        rope_scalings=("linear", "yarn"),
    ),
    "gpt-oss": GgufFamily(
        "gpt_oss",
        _GPT_OSS_NAMES,
        _gpt_oss,
        parameters={"attn_sinks.weight": "self_attn.sinks"},
        rope_scalings=("linear", "yarn"),
    ),
    "granitemoe": GgufFamily(
        "granitemoe",
        _GRANITE_NAMES,
        _granite_moe,
        transforms=_PAIRED_HEADS,
        rope_scalings=("linear", "yarn"),
    ),
    "llama:dense": GgufFamily(
        "llama",
        _DENSE_NAMES,
        _llama,
        transforms=_PAIRED_HEADS,
        skipped=("rope_freqs.weight",),
        rope_scalings=("linear", "yarn"),
    ),
    "qwen2:dense": GgufFamily("qwen2", _DENSE_NAMES, _dense, rope_scalings=("linear", "yarn")),
    "qwen3:dense": GgufFamily(
        "qwen3", _DENSE_NAMES | _NORMS, _dense, rope_scalings=("linear", "yarn")
    ),
    "llama": GgufFamily(
        "mixtral",
        _moe_names("block_sparse_moe"),
        _mixtral,
        transforms=_PAIRED_HEADS,
        rope_scalings=("linear", "yarn"),
    ),
    "llama4": GgufFamily(
        "llama4",
        _LLAMA4_NAMES,
        _llama4,
        prefix="language_model.",
        skipped=("rope_freqs.weight",),
        text_type="llama4_text",
    ),
    "minimax-m2": GgufFamily(
        "minimax",
        _moe_names("block_sparse_moe") | _NORMS,
        _minimax_m2,
        parameters={"exp_probs_b.bias": f"block_sparse_moe.{_BIAS_NAME}"},
        rope_scalings=("linear", "yarn"),
    ),
    "qwen2moe": GgufFamily("qwen2_moe", _QWEN2_NAMES, _qwen2_moe, rope_scalings=("linear", "yarn")),
    "qwen35moe": GgufFamily(
        "qwen3_5_moe",
        _LINEAR_NAMES
        | {
            "attn_qkv": "linear_attn.in_proj_qkv",
            "attn_gate": "linear_attn.in_proj_z",
            "ssm_alpha": "linear_attn.in_proj_a",
            "ssm_beta": "linear_attn.in_proj_b",
        },
        _qwen3_5_moe,
        parameters=_LINEAR_PARAMETERS,
        transforms={
            "linear_attn.A_log": transforms.decay_logarithm_by_value_head,
            "linear_attn.conv1d": transforms.convolution_weight_by_value_head,
            "linear_attn.dt_bias": transforms.restore_value_rows,
            "linear_attn.in_proj_a": transforms.restore_value_rows,
            "linear_attn.in_proj_b": transforms.restore_value_rows,
            "linear_attn.in_proj_qkv": transforms.restore_value_tail,
            "linear_attn.in_proj_z": transforms.restore_value_rows,
            "linear_attn.out_proj": transforms.restore_value_columns,
        },
        prefix="language_model.",
        rope_scalings=("linear", "yarn"),
        text_type="qwen3_5_moe_text",
    ),
    "qwen3moe": GgufFamily(
        "qwen3_moe", _moe_names("mlp") | _NORMS, _qwen3_moe, rope_scalings=("linear", "yarn")
    ),
    "qwen3next": GgufFamily(
        "qwen3_next",
        _LINEAR_NAMES | {"ssm_ba": "linear_attn.in_proj_ba", "ssm_in": "linear_attn.in_proj_qkvz"},
        _linear_attention,
        parameters=_LINEAR_PARAMETERS
        | {
            "attn_qkv.weight": "linear_attn.in_proj_qkvz.qkv",
            "attn_gate.weight": "linear_attn.in_proj_qkvz.z",
        },
        transforms={
            "linear_attn.A_log": transforms.decay_logarithm,
            "linear_attn.conv1d": transforms.convolution_weight,
            "linear_attn.in_proj_qkvz": transforms.join_by_key_head,
        },
        rope_scalings=("linear", "yarn"),
    ),
}
"""By the names that `find_family` gives."""
ARCHITECTURES = tuple(dict.fromkeys(name.partition(":")[0] for name in FAMILIES))
"""Values of general.architecture that are served."""


def find_family(values: Values) -> str:
    """The key of a model's row in `FAMILIES`.

    Raises:
        CheckpointError: there is none.
    """
    if not values.number("expert_count", 0):
        name = f"{values.architecture}:dense"
        if name not in FAMILIES:
            dense = ", ".join(n.partition(":")[0] for n in FAMILIES if n.endswith(":dense"))
            raise CheckpointError(
                f"{values.path}: the model is dense, so it has no experts to distribute; use "
                f"llama.cpp for it. As a draft model: {dense}, got {values.architecture}"
            )
        return name
    if values.architecture in ("qwen2", "qwen3"):
        raise values.unsupported("expert_count", "0", values.number("expert_count"))
    if values.architecture != "deepseek2":
        return values.architecture
    # Files of the first models, which have softmax, do not say so.
    gating = values.number("expert_gating_func", SIGMOID if values.has("exp_probs_b") else SOFTMAX)
    if gating not in (SOFTMAX, SIGMOID):
        raise values.unsupported("expert_gating_func", f"{SOFTMAX} or {SIGMOID}", gating)
    if values.number("block_count") in _GLM_LAYERS and values.vocabulary == _GLM_VOCABULARY:
        if gating != SIGMOID:
            raise values.unsupported("expert_gating_func", str(SIGMOID), gating)
        return "deepseek2:glm"  # its norms of latents have the epsilon of the others
    return "deepseek2" if gating == SIGMOID else "deepseek2:softmax"
