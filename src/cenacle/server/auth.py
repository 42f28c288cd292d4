"""API keys and what each has used today: one SQLite file in the user's configuration folder.

Owns: the file, making and finding keys, counting tokens per key and day.
Does not know: HTTP, models, what a request is.
Invariant: the file is readable by its owner only and never holds a key, only its SHA-256; several
programs (servers, `cenacle keys`) may use it at once, and each sees the others' changes at once.
Next: `guard.py` asks for a key at the door; `metrics.py` charges tokens to it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ..errors import CenacleError, InputError
from ..paths import make_config_dir

KEY_PREFIX = "cen-"
DAY_S = 86400
LOCK_TIMEOUT_S = 5.0  # longest wait for another program that is writing

_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    name TEXT PRIMARY KEY, digest BLOB NOT NULL, created REAL NOT NULL,
    tokens_per_day INTEGER, streams INTEGER
);
CREATE TABLE IF NOT EXISTS used (
    day INTEGER NOT NULL, name TEXT NOT NULL, tokens INTEGER NOT NULL, PRIMARY KEY (day, name)
);
"""
_COLUMNS = {"keys": "digest, name, created, tokens_per_day, streams", "used": "day, name, tokens"}


@dataclass(frozen=True)
class ApiKey:
    """An API key, without its secret.

    Args:
        name: unique; also the label of its metrics.
        created: seconds since 1970.
        tokens_per_day: prompt and generated tokens per UTC day; None: no limit.
        streams: requests at once; None: the server's own limit.
    """

    name: str
    created: float
    tokens_per_day: int | None = None
    streams: int | None = None


class KeyStore:
    """The keys of one file. Safe for several threads. Every method raises `CenacleError` when the
    file has become unusable.

    Args:
        path: of the file, made if it is not there; None: "keys.db" in `paths.config_dir`.
        clock: seconds since 1970, replaced in tests.

    Raises:
        InputError: the file cannot be opened, or is something else.
    """

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self.path = path or make_config_dir() / "keys.db"
        self._clock = clock
        self._lock = threading.Lock()
        self._pending: Counter[tuple[int, str]] = Counter()
        try:
            # Before SQLite makes it with everybody's right to read; its journals inherit the mode.
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            self.path.chmod(0o600)
            self._db = sqlite3.connect(self.path, timeout=LOCK_TIMEOUT_S, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")  # a commit then costs no wait for the disk
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
            for table in _COLUMNS.items():
                self._db.execute("SELECT {1} FROM {0} LIMIT 0".format(*table))
        except (OSError, sqlite3.Error) as error:
            raise InputError(
                f"cannot use {self.path} for API keys: {error}; move it away and add keys again "
                f"with `cenacle keys add NAME`",
                "keys",
            ) from error

    def close(self) -> None:
        """Write what has been used, and close the file."""
        self.save()
        self._db.close()

    def add(self, name: str, tokens_per_day: int | None = None, streams: int | None = None) -> str:
        """Make a key.

        Returns:
            The secret. It is nowhere else: only its SHA-256 is kept. A slow hash with salt protects
            secrets that can be guessed; 256 random bits cannot.

        Raises:
            InputError: the name is taken or not a name, or a limit is not positive.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}", name):
            raise InputError(
                f"name: expected up to 64 letters, digits and _ . @ -, got {name!r}", "name"
            )
        for what, limit in (("tokens-per-day", tokens_per_day), ("streams", streams)):
            if limit is not None and not 1 <= limit < 2**63:
                raise InputError(f"{what}: expected at least 1, got {limit}", what)
        secret = KEY_PREFIX + secrets.token_urlsafe(32)
        row = (name, _digest(secret), self._clock(), tokens_per_day, streams)
        try:
            with self._using(), self._db:
                self._db.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError as error:
            raise InputError(
                f"name: there is a key {name} already; remove it first, or take another name",
                "name",
            ) from error
        return secret

    def remove(self, name: str) -> None:
        """Make a key worthless from the next request on; what it has used today stays counted.

        Raises:
            InputError: there is none of this name.
        """
        with self._using(), self._db:
            if not self._db.execute("DELETE FROM keys WHERE name = ?", (name,)).rowcount:
                raise InputError(f"name: there is no key {name!r}; see `cenacle keys list`", "name")

    def all(self) -> list[ApiKey]:
        """All keys, by name."""
        with self._using():
            rows = self._db.execute(
                "SELECT name, created, tokens_per_day, streams FROM keys ORDER BY name"
            ).fetchall()
        return [ApiKey(*row) for row in rows]

    def find(self, secret: str) -> ApiKey | None:
        """The key of a secret, or None. Every key is compared, each in constant time."""
        digest, found = _digest(secret), None
        with self._using():
            rows = self._db.execute(f"SELECT {_COLUMNS['keys']} FROM keys").fetchall()
        for theirs, *rest in rows:
            if hmac.compare_digest(theirs, digest):
                found = ApiKey(*rest)
        return found

    def charge(self, name: str, tokens: int) -> None:
        """Count tokens for a key, from now on in `used`; on disk with the next `save`."""
        with self._lock:
            self._pending[self._day(), name] += tokens

    def save(self) -> None:
        """Write what has been charged since the last time; what cannot be written is kept."""
        with self._using():
            if not self._pending:
                return
            rows = [(day, name, tokens) for (day, name), tokens in self._pending.items()]
            with self._db:
                self._db.executemany(
                    "INSERT INTO used VALUES (?, ?, ?) ON CONFLICT (day, name) "
                    "DO UPDATE SET tokens = tokens + excluded.tokens",
                    rows,
                )
            self._pending.clear()

    def used(self, name: str) -> int:
        """Tokens of a key in the present UTC day."""
        day = self._day()
        with self._using():
            row = self._db.execute(
                "SELECT tokens FROM used WHERE day = ? AND name = ?", (day, name)
            ).fetchone()
            return (row[0] if row else 0) + self._pending[day, name]

    def until_tomorrow_s(self) -> int:
        """Seconds until budgets begin again, at least 1."""
        return int(DAY_S - self._clock() % DAY_S) or 1

    @contextmanager
    def _using(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.IntegrityError:
                raise
            except sqlite3.Error as error:
                raise CenacleError(f"cannot use {self.path}: {error}") from error

    def _day(self) -> int:
        return int(self._clock() // DAY_S)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def format_date(seconds: float) -> str:
    """A day for people, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()
