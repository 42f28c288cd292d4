"""A dense llama model in a GGUF file, written as a Mixture-of-Experts model of mixtral's family.

Owns: cutting feed-forward layers into experts, and the router.
Does not know: where the file comes from; ranks.
How: expert e has the e-th part of the hidden width. With all experts chosen, a router of zeros
weighs each with 1/n, and its down projection is n times the dense layer's, n a power of two: the
sum is that of the dense layer, exactly but for the order of additions. With fewer experts chosen,
the router is fitted to a text: it predicts how long each expert's output is, with scores so close
to each other that all chosen experts weigh the same.
Invariant: weights are those of the file. Nothing is quantized again, except types of `gguf.blocks`
that MLX has no layout for.
Next: `smollm.py`, which has a model to cut.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import dequantize_model

from ..errors import CheckpointError, InputError
from ..gguf.blocks import BLOCK_TYPES, UNQUANTIZED, row_shape, to_mlx_layout
from ..gguf.file import GgufFile, GgufTensor, Metadata
from ..gguf.tokenizer import end_tokens, special_token, tokenizer_files
from ..model.checkpoint import Checkpoint
from ..model.gguf_families import OUTER_NAMES, PLAIN_NAMES
from ..model.gguf_transforms import restore_row_order
from ..model.loader import build_model

Parameters = dict[str, mx.array]

_NAMES = PLAIN_NAMES | {
    f"ffn_{n}": f"block_sparse_moe.switch_mlp.{n}_proj" for n in ("gate", "up", "down")
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_SCORE_SPREAD = 1e-3  # of a router's scores: softmax makes weights equal to within as much
_RIDGE = 1e-2
MAX_FIT_TOKENS = 512


@dataclass(frozen=True)
class DenseShape:
    """What the file says about a llama model."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    context: int
    norm_eps: float
    rope_base: float

    @classmethod
    def read(cls, file: GgufFile) -> DenseShape:
        """Of a file's metadata.

        Raises:
            CheckpointError: it is no dense llama model, or a value is missing.
        """
        metadata = file.metadata
        kind = metadata.get("general.architecture")
        if kind != "llama" or metadata.get("llama.expert_count"):
            raise CheckpointError(
                f"{file.path}: expected a dense llama model, got {kind!r:.100}"
                f"{' with experts' if kind == 'llama' else ''}; give another file"
            )
        shape = cls(
            _number(metadata, "block_count", int),
            _number(metadata, "embedding_length", int),
            _number(metadata, "feed_forward_length", int),
            (heads := _number(metadata, "attention.head_count", int)),
            _number(metadata, "attention.head_count_kv", int, heads),
            _number(metadata, "context_length", int),
            _number(metadata, "attention.layer_norm_rms_epsilon", float),
            _number(metadata, "rope.freq_base", float, 10000.0),
        )
        if shape.width % shape.heads or shape.heads % shape.kv_heads:
            raise CheckpointError(
                f"{file.path}: expected a width of a multiple of the heads, and heads of a "
                f"multiple of the key heads, got {shape.width}, {shape.heads} and {shape.kv_heads}"
            )
        if any("rope_freqs" in tensor.name for tensor in file.tensors):
            raise CheckpointError(f"{file.path}: scaled rotary positions are not supported here")
        return shape


def _number(
    metadata: Metadata, key: str, kind: type[int] | type[float], default: Any = None
) -> Any:
    value = metadata.get(f"llama.{key}", default)
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < 2**31:
        raise CheckpointError(f"llama.{key}: expected a positive number, got {value!r:.100}")
    return value


