"""The same shape in other programs' formats, with random weights: GGUF and distributed-llama's.

Owns: which tensors those programs expect for a config, and writing them, a few MiB at a time.
Does not know: how the programs are run (`peers.py`); checkpoints, apart from their config.
Invariant: every matrix is in blocks of 32 four-bit weights with one float16 scale (llama.cpp's
Q4_0, distributed-llama's Q40): 4.5 bits per weight, as MLX's 4 bits in groups of 64. Nothing is
quantized: blocks are drawn as they are stored.
Next: `peers.py`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...core.model_config import (
    CONTEXT_LENGTH_KEYS,
    EXPERT_COUNT_KEYS,
    HEAD_COUNT_KEYS,
    HIDDEN_SIZE_KEYS,
    KV_HEAD_COUNT_KEYS,
    LAYER_COUNT_KEYS,
    TOP_K_KEYS,
    VOCAB_SIZE_KEYS,
    Config,
    find_int,
)
from ...errors import InputError
from ...extras import import_extra

BLOCK, BLOCK_BYTES = 32, 18  # weights, and bytes with the scale
_STD = 4.61  # of the numbers -8 to 7, all equally likely
_CHUNK_BLOCKS = 1 << 17


@dataclass(frozen=True)
class PeerShape:
    """What both formats need to know of a model.

    Args:
        kind: mlx-lm's model_type.
        width: of the residual stream.
        head_width: of one attention head.
        inner: hidden width of one expert.
        dense_inner: hidden width of dense layers, which the files state although there are none.
    """

    kind: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    experts: int
    top_k: int
    inner: int
    dense_inner: int
    vocabulary: int
    context: int
    rope_base: float
    norm_eps: float
    clip_qkv: float | None = None


def read_shape(config: Config) -> PeerShape:
    """The shape of a checkpoint's config.

    Raises:
        InputError: a family that is not written here, or widths that are no multiple of 32.
    """
    kind = config.get("model_type")
    if kind not in ("qwen3_moe", "dbrx"):
        raise InputError(
            f"peer: a random model in the peer's format can be written for qwen3_moe and dbrx, "
            f"got {kind}; measure without --peer, or on `--synth moe-2b`"
        )
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise InputError("peer: expected a model whose layers all have experts")

    def number(*keys: str) -> int:
        value = find_int(config, keys)
        if value is None:
            raise InputError(f"peer: expected a config with {' or '.join(keys)}, got none")
        return value

    heads, width = number(*HEAD_COUNT_KEYS), number(*HIDDEN_SIZE_KEYS)
    attention = config.get("attn_config", config)
    shape = PeerShape(
        kind,
        number(*LAYER_COUNT_KEYS),
        width,
        heads,
        number(*KV_HEAD_COUNT_KEYS),
        config.get("head_dim") or width // heads,
        number(*EXPERT_COUNT_KEYS),
        number(*TOP_K_KEYS),
        number("moe_intermediate_size", "ffn_hidden_size"),
        number("intermediate_size", "ffn_hidden_size"),
        number(*VOCAB_SIZE_KEYS),
        number(*CONTEXT_LENGTH_KEYS),
        float(attention.get("rope_theta", 10000)),
        config.get("rms_norm_eps", 1e-5),
        float(attention["clip_qkv"]) if kind == "dbrx" else None,
    )
    for size in (shape.width, shape.inner, shape.heads * shape.head_width):  # matrices' inputs
        if size % BLOCK:
            raise InputError(f"peer: widths must be multiples of {BLOCK}, got {size}")
    return shape


def random_blocks(rng: np.random.Generator, weights: int, std: float) -> Iterator[np.ndarray]:
    """`weights` random four-bit weights of standard deviation `std`: bytes, piece by piece."""
    left = weights // BLOCK
    while left:
        n = min(left, _CHUNK_BLOCKS)
        piece = rng.integers(0, 256, (n, BLOCK_BYTES), dtype=np.uint8)
        scales = (std / _STD * rng.uniform(0.7, 1.3, n)).astype(np.float16)
        piece[:, :2] = scales[:, None].view(np.uint8)
        yield piece.reshape(-1)
        left -= n


# ---- GGUF


def write_gguf(config: Config, out: Path, seed: int = 0) -> None:
    """A GGUF file for llama.cpp: all matrices Q4_0, router and norms float32, no vocabulary.

    Raises:
        InputError: an unsupported family, or the extra `peers` is not installed.
    """
    s = read_shape(config)
    gguf = import_extra("gguf", "peers")
    arch = {"qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE, "dbrx": gguf.MODEL_ARCH.DBRX}[s.kind]
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(s.layers)
    writer.add_context_length(s.context)
    writer.add_embedding_length(s.width)
    writer.add_feed_forward_length(s.dense_inner)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_rope_freq_base(s.rope_base)
    writer.add_expert_count(s.experts)
    writer.add_expert_used_count(s.top_k)
    if s.clip_qkv is not None:
        writer.add_clamp_kqv(s.clip_qkv)
        writer.add_layer_norm_eps(s.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(s.norm_eps)
        writer.add_expert_feed_forward_length(s.inner)
        writer.add_key_length(s.head_width)
        writer.add_value_length(s.head_width)
    writer.add_vocab_size(s.vocabulary)
    writer.add_tokenizer_model("no_vocab")  # token ids only: what is measured needs no text
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    tensors = list(_gguf_tensors(s))
    for name, dims in tensors:
        if _is_float(name, dims):
            writer.add_tensor_info(name, dims, np.dtype(np.float32), 4 * math.prod(dims))
        else:
            row = dims[-1] // BLOCK * BLOCK_BYTES
            writer.add_tensor_info(
                name,
                (*dims[:-1], row),
                np.dtype(np.uint8),
                math.prod(dims[:-1]) * row,
                gguf.GGMLQuantizationType.Q4_0,
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.Generator(np.random.SFC64(seed))
    for name, dims in tensors:
        writer.write_tensor_data(_values(rng, name, dims))
    writer.close()


def _gguf_tensors(s: PeerShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, outermost dimension first."""
    q, kv = s.heads * s.head_width, s.kv_heads * s.head_width
    yield "token_embd.weight", (s.vocabulary, s.width)
    yield "output_norm.weight", (s.width,)
    yield "output.weight", (s.vocabulary, s.width)
    for i in range(s.layers):
        at = f"blk.{i}."
        yield f"{at}attn_norm.weight", (s.width,)
        if s.kind == "dbrx":
            yield f"{at}attn_qkv.weight", (q + 2 * kv, s.width)
            yield f"{at}attn_output_norm.weight", (s.width,)
        else:
            yield f"{at}attn_q.weight", (q, s.width)
            yield f"{at}attn_k.weight", (kv, s.width)
            yield f"{at}attn_v.weight", (kv, s.width)
            yield f"{at}attn_q_norm.weight", (s.head_width,)
            yield f"{at}attn_k_norm.weight", (s.head_width,)
            yield f"{at}ffn_norm.weight", (s.width,)
        yield f"{at}attn_output.weight", (s.width, q)
        yield f"{at}ffn_gate_inp.weight", (s.experts, s.width)
        yield f"{at}ffn_gate_exps.weight", (s.experts, s.inner, s.width)
        yield f"{at}ffn_up_exps.weight", (s.experts, s.inner, s.width)
        yield f"{at}ffn_down_exps.weight", (s.experts, s.width, s.inner)


