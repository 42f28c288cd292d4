"""The form of log lines."""

from __future__ import annotations

import logging


class PrintableFormatter(logging.Formatter):
    """A line of a log: what came from outside cannot end it or begin another."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`. Tracebacks are our own and keep their lines."""
        line, newline, traceback = super().format(record).partition("\nTraceback (most recent")
        escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        return escaped + newline + traceback
