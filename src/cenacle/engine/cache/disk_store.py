"""The prefix cache on disk: one rank's pages, which survive a restart.

Owns: the files of one rank, their names, checksums and permissions, and the thread that writes,
verifies and removes them, so that no step waits for a disk.
Does not know: MLX, the content of a page, which pages are wanted (`scheduler/disk_index.py`).
Invariant: a file with a page's name is complete (it is written under another name first); a page is
used only if it matches the checksum in its name and was written by the same group; only files and
folders with names of this form are ever removed; failures are notices, not errors. Pages contain
prompts: files have mode 0600, folders 0700.
Next: `kv_cache.py` makes and reads the content.
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

from ...core.step import Page, PageLoad, PageReport
from ...model.weight_files import config_file, weight_files

FORMAT = 1  # of pages and their names
MIN_FREE_BYTES = 10**9  # left on the disk for others
SAMPLE_BYTES = 1 << 16  # read at three places of each file of weights, for the fingerprint
STALE_AFTER_S = 3600.0  # then an unfinished file is removed: its writer has ended
CLOSE_S = 1.0  # for pending writes at the end
MAX_HEADER_BYTES = 1 << 26
CHECKSUM_DIGITS = 32

_PAGE_NAME = re.compile(  # key, parent, begin, end, checksum
    r"([0-9a-f]{24})-([0-9a-f]{24}|)-(\d{1,9})-(\d{1,9})-([0-9a-f]{32})\.safetensors"
)
_UNFINISHED_NAME = re.compile(r"\.[0-9a-f]{24}\.[0-9a-f]{8}")
_GROUP_NAME, _RANK_NAME = re.compile(r"[0-9a-f]{32}"), re.compile(r"rank-\d+")

OnReport = Callable[[PageReport], None]
"""Called by the thread with what has become of pages, for `DiskIndex.on_report`."""


def fingerprint(model: Path, settings: Mapping[str, Any]) -> str:
    """A digest of all that decides what is in a cache.

    Args:
        model: the checkpoint's folder. Of its weights: sizes, times, and some bytes.
        settings: all else, as JSON.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, settings], sort_keys=True).encode())
    for path in (config_file(model), *weight_files(model)):
        info = path.stat()
        digest.update(f"{path.name}\0{info.st_size}\0{info.st_mtime_ns}\0".encode())
        with path.open("rb") as file:
            for offset in (0, info.st_size // 2, max(0, info.st_size - SAMPLE_BYTES)):
                file.seek(offset)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]


