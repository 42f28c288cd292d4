"""Small GGUF files of a llama with random weights, written by the package gguf."""

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
