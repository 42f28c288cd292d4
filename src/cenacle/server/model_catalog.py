"""The models of a server, by name, before any is loaded.

Owns: which models there are, and what can be told of each without loading it.
Does not know: when they are loaded.
Invariant: reads headers only, and nothing from a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CenacleError, InputError
from .api.protocol import ServedModel

if TYPE_CHECKING:
    from ..load_options import LoadOptions


@dataclass(frozen=True)
class ModelEntry:
    """A model that can be loaded.

    Args:
        options: how.
        served: what clients are told of it.
        weights_bytes: of its checkpoint; None: not known before it is loaded.
    """

    options: LoadOptions
    served: ServedModel
    weights_bytes: int | None = None


def read_catalog(
    models: Sequence[str],
    folder: Path | None,
    options: LoadOptions,
    report: Callable[[str], None],
) -> dict[str, ModelEntry]:
    """The models of a server by name, in the order given.

    Args:
        models: folders, GGUF files and names of Hub repositories.
        folder: with further models in it; what is none is left out.
        options: of each of them, but for the model.
        report: told in sentences what is left out.

    Raises:
        InputError: no model, or two of one name.
        CheckpointError: one of `models` cannot be read.
    """
    catalog: dict[str, ModelEntry] = {}
    for model in models:
        _add(catalog, _describe(replace(options, model=model)))
    for path in _find_models(folder) if folder is not None else ():
        try:
            entry = _describe(replace(options, model=str(path)))
        except CenacleError as error:
            report(f"{path.name} is left out: {error}")
            continue
        if entry.options.model not in [e.options.model for e in catalog.values()]:
            _add(catalog, entry)
    if not catalog:
        where = f" in {folder}" if folder is not None else ""
        raise InputError(f"--models-dir: expected at least one model, got none{where}", "model")
    return catalog


def _add(catalog: dict[str, ModelEntry], entry: ModelEntry) -> None:
    if (other := catalog.get(entry.served.name)) is not None:
        raise InputError(
            f"--model: expected models of different names, got {other.options.model} and "
            f"{entry.options.model}; rename one of the folders",
            "model",
        )
    catalog[entry.served.name] = entry


def _find_models(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise InputError(f"--models-dir: expected a folder, got {folder}", "models-dir")
    for path in sorted(folder.iterdir()):
        if _is_model(path):
            yield path


def _is_model(path: Path) -> bool:
    if path.suffix == ".gguf":
        return "-of-" not in path.stem or "-00001-of-" in path.stem
    if not path.is_dir():
        return False
    names = ("config.json", "params.json")
    return any((path / name).exists() for name in names) or any(path.glob("*.gguf"))


def _describe(options: LoadOptions) -> ModelEntry:
    from ..model.checkpoint import Checkpoint, locate_checkpoint
    from ..model.generation_config import read_sampling_defaults
    from ..model.spec_reader import read_model_spec
    from ..runtime import model_name

    if not Path(options.model).expanduser().exists():
        # The Hub is asked when it is loaded.
        if options.model.count("/") != 1 or options.model.startswith((".", "/", "~")):
            locate_checkpoint(options.model)  # says what is wrong
        return ModelEntry(options, ServedModel(options.model, None, 0))
    checkpoint = Checkpoint.open(locate_checkpoint(options.model))
    spec = read_model_spec(checkpoint, images=options.engine.sees_images)
    served = ServedModel(
        model_name(options.model, checkpoint),
        spec.context_length,
        spec.vocab_size,
        image_obstacle="" if spec.tower_bytes else "one that cannot be shown images",
        sampling_defaults=read_sampling_defaults(checkpoint.folder),
    )
    return ModelEntry(options, served, spec.total_bytes)
