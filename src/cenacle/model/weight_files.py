"""Which files belong to a checkpoint.

Owns: the rule: the index decides about weights, else the names; other files are
those that mlx-lm downloads.
Does not know: what is in the files.
Invariant: whoever loads, downloads, serves, checks or sums up a checkpoint takes the same files.
Next: `checkpoint.py` reads their headers.
"""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from ..errors import CheckpointError
from .byte_ranges import JOURNAL

log = logging.getLogger(__name__)

CONFIG_FILES = "config.json", "params.json"  # the second is Mistral's own
INDEX_FILES = "model.safetensors.index.json", "consolidated.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
MAX_METADATA_BYTES = 256 << 20  # of a tokenizer, the largest of them
WEIGHTS_PATTERNS = "model*.safetensors", "consolidated*.safetensors"  # where there is no index
GGUF_INDEX = "gguf-tensors.json"  # of a folder that stands for a GGUF model
WEIGHT_SUFFIXES = ".safetensors", ".gguf"


def config_file(folder: Path) -> Path:
    """config.json, or what stands for it; it need not exist."""
    paths = [folder / name for name in CONFIG_FILES]
    return next((path for path in paths if path.is_file()), paths[0])


def index_path(folder: Path) -> Path:
    """The index of the weights; it need not exist."""
    paths = [folder / name for name in INDEX_FILES]
    return next((path for path in paths if path.exists()), paths[0])


def read_index(folder: Path) -> dict[str, str] | None:
    """The file of each tensor, as the index has it; None: there is no index.

    Raises:
        CheckpointError: it is not an index, or names a file elsewhere.
    """
    index = index_path(folder)
    try:
        with index.open("rb") as file:
            return parse_index(file.read(MAX_INDEX_BYTES + 1), str(index))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}") from error


def parse_index(data: bytes, name: str) -> dict[str, str]:
    """The file of each tensor.

    Args:
        data: what the index has, or at least `MAX_INDEX_BYTES` + 1 bytes of it.
        name: of the index, for errors.

    Raises:
        CheckpointError: it is not an index, or names a file elsewhere.
    """
    if len(data) > MAX_INDEX_BYTES:
        raise CheckpointError(f"{name}: expected an index of at most {MAX_INDEX_BYTES} bytes")
    try:
        listed = json.loads(data)["weight_map"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: expected JSON with a weight_map: {error!r:.200}") from error
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise CheckpointError(f"{name}: expected JSON with a weight_map to names of files")
    for file in set(listed.values()):
        if not file.endswith(".safetensors") or "/" in file or "\\" in file or "\0" in file:
            raise CheckpointError(
                f"{name}: expected names of .safetensors files beside it, got {file!r:.200}"
            )
    return listed


def weight_files(folder: Path) -> list[Path]:
    """The files with the checkpoint's weights, in order. Those of the index may be missing.

    Raises:
        CheckpointError: the index cannot be read.
    """
    if (folder / GGUF_INDEX).exists():
        return sorted(folder.glob("*.gguf"))
    listed = read_index(folder)
    if listed is None:
        found = [sorted(folder.glob(pattern)) for pattern in WEIGHTS_PATTERNS]
        return next(filter(None, found), [])
    return [folder / name for name in sorted(set(listed.values()))]


def check_files(folder: Path) -> None:
    """Reading any file of the checkpoint ends, and takes bounded memory.

    Raises:
        CheckpointError: one is a pipe, a device or a socket, or is too large for what it is.
    """
    for path in sorted(folder.iterdir()):
        is_weights = path.name.endswith(WEIGHT_SUFFIXES)
        if not is_weights and not any(fnmatch(path.name, p) for p in metadata_patterns()):
            continue
        with suppress(OSError):  # a link to nothing: whoever needs it says so
            info = path.stat()
            if not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):
                raise CheckpointError(f"{path}: expected a regular file, got a pipe or a device")
            if not is_weights and info.st_size > MAX_METADATA_BYTES:
                raise CheckpointError(
                    f"{path}: expected at most {MAX_METADATA_BYTES:,} bytes, got {info.st_size:,}"
                )


def metadata_patterns() -> list[str]:
    """Names of all files but weights, as mlx-lm downloads them."""
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    return [pattern for pattern in DEFAULT_ALLOW_PATTERNS if pattern not in WEIGHTS_PATTERNS]


def select_files(source: str, names: Iterable[str], listed: dict[str, str] | None) -> list[str]:
    """The files among `names` that belong to the checkpoint.

    Weights that the index does not name are reported in the log, once.

    Args:
        source: where they are.
        listed: what `read_index` gives.
    """
    names = sorted(names)
    weights = {name for name in names if name.endswith(".safetensors")}
    patterns = metadata_patterns()
    others = {n for n in names if any(fnmatch(n, p) for p in patterns)} - {JOURNAL}
    if GGUF_INDEX in names:
        weights = {name for name in names if name.endswith(".gguf")}
    elif listed is None:
        found = [{n for n in weights if fnmatch(n, pattern)} for pattern in WEIGHTS_PATTERNS]
        weights = next(filter(None, found), set())
    elif stray := sorted(weights - set(listed.values())):
        weights -= set(stray)
        _report_stray_files(source, len(stray), ", ".join(stray[:3]))
    return sorted(weights | others)


@cache
def _report_stray_files(source: str, count: int, examples: str) -> None:
    text = "%s: %d weight files are not named by the index and not used, such as %s"
    log.warning(text, source, count, examples)