def write_experts(
    file: GgufFile, out: Path, experts: int = 8, top_k: int | None = None, text: str = ""
) -> None:
    """Write a dense llama model as a mixtral checkpoint; the folder appears when it is whole.

    Args:
        experts: per layer, a power of two.
        top_k: experts per token; None: all, and then the model computes what the dense one does.
        text: what the router is fitted to, if `top_k` is fewer than all.

    Raises:
        CheckpointError: the file is damaged or no dense llama model.
        InputError: numbers that do not fit.
    """
    shape = DenseShape.read(file)
    chosen = experts if top_k is None else top_k
    if experts < 2 or experts & (experts - 1) or shape.hidden % (32 * experts):
        raise InputError(
            f"experts: expected a power of two that divides the hidden width, {shape.hidden}, into "
            f"multiples of 32, got {experts}",
            "experts",
        )
    if not 1 <= chosen <= experts:
        raise InputError(f"top_k: expected 1 to {experts}, got {chosen}", "top_k")
    if chosen < experts and not text:
        raise InputError("text: expected text to fit the router to, got none", "text")
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        for name, content in tokenizer_files(file.metadata).items():
            (temporary / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        parameters = _read_parameters(file, shape, experts)
        _write(temporary, file, shape, parameters, (experts, experts))
        if chosen < experts:
            routers = _fit_routers(temporary, _token_ids(temporary, text))
            _write(
                temporary,
                file,
                shape,
                _with_routers(parameters, routers, chosen),
                (experts, chosen),
            )
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    out: Path,
    file: GgufFile,
    shape: DenseShape,
    parameters: Parameters,
    counts: tuple[int, int],
) -> None:
    mx.save_safetensors(str(out / "model.safetensors"), parameters, {"format": "mlx"})
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": parameters["model.embed_tokens.weight"].shape[0],
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden // counts[0],
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_local_experts": counts[0],
        "num_experts_per_tok": counts[1],
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_base,
        "tie_word_embeddings": "lm_head.weight" not in parameters,
        "bos_token_id": special_token(file.metadata, "bos"),
        "eos_token_id": end_tokens(file.metadata),
    }
    if any(name.endswith(".scales") for name in parameters):
        config["quantization"] = {"group_size": 32, "bits": 4, "mode": "affine"}
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _read_parameters(file: GgufFile, shape: DenseShape, experts: int) -> Parameters:
    """Every parameter of the mixtral model, with all experts chosen."""
    parameters: Parameters = {}
    for tensor in file.tensors:
        path = _module_path(file, tensor.name, shape.layers)
        expected = _expected_shape(tensor.name, shape)
        if expected is not None and tensor.shape != expected:
            raise CheckpointError(
                f"{file.path}: tensor {tensor.name}: expected {list(expected)} weights, got "
                f"{list(tensor.shape)}; the file is damaged or of another family"
            )
        convert = _conversion(tensor.name, shape, experts)
        for leaf, array in _read_tensor(file, tensor).items():
            parameters[f"{path}.{leaf}"] = mx.array(np.ascontiguousarray(convert(array)))
    needed = [*OUTER_NAMES.values()][:2] + [
        f"model.layers.{i}.{name}" for i in range(shape.layers) for name in _NAMES.values()
    ]
    missing = [path for path in needed if f"{path}.weight" not in parameters]
    if missing:
        raise CheckpointError(
            f"{file.path}: {len(missing)} tensors are missing, the first is {missing[0]}; "
            "download it again"
        )
    for i in range(shape.layers):
        router = f"model.layers.{i}.block_sparse_moe.gate.weight"
        parameters[router] = mx.zeros((experts, shape.width))
        down = f"model.layers.{i}.block_sparse_moe.switch_mlp.down_proj"
        _scale_layer(parameters, down, experts)
    return parameters


def _scale_layer(parameters: Parameters, path: str, factor: float) -> None:
    is_quantized = f"{path}.scales" in parameters
    for leaf in ("scales", "biases") if is_quantized else ("weight",):
        parameters[f"{path}.{leaf}"] = parameters[f"{path}.{leaf}"] * factor


def _module_path(file: GgufFile, name: str, layers: int) -> str:
    match = _LAYER.fullmatch(name)
    if match and match[2] in _NAMES and int(match[1]) < layers:
        return f"model.layers.{int(match[1])}.{_NAMES[match[2]]}"
    if (path := OUTER_NAMES.get(name.removesuffix(".weight"))) is not None:
        return path
    raise CheckpointError(f"{file.path}: unexpected tensor {name:.100} in a dense llama model")


def _expected_shape(name: str, shape: DenseShape) -> tuple[int, ...] | None:
    match = _LAYER.fullmatch(name)
    kv_width = shape.width // shape.heads * shape.kv_heads
    return {
        "attn_norm": (shape.width,),
        "ffn_norm": (shape.width,),
        "attn_q": (shape.width, shape.width),
        "attn_k": (kv_width, shape.width),
        "attn_v": (kv_width, shape.width),
        "attn_output": (shape.width, shape.width),
        "ffn_gate": (shape.hidden, shape.width),
        "ffn_up": (shape.hidden, shape.width),
        "ffn_down": (shape.width, shape.hidden),
    }.get(match[2] if match else "")


