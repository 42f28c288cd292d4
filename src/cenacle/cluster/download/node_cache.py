"""."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from ...errors import CheckpointError
from ...model.byte_ranges import JOURNAL, is_partial
from ...model.checkpoint import Checkpoint, locate_checkpoint
from ...paths import models_dir
from .. import node_info
from .download import fetch_metadata
from .hub import Hub
from .source import SourceInterrupted


def partial_folder(place: Path, model: str, key: str) -> Path:
    """Where a part of a model is, or would be.

    Args:
        place: the folder of parts.
        key: what tells models of one name apart.
    """
    return place / f"{model.replace('/', '--').lstrip('.')}-{key}"


def open_model(model: str) -> tuple[Path, Hub | None]:
    """What the head knows a model by: a whole folder, or its part, and the hub that has the rest.

    Of a hub's model that is not on this machine only config, tokenizer and headers are fetched.

    Raises:
        CheckpointError: see `weights.locate`.
    """
    given = Path(model).expanduser()
    if given.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
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
        # The hub does not answer: what was fetched of this model before may do.
        known = sorted(
            models_dir().glob(f"{partial_folder(models_dir(), model, '*').name}/{JOURNAL}"),
            key=_modified_s,
        )
        commits = [p.parent.name.rpartition("-")[2] for p in known]
        commits = [c for c in commits if re.fullmatch("[0-9a-f]{40}", c)]
        if not commits:
            raise
        hub = Hub(model, commits[-1])
        folder = partial_folder(models_dir(), model, commits[-1])
        Checkpoint.open(folder)  # its headers are here
    return folder, hub


def _modified_s(path: Path) -> float:
    return path.stat().st_mtime


def _find_in_hub_cache(model: str) -> Path | None:
    """The folder of a model that was fetched whole some time."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    try:
        found = snapshot_download(
            model, local_files_only=True, allow_patterns=DEFAULT_ALLOW_PATTERNS
        )
        Checkpoint.open(Path(found))
    except (LocalEntryNotFoundError, CheckpointError, ValueError):
        return None
    return Path(found)


@dataclass(frozen=True)
class LocalModel:
    """What a machine has of a model.

    Args:
        folder: where it is, or where a part of it goes.
        whole: nothing needs to be fetched.
    """

    folder: str
    whole: bool


def find_local_model(
    model: str, digest: str, config: str, folders: list[Path], place: Path
) -> LocalModel:
    """What of a model is on this machine.

    Args:
        model: as the head calls it.
        digest: `machine.digest` of the head's.
        config: the SHA-256 of its config.json.
        folders: where models are kept here.
        place: where parts are.

    Raises:
        CheckpointError: there is another model of that name.
    """
    part = LocalModel(str(partial_folder(place, model, digest[:12])), False)
    folder = node_info.find(model, folders)
    if folder is None or is_partial(folder):
        return part
    folder = folder.resolve()
    if node_info.digest(folder) == digest:
        return LocalModel(str(folder), True)
    if hashlib.sha256((folder / "config.json").read_bytes()).hexdigest() == config:
        return part  # weights are missing, or were fetched to their half
    raise CheckpointError(
        f"{folder} has another model of the name {model} than the head (config.json differs): copy "
        f"it again, or take it away"
    )
