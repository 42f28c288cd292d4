"""A checkpoint's folder: config.json and the headers of its safetensors files.

Owns: checking the headers against the files, and finding a model's folder.
Does not know: what tensors are for, plans.
Invariant: a tensor of an opened checkpoint lies inside its file, with as many bytes as its type and
shape need, none of which is another tensor's. No weights are read.
Next: `tensor_reader.py` reads tensors.
"""

from __future__ import annotations

import glob
import json
import logging
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.model_config import EXPERT_COUNT_KEYS, LAYER_COUNT_KEYS, TOP_K_KEYS, find_int
from ..core.units import format_bytes
from ..errors import CheckpointError
from ..paths import check_readable
from . import architecture
from .byte_ranges import is_partial
from .config_file import read_config, read_quantization_settings
from .families import VISION_PREFIXES, family_of, is_tower_tensor
from .format_recognition import find_quantized_layers
from .gguf_checkpoint import GgufIndex, is_gguf, prepare_folder
from .quantized_layers import QuantizedLayers
from .tensor_info import DTYPES, TensorInfo
from .weight_files import (
    WEIGHTS_PATTERNS,
    check_files,
    metadata_patterns,
    read_index,
    select_files,
    weight_files,
)

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 100_000_000  # limit of the safetensors format
MAX_DIMENSION = 2**31 - 1  # of MLX's arrays
# Several times what any format has; building a model takes time for every stray tensor.
MAX_TENSORS_OUTSIDE, MAX_TENSORS_PER_LAYER, MAX_TENSORS_PER_EXPERT = 10_000, 1000, 40


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors files whose headers have been checked.

    Args:
        folder: its path.
        config: config.json, with the names that mlx-lm looks for.
        tensors: every tensor by name.
        quantized: the layers that are quantized in other formats than MLX's own.
        gguf: the index of a folder that stands for a GGUF model.
        renamed: of a part of a checkpoint: the names of its tensors here by those in the files.
        low_norms: its norms that are stored less 1, which the family's conversion may not know.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    quantized: QuantizedLayers = field(default_factory=QuantizedLayers)
    gguf: GgufIndex | None = None
    renamed: Mapping[str, str] | None = None
    low_norms: frozenset[str] = frozenset()

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read config.json and the headers; no weights.

        Raises:
            CheckpointError: a file is missing, truncated or not what its header says.
        """
        check_readable(folder)
        if not folder.is_dir():
            what = "expected a model's folder, got a file" if folder.exists() else "no such folder"
            raise CheckpointError(f"{folder}: {what}")
        check_files(folder)
        config = read_config(folder)
        if (index := GgufIndex.read(folder, config)) is not None:
            _check_counts(folder, config, index.tensors)
            config = architecture.complete_config(config)
            return cls(folder, config, index.tensors, gguf=index)
        listed, files = read_index(folder), weight_files(folder)
        if not files:
            raise CheckpointError(
                f"{folder} has no weights: expected files named model*.safetensors"
            )
        tensors: dict[str, TensorInfo] = {}
        max_tensors = _max_tensors(config)
        for file in files:
            if listed is not None and not file.exists():
                missing = sum(1 for name in listed.values() if name == file.name)
                raise CheckpointError(
                    f"{folder}: {missing} of {len(listed)} tensors of the index are missing, they "
                    f"are in {file.name}; download that file"
                )
            for tensor in _read_header(file):
                if (other := tensors.setdefault(tensor.name, tensor)) is not tensor:
                    raise CheckpointError(
                        f"{folder}: expected each tensor in one file, got {tensor.name} in "
                        f"{other.file.name} and {file.name}; remove the file that does not belong"
                    )
                if len(tensors) > max_tensors:
                    raise CheckpointError(
                        f"{file}: expected at most {max_tensors:,} tensors for what config.json "
                        f"describes, got more; the files do not belong "
                        "together: remove what is not of this model, or download it again"
                    )
        _check_index(folder, tensors, listed or {})
        _check_counts(folder, config, tensors)
        settings = read_quantization_settings(folder, config)
        config = architecture.complete_config(config)
        family = family_of(str(config.get("model_type")))
        if (rename := family.rename_tensor) is not None:
            renamed = [replace(t, name=rename(t.name, config)) for t in tensors.values()]
            tensors = {tensor.name: tensor for tensor in renamed}
        quantized = find_quantized_layers(
            str(folder), tensors, config, settings, family.own_formats
        )
        if quantized.layers:
            # The loader makes MLX's layouts; each layer's bits and groups follow from its shapes.
            config.setdefault("quantization", {"group_size": 32, "bits": 4, "mode": "affine"})
        elif "quant_method" not in settings and {"bits", "group_size"} <= settings.keys():
            config.setdefault("quantization", settings)  # MLX's, by the newer name alone
        return cls(folder, config, tensors, quantized)

    @property
    def files(self) -> list[Path]:
        """Those with tensors, in order."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    @property
    def text_tensors(self) -> dict[str, TensorInfo]:
        """Those of the language model."""
        return {name: t for name, t in self.tensors.items() if not is_tower_tensor(name)}

    @property
    def vision_tensors(self) -> dict[str, TensorInfo]:
        """Those of a tower that sees images, by their names in the checkpoint."""
        return {n: t for n, t in self.tensors.items() if n.startswith(VISION_PREFIXES)}

    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(t.stop - t.start for t in self.tensors.values())