def _read_tensor(file: GgufFile, tensor: GgufTensor) -> dict[str, np.ndarray]:
    """A tensor's bytes as MLX's parameters; float32 if it is not quantized."""
    with file.path.open("rb") as opened:
        opened.seek(tensor.start)
        data = np.frombuffer(opened.read(tensor.stop - tensor.start), np.uint8)
    if len(data) != tensor.stop - tensor.start:
        raise CheckpointError(
            f"{file.path}: the file ended inside {tensor.name}; download it again"
        )
    if tensor.type not in UNQUANTIZED:
        if BLOCK_TYPES[tensor.type].mode != "affine":
            raise CheckpointError(f"{file.path}: {tensor.name} of {tensor.type} cannot be cut")
        return to_mlx_layout(tensor.type, data.reshape(row_shape(tensor.type, tensor.shape)))
    if tensor.type == "BF16":
        floats = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        floats = data.view("<f4" if tensor.type == "F32" else "<f2").astype(np.float32)
    return {"weight": floats.reshape(tensor.shape)}


def _conversion(name: str, shape: DenseShape, experts: int) -> Callable[[np.ndarray], np.ndarray]:
    match = _LAYER.fullmatch(name)
    part = match[2] if match else ""
    if part in ("attn_q", "attn_k"):
        heads = shape.heads if part == "attn_q" else shape.kv_heads
        return lambda array: restore_row_order(array, heads)
    if part in ("ffn_gate", "ffn_up"):
        return lambda array: array.reshape(experts, -1, array.shape[-1])
    if part == "ffn_down":  # [width, words or groups of the hidden width]
        return lambda array: array.reshape(len(array), experts, -1).swapaxes(0, 1)
    return lambda array: array


def _token_ids(folder: Path, text: str) -> mx.array:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return mx.array([tokenizer.encode(text).ids[:MAX_FIT_TOKENS]])


def _fit_routers(folder: Path, tokens: mx.array) -> list[mx.array]:
    """A router [experts, width] per layer that predicts how long experts' outputs are."""
    model = dequantize_model(build_model(Checkpoint.open(folder), None, 0))
    hidden = model.model.embed_tokens(tokens)
    routers = []
    for layer in model.layers:
        hidden = hidden + layer.self_attn(layer.input_layernorm(hidden), "causal", None)
        inputs = layer.post_attention_layernorm(hidden)
        outputs = _expert_outputs(layer.block_sparse_moe.switch_mlp, inputs[0])
        lengths = np.array(mx.linalg.norm(outputs, axis=-1)).T
        routers.append(mx.array(_fit(np.array(inputs[0]), lengths)))
        hidden = hidden + outputs.mean(axis=0)
        mx.eval(hidden)
    return routers


def _expert_outputs(experts: nn.Module, inputs: mx.array) -> mx.array:
    """[tokens, width] -> [experts, tokens, width]; MLX gathers rows of floats slowly on a CPU."""
    gate = inputs @ experts.gate_proj.weight.swapaxes(1, 2)
    up = inputs @ experts.up_proj.weight.swapaxes(1, 2)
    return (nn.silu(gate) * up) @ experts.down_proj.weight.swapaxes(1, 2)


def _fit(inputs: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Ridge regression [experts, width] of lengths [tokens, experts] on inputs [tokens, width]."""
    products = inputs.T @ inputs
    products += np.eye(len(products)) * (_RIDGE * np.trace(products) / len(products))
    router = np.linalg.solve(products, inputs.T @ lengths).T
    spread = np.std(inputs @ router.T, axis=1).mean()
    return (router * (_SCORE_SPREAD / max(float(spread), 1e-9))).astype(np.float32)


def _with_routers(parameters: Parameters, routers: list[mx.array], top_k: int) -> Parameters:
    changed = dict(parameters)
    for i, router in enumerate(routers):
        changed[f"model.layers.{i}.block_sparse_moe.gate.weight"] = router
        down = f"model.layers.{i}.block_sparse_moe.switch_mlp.down_proj"
        _scale_layer(changed, down, top_k / len(router))
    return changed
