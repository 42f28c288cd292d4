"""A GGUF model as a checkpoint's folder: config, tokenizer, and where each tensor's bytes are.

Owns: the folder; `GGUF_INDEX`, the list of tensors under the names of mlx-lm's modules; making
parameters of tensors that were read.
Does not know: families (`gguf_families.py`), plans, ranks.
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
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..core.model_config import Config, text_config
from ..errors import CheckpointError
from ..gguf.blocks import BLOCK_TYPES, GROUP, UNQUANTIZED, row_shape, to_mlx_layout
from ..gguf.file import GgufFile, GgufTensor, split_files
from ..gguf.tokenizer import end_tokens, special_token, tokenizer_files
from ..paths import models_dir
from . import generation_config
from .gguf_families import (
    ARCHITECTURES,
    FAMILIES,
    PLAIN_NAMES,
    GgufFamily,
    Values,
    find_family,
    rope_scaling,
)
from .gguf_transforms import Parts, Transform, name_parts
from .tensor_info import TensorInfo
from .tensor_reader import TensorPiece, read_bytes, read_piece
from .weight_files import GGUF_INDEX

_LAYER = re.compile(r"blk\.(\d+)\.(\w+)(?:\.(weight|bias))?")
_LAYER_PATH = re.compile(r"(?:.*\.)?(?:layers|blocks)\.\d+(?:\.(.*))?")
# Of generation_config.json: the end of the name that GGUF has.
SAMPLING_KEYS = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
FORMAT_VERSION = 3  # of the folder; another version's is not read


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
    key = hashlib.sha256(bytes([FORMAT_VERSION]))
    for file in files:
        try:
            info = file.stat()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
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
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: expected a GGUF model of one of {', '.join(ARCHITECTURES)}, got "
            f"{architecture!r:.100}; use the model in another format"
        )
    places = {tensor.name: (file.path, tensor) for file in files for tensor in file.tensors}
    values = Values(path, architecture, metadata, places)
    family_name = find_family(values)
    family = FAMILIES[family_name]
    layers, drafting_layers = values.number("block_count"), values.number("nextn_predict_layers", 0)
    # mlx-lm has no layers that predict further tokens.
    skipped = tuple(
        f"blk.{layers - 1 - i}." for i in range(min(int(drafting_layers), int(layers), 16))
    )
    tensors: dict[str, list[Any]] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name.startswith(skipped) or tensor.name in family.skipped:
                continue
            name = _parameter_name(path, family, tensor.name)
            if name in tensors:
                raise CheckpointError(
                    f"{path}: {tensor.name:.100} is listed twice; download it again"
                )
            start, stop = tensor.start, tensor.stop
            tensors[name] = [file.path.name, tensor.type, list(_shape(name, tensor)), start, stop]
    config = _config(values, family)
    for file in files:
        (folder / file.path.name).symlink_to(file.path)
    for name, content in tokenizer_files(metadata).items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    defaults = {
        name: metadata.get(f"general.sampling.{key}") for name, key in SAMPLING_KEYS.items()
    }
    sampling = {name: value for name, value in defaults.items() if isinstance(value, int | float)}
    (folder / generation_config.FILE_NAME).write_text(json.dumps(sampling), encoding="utf-8")
    index = {"family": family_name, "tensors": tensors}
    (folder / GGUF_INDEX).write_text(json.dumps(index), encoding="utf-8")


def _parameter_name(path: Path, family: GgufFamily, name: str) -> str:
    match = _LAYER.fullmatch(name)
    if match is not None:
        layer = f"{family.prefix}{family.layers}.{int(match[1])}"
        if (parameter := family.parameters.get(name.split(".", 2)[2])) is not None:
            return f"{layer}.{parameter}"
        module = family.names.get(match[2]) or PLAIN_NAMES.get(match[2])
        if module is not None and match[3] is not None:
            return f"{layer}.{module}.{match[3]}"
    elif (outer := family.outer.get(name.removesuffix(".weight"))) is not None:
        return f"{family.prefix}{outer}.weight"
    raise CheckpointError(
        f"{path}: unknown tensor {name:.100} for {family.model_type}; use the model in "
        "another format"
    )


def _shape(name: str, tensor: GgufTensor) -> tuple[int, ...]:
    """A quantized tensor's rows are [blocks, bytes of a block]."""
    shape = tensor.shape
    if name.endswith("shared_expert_gate.weight"):
        shape = (1, *shape[-1:])
    return shape if tensor.type in UNQUANTIZED else row_shape(tensor.type, shape)


