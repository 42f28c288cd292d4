"""Renders chats and tokenizes in a process of its own.

Owns: the process, what is sent to it, how much work a text may need.
Does not know: chat templates, messages.
Invariant: a template or a tokenizer from a stranger costs one request at worst, never this process.
Next: `text_worker.py` is the process; `tokenizer.py` uses it where a server runs.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from ..worker_process import WorkerFailed, WorkerProcess, work_again_if_killed
from .time_limit import LimitReached

# Of a chat or a text; to be tokenized, a text may take as much again for each megabyte.
CPU_S, MEMORY_BYTES = 30, 2 << 30
LOAD_CPU_S, LOAD_MEMORY_BYTES = 120, 8 << 30


class TextProcess:
    """Safe for several threads, which wait for each other.

    Args:
        tokenizer: as the tokenizers library writes it, JSON; None: it only renders.
    """

    def __init__(self, tokenizer: str | None) -> None:
        self._tokenizer = tokenizer
        self._worker = WorkerProcess("cenacle.text.text_worker")
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the process, which takes a second; else the first text waits for it."""
        with self._lock, contextlib.suppress(OSError):  # then the first text tells
            self._worker.start()

    def render(self, arguments: dict[str, Any]) -> str:
        """A chat as text.

        Args:
            arguments: of transformers' `render_jinja_template`.

        Raises:
            LimitReached: it takes too long, or too much memory.
            ValueError: the template refuses the messages.
        """
        return str(self._ask({"render": arguments})["text"])

    def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        """Text to ids; `special`: with the tokens that the tokenizer adds.

        Raises:
            LimitReached: it takes too long, or too much memory.
            ValueError: the tokenizer fails.
        """
        scale = 1 + len(text) / 1e6
        return tuple(self._ask({"encode": text, "special": special}, scale)["ids"])

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._worker.close()

    def _ask(self, message: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:
        limits = {"cpu_s": CPU_S * scale, "memory_bytes": int(MEMORY_BYTES * scale)}
        with self._lock:
            try:
                answer = work_again_if_killed(lambda: self._ask_worker({**message, **limits}))
            except WorkerFailed:
                raise LimitReached from None
        _raise_error(answer)
        return answer

    def _ask_worker(self, message: dict[str, Any]) -> dict[str, Any]:
        if self._tokenizer is not None and not self._worker.has_answered:
            loading = {"tokenizer": self._tokenizer, "cpu_s": LOAD_CPU_S}
            _raise_error(self._worker.ask({**loading, "memory_bytes": LOAD_MEMORY_BYTES}))
        return self._worker.ask(message)


def _raise_error(answer: dict[str, Any]) -> None:
    if "error" in answer:
        raise ValueError(answer["error"])
