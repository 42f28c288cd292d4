"""A random MoE model as a GGUF file, with llama.cpp's names and order of rows, and as floats."""

import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

from cenacle.model import architecture
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.loader import build_model
from cenacle.model.synth import synth

from .tiny_gguf import byte_vocabulary

# As llama.cpp's convert script names them, apart from what the families share.
_NAMES = {
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{n}_norm": f"attn_{n}_norm" for n in "qk"},
    **{"mlp.gate": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp"},
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    **{f"mlp.shared_experts.{n}_proj": f"ffn_{n}_shexp" for n in ("gate", "up", "down")},
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")},
    **{f"mlp.shared_expert.{n}_proj": f"ffn_{n}_shexp" for n in ("gate", "up", "down")},
    **{f"mlp.switch_mlp.{n}_proj": f"ffn_{n}_exps" for n in ("gate", "up", "down")},
    **{f"block_sparse_moe.switch_mlp.{n}_proj": f"ffn_{n}_exps" for n in ("gate", "up", "down")},
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ARCHITECTURES = {
    "glm4_moe": "glm4moe",
    "granitemoe": "granitemoe",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}


def gguf_name(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    if path in _OUTER:
        return f"{_OUTER[path]}.{leaf}"
    _, _, layer, module = path.split(".", 3)
    if leaf == "e_score_correction_bias":
        return f"blk.{layer}.exp_probs_b.bias"
    return f"blk.{layer}.{_NAMES[module]}.{leaf}"


def _pairs_of_heads(array: np.ndarray, heads: int) -> np.ndarray:
    """As the convert script's `permute`: two halves of a head become pairs."""
    return (
        array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        .swapaxes(1, 2)
        .reshape(array.shape)
    )


def write_moe(folder: Path, family: str, kind: str = "F32", max_tensors: int = 0, **changes: Any):
    """Write `folder`/model.gguf, or files of at most `max_tensors` each.

    Returns:
        mlx-lm's model with the file's weights as floats.
    """
    tiny = Path(architecture.__file__).parent / "configs" / "tiny" / f"{family}.json"
    config = json.loads(tiny.read_text()) | {"vocab_size": len(byte_vocabulary()[0])} | changes
    config.pop("mlp_only_layers", None)
    if family == "glm4_moe":
        config["n_group"] = 1
    if family == "qwen3_moe":
        config["mlp_only_layers"] = []
    synth(folder / "floats", config=config, dtype="float32")
    model = build_model(Checkpoint.open(folder / "floats"), None, 0)
    write_header = gguf.GGUFWriter(
        folder / "model.gguf", ARCHITECTURES[family], split_max_tensors=max_tensors
    )
    _add_metadata(write_header, config)
    replaced = []
    for name, array in architecture.named_parameters(model):
        values = np.array(array)
        stored, written = values, gguf_name(name)
        if family == "glm4_moe":
            written = written.replace("ffn_norm", "post_attention_norm")
        heads = config["num_attention_heads"] if "q_proj" in name else config["num_key_value_heads"]
        if family in ("mixtral", "granitemoe") and ("q_proj" in name or "k_proj" in name):
            stored = _pairs_of_heads(values, heads)
        if "shared_expert_gate" in name:
            stored = values[0]
        is_matrix = stored.ndim > 1 and "ffn_gate_inp" not in written
        if kind == "F32" or not is_matrix:
            write_header.add_tensor(written, stored)
            continue
        quantized = gguf.GGMLQuantizationType[kind]
        data = gguf.quantize(stored, quantized)
        write_header.add_tensor(written, data, raw_dtype=quantized)
        # Rows are quantized alone: the order of rows does not matter.
        replaced.append(
            (name, mx.array(gguf.dequantize(gguf.quantize(values, quantized), quantized)))
        )
    model.load_weights(replaced, strict=False)
    write_header.write_header_to_file()
    write_header.write_kv_data_to_file()
    write_header.write_tensors_to_file()
    write_header.close()
    return model


def _add_metadata(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(
        config.get("num_experts") or config.get("num_local_experts") or config["n_routed_experts"]
    )
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if "n_routed_experts" in config:
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_rope_dimension_count(int(config["head_dim"] * config["partial_rotary_factor"]))
    if "logits_scaling" in config:
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    tokens, merges = byte_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(False)
