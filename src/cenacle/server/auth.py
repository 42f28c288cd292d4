"""API keys, and the tokens that each has used today: one SQLite file in the configuration folder.

Owns: the file, creating and finding keys, counting tokens per key and day.
Does not know: HTTP, models, requests.
Invariant: only the owner can read the file, and it holds a key's SHA-256, never the key. Several
programs (servers, `cenacle keys`) can use it at once; each sees the others' changes immediately.
Next: `middleware.py` looks keys up, `metrics.py` charges tokens to them.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from ..errors import CenacleError, InputError
from ..paths import make_config_dir

KEY_PREFIX = "cen-"
DAY_S = 86400
LOCK_TIMEOUT_S = 5.0  # longest wait for another program's write

_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    name TEXT PRIMARY KEY, digest BLOB NOT NULL, created REAL NOT NULL,
    tokens_per_day INTEGER, max_concurrent INTEGER
);
CREATE TABLE IF NOT EXISTS models (
    name TEXT NOT NULL, model TEXT NOT NULL, PRIMARY KEY (name, model)
);
CREATE TABLE IF NOT EXISTS used (
    day INTEGER NOT NULL, name TEXT NOT NULL, tokens INTEGER NOT NULL, PRIMARY KEY (day, name)
);
"""
_COLUMNS = {
    "keys": "digest, name, created, tokens_per_day, max_concurrent",
    "used": "day, name, tokens",
    "models": "name, model",
}


@dataclass(frozen=True)
class ApiKey:
    """An API key, without its secret.

    Args:
        name: unique; also the label of its metrics.
        created: seconds since 1970.
        tokens_per_day: prompt and generated tokens per UTC day; None: no limit.
        max_concurrent: requests at once; None: the server's default.
        models: names of the models that it may use; empty: all.
    """

    name: str
    created: float
    tokens_per_day: int | None = None
    max_concurrent: int | None = None
    models: tuple[str, ...] = ()

    def may_use(self, *names: str) -> bool:
        """Whether it may use a model that has one of these names."""
        return not self.models or not set(names).isdisjoint(self.models)


class KeyStore:
    """The keys of one file. Safe for several threads. Every method raises `CenacleError` when the
    file has become unusable.

    Args:
        path: of the file, created if missing; None: "keys.db" in `paths.config_dir`.
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
            # SQLite would create it readable by everybody; its journals inherit the mode.
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            self.path.chmod(0o600)
            self._db = sqlite3.connect(self.path, timeout=LOCK_TIMEOUT_S, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")  # commits do not wait for the disk
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
            for table in _COLUMNS.items():
                self._db.execute("SELECT {1} FROM {0} LIMIT 0".format(*table))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be opened ({error.strerror})", "keys") from error
        except sqlite3.Error as error:
            raise InputError(
                f"{self.path}: expected the API keys of this version of Cenacle, got another "
                f"file or one of an older version ({error}); move it away and create the keys "
                f"again with `cenacle keys add NAME`",
                "keys",
            ) from error

    def close(self) -> None:
        """Save the counts and close the file."""
        self.save()
        self._db.close()

    def add(
        self,
        name: str,
        tokens_per_day: int | None = None,
        max_concurrent: int | None = None,
        models: Sequence[str] = (),
    ) -> str:
        """Create a key; arguments as of `ApiKey`.

        Returns:
            The secret. Only its SHA-256 is stored. A slow, salted hash protects secrets that can be
            guessed; 256 random bits cannot.

        Raises:
            InputError: the name is taken or malformed, or a limit is not positive.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}", name):
            raise InputError(
                f"name: expected up to 64 letters, digits and _ . @ -, got {name!r}", "name"
            )
        limits = {"tokens-per-day": tokens_per_day, "max-concurrent": max_concurrent}
        for option, limit in limits.items():
            if limit is not None and not 1 <= limit < 2**63:
                raise InputError(f"{option}: expected at least 1, got {limit}", option)
        if not all(models):
            raise InputError("model: expected the name of a model, got an empty one", "model")
        secret = KEY_PREFIX + secrets.token_urlsafe(32)
        row = (name, _digest(secret), self._clock(), tokens_per_day, max_concurrent)
        try:
            with self._locked(), self._db:
                self._db.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?)", row)
                rows = [(name, model) for model in dict.fromkeys(models)]
                self._db.executemany("INSERT INTO models VALUES (?, ?)", rows)
        except sqlite3.IntegrityError as error:
            raise InputError(
                f"name: a key named {name} exists already; remove it or choose another name",
                "name",
            ) from error
        return secret

    def remove(self, name: str) -> None:
        """Delete a key; it is refused from the next request on. Its tokens of today stay counted.

        Raises:
            InputError: there is no key of this name.
        """
        with self._locked(), self._db:
            if not self._db.execute("DELETE FROM keys WHERE name = ?", (name,)).rowcount:
                raise InputError(f"name: no key is named {name!r}; see `cenacle keys list`", "name")
            self._db.execute("DELETE FROM models WHERE name = ?", (name,))

    def list_keys(self) -> list[ApiKey]:
        """All keys, by name."""
        with self._locked():
            rows = self._db.execute(
                "SELECT name, created, tokens_per_day, max_concurrent FROM keys ORDER BY name"
            ).fetchall()
            return [self._with_models(ApiKey(*row)) for row in rows]

    def find(self, secret: str) -> ApiKey | None:
        """The key of a secret, or None. Compares with every key, each in constant time."""
        digest, match = _digest(secret), None
        with self._locked():
            rows = self._db.execute(f"SELECT {_COLUMNS['keys']} FROM keys").fetchall()
            for stored, *columns in rows:
                if hmac.compare_digest(stored, digest):
                    match = self._with_models(ApiKey(*columns))
        return match

    def charge(self, name: str, tokens: int) -> None:
        """Count tokens for a key: at once in `used_today`, on disk with the next `save`."""
        with self._lock:
            self._pending[self._day(), name] += tokens

    def save(self) -> None:
        """Write what was charged since the last call; a failed write is retried by the next."""
        with self._locked():
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

    def used_today(self, name: str) -> int:
        """Tokens that a key has used on this UTC day."""
        day = self._day()
        with self._locked():
            row = self._db.execute(
                "SELECT tokens FROM used WHERE day = ? AND name = ?", (day, name)
            ).fetchone()
            return (row[0] if row else 0) + self._pending[day, name]

    def seconds_until_reset(self) -> int:
        """Seconds until the next UTC day, at least 1."""
        return int(DAY_S - self._clock() % DAY_S) or 1

    def _with_models(self, key: ApiKey) -> ApiKey:
        query = "SELECT model FROM models WHERE name = ? ORDER BY model"
        rows = self._db.execute(query, (key.name,)).fetchall()
        return replace(key, models=tuple(model for (model,) in rows))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.IntegrityError:
                raise
            except sqlite3.Error as error:
                raise CenacleError(f"{self.path}: cannot be used ({error})") from error

    def _day(self) -> int:
        return int(self._clock() // DAY_S)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def format_date(seconds: float) -> str:
    """The UTC date, as in 2026-11-26."""
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()
