"""Where a model is kept on a node: a whole folder, or the folder of this node's part.

Owns: finding a model on this machine, and naming the folder of a part.
Does not know: which ranges a node needs, how they are fetched.
Next: `distribution.py` asks every node; `task.py` fills the folders.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from ...errors import CheckpointError
from ...model.byte_ranges import JOURNAL, is_partial
from ...model.checkpoint import Checkpoint, locate_checkpoint
from ...model.weight_files import config_file
from ...paths import models_dir
from .. import node_info
from .download import fetch_metadata
from .hub import Hub
from .source import SourceInterrupted


def partial_folder(parts_dir: Path, model: str, key: str) -> Path:
    """The folder of a node's part of a model.

    Args:
        parts_dir: the folder of all parts.
        key: tells models of one name apart.
    """
    return parts_dir / f"{model.replace('/', '--').lstrip('.')}-{key}"


def open_model(model: str) -> tuple[Path, Hub | None]:
    """The head's folder of a model, whole or partial, and the Hub repository that has the rest.

    Of a Hub model that is not on this machine only config, tokenizer and headers are downloaded.

    Raises:
        CheckpointError: see `locate_checkpoint`.
    """
    path = Path(model).expanduser()
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        return locate_checkpoint(model), None
    if (cached := _find_in_hub_cache(model)) is not None:
        return cached, None
    hub = Hub(model)
    try:
        folder = partial_folder(models_dir(), model, hub.commit)
        fetch_metadata(hub, folder)
    except CheckpointError as error:
        if not isinstance(error.__cause__, SourceInterrupted):
            raise
        # The Hub does not respond: use the latest commit of which something was downloaded.
        commit = _latest_commit(model)
        if commit is None:
            raise
        hub = Hub(model, commit)
        folder = partial_folder(models_dir(), model, commit)
        Checkpoint.open(folder)  # its headers are there
    return folder, hub


def _latest_commit(model: str) -> str | None:
    folders = partial_folder(models_dir(), model, "*").name
    journals = models_dir().glob(f"{folders}/{JOURNAL}")
    commits = [
        journal.parent.name.rpartition("-")[2]
        for journal in sorted(journals, key=lambda path: path.stat().st_mtime)
    ]
    return next((c for c in reversed(commits) if re.fullmatch("[0-9a-f]{40}", c)), None)


def _find_in_hub_cache(model: str) -> Path | None:
    """The folder of a model that huggingface_hub has downloaded whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    try:
        folder = Path(
            snapshot_download(model, local_files_only=True, allow_patterns=DEFAULT_ALLOW_PATTERNS)
        )
        Checkpoint.open(folder)
    except (LocalEntryNotFoundError, CheckpointError, ValueError):
        return None
    return folder


@dataclass(frozen=True)
class LocalModel:
    """What a node has of a model.

    Args:
        folder: where the model is, or where the node's part goes.
        is_complete: nothing needs to be downloaded.
    """

    folder: str
    is_complete: bool


def find_local_model(
    model: str, digest: str, config_sha256: str, model_dirs: list[Path], parts_dir: Path
) -> LocalModel:
    """What this machine has of a model.

    Args:
        model: its name on the head.
        digest: `node_info.digest` of the head's folder.
        config_sha256: of the head's config.json.
        model_dirs: where models are kept here.
        parts_dir: where parts are.

    Raises:
        CheckpointError: there is another model of that name.
    """
    part = LocalModel(str(partial_folder(parts_dir, model, digest[:12])), False)
    folder = node_info.find_model(model, model_dirs)
    if folder is None or is_partial(folder):
        return part
    folder = folder.resolve()
    if node_info.checkpoint_digest(folder) == digest:
        return LocalModel(str(folder), True)
    if hashlib.sha256(config_file(folder).read_bytes()).hexdigest() == config_sha256:
        return part  # weights are missing or half downloaded
    raise CheckpointError(
        f"{folder} has a different model named {model} than the head (config.json differs); copy "
        f"the head's model there, or remove the folder"
    )
