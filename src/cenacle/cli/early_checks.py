"""What can be refused before the libraries are imported that would find it after seconds.

Owns: whether a model exists on this machine.
Does not know: what is in its files (`model/checkpoint.py`), the Hub.
Invariant: refuses only what loading would refuse too, and in the same words.
"""

from __future__ import annotations

import difflib
import os
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import CheckpointError, InputError
from ..extras import is_installed
from ..paths import check_readable, resolve_model

MAX_NEIGHBORS = 1000  # of a folder's files that are compared


def check_model(model: str) -> str:
    """Refuse a path that does not exist or cannot be read.

    Args:
        model: a path, the name of a Hub repository, or `demo`.

    Returns:
        The path or the name; see `paths.resolve_model`.

    Raises:
        CheckpointError: neither can be, and the message has the nearest paths, at most three; or
            this user may not read it.
    """
    model = resolve_model(model)
    path = Path(model).expanduser()
    check_readable(path)
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


def check_output(path: Path | None, option: str) -> None:
    """Refuse an output file that cannot be written, before minutes of work.

    Args:
        path: of the file; None: nothing is checked.
        option: the option that gave it, without dashes.

    Raises:
        InputError: it is a folder, or this user may not write it.
    """
    if path is None:
        return
    path = path.absolute()
    try:
        if path.is_dir():
            raise InputError(f"--{option}: expected a file, got the folder {path}", option)
        existing = next(p for p in (path, *path.parents) if p.exists())
        is_place = existing == path or existing.is_dir()
        writable = is_place and os.access(existing, os.W_OK | os.X_OK * existing.is_dir())
    except PermissionError:
        writable = False
    if not writable:
        raise InputError(f"--{option}: cannot write {path}; choose another place", option)


def check_otlp_endpoint(url: str) -> None:
    """Refuse an invalid address of a collector, and traces that this installation cannot send.

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
