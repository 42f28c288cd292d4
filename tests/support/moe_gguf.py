"""A random MoE model as a GGUF file, with llama.cpp's names and order of rows, and as floats."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

from cenacle.gguf.blocks import BLOCK_TYPES
from cenacle.model import architecture
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.loader import build_model
from cenacle.model.synth import synth

from .gguf_blocks import random_blocks
from .tiny_gguf import byte_vocabulary

# As llama.cpp's convert script names them, apart from what the families share.
_MATRICES = ("gate", "up", "down")
_NAMES = {
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{n}_norm": f"attn_{n}_norm" for n in "qk"},
    **{f"self_attn.q_{n}_proj": f"attn_q_{n}" for n in "ab"},
    **{f"self_attn.{n}_a_layernorm": f"attn_{n}_a_norm" for n in ("q", "kv")},
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_b_proj": "attn_kv_b",
    **{"self_attn.embed_q": "attn_k_b", "self_attn.unembed_out": "attn_v_b"},
    **{"linear_attn.conv1d": "ssm_conv1d", "linear_attn.norm": "ssm_norm"},
    **{"linear_attn.out_proj": "ssm_out", "linear_attn.in_proj_ba": "ssm_ba"},
    **{"linear_attn.in_proj_qkvz": "ssm_in", "linear_attn.in_proj_qkv": "attn_qkv"},
    **{"linear_attn.in_proj_z": "attn_gate", "linear_attn.in_proj_a": "ssm_alpha"},
    "linear_attn.in_proj_b": "ssm_beta",
    **{f"norm_attn_norm.norm_{i + 1}": ("attn_norm", "attn_output_norm")[i] for i in range(2)},
    "norm_attn_norm.attn.Wqkv": "attn_qkv",
    "norm_attn_norm.attn.out_proj": "attn_output",
    **{
        f"{block}.{router}": "ffn_gate_inp"
        for block in ("mlp", "block_sparse_moe", "ffn", "feed_forward")
        for router in ("gate", "router", "router.layer")
    },
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{
        f"{block}.{experts}{n}_proj": f"ffn_{n}{suffix}"
        for block in ("mlp", "block_sparse_moe", "ffn", "feed_forward")
        for experts, suffix in (
            ("", ""),
            ("shared_expert.", "_shexp"),
            ("shared_experts.", "_shexp"),
            ("switch_mlp.", "_exps"),
            ("experts.", "_exps"),
        )
        for n in _MATRICES
    },
}
_PARAMETERS = {
    "e_score_correction_bias": "exp_probs_b.bias",
    "sinks": "attn_sinks.weight",
    "A_log": "ssm_a",
    "dt_bias": "ssm_dt.bias",
}
_OUTER = {
    **{"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"},
    **{"wte": "token_embd", "norm_f": "output_norm"},
}
RANDOM_TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS")
"""The package gguf does not write them."""
ARCHITECTURES = {
    "dbrx": "dbrx",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe": "glm4moe",
    "glm4_moe_lite": "deepseek2",
    "gpt_oss": "gpt-oss",
    "granitemoe": "granitemoe",
    "llama4": "llama4",
    "minimax": "minimax-m2",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_5_moe": "qwen35moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
}
# Where the tiny config has what no GGUF file says.
_CHANGES: dict[str, dict[str, Any]] = {
    "glm4_moe": {"n_group": 1},
    # DeepSeek's norms of latents have another epsilon than the others.
    "glm4_moe_lite": {"n_group": 1, "rms_norm_eps": 1e-2},
    "llama4": {
        "attention_chunk_size": 8192,
        "floor_scale": 8192,
        "rope_scaling": {
            **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        },
    },
    "qwen3_moe": {"mlp_only_layers": []},
    "qwen3_next": {"mlp_only_layers": []},
}
_POST_NORM = ("glm4_moe", "gpt_oss", "qwen3_next", "qwen3_5_moe")


def gguf_name(family: str, name: str) -> str:
    path, _, leaf = name.rpartition(".")
    match = re.fullmatch(r"(?:.*\.)?(?:layers|blocks)\.(\d+)\.(.+)", path)
    if match is None:
        return f"{_OUTER[path.rpartition('.')[2]]}.{leaf}"
    layer, module = match.groups()
    if leaf in _PARAMETERS:
        return f"blk.{layer}.{_PARAMETERS[leaf]}"
    part = _NAMES[module]
    if part == "ffn_norm" and family in _POST_NORM:
        part = "post_attention_norm"
    return f"blk.{layer}.{part}.{leaf}"


def _pairs_of_heads(array: np.ndarray, heads: int) -> np.ndarray:
    """As the convert script's `permute`: two halves of a head become pairs."""
    return (
        array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        .swapaxes(1, 2)
        .reshape(array.shape)
    )


