"""Small GGUF files of a llama with random weights, written by the package gguf."""

from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import numpy as np

LAYERS, WIDTH, HIDDEN, HEADS, KV_HEADS = 2, 64, 256, 4, 2
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def byte_vocabulary() -> tuple[list[str], list[str]]:
    """Tokens of single bytes as byte-level BPE writes them, two merged ones, two special ones."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in shown]
    tokens = [chr(b) for b in shown] + [chr(256 + i) for i in range(len(rest))]
    return [*tokens, "he", "hel", "<|im_start|>", "<|im_end|>"], ["h e", "he l"]


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    kv_width = WIDTH // HEADS * KV_HEADS
    vocabulary = len(byte_vocabulary()[0])
    layer = {
        "attn_norm": (WIDTH,),
        "ffn_norm": (WIDTH,),
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (kv_width, WIDTH),
        "attn_v": (kv_width, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_gate": (HIDDEN, WIDTH),
        "ffn_up": (HIDDEN, WIDTH),
        "ffn_down": (WIDTH, HIDDEN),
    }
    outer = {"token_embd": (vocabulary, WIDTH), "output_norm": (WIDTH,)}
    return outer | {
        f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()
    }


def write_llama(
    path: Path, kind: str = "Q4_1", tokens: Any = None, pre: str = "smollm"
) -> dict[str, np.ndarray]:
    """Write a file, and return what its weights are, by GGUF's names."""
    own_tokens, merges = byte_vocabulary()
    tokens = own_tokens if tokens is None else tokens
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT)
    random = np.random.default_rng(0)
    weights = {}
    for name, shape in tensor_shapes().items():
        values = (random.standard_normal(shape) * (0.1 if len(shape) > 1 else 1)).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            quantized = gguf.GGMLQuantizationType[kind]
            data = gguf.quantize(values, quantized)
            writer.add_tensor(f"{name}.weight", data, raw_dtype=quantized)
            values = gguf.dequantize(data, quantized)
        weights[f"{name}.weight"] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def write_dense(path: Path, kind: str, **changes: Any):
    """Write a file of a Qwen2 or Qwen3 with random weights as floats, and return mlx-lm's model."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    family = import_module(f"mlx_lm.models.{kind}")
    tokens, merges = byte_vocabulary()
    config = {
        **{"model_type": kind, "hidden_size": WIDTH, "num_hidden_layers": LAYERS},
        **{"intermediate_size": HIDDEN, "num_attention_heads": HEADS, "head_dim": WIDTH // HEADS},
        **{"num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-5, "vocab_size": len(tokens)},
        **{"rope_theta": 10000.0, "max_position_embeddings": 256, "tie_word_embeddings": False},
        **changes,
    }
    mx.random.seed(7)
    model = family.Model(family.ModelArgs.from_dict(config))
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(len(tokens) - 1)
    outer = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    inner = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    inner |= {"o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
    inner |= {f"{n}_proj": f"attn_{n}" for n in "qkv"}
    inner |= {f"{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")}
    for name, array in tree_flatten(model.parameters()):
        *_, module, leaf = name.split(".")
        layer = name.split(".")[2] if ".layers." in name else None
        stored = outer[module] if layer is None else f"blk.{layer}.{inner[module]}"
        writer.add_tensor(f"{stored}.{leaf}", np.array(array.astype(mx.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
