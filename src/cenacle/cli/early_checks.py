"""What can be refused before the libraries are imported that would find it after seconds.

Owns: whether a model exists on this machine.
Does not know: what is in its files (`model/checkpoint.py`), the Hub.
Invariant: refuses only what loading would refuse too, and in the same words.
"""

from __future__ import annotations

import difflib
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import CheckpointError, InputError
from ..extras import is_installed
from ..paths import resolve_model

MAX_NEIGHBORS = 1000  # of a folder's files that are compared


def check_model(model: str) -> str:
    """Refuse a path that does not exist.

    Args:
        model: a path, the name of a Hub repository, or `demo`.

    Returns:
        The path or the name; see `paths.resolve_model`.

    Raises:
        CheckpointError: neither can be; the message has the nearest paths, at most three.
    """
    model = resolve_model(model)
    path = Path(model).expanduser()
    if path.exists() or (model.count("/") == 1 and not model.startswith((".", "/", "~"))):
        return model
    near = find_similar_paths(path)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise CheckpointError(
        f"{model}: no such folder, and not a Hub repository such as org/model{hint}"
    )


def find_similar_paths(path: Path, count: int = 3) -> list[str]:
    """The paths beside one that does not exist whose names are nearest to its name."""
    try:
        names = [entry.name for entry in islice(path.parent.iterdir(), MAX_NEIGHBORS)]
    except OSError:
        return []
    names = [name for name in names if not name.startswith(".")]
    return [str(path.parent / name) for name in difflib.get_close_matches(path.name, names, count)]


def check_otlp_endpoint(url: str) -> None:
    """Refuse a collector's address that is none, and traces that this installation cannot send.

    Raises:
        InputError: either.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(
            f"--otlp-endpoint: expected http://HOST:PORT or https://, got {url!r}", "otlp-endpoint"
        )
    if not is_installed("opentelemetry.sdk"):
        raise InputError(
            "--otlp-endpoint: needs the package opentelemetry, which is not installed: run "
            "`pip install 'cenacle[otel]'`",
            "otlp-endpoint",
        )
