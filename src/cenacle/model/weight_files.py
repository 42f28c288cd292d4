"""Which files of a folder have a checkpoint's weights.

Owns: the rule: the index decides, else all files named model*.safetensors.
Does not know: what is in the files.
Invariant: whoever loads, downloads, checks or sums up a checkpoint takes the same files.
Next: `checkpoint.py` reads their headers.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"


def read_index(folder: Path) -> dict[str, str] | None:
    """The file of each tensor, as the index has it; None: there is no index.

    Raises:
        CheckpointError: it is not an index, or names a file elsewhere.
    """
    index = folder / INDEX_FILE
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"{index}: expected JSON with a weight_map: {error!r:.200}"
        ) from error
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise CheckpointError(f"{index}: expected JSON with a weight_map to names of files")
    for file in set(listed.values()):
        if not file.endswith(".safetensors") or "/" in file or "\\" in file or "\0" in file:
            raise CheckpointError(
                f"{index}: expected names of .safetensors files beside it, got {file!r:.200}"
            )
    return listed


def weight_files(folder: Path) -> list[Path]:
    """The files with the checkpoint's weights, in order. Those of the index may be missing.

    Raises:
        CheckpointError: the index cannot be read.
    """
    listed = read_index(folder)
    if listed is None:
        return sorted(folder.glob("model*.safetensors"))
    return [folder / name for name in sorted(set(listed.values()))]


def stray_files(folder: Path) -> list[Path]:
    """Files that look like weights and that the index does not name."""
    return sorted(set(folder.glob("*.safetensors")) - set(weight_files(folder)))