def _tiled(array: np.ndarray, config: dict, axis: int = 0) -> np.ndarray:
    """As the script's `_reorder_v_heads`: value heads of one key head no longer lie together."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    grouped = array.reshape(*before, keys, values // keys, -1, *after)
    return grouped.swapaxes(axis, axis + 1).reshape(array.shape)


def _split_by_kind(array: np.ndarray, config: dict) -> tuple[np.ndarray, np.ndarray]:
    """Rows [q, k, v, z] of each key head -> all q, all k, all v; all z."""
    heads, width = config["linear_num_key_heads"], config["linear_key_head_dim"]
    by_head = array.reshape(heads, -1, array.shape[-1])
    values = (by_head.shape[1] - 2 * width) // 2
    ends = (width, 2 * width, 2 * width + values)
    q, k, v, z = (part.reshape(-1, array.shape[-1]) for part in np.split(by_head, ends, axis=1))
    return np.concatenate([q, k, v]), z


def stored_tensors(
    family: str, config: dict, name: str, array: np.ndarray, *, legacy: bool
) -> dict[str, np.ndarray]:
    """What the file has of one of mlx-lm's parameters, by GGUF's names."""
    written = gguf_name(family, name)
    layer, part = written.rpartition(".")[0].rpartition(".")[::2]
    if family in ("mixtral", "granitemoe") and part in ("attn_q", "attn_k"):
        heads = "num_attention_heads" if part == "attn_q" else "num_key_value_heads"
        array = _pairs_of_heads(array, config[heads])
    if part == "ffn_gate_inp_shexp":
        array = array[0]
    if part == "ssm_conv1d":
        array = array[..., 0]
    if written.endswith("ssm_a"):
        array = -np.exp(array)
    if part == "ssm_in" and not legacy:
        qkv, z = _split_by_kind(array, config)
        return {f"{layer}.attn_qkv.weight": qkv, f"{layer}.attn_gate.weight": z}
    if family == "deepseek_v2" and part == "attn_kv_b" and not legacy:
        heads, width = config["num_attention_heads"], config["qk_nope_head_dim"]
        by_head = array.reshape(heads, -1, array.shape[-1])
        keys, values = by_head[:, :width].swapaxes(1, 2), by_head[:, width:]
        return {f"{layer}.attn_k_b.weight": keys.copy(), f"{layer}.attn_v_b.weight": values}
    if family == "qwen3_5_moe":
        start = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
        if part in ("attn_qkv", "ssm_conv1d"):
            array = np.concatenate([array[:start], _tiled(array[start:], config)])
        elif part in ("attn_gate", "ssm_alpha", "ssm_beta", "ssm_dt") or "ssm_a" in written:
            array = _tiled(array, config)
        elif part == "ssm_out":
            array = _tiled(array, config, axis=1)
    return {written: array}


def _join_halves(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """DeepSeek's k_b and v_b as the one tensor of older files."""
    joined = {}
    for name, array in tensors.items():
        if "attn_k_b" in name:
            values = tensors[name.replace("attn_k_b", "attn_v_b")]
            both = np.concatenate([array.swapaxes(1, 2), values], axis=1)
            joined[name.replace("attn_k_b", "attn_kv_b")] = both.reshape(-1, both.shape[-1])
        elif "attn_v_b" not in name:
            joined[name] = array
    return joined