class PageStore:
    """The pages of one rank.

    Args:
        home: folder of all groups.
        group: its `fingerprint`.
        rank: whose pages these are.
        budget_bytes: for these pages and those of other groups. The scheduler keeps this group
            within it; other groups' pages are removed to make room.
        on_report: see `OnReport`.
    """

    def __init__(
        self, home: Path, group: str, rank: int, budget_bytes: int, on_report: OnReport
    ) -> None:
        self._home, self._group_folder = home, home / group
        self._folder = self._group_folder / f"rank-{rank}"
        self._owner = f"{group}/rank-{rank}"
        self._budget_bytes, self._on_report = budget_bytes, on_report
        self._paths: dict[str, Path] = {}
        self._sizes: dict[str, int] = {}
        self._others: list[tuple[float, int, Path]] = []  # last use, bytes; newest first
        self._full = False
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.notices: list[str] = []
        self.listing: list[tuple[str, str, int, int, int]] | None = None
        try:
            listing, self._others = self._list_pages(), self._list_other_groups()
            self.listing = listing
        except OSError as error:
            self.notices.append(
                f"prefix cache on disk is disabled: {self._home}: {_describe(error)}"
            )
        self._thread = threading.Thread(target=self._run, name="page-store", daemon=True)
        self._thread.start()

    @property
    def metadata(self) -> dict[str, str]:
        """To be saved with every page."""
        return {"mark": self._owner}

    def path(self, page: Page) -> Path:
        """The file of a page that was verified."""
        return self._paths[page.key]

    def write(self, page: Page, content: io.BytesIO) -> None:
        """Write a page in the background; the result is reported."""
        self._jobs.put(partial(self._write, page, content))

    def check(self, load: PageLoad) -> None:
        """Verify pages in the background; the result is reported."""
        self._jobs.put(partial(self._check, load))

    def remove(self, keys: Iterable[str]) -> None:
        """Remove pages in the background; unknown keys are ignored."""
        for key in keys:
            self._jobs.put(partial(self._remove, key))

    def close(self) -> None:
        """Wait `CLOSE_S` for pending writes."""
        self._jobs.put(None)
        self._thread.join(CLOSE_S)

    # At start

    def _list_pages(self) -> list[tuple[str, str, int, int, int]]:
        """The pages of this rank, longest unused first."""
        if not self._folder.exists():
            return []
        self._require_private()
        files: list[tuple[float, Path, os.stat_result]] = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):  # just removed by another program of this group
                info = path.lstat()
                files.append((info.st_mtime, path, info))
        rows: dict[str, tuple[str, str, int, int, int]] = {}
        for last_use, path, info in sorted(files):
            name = _PAGE_NAME.fullmatch(path.name)
            if name is not None and stat.S_ISREG(info.st_mode):
                key, parent, begin, end = name[1], name[2], int(name[3]), int(name[4])
                if key in rows:
                    self._remove(key)
                    del rows[key]  # it moves to the end
                self._paths[key], self._sizes[key] = path, info.st_size
                rows[key] = (key, parent, begin, end, self._sizes[key])
            elif _UNFINISHED_NAME.fullmatch(path.name):
                if time.time() - last_use > STALE_AFTER_S:
                    path.unlink(missing_ok=True)
            else:
                self.notices.append(f"{path} is not a file of the prefix cache: ignored")
        return list(rows.values())

    def _require_private(self) -> None:
        """Raises PermissionError if other users can read or write the folders."""
        for folder in (self._group_folder, self._folder):
            info = folder.stat()
            if info.st_uid != os.getuid() or info.st_mode & 0o077:
                raise PermissionError(errno.EPERM, f"other users can access {folder}")

    def _list_other_groups(self) -> list[tuple[float, int, Path]]:
        """Pages of other models or plans."""
        pages = []
        for path in self._home.glob("*/*/*.safetensors"):
            rank, group = path.parent, path.parent.parent
            valid = _GROUP_NAME.fullmatch(group.name) and _RANK_NAME.fullmatch(rank.name)
            if valid and _PAGE_NAME.fullmatch(path.name) and group != self._group_folder:
                with suppress(FileNotFoundError):  # just removed by its own group
                    info = path.lstat()
                    pages.append((info.st_mtime, info.st_size, path))
        return sorted(pages, reverse=True)

    # In the thread

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _write(self, page: Page, content: io.BytesIO) -> None:
        data = content.getbuffer()
        try:
            path = self._write_file(page, data)
        except OSError as error:
            notice = (
                f"prefix cache: no more pages are written to disk: {self._folder}: "
                f"{_describe(error)}"
            )
            notices = () if self._full else (notice,)
            self._full = True
            self._on_report(PageReport(failed=page.key, notices=notices))
            return
        self._paths[page.key], self._sizes[page.key] = path, len(data)
        self._on_report(PageReport(written=(page.key, len(data))))

    def _write_file(self, page: Page, data: memoryview) -> Path:
        if self._full:
            raise OSError(errno.ENOSPC, "an earlier write failed")
        for folder in (self._home, self._group_folder, self._folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._require_private()
        self._evict_other_groups(len(data))
        if shutil.disk_usage(self._folder).free < MIN_FREE_BYTES + len(data):
            raise OSError(errno.ENOSPC, f"less than {MIN_FREE_BYTES / 1e9:g} GB would be left")
        name = f"{page.key}-{page.parent}-{page.begin}-{page.end}-"
        digest = hashlib.sha256(name.encode())
        digest.update(data)
        path = self._folder / f"{name}{digest.hexdigest()[:CHECKSUM_DIGITS]}.safetensors"
        unfinished = self._folder / f".{page.key}.{secrets.token_hex(4)}"
        try:
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        return path

    def _evict_other_groups(self, new_bytes: int) -> None:
        """Remove the longest unused pages of other groups until `new_bytes` more fit."""
        total = sum(self._sizes.values()) + sum(size for _, size, _ in self._others) + new_bytes
        while total > self._budget_bytes and self._others:
            _, size, path = self._others.pop()
            path.unlink(missing_ok=True)
            total -= size
            with suppress(OSError):  # not empty
                path.parent.rmdir()
                path.parent.parent.rmdir()

    def _check(self, load: PageLoad) -> None:
        unreadable: dict[str, str] = {}
        for page in load.pages:
            reason = self._find_damage(page)
            if reason is not None:
                unreadable[page.key] = reason
        checked, notices = (load.name, list(unreadable)), tuple(unreadable.values())
        self._on_report(PageReport(checked=checked, notices=notices))

    def _find_damage(self, page: Page) -> str | None:
        """Why a page cannot be used, as a notice."""
        path = self._paths.get(page.key)
        if path is None:
            return f"a page of {self._folder} no longer exists: it is computed again"
        name = _PAGE_NAME.fullmatch(path.name)
        assert name is not None, "only such files are listed"
        prefix = path.name[: name.start(5)]  # part of the checksum
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, partial(hashlib.sha256, prefix.encode()))
                if digest.hexdigest()[:CHECKSUM_DIGITS] != name[5]:
                    self._remove(page.key)
                    return f"{path} is damaged: it was removed and is computed again"
                if _read_owner(file) != self._owner:
                    self._forget(page.key)
                    return f"{path} belongs to another model or group: ignored"
            os.utime(path)
        except OSError as error:
            self._forget(page.key)
            return f"{path}: {_describe(error)}: it is computed again"
        return None

    def _forget(self, key: str) -> Path | None:
        self._sizes.pop(key, None)
        return self._paths.pop(key, None)

    def _remove(self, key: str) -> None:
        path = self._forget(key)
        if path is not None:
            with suppress(OSError):
                path.unlink()


def _read_owner(file: BinaryIO) -> str | None:
    """The owner in a page's header; mlx-lm stores the metadata of a cache as item 0."""
    file.seek(0)
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
        return str(header["__metadata__"]["0.mark"])
    except (struct.error, ValueError, KeyError, TypeError):
        return None


def _describe(error: OSError) -> str:
    return error.strerror or str(error)