def _read_header(file: Path) -> list[TensorInfo]:
    try:
        size = file.stat().st_size
        opened = file.open("rb")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    with opened as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{file} is truncated or not a safetensors file: its header should be {length} "
                f"bytes long, the file has {format_bytes(size)}; download it again"
            )
        try:
            header = json.loads(f.read(length), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested deeply
            raise CheckpointError(
                f"{file}: the header is corrupted ({error}); download it again"
            ) from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{file}: the header is corrupted (not a JSON object); download it again"
        )
    header.pop("__metadata__", None)
    tensors = [_read_entry(file, name, entry, 8 + length, size) for name, entry in header.items()]
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start < end:
            raise CheckpointError(
                f"{file}: the header is corrupted: tensor {tensor.name:.100} begins inside "
                f"{before:.100}; download it again"
            )
        end, before = tensor.stop, tensor.name
    return tensors


def _unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(members)
    if len(made) < len(members):
        raise ValueError("a name is listed twice")
    return made


def _read_entry(file: Path, name: str, entry: Any, begin: int, size: int) -> TensorInfo:
    """A tensor of a header, whose data begin at a byte of a file of so many."""
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        expected = math.prod(shape) * DTYPES[dtype][0] // 8
        if not all(type(n) is int and 0 <= n <= MAX_DIMENSION for n in shape):
            raise ValueError("dimensions")
        if type(start) is not int or type(stop) is not int:
            raise ValueError("data_offsets")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{file}: expected dtype, shape and data_offsets for tensor {name:.100}, got "
            f"{entry!r:.200}; download it again"
        ) from error
    if stop - start != expected or start < 0:
        raise CheckpointError(
            f"{file}: tensor {name:.100} of {dtype} {list(shape)} needs {expected} bytes, "
            f"its header gives it {stop - start}; download it again"
        )
    if begin + stop > size:
        raise CheckpointError(
            f"{file} is truncated: tensor {name:.100} ends at byte {begin + stop}, "
            f"the file has {size}; download it again"
        )
    return TensorInfo(name, file, dtype, shape, begin + start, begin + stop)


def _check_index(folder: Path, tensors: dict[str, TensorInfo], listed: dict[str, str]) -> None:
    """Every tensor that the index lists must be there: this finds a file of another checkpoint."""
    missing = {name: file for name, file in listed.items() if name not in tensors}
    if missing:
        name, file = next(iter(missing.items()))
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(listed)} tensors of the index are missing, "
            f"the first is {name} in {file}; download that file"
        )


def _max_tensors(config: dict[str, Any]) -> int:
    layers = (find_int(config, LAYER_COUNT_KEYS) or 1000) + 8  # drafters are layers too
    experts = find_int(config, EXPERT_COUNT_KEYS) or 0
    return MAX_TENSORS_OUTSIDE + layers * (MAX_TENSORS_PER_LAYER + experts * MAX_TENSORS_PER_EXPERT)


def _check_counts(folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
    """There are no more layers than tensors, nor more experts than tensors or rows of one.

    mlx-lm builds all that config.json asks for before it looks at the weights.
    """
    widest = max((max(tensor.shape, default=0) for tensor in tensors.values()), default=0)
    for keys, limit, what in (
        (LAYER_COUNT_KEYS, len(tensors), "layers"),
        (EXPERT_COUNT_KEYS, max(len(tensors), widest), "experts"),
    ):
        if (count := find_int(config, keys) or 0) > limit:
            raise CheckpointError(
                f"{folder}: config.json describes {count} {what}, and the {len(tensors)} tensors "
                "cannot hold so many; the files do not belong together: download the model again"
            )
    experts, chosen = find_int(config, EXPERT_COUNT_KEYS), find_int(config, TOP_K_KEYS)
    if experts and chosen is not None and not 1 <= chosen <= experts:
        raise CheckpointError(
            f"{folder}: config.json: expected 1 to {experts} experts per token, got {chosen}"
        )


def locate_checkpoint(model: str, revision: str | None = None) -> Path:
    """A local folder for a path or a Hub repository ("org/name"), downloaded if need be.

    Weights that the index does not name are reported in the log: ranks need not say it again.

    Raises:
        CheckpointError: neither a folder with a whole model nor a repository that can be had.
    """
    folder = Path(model).expanduser()
    check_readable(folder)
    if is_gguf(folder):
        return prepare_folder(folder)
    if folder.exists():
        if is_partial(folder):
            raise CheckpointError(
                f"{folder} has only one node's part of a model: give a folder that has all of it, "
                f"or the model's name on the Hub"
            )
        if folder.is_dir():
            check_files(folder)
            names = (file.name for file in folder.iterdir())
            select_files(str(folder), names, read_index(folder))
        return folder
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{model}: no such folder, and not a Hub repository such as org/model"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(model, revision=revision, allow_patterns=metadata_patterns())
        )
        listed = read_index(folder)
        files = WEIGHTS_PATTERNS if listed is None else map(glob.escape, set(listed.values()))
        snapshot_download(model, revision=folder.name, allow_patterns=sorted(files))
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        lines = str(error).removeprefix("Got: ").strip().splitlines()
        reason = lines[0] if lines else repr(error)
        raise CheckpointError(
            f"{model}: no such folder, and the Hub does not provide it ({reason})"
        ) from error