def _is_float(name: str, dims: tuple[int, ...]) -> bool:
    return len(dims) == 1 or "ffn_gate_inp" in name


def _values(rng: np.random.Generator, name: str, dims: tuple[int, ...]) -> np.ndarray:
    if len(dims) == 1:
        return np.ones(dims, np.float32)
    std = 1 / math.sqrt(dims[-1])
    if _is_float(name, dims):
        return (std * rng.standard_normal(dims)).astype(np.float32)
    return np.concatenate(list(random_blocks(rng, math.prod(dims), std)))


# ---- distributed-llama

_MODEL_MAGIC, _TOKENIZER_MAGIC = 0xA00ABCD, 0x567124
_QWEN3_MOE, _Q40, _SILU = 0xABCD02, 2, 1


def write_dllama(config: Config, out: Path, seed: int = 0) -> None:
    """distributed-llama's model file: matrices Q40; embedding, router and norms float32.

    Raises:
        InputError: a family that distributed-llama does not run.
    """
    s = read_shape(config)
    if s.kind != "qwen3_moe":
        raise InputError(f"peer dllama: expected a model of family qwen3_moe, got {s.kind}")
    header = {
        0: 0,  # version
        1: _QWEN3_MOE,
        11: _SILU,
        2: s.width,
        3: s.dense_inner,
        4: s.layers,
        5: s.heads,
        6: s.kv_heads,
        13: _Q40,
        10: s.context,
        9: s.vocabulary,
        7: s.experts,
        8: s.top_k,
        12: int(s.rope_base),
        19: s.head_width,
        20: {1e-5: 5, 1e-6: 6}[s.norm_eps],
        21: s.inner,
    }
    rng = np.random.Generator(np.random.SFC64(seed))
    q, kv = s.heads * s.head_width, s.kv_heads * s.head_width
    with out.open("wb") as file:
        _write_header(file.write, _MODEL_MAGIC, header)

        def floats(rows: int, columns: int) -> None:
            for _ in range(rows):
                row = rng.standard_normal(columns, np.float32) / np.float32(math.sqrt(columns))
                file.write(row.data)

        def ones(n: int) -> None:
            file.write(np.ones(n, np.float32).data)

        def matrix(rows: int, columns: int) -> None:
            for piece in random_blocks(rng, rows * columns, 1 / math.sqrt(columns)):
                file.write(piece.data)

        floats(s.vocabulary, s.width)
        for _ in range(s.layers):
            matrix(q, s.width)
            matrix(kv, s.width)
            matrix(kv, s.width)
            matrix(s.width, q)
            floats(s.experts, s.width)
            for _ in range(s.experts):
                matrix(s.inner, s.width)
                matrix(s.width, s.inner)
                matrix(s.inner, s.width)
            ones(s.head_width)
            ones(s.head_width)
            ones(s.width)
            ones(s.width)
        ones(s.width)
        matrix(s.vocabulary, s.width)


def write_dllama_tokenizer(out: Path, vocabulary: int) -> None:
    """A tokenizer file: ids 0 to 255 are the bytes, 256 begins a text, the rest are fillers."""
    tokens = [bytes([i]) for i in range(256)]
    tokens += [b"<|%d|>" % i for i in range(256, vocabulary)]
    # The end of a text is the last filler, so that a random model hardly ever stops there.
    header = {1: vocabulary, 2: max(map(len, tokens)), 3: 256, 0: 1, 9: 1, 10: 0}
    with out.open("wb") as file:
        _write_header(file.write, _TOKENIZER_MAGIC, header)
        file.write(struct.pack("<i", vocabulary - 1))
        for token in tokens:
            file.write(struct.pack("<fI", 0.0, len(token)) + token)


def _write_header(write: Callable[[bytes], Any], magic: int, values: dict[int, int]) -> None:
    data = b"".join(struct.pack("<ii", k, v) for k, v in values.items())
    write(struct.pack("<ii", magic, 8 + len(data)) + data)
