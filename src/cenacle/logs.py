"""The form of log lines, and how often the same one is written."""

from __future__ import annotations

import logging
import time


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
