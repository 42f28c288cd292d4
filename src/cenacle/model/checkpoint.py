"""A checkpoint's folder: config.json and the headers of its safetensors files.

Owns: checking the headers against the files, and finding a model's folder.
Does not know: what tensors are for, plans.
Invariant: a tensor of an opened checkpoint lies inside its file, with as many bytes as its type and
shape need. No weights are read.
Next: `tensor_reader.py` reads tensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import utils as mlx_lm_utils

from ..core.units import format_bytes
from ..errors import CheckpointError
from . import architecture
from .byte_ranges import is_partial

MAX_HEADER_BYTES = 100_000_000  # limit of the safetensors format

# safetensors name -> (bits of an element, numpy type that carries the bytes, type MLX gives it)
DTYPES: dict[str, tuple[int, Any, mx.Dtype]] = {
    "F64": (64, np.float64, mx.float32),
    "F32": (32, np.float32, mx.float32),
    "F16": (16, np.float16, mx.float16),
    "BF16": (16, np.uint16, mx.bfloat16),
    "I64": (64, np.int64, mx.int64),
    "I32": (32, np.int32, mx.int32),
    "I16": (16, np.int16, mx.int16),
    "I8": (8, np.int8, mx.int8),
    "U64": (64, np.uint64, mx.uint64),
    "U32": (32, np.uint32, mx.uint32),
    "U16": (16, np.uint16, mx.uint16),
    "U8": (8, np.uint8, mx.uint8),
    "BOOL": (8, np.bool_, mx.bool_),
    "F8_E4M3": (8, np.uint8, mx.uint8),
    "F8_E8M0": (8, np.uint8, mx.uint8),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's bytes are: [start, stop) of `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors files whose headers have been checked.

    Args:
        folder: its path.
        config: config.json, with the names that mlx-lm looks for.
        tensors: every tensor by name.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read config.json and the headers; no weights.

        Raises:
            CheckpointError: a file is missing, truncated or not what its header says.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        try:
            config = mlx_lm_utils.load_config(folder)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{folder} has no config.json; expected a model folder as on the Hugging Face Hub"
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{folder / 'config.json'} is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{folder / 'config.json'}: expected a JSON object")
        if "model_file" in config:
            raise CheckpointError(
                f"{folder}: config.json names a Python file ({config['model_file']}); Cenacle runs "
                f"mlx-lm's own families only and executes no code from a checkpoint"
            )
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{folder} has no weights: expected files named model*.safetensors"
            )
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            tensors |= {t.name: t for t in _read_header(file)}
        _check_index(folder, tensors)
        return cls(folder, architecture.complete_config(config), tensors)

    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(t.stop - t.start for t in self.tensors.values())


def _read_header(file: Path) -> Iterable[TensorInfo]:
    size = file.stat().st_size
    with file.open("rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{file} is truncated or not a safetensors file: its header should be {length} "
                f"bytes long, the file has {format_bytes(size)}; download it again"
            )
        try:
            header = json.loads(f.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{file}: the header is corrupted ({error}); download it again"
            ) from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{file}: the header is corrupted (not a JSON object); download it again"
        )
    header.pop("__metadata__", None)
    for name, entry in header.items():
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            start, stop = entry["data_offsets"]
            expected = math.prod(shape) * DTYPES[dtype][0] // 8
            got = stop - start
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{file}: expected dtype, shape and data_offsets for tensor {name}, got {entry!r}; "
                f"download it again"
            ) from error
        if got != expected or start < 0:
            raise CheckpointError(
                f"{file}: tensor {name} of {dtype} {list(shape)} needs {expected} bytes, "
                f"its header gives it {got}; download it again"
            )
        begin = 8 + length
        if begin + stop > size:
            raise CheckpointError(
                f"{file} is truncated: tensor {name} ends at byte {begin + stop}, "
                f"the file has {size}; download it again"
            )
        yield TensorInfo(name, file, dtype, shape, begin + start, begin + stop)


def _check_index(folder: Path, tensors: dict[str, TensorInfo]) -> None:
    """Every tensor that the index lists must be there: this finds a missing shard."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return
    try:
        listed = dict(json.loads(index.read_text())["weight_map"])
    except (KeyError, TypeError, ValueError) as error:  # ValueError: not JSON, not UTF-8
        raise CheckpointError(f"{index}: expected JSON with a weight_map: {error!r}") from error
    missing = {name: file for name, file in listed.items() if name not in tensors}
    if missing:
        name, file = next(iter(missing.items()))
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(listed)} tensors of the index are missing, "
            f"the first is {name} in {file}; download that file"
        )


def locate_checkpoint(model: str, revision: str | None = None) -> Path:
    """A local folder for a path or a Hub repository ("org/name"), downloaded if need be.

    Raises:
        CheckpointError: neither a folder with a whole model nor a repository that can be had.
    """
    folder = Path(model).expanduser()
    if folder.exists():
        if is_partial(folder):
            raise CheckpointError(
                f"{folder} has only one node's part of a model: give a folder that has all of it, "
                f"or the model's name on the Hub"
            )
        return folder
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{model}: no such folder, and not a Hub repository such as org/model"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=mlx_lm_utils.DEFAULT_ALLOW_PATTERNS
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"{model}: no such folder, and the Hub does not provide it: {reason}"
        ) from error
