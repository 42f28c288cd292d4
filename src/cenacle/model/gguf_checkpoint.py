"""A GGUF model as a checkpoint's folder: config, tokenizer, and where each tensor's bytes are.

Owns: each family's config and names, from GGUF's metadata and names; `GGUF_INDEX`, the list of
tensors under the names of mlx-lm's modules; decoding tensors that were read.
Does not know: plans, ranks.
How: the head reads the header once and writes a folder with config.json, tokenizer files, that
list and links to the files. Whoever opens that folder needs no header.
Invariant: a tensor of the index lies inside its file.
Next: `checkpoint.py` opens the folder, `loader.py` reads its tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from ..gguf.blocks import BLOCK_TYPES, UNQUANTIZED, row_shape, to_mlx_layout
from ..gguf.file import GgufFile, GgufTensor, Metadata, split_files
from ..gguf.tokenizer import end_tokens, special_token, tokenizer_files
from ..paths import models_dir
from .tensor_info import TensorInfo
from .weight_files import GGUF_INDEX

Array = TypeVar("Array", mx.array, np.ndarray)
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
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


def _moe_names(block: str, shared: str | None = None) -> dict[str, str]:
    names = {"ffn_gate_inp": f"{block}.gate"}
    names |= {f"ffn_{n}_exps": f"{block}.switch_mlp.{n}_proj" for n in _MATRICES}
    names |= {f"ffn_{n}": f"{block}.{n}_proj" for n in _MATRICES}
    if shared is not None:
        names |= {f"ffn_{n}_shexp": f"{block}.{shared}.{n}_proj" for n in _MATRICES}
    return names


@dataclass(frozen=True)
class GgufFamily:
    """One of llama.cpp's architectures.

    Args:
        model_type: mlx-lm's.
        names: a layer's modules, by GGUF's names.
        config: entries of config.json beside those of every family.
        is_permuted: rows of q and k are in llama.cpp's order, pairs that rotate together.
    """

    model_type: str
    names: Mapping[str, str]
    config: Callable[[_Values], dict[str, Any]]
    is_permuted: bool = False


class _Values:
    """Metadata of one architecture."""

    def __init__(self, path: Path, architecture: str, metadata: Metadata) -> None:
        self.path, self.architecture, self.metadata = path, architecture, metadata

    def number(self, key: str, default: float | None = None) -> Any:
        value: Any = self.metadata.get(f"{self.architecture}.{key}", default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not 0 <= value < 2**53:
            raise CheckpointError(
                f"{self.path}: {self.architecture}.{key}: expected a number, got {value!r:.100}; "
                "download it again"
            )
        return value


def _mixtral(values: _Values) -> dict[str, Any]:
    return {
        "intermediate_size": values.number("feed_forward_length"),
        "num_local_experts": values.number("expert_count"),
    }


def _qwen2_moe(values: _Values) -> dict[str, Any]:
    width = values.number("expert_feed_forward_length")
    return {
        "num_experts": values.number("expert_count"),
        "intermediate_size": values.number("feed_forward_length", width),
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": values.number(
            "expert_shared_feed_forward_length", values.number("feed_forward_length", width)
        ),
    }


def _qwen3_moe(values: _Values) -> dict[str, Any]:
    width = values.number("expert_feed_forward_length")
    return {
        "num_experts": values.number("expert_count"),
        "intermediate_size": values.number("feed_forward_length", width),
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _granite_moe(values: _Values) -> dict[str, Any]:
    return _mixtral(values) | {
        "attention_bias": False,
        "attention_multiplier": values.number("attention.scale"),
        "embedding_multiplier": values.number("embedding_scale"),
        "residual_multiplier": values.number("residual_scale"),
        "logits_scaling": values.number("logit_scale"),
    }


def _glm4_moe(values: _Values) -> dict[str, Any]:
    head_dim = values.number("attention.key_length")
    return {
        "attention_bias": True,
        "first_k_dense_replace": values.number("leading_dense_block_count", 0),
        "intermediate_size": values.number("feed_forward_length"),
        "moe_intermediate_size": values.number("expert_feed_forward_length"),
        "n_group": 1,
        "n_routed_experts": values.number("expert_count"),
        "n_shared_experts": values.number("expert_shared_count"),
        "norm_topk_prob": bool(values.metadata.get("glm4moe.expert_weights_norm", True)),
        "partial_rotary_factor": values.number("rope.dimension_count") / max(head_dim, 1),
        "rope_scaling": None,
        "routed_scaling_factor": values.number("expert_weights_scale", 1.0),
        "topk_group": 1,
    }


_GLM_NAMES = _moe_names("mlp", "shared_experts") | {
    "post_attention_norm": "post_attention_layernorm",
    "exp_probs_b": "mlp.gate.e_score_correction",
}
_GRANITE_NAMES = _moe_names("block_sparse_moe") | {"ffn_gate_inp": "block_sparse_moe.router.layer"}
_QWEN2_NAMES = _moe_names("mlp", "shared_expert") | {"ffn_gate_inp_shexp": "mlp.shared_expert_gate"}
_NORMS = {f"attn_{n}_norm": f"self_attn.{n}_norm" for n in "qk"}

FAMILIES = {
    "glm4moe": GgufFamily("glm4_moe", _GLM_NAMES | _NORMS, _glm4_moe),
    "granitemoe": GgufFamily("granitemoe", _GRANITE_NAMES, _granite_moe, is_permuted=True),
    "llama": GgufFamily("mixtral", _moe_names("block_sparse_moe"), _mixtral, is_permuted=True),
    "qwen2moe": GgufFamily("qwen2_moe", _QWEN2_NAMES, _qwen2_moe),
    "qwen3moe": GgufFamily("qwen3_moe", _moe_names("mlp") | _NORMS, _qwen3_moe),
}
"""By GGUF's general.architecture."""


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder with such files and no other weights."""
    if path.is_file():
        return path.suffix == ".gguf"
    return (
        path.is_dir()
        and not (path / GGUF_INDEX).exists()
        and not any(path.glob("*.safetensors"))
        and any(path.glob("*.gguf"))
    )


def prepare_folder(path: Path) -> Path:
    """The folder that stands for a GGUF model, written if it does not exist.

    Args:
        path: a file, one of several files, or a folder with one model's files.

    Raises:
        CheckpointError: files are missing, damaged, or of a family that is not supported.
    """
    path = path.resolve()
    files = split_files(path if path.is_file() else _first_file(path))
    key = hashlib.sha256()
    for file in files:
        info = file.stat()
        key.update(f"{file}\0{info.st_size}\0{info.st_mtime_ns}\0".encode())
    folder = models_dir() / f"gguf-{key.hexdigest()[:16]}" / files[0].stem
    if (folder / GGUF_INDEX).exists():
        return folder
    opened = [GgufFile.open(file) for file in files]
    temporary = folder.parent.with_name(f".{folder.parent.name}.{secrets.token_hex(4)}")
    content = temporary / folder.name
    try:
        content.mkdir(parents=True)
        _write_folder(content, opened)
        try:
            temporary.replace(folder.parent)
        except OSError:
            if not (folder / GGUF_INDEX).exists():  # another process was first, else
                raise
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _first_file(folder: Path) -> Path:
    first = [f for f in sorted(folder.glob("*.gguf")) if split_files(f)[0] == f]
    if len(first) != 1:
        raise CheckpointError(
            f"{folder}: expected the GGUF files of one model, got {len(first)} models; name a file"
        )
    return first[0]


def _write_folder(folder: Path, files: list[GgufFile]) -> None:
    path, metadata = files[0].path, files[0].metadata
    architecture = metadata.get("general.architecture")
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        raise CheckpointError(
            f"{path}: expected a GGUF model of one of {', '.join(FAMILIES)}, got "
            f"{architecture!r:.100}; use the model in another format"
        )
    values = _Values(path, str(architecture), metadata)
    if not values.number("expert_count", 0):
        raise CheckpointError(
            f"{path}: a dense model, it has no experts to distribute; llama.cpp runs it on one "
            "machine"
        )
    layers, drafting_layers = values.number("block_count"), values.number("nextn_predict_layers", 0)
    # mlx-lm has no layers that predict further tokens.
    skipped = tuple(
        f"blk.{layers - 1 - i}." for i in range(min(int(drafting_layers), int(layers), 16))
    )
    tensors: dict[str, list[Any]] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name.startswith(skipped):
                continue
            name = _module_name(path, family, tensor.name)
            if name in tensors:
                raise CheckpointError(
                    f"{path}: {tensor.name:.100} is there twice; download it again"
                )
            start, stop = tensor.start, tensor.stop
            tensors[name] = [file.path.name, tensor.type, list(_shape(name, tensor)), start, stop]
    config = _config(values, family, tensors)
    for file in files:
        (folder / file.path.name).symlink_to(file.path)
    for name, content in tokenizer_files(metadata).items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    heads = [values.number("attention.head_count"), config["num_key_value_heads"]]
    index = {"tensors": tensors, "permuted_heads": heads if family.is_permuted else []}
    (folder / GGUF_INDEX).write_text(json.dumps(index), encoding="utf-8")


def _module_name(path: Path, family: GgufFamily, name: str) -> str:
    match = _LAYER.fullmatch(name)
    if match is not None:
        module = family.names.get(match[2]) or PLAIN_NAMES.get(match[2])
        if module is not None:
            joint = "_" if module.endswith("e_score_correction") else "."
            return f"model.layers.{int(match[1])}.{module}{joint}{match[3]}"
    elif (outer := OUTER_NAMES.get(name.removesuffix(".weight"))) is not None:
        return f"{outer}.weight"
    raise CheckpointError(
        f"{path}: tensor {name:.100} is none that {family.model_type} has; use the model in "
        "another format"
    )


def _shape(name: str, tensor: GgufTensor) -> tuple[int, ...]:
    """A quantized tensor's rows are [blocks, bytes of a block]."""
    shape = tensor.shape
    if name.endswith("shared_expert_gate.weight"):
        shape = (1, *shape[-1:])
    return shape if tensor.type in UNQUANTIZED else row_shape(tensor.type, shape)


