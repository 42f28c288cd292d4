"""A rank's pages on disk: parts of prompts' caches, which outlive the program.

Owns: the files of one rank, their names, checksums and permissions, and the thread that writes,
reads and removes them, so that no step waits for a disk.
Does not know: MLX, what is in a page, which pages are wanted (the front says so).
Invariant: a file that has its name is whole (it is written beside it first); nothing is used that
has another checksum than its name says, or was written by another group; only files whose names are
of our form, in folders whose names are, are ever removed; what fails is a notice, not an error.
They hold what people wrote: files are 0600, folders 0700.
Next: `cache.py` makes and reads what is in them; `pages.py` is the front's index.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import queue
import re
import secrets
import shutil
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ...core.step import Page, PageLoad

FORMAT = 1  # of pages and their names; others are not looked at
SPARED = 10**9  # bytes of the disk that are left to others
SAMPLE = 1 << 16  # bytes at three places of a file of weights, which tell it from others
HALF_WRITTEN_S = 3600.0  # after which a file that has no name yet was left by who ended
ENDING_S = 1.0  # for what is still to be written when the rank ends
MAX_HEADER = 1 << 26

_NAME = re.compile(  # key, parent, begin, end, checksum
    r"([0-9a-f]{24})-([0-9a-f]{24}|)-(\d{1,9})-(\d{1,9})-([0-9a-f]{32})\.safetensors"
)
_GROUP, _RANK = re.compile(r"[0-9a-f]{32}"), re.compile(r"rank-\d+")

Say = Callable[[dict[str, Any]], None]
"""Called by the thread with what has become of pages, as `Pages.heard` takes it, and "notices"."""


def fingerprint(model: Path, facts: Mapping[str, Any]) -> str:
    """What has to be the same for a cache to be the same.

    Args:
        model: the checkpoint's folder; of weights the sizes and times, and some bytes.
        facts: whatever else; JSON.
    """
    seen = hashlib.sha256(json.dumps([FORMAT, facts], sort_keys=True).encode())
    for path in (model / "config.json", *sorted(model.glob("model*.safetensors"))):
        found = path.stat()
        seen.update(f"{path.name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
        with path.open("rb") as file:
            for at in (0, found.st_size // 2, max(0, found.st_size - SAMPLE)):
                file.seek(at)
                seen.update(file.read(SAMPLE))
    return seen.hexdigest()[:32]


class PageStore:
    """The pages of one rank.

    Args:
        home: the folder of all groups' pages.
        group: its `fingerprint`.
        rank: whose pages these are.
        budget: bytes that they and those of other groups may take; what this group has the
            front keeps within it, others go for it.
        say: see `Say`.
    """

    def __init__(self, home: Path, group: str, rank: int, budget: int, say: Say) -> None:
        self._home, self._group, self._budget, self._say = home, home / group, budget, say
        self._folder = self._group / f"rank-{rank}"
        self._mark = f"{group}/rank-{rank}"
        self._paths: dict[str, Path] = {}
        self._sizes: dict[str, int] = {}
        self._others: list[tuple[float, int, Path]] = []  # when used, bytes: newest first
        self._full = False
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.notices: list[str] = []
        self.listed: list[tuple[str, str, int, int, int]] | None = None
        try:
            listed, self._others = self._list(), self._list_others()
            self.listed = listed
        except OSError as error:
            self.notices.append(f"{self._home}: {_why(error)}: no prompts are kept there")
        self._thread = threading.Thread(target=self._run, name="disk", daemon=True)
        self._thread.start()

    @property
    def about(self) -> dict[str, str]:
        """What goes with every page's content."""
        return {"mark": self._mark}

    def path(self, page: Page) -> Path:
        """The file of a page that was sought and found."""
        return self._paths[page.key]

    def write(self, page: Page, content: io.BytesIO) -> None:
        """Write a page; says when it is done."""
        self._jobs.put(partial(self._write, page, content))

    def seek(self, load: PageLoad) -> None:
        """Read pages and check them; says what is wrong."""
        self._jobs.put(partial(self._seek, load))

    def remove(self, keys: Iterable[str]) -> None:
        """Remove pages; those that are not there are ignored."""
        for key in keys:
            self._jobs.put(partial(self._remove, key))

    def close(self) -> None:
        """Write what there is to write, if that takes but a moment."""
        self._jobs.put(None)
        self._thread.join(ENDING_S)

    # At the beginning

    def _list(self) -> list[tuple[str, str, int, int, int]]:
        """What is there, longest unused first."""
        if not self._folder.exists():
            return []
        self._check_private()
        there: list[tuple[float, Path, os.stat_result]] = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):  # another program of this group has just removed it
                about = path.lstat()
                there.append((about.st_mtime, path, about))
        found: dict[str, tuple[str, str, int, int, int]] = {}
        for used, path, about in sorted(there):
            name = _NAME.fullmatch(path.name)
            if name is not None and stat.S_ISREG(about.st_mode):
                key, parent, begin, end = name[1], name[2], int(name[3]), int(name[4])
                if key in found:
                    self._remove(key)
                    del found[key]  # it moves to the end
                self._paths[key], self._sizes[key] = path, about.st_size
                found[key] = (key, parent, begin, end, self._sizes[key])
            elif _unfinished(path.name):
                if time.time() - used > HALF_WRITTEN_S:
                    path.unlink(missing_ok=True)
            else:
                self.notices.append(f"{path} is not of this program: ignored")
        return list(found.values())

    def _check_private(self) -> None:
        """What others can write is not believed, and what others can read is not used.

        Raises:
            PermissionError: says which folder.
        """
        for folder in (self._group, self._folder):
            about = folder.stat()
            if about.st_uid != os.getuid() or about.st_mode & 0o077:
                raise PermissionError(errno.EPERM, f"{folder} is not this user's alone")

    def _list_others(self) -> list[tuple[float, int, Path]]:
        """Other groups' pages: of other models, or dealt in other ways."""
        found = []
        for path in self._home.glob("*/*/*.safetensors"):
            folder = path.parent
            ours = _GROUP.fullmatch(folder.parent.name) and _RANK.fullmatch(folder.name)
            if ours and _NAME.fullmatch(path.name) and folder.parent != self._group:
                with suppress(FileNotFoundError):  # its own group has just removed it
                    about = path.lstat()
                    found.append((about.st_mtime, about.st_size, path))
        return sorted(found, reverse=True)

    # In the thread

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _write(self, page: Page, content: io.BytesIO) -> None:
        data = content.getbuffer()
        try:
            if self._full:
                raise OSError(errno.ENOSPC, "there was no room before")
            for folder in (self._home, self._group, self._folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_private()
            self._make_room(len(data))
            if shutil.disk_usage(self._folder).free < SPARED + len(data):
                raise OSError(errno.ENOSPC, f"less than {SPARED / 1e9:g} GB would be left")
            name = f"{page.key}-{page.parent}-{page.begin}-{page.end}-"
            seen = hashlib.sha256(name.encode())
            seen.update(data)
            name += f"{seen.hexdigest()[:32]}.safetensors"
            beside = self._folder / f".{page.key}.{secrets.token_hex(4)}"
            try:
                opened = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(opened, "wb") as file:
                    file.write(data)
                beside.replace(self._folder / name)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
        except OSError as error:
            said: dict[str, Any] = {"failed": page.key}
            if not self._full:
                why = f"{self._folder}: {_why(error)}: no more prompts are kept there"
                said["notices"] = [why]
            self._full = True
            self._say(said)
            return
        self._paths[page.key], self._sizes[page.key] = self._folder / name, len(data)
        self._say({"written": [page.key, len(data)]})

    def _make_room(self, size: int) -> None:
        """Let other groups' pages go for one that is written, longest unused first."""
        total = sum(self._sizes.values()) + sum(other[1] for other in self._others) + size
        while total > self._budget and self._others:
            _, freed, path = self._others.pop()
            path.unlink(missing_ok=True)
            total -= freed
            with suppress(OSError):  # it has others
                path.parent.rmdir()
                path.parent.parent.rmdir()

    def _seek(self, load: PageLoad) -> None:
        wrong: dict[str, str] = {}
        for page in load.pages:
            why = self._check(page)
            if why is not None:
                wrong[page.key] = why
        self._say({"checked": [load.name, list(wrong)], "notices": list(wrong.values())})

    def _check(self, page: Page) -> str | None:
        """What is wrong with a page, as a notice."""
        path = self._paths.get(page.key)
        if path is None:
            return f"a page of {self._folder} is not there any more: it is computed again"
        name = _NAME.fullmatch(path.name)
        assert name is not None, "only such files are listed"
        said = path.name[: name.start(5)]  # the checksum is of that too
        try:
            with path.open("rb") as file:
                seen = hashlib.file_digest(file, partial(hashlib.sha256, said.encode()))
                if seen.hexdigest()[:32] != name[5]:
                    self._remove(page.key)
                    return f"{path} is damaged: it was removed, and is computed again"
                if _mark(file) != self._mark:
                    del self._paths[page.key], self._sizes[page.key]
                    return f"{path} is of another model or group: ignored"
            os.utime(path)
        except OSError as error:
            del self._paths[page.key], self._sizes[page.key]
            return f"{path}: {_why(error)}: it is computed again"
        return None

    def _remove(self, key: str) -> None:
        path = self._paths.pop(key, None)
        self._sizes.pop(key, None)
        if path is not None:
            with suppress(OSError):
                path.unlink()


def _mark(file: BinaryIO) -> str | None:
    """Whose a page is, by its header (mlx-lm numbers what goes with a cache: ours is 0)."""
    file.seek(0)
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        mark = json.loads(file.read(min(length, MAX_HEADER)))["__metadata__"]["0.mark"]
    except (struct.error, ValueError, KeyError, TypeError):
        return None
    return str(mark)


def _unfinished(name: str) -> bool:
    return re.fullmatch(r"\.[0-9a-f]{24}\.[0-9a-f]{8}", name) is not None


def _why(error: OSError) -> str:
    return error.strerror or str(error)