def _random_rows(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor's bytes [..., bytes of a row]."""
    blocks = (*shape[:-1], shape[-1] // BLOCK_TYPES[kind].weights)
    return random_blocks(kind, blocks).reshape(*shape[:-1], -1)


def write_moe(
    folder: Path,
    family: str,
    kind: str = "F32",
    max_tensors: int = 0,
    *,
    mixed: dict[str, str] | None = None,
    as_floats: bool = False,
    legacy: bool = False,
    **changes: Any,
):
    """Write `folder`/model.gguf, or files of at most `max_tensors` each.

    Args:
        mixed: other kinds than `kind`, by parts of tensors' names.
        as_floats: the file has what the quantized weights are, as floats.
        legacy: as older versions of the script wrote the family.

    Returns:
        mlx-lm's model with the file's weights as floats, if they are stored as the model has them
        but for the order of rows, and not of `RANDOM_TYPES`, whose blocks are random.
    """
    tiny = Path(architecture.__file__).parent / "configs" / "tiny" / f"{family}.json"
    config = json.loads(tiny.read_text())
    text = config.get("text_config", config)
    text.pop("mlp_only_layers", None)
    text |= {"vocab_size": len(byte_vocabulary()[0])} | _CHANGES.get(family, {}) | changes
    synth(folder / "floats", config=config, dtype="float32")
    model = build_model(Checkpoint.open(folder / "floats"), None, 0)
    tensors: dict[str, np.ndarray] = {}
    origins: dict[str, tuple[str, np.ndarray]] = {}
    for name, array in architecture.named_parameters(model):
        stored = stored_tensors(family, text, name, np.array(array), legacy=legacy)
        tensors |= stored
        origins |= {written: (name, np.array(array)) for written in stored if len(stored) == 1}
    if legacy:
        tensors = _join_halves(tensors)
    writer = gguf.GGUFWriter(
        folder / "model.gguf", ARCHITECTURES[family], split_max_tensors=max_tensors
    )
    _add_metadata(writer, text, legacy)
    _add_tokenizer(writer)
    replaced = []
    for name, array in tensors.items():
        own_kind = next((k for part, k in (mixed or {}).items() if part in name), kind)
        is_plain = array.ndim == 1 or name.endswith("bias") or "conv1d" in name
        is_plain |= "ffn_gate_inp" in name
        if own_kind == "F32" or is_plain:
            writer.add_tensor(name, np.ascontiguousarray(array))
            continue
        quantized = gguf.GGMLQuantizationType[own_kind]
        if own_kind in RANDOM_TYPES:
            writer.add_tensor(name, _random_rows(own_kind, array.shape), raw_dtype=quantized)
            continue
        data = gguf.quantize(np.ascontiguousarray(array), quantized)
        if as_floats:
            writer.add_tensor(name, gguf.dequantize(data, quantized))
        else:
            writer.add_tensor(name, data, raw_dtype=quantized)
        if name in origins:  # rows are quantized alone: their order does not matter
            origin, values = origins[name]
            weights = gguf.dequantize(gguf.quantize(values, quantized), quantized)
            replaced.append((origin, mx.array(weights)))
    model.load_weights(replaced, strict=False)
    if family == "llama4":
        writer.add_tensor("rope_freqs.weight", _frequency_factors(text))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _frequency_factors(config: dict) -> np.ndarray:
    """As the convert script computes them."""
    scaling, dim = config["rope_scaling"], config["head_dim"]
    context = scaling["original_max_position_embeddings"]
    low, high, factor = (scaling[f"{n}factor"] for n in ("low_freq_", "high_freq_", ""))
    factors = []
    for i in range(0, dim, 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (i / dim)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def _add_metadata(writer: gguf.GGUFWriter, config: dict, legacy: bool) -> None:
    if config["model_type"] == "dbrx":
        _add_dbrx(writer, config)
        return
    writer.add_float32("general.sampling.temp", 0.5)
    writer.add_int32("general.sampling.top_k", 20)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(
        config.get("intermediate_size_mlp") or config["intermediate_size"]
    )
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_expert_count(
        config.get("num_experts") or config.get("num_local_experts") or config["n_routed_experts"]
    )
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "kv_lora_rank" in config:
        _add_latent_attention(writer, config, legacy)
    else:
        writer.add_head_count_kv(config["num_key_value_heads"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if config["model_type"] == "gpt_oss":
        writer.add_sliding_window(config["sliding_window"])
    if config["model_type"] in ("gpt_oss", "minimax", "llama4_text"):
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if "interleave_moe_layer_step" in config:
        writer.add_interleave_moe_layer_step(config["interleave_moe_layer_step"])
    if "n_routed_experts" in config:
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
    if "scoring_func" in config and not legacy:
        gating = gguf.ExpertGatingFuncType[config["scoring_func"].upper()]
        writer.add_expert_gating_func(gating)
    if "linear_key_head_dim" in config:
        _add_linear_attention(writer, config)
    rotary = config.get("qk_rope_head_dim") or config.get("rotary_dim")
    if rotary or "partial_rotary_factor" in rope:
        writer.add_rope_dimension_count(
            rotary or int(config["head_dim"] * rope["partial_rotary_factor"])
        )
    if (scaling := config.get("rope_scaling")) and scaling.get("beta_fast"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
    if "logits_scaling" in config:
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])


def _add_latent_attention(writer: gguf.GGUFWriter, config: dict, legacy: bool) -> None:
    nope, rotary = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    latent, values = config["kv_lora_rank"], config["v_head_dim"]
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    if legacy:
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(nope + rotary)
        writer.add_value_length(values)
    else:
        writer.add_head_count_kv(1)
        writer.add_key_length(latent + rotary)
        writer.add_value_length(latent)
        writer.add_key_length_mla(nope + rotary)
        writer.add_value_length_mla(values)
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    if config["rope_scaling"] is not None:
        writer.add_rope_scaling_yarn_log_mul(0.1 * config["rope_scaling"]["mscale_all_dim"])


def _add_linear_attention(writer: gguf.GGUFWriter, config: dict) -> None:
    value_heads = config["linear_num_value_heads"]
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(value_heads)
    writer.add_ssm_inner_size(config["linear_value_head_dim"] * value_heads)
    writer.add_uint32(f"{writer.arch}.full_attention_interval", config["full_attention_interval"])


def _add_dbrx(writer: gguf.GGUFWriter, config: dict) -> None:
    experts, attention = config["ffn_config"], config["attn_config"]
    writer.add_block_count(config["n_layers"])
    writer.add_context_length(config["max_seq_len"])
    writer.add_embedding_length(config["d_model"])
    writer.add_feed_forward_length(experts["ffn_hidden_size"])
    writer.add_head_count(config["n_heads"])
    writer.add_head_count_kv(attention["kv_n_heads"])
    writer.add_rope_freq_base(attention["rope_theta"])
    writer.add_clamp_kqv(attention["clip_qkv"])
    writer.add_expert_count(experts["moe_num_experts"])
    writer.add_expert_used_count(experts["moe_top_k"])
    writer.add_layer_norm_eps(1e-5)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokens, merges = byte_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(False)
