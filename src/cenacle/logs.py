"""The form of log lines, and how often the same one is written."""

from __future__ import annotations

import json
import logging
import time
from datetime import UTC, datetime


class PrintableFormatter(logging.Formatter):
    """A line of a log: what came from outside cannot end it or begin another."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`. Tracebacks are our own and keep their lines."""
        line, newline, traceback = super().format(record).partition("\nTraceback (most recent")
        escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        return escaped + newline + traceback


class RepeatedLineFilter(logging.Filter):
    """Lets the same line through once in a while: a client can cause any number of them.

    Lines with a traceback always pass.

    Args:
        interval_s: between two of the same.
    """

    MAX_LINES = 100  # that are remembered

    def __init__(self, interval_s: float = 60.0) -> None:
        super().__init__()
        self._interval_s = interval_s
        self._logged_s: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is written."""
        if record.exc_info:
            return True
        now_s, line = time.monotonic(), record.getMessage()
        if now_s - self._logged_s.get(line, -self._interval_s) < self._interval_s:
            return False
        if len(self._logged_s) >= self.MAX_LINES:
            self._logged_s.clear()
        self._logged_s[line] = now_s
        return True


class JsonFormatter(logging.Formatter):
    """A line of a log for machines: one JSON object with time, level, source and message, and the
    fields that a record has as `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        body = {
            "time": format_time(record.created),
            "level": record.levelname.lower(),
            "source": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            body["traceback"] = self.formatException(record.exc_info)
        return json.dumps(body)


class LogFormat:
    """The form of all lines that this program logs; set once, when it starts."""

    is_json = False

    @classmethod
    def formatter(cls, text_format: str, time_format: str | None = None) -> logging.Formatter:
        """A formatter of that form.

        Args:
            text_format, time_format: see `logging.Formatter`, for people.
        """
        return JsonFormatter() if cls.is_json else PrintableFormatter(text_format, time_format)


def format_time(seconds: float) -> str:
    """Seconds since 1970 as a UTC time with milliseconds, such as 2026-11-27T23:15:04.120Z."""
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def configure_logging() -> None:
    """Write warnings, and the coming and going of nodes, to stderr with the time."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormat.formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], force=True)
