"""Every folder of the program, and files that only their owner can read.

Owns: where configuration, caches and state are, by the environment:

    CENACLE_HOME        one folder for everything below; overrides the three XDG variables
    XDG_CONFIG_HOME     keys, certificates, the cluster, the user's catalog    (~/.config)
    XDG_CACHE_HOME      downloaded models, prefix cache, bench's models        (~/.cache)
    XDG_STATE_HOME      history of the chat                                    (~/.local/state)

Does not know: what is in the files.
Invariant: nobody else can write where code is loaded from; a private file is written whole or not
at all, with mode 0600.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import platform
import secrets
import shutil
import stat
import tempfile
from itertools import chain
from pathlib import Path
from typing import IO

import psutil

from .errors import CheckpointError, InputError

HOME_VARIABLE = "CENACLE_HOME"
BUNDLED_MODELS = Path(__file__).parent / "demo"
DEMO_NAME = "demo"  # which commands and `load` take for a model
MAX_SOCKET_FOLDER = 80  # characters; the path of a socket may have 103


def config_dir() -> Path:
    """Folder for configuration, keys and certificates."""
    return _user_dir("XDG_CONFIG_HOME", ".config")


def cache_dir() -> Path:
    """Folder for what can be downloaded or computed again."""
    return _user_dir("XDG_CACHE_HOME", ".cache")


def state_dir() -> Path:
    """Folder for history."""
    return _user_dir("XDG_STATE_HOME", ".local/state")


def cluster_dir() -> Path:
    """Folder for the identity of a node or head, and the head's roster."""
    return config_dir() / "cluster"


def catalog_dir() -> Path:
    """Folder for the user's own machines and links, those of `calibrate` among them."""
    return config_dir() / "catalog"


def verification_dir() -> Path:
    """Folder for the records of what passed verification."""
    return config_dir() / "verification"


def models_dir() -> Path:
    """Folder for downloaded models and parts of models."""
    return cache_dir() / "models"


def resolve_model(model: str) -> str:
    """What a user calls a model, as a path or the name of a Hub repository.

    `demo` is the model in this package, unless the working folder has a model of that name; any
    other name stays as it is.

    Raises:
        CheckpointError: the working folder's `demo` cannot be read.
    """
    if model != DEMO_NAME:
        return model
    check_readable(Path(model))
    return model if _holds_model(Path(model)) else str(BUNDLED_MODELS / "demo_model")


def check_readable(path: Path) -> None:
    """Refuse a model's file or folder that exists and that this user may not read.

    Raises:
        CheckpointError: names the path.
    """
    try:
        mode = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
        readable = not path.exists() or os.access(path, mode)
    except PermissionError:  # of a folder above
        readable = False
    if not readable:
        raise CheckpointError(
            f"{path} cannot be read: permission denied; give this user access to it"
        )


def _holds_model(folder: Path) -> bool:
    names = ("config.json", "params.json")
    return any((folder / name).is_file() for name in names) or any(folder.glob("*.gguf"))


def prefix_cache_dir() -> Path:
    """Folder for the prefix cache on disk."""
    return cache_dir() / "prefixes"


def chat_history_file() -> Path:
    """File for the prompts that the arrow keys bring back."""
    return state_dir() / "chat_history"


def use_private_temp_dir() -> None:
    """Set TMPDIR, for this process and those it starts, to a folder of this user alone.

    MLX compiles functions into `$TMPDIR/mlx` and loads what is there, whoever has put it there.
    """
    folder = cache_dir() / "tmp"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        usable = private_dir_problem(folder) is None and _holds_own_files_only(folder / "mlx")
        if usable:
            folder.chmod(0o700)
    except OSError:  # such as a home that cannot be written
        usable = False
    if not usable:
        folder = Path(tempfile.mkdtemp(prefix="cenacle-tmp-"))  # mode 0700
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None


def _holds_own_files_only(folder: Path) -> bool:
    """Others may have put files into a folder before it was private."""
    if not folder.exists():
        return True
    return all(path.lstat().st_uid == os.geteuid() for path in (folder, *folder.rglob("*")))


def private_dir_problem(folder: Path) -> str | None:
    """Why others could write to a folder or replace it; None: they cannot."""
    for path in (folder, folder.parent):
        info = path.lstat()
        if not stat.S_ISDIR(info.st_mode):
            return f"{path} is not a folder"
        if info.st_uid not in (os.geteuid(), 0):
            return f"{path} belongs to another user"
        others = info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if others and (path == folder or not info.st_mode & stat.S_ISVTX):
            return f"other users can write to {path}"
    return None


def make_session_dir() -> Path:
    """A new folder for sockets, mode 0700; removes those that killed programs left."""
    prefix = f"cenacle-{platform.node()[:20]}-"
    places = {Path(tempfile.gettempdir()), Path("/tmp")}
    for old in chain.from_iterable(place.glob(f"{prefix}*-*") for place in places):
        process_id = old.name.removeprefix(prefix).split("-")[0]
        ended = process_id.isdigit() and not psutil.pid_exists(int(process_id))
        if ended and old.lstat().st_uid == os.geteuid():
            shutil.rmtree(old, ignore_errors=True)
    name = f"{prefix}{os.getpid()}-"
    folder = tempfile.mkdtemp(prefix=name)
    if len(folder) > MAX_SOCKET_FOLDER:
        Path(folder).rmdir()
        folder = tempfile.mkdtemp(prefix=name, dir="/tmp")
    return Path(folder)


def make_config_dir() -> Path:
    """`config_dir`, created with mode 0700 if it does not exist.

    Raises:
        InputError: it cannot be created.
    """
    folder = config_dir()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be created ({error}); set {HOME_VARIABLE} to a folder that you can "
            f"write to",
            HOME_VARIABLE,
        ) from error
    return folder


def write_private(path: Path, data: bytes) -> None:
    """Write a file with mode 0600, in a folder of mode 0700, whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(file, "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); set {HOME_VARIABLE} to a folder that "
            f"you can write to"
        ) from error


def read_private(path: Path) -> bytes:
    """Read a file of `write_private`.

    Raises:
        InputError: it does not exist, or other users can read it.
    """
    try:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise InputError(f"{path} can be read by other users: run `chmod 600 {path}`")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _user_dir(variable: str, default: str) -> Path:
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home)
    return Path(os.environ.get(variable) or Path.home() / default) / "cenacle"


def lock_file(path: Path, owner: str) -> IO[str]:
    """An open file that only one process at a time can have; it holds the process id.

    Args:
        owner: what the process is, for the error.

    Raises:
        InputError: another process has it, or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = path.open("a+")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        process_id = file.read().strip()
        file.close()
        raise InputError(
            f"{owner} is already running (process {process_id}) with {path.parent}"
        ) from None
    file.seek(0)
    file.truncate()
    file.write(str(os.getpid()))
    file.flush()
    return file