def _config(values: _Values, family: GgufFamily, tensors: dict[str, list[Any]]) -> dict[str, Any]:
    number, metadata = values.number, values.metadata
    heads, width = number("attention.head_count"), number("embedding_length")
    config = {
        "model_type": family.model_type,
        "vocab_size": len(metadata.get("tokenizer.ggml.tokens") or ()),
        "hidden_size": width,
        "num_hidden_layers": number("block_count") - number("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": number("attention.key_length", width // max(int(heads), 1)),
        "num_experts_per_tok": number("expert_used_count"),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        **family.config(values),
    }
    if embedding := tensors.get("model.embed_tokens.weight"):
        config["vocab_size"] = embedding[2][0]
    if family.model_type == "glm4_moe":
        config["use_qk_norm"] = any("q_norm" in name for name in tensors)
    scaling = metadata.get(f"{values.architecture}.rope.scaling.type", "none")
    if scaling in ("yarn", "linear"):
        config["rope_scaling"] = {"type": scaling, "factor": number("rope.scaling.factor")}
        if scaling == "yarn":
            config["rope_scaling"]["original_max_position_embeddings"] = number(
                "rope.scaling.original_context_length"
            )
    elif scaling != "none":
        raise CheckpointError(
            f"{values.path}: expected rotary positions scaled by yarn or linear, got "
            f"{scaling!r:.100}; use the model in another format"
        )
    if "tokenizer.ggml.tokens" in metadata:
        config["bos_token_id"] = special_token(metadata, "bos")
        config["eos_token_id"] = end_tokens(metadata)
    return config


@dataclass(frozen=True)
class GgufIndex:
    """What the file `GGUF_INDEX` has.

    Args:
        tensors: by the names of mlx-lm's modules; a quantized one's dtype is GGUF's type.
        permuted_heads: query and key heads, where their rows are in llama.cpp's order.
    """

    tensors: dict[str, TensorInfo]
    permuted_heads: tuple[int, ...]

    @classmethod
    def read(cls, folder: Path) -> GgufIndex | None:
        """A folder's; None: it has none.

        Raises:
            CheckpointError: it is damaged, or a file is missing or shorter.
        """
        path = folder / GGUF_INDEX
        if not path.exists():
            return None
        try:
            data = json.loads(path.read_bytes())
            tensors = {}
            for name, (file, kind, shape, start, stop) in data["tensors"].items():
                info = TensorInfo(name, folder / file, kind, tuple(shape), start, stop)
                size = BLOCK_TYPES[kind].nbytes if kind in UNQUANTIZED else 1
                if math.prod(shape) * size != stop - start or "/" in file:
                    raise ValueError(name)
                tensors[name] = info
            heads = tuple(int(count) for count in data["permuted_heads"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r:.100}); remove {folder}") from error
        for file in {info.file for info in tensors.values()}:
            end = max(info.stop for info in tensors.values() if info.file == file)
            if not file.exists() or file.stat().st_size < end:
                raise CheckpointError(
                    f"{file} is missing or truncated: expected {end} bytes; download it again"
                )
        return cls(tensors, heads)

    @property
    def description(self) -> str | None:
        """The types of quantized tensors; None: there are none."""
        kinds = sorted({info.dtype for info in self.tensors.values()} - UNQUANTIZED)
        return f"GGUF {', '.join(kinds)}" if kinds else None

    def count_rounded(self) -> dict[str, int]:
        """How many tensors there are of each type that MLX's layouts do not hold exactly."""
        types = Counter(info.dtype for info in self.tensors.values())
        return {name: n for name, n in sorted(types.items()) if not BLOCK_TYPES[name].is_exact}

    def decode(self, info: TensorInfo, array: mx.array) -> dict[str, mx.array]:
        """MLX's parameters of what was read of a tensor, by leaf: "weight", "scales", ...

        Args:
            array: [..., blocks, bytes] of a quantized tensor.
        """
        path, _, leaf = info.name.rpartition(".")
        if info.dtype in UNQUANTIZED:
            parts = {leaf: array}
        else:
            leaves = to_mlx_layout(info.dtype, np.array(array))
            parts = {name: mx.array(part) for name, part in leaves.items()}
        for module, heads in zip(("q_proj", "k_proj"), self.permuted_heads, strict=False):
            if path.endswith(f"self_attn.{module}"):
                parts = {name: restore_row_order(part, heads) for name, part in parts.items()}
        return parts

    def describe(self, info: TensorInfo, shape: tuple[int, ...]) -> dict[str, mx.array]:
        """As `decode`, but nothing is read: never to be evaluated.

        Args:
            shape: of what would be read.
        """
        leaf = info.name.rpartition(".")[2]
        if info.dtype in UNQUANTIZED:
            types = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
            return {leaf: mx.full(shape, math.nan, types[info.dtype])}
        kind = BLOCK_TYPES[info.dtype]
        *rows, blocks, _ = shape
        weights = blocks * kind.weights
        words, groups = (*rows, weights * kind.bits // 32), (*rows, weights // 32)
        parts = {"weight": mx.zeros(words, mx.uint32)}
        if kind.mode != "affine":
            return parts | {"scales": mx.full(groups, 255, mx.uint8)}
        nan = mx.full(groups, math.nan, mx.float32)
        return parts | {"scales": nan, "biases": nan}


def restore_row_order(array: Array, heads: int) -> Array:
    """llama.cpp's order of a head's rows, pairs that rotate together, as the Hub's, two halves."""
    rows = len(array) // heads
    return array.reshape(heads, rows // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)
