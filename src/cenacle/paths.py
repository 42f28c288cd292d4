"""."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from .errors import InputError


def own_folder() -> Path:
    """This user's folder: $CENACLE_HOME, else `cenacle` where configuration is kept."""
    if given := os.environ.get("CENACLE_HOME"):
        return Path(given)
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "cenacle"


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read (0600, in a folder of 0700), whole or not at all.

    Raises:
        InputError: the folder cannot be written.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(file, "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); set CENACLE_HOME to a folder of yours"
        ) from error


def read_private(path: Path) -> bytes:
    """Read a file of `write_private`.

    Raises:
        InputError: it is not there, or others can read it.
    """
    try:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise InputError(f"{path} can be read by others: `chmod 600 {path}`")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