def _config(values: Values, family: GgufFamily) -> dict[str, Any]:
    number, metadata = values.number, values.metadata
    heads, width = number("attention.head_count"), number("embedding_length")
    config = {
        "model_type": family.model_type,
        "vocab_size": values.vocabulary,
        "hidden_size": width,
        "num_hidden_layers": number("block_count") - number("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": number("attention.key_length", width // max(int(heads), 1)),
        "num_experts_per_tok": number("expert_used_count", 0 if family.is_dense else None),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number(family.norm_key),
        "rope_theta": number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in values.tensors,
        **family.config(values),
    }
    if (scaling := rope_scaling(values, family)) is not None:
        config["rope_scaling"] = scaling | (config.get("rope_scaling") or {})
    if "tokenizer.ggml.tokens" in metadata:
        config["bos_token_id"] = special_token(metadata, "bos")
        config["eos_token_id"] = end_tokens(metadata)
    if family.text_type is not None:
        text = config | {"model_type": family.text_type}
        kept = ("model_type", "tie_word_embeddings", "bos_token_id", "eos_token_id")
        config = {"text_config": text, **{key: config[key] for key in kept if key in config}}
    return config


@dataclass(frozen=True)
class GgufIndex:
    """What the file `GGUF_INDEX` has.

    Args:
        tensors: by the names of mlx-lm's parameters, or of what they are made of; a quantized one's
            dtype is GGUF's type.
        transforms: of the family.
        config: of the language model.
    """

    tensors: dict[str, TensorInfo]
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    config: Config = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, config: Config) -> GgufIndex | None:
        """A folder's; None: it has none.

        Args:
            config: its config.json.

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
                numbers = (*shape, start, stop)
                if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
                    raise ValueError(name)
                if math.prod(shape) * size != stop - start or Path(file).name != file:
                    raise ValueError(name)
                if kind not in UNQUANTIZED and shape[-1] != BLOCK_TYPES[kind].nbytes:
                    raise ValueError(name)
                tensors[name] = info
            family = FAMILIES[data["family"]]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r:.100}); remove {folder}") from error
        for file in {info.file for info in tensors.values()}:
            end = max(info.stop for info in tensors.values() if info.file == file)
            if not file.is_file() or file.stat().st_size < end:
                raise CheckpointError(
                    f"{file} is missing or truncated: expected {end} bytes; download it again"
                )
        return cls(tensors, family.transforms, text_config(config))

    @property
    def description(self) -> str | None:
        """The types of quantized tensors; None: there are none."""
        kinds = sorted({info.dtype for info in self.tensors.values()} - UNQUANTIZED)
        return f"GGUF {', '.join(kinds)}" if kinds else None

    def count_rounded(self) -> dict[str, int]:
        """How many tensors there are of each type that MLX's layouts do not hold exactly."""
        types = Counter(info.dtype for info in self.tensors.values())
        return {name: n for name, n in sorted(types.items()) if not BLOCK_TYPES[name].is_exact}

    @cached_property
    def _source_counts(self) -> Counter[str]:
        """How many tensors there are under each path."""
        return Counter(name.rpartition(".")[0] for name in self.tensors)

    def read_parts(self, piece: TensorPiece, shape: tuple[int, ...]) -> Parts:
        """Read and decode a part of a tensor.

        Args:
            shape: of what is read: [..., blocks, bytes] of a quantized tensor.

        Raises:
            CheckpointError: the file ended or could not be read.
        """
        if piece.tensor.dtype in UNQUANTIZED:
            return {"weight": read_piece(piece).reshape(shape)}
        leaves = to_mlx_layout(piece.tensor.dtype, read_bytes(piece).reshape(shape))
        # A part at a time goes to MLX, which copies it.
        return {name: mx.array(leaves.pop(name)) for name in list(leaves)}

    def describe(self, info: TensorInfo, shape: tuple[int, ...]) -> Parts:
        """As `read_parts`, but nothing is read: never to be evaluated.

        Args:
            shape: of what would be read.
        """
        if info.dtype in UNQUANTIZED:
            types = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
            return {"weight": mx.full(shape, math.nan, types[info.dtype])}
        kind = BLOCK_TYPES[info.dtype]
        *rows, blocks, _ = shape
        weights = blocks * kind.weights
        words, groups = (*rows, weights * kind.bits // 32), (*rows, weights // GROUP)
        parts = {"weight": mx.zeros(words, mx.uint32)}
        if kind.mode != "affine":
            return parts | {"scales": mx.full(groups, 255, mx.uint8)}
        nan = mx.full(groups, math.nan, mx.float32)
        return parts | {"scales": nan, "biases": nan}

    def parameters(
        self, info: TensorInfo, parts: Parts, waiting: dict[str, dict[str, Parts]]
    ) -> Parts:
        """The model's parameters that a tensor makes, by name, lazily.

        Args:
            parts: what `read_parts` gives.
            waiting: tensors, by path, whose parameters need others that come later; it begins
                empty and ends empty.
        """
        path, _, leaf = info.name.rpartition(".")
        match = _LAYER_PATH.fullmatch(path)
        inner = (match[1] or "") if match is not None else ""
        transform, sources = self.transforms.get(f"{inner}.{leaf}"), {leaf: parts}
        if transform is None and (transform := self.transforms.get(inner)) is not None:
            sources = waiting.setdefault(path, {})
            sources[leaf] = parts
            if len(sources) < self._source_counts[path]:
                return {}
            del waiting[path]
        made = transform(sources, self.config) if transform is not None else name_parts(sources)
        return {f"{path}.{name}": array for name, array in made.items()}
