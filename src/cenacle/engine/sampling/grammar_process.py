"""Compiles grammars where a crash costs only the request that brought them.

Owns: the process that compiles (`grammar_worker.py`), its start, deadline and restart.
Does not know: matchers, MLX, HTTP.
Invariant: no grammar is compiled in a process of the server before it was compiled there.
llguidance recurses as deeply as a grammar does, and a stack that overflows ends the process.
Next: `grammar.check_grammar`, which everybody calls.
"""

from __future__ import annotations

import atexit
import hashlib
import threading
from dataclasses import dataclass
from typing import Any

from ...worker_process import WorkerFailed, WorkerProcess, work_again_if_killed
from .grammar_worker import CPU_S

KNOWN_GRAMMARS = 256  # compiled ones that are remembered


@dataclass(frozen=True)
class SerializedTokenizer:
    """A vocabulary for another process.

    Args:
        text: as the tokenizers library writes it, JSON.
        stop_tokens: that end an output.
    """

    text: str
    stop_tokens: tuple[int, ...]


class UnreadableTokenizer(Exception):
    """llguidance cannot read the vocabulary."""


class GrammarProcess:
    """Compiles grammars in a process that is started on the first use. Safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker = WorkerProcess("cenacle.engine.sampling.grammar_worker")
        self._tokenizer: SerializedTokenizer | None = None
        self._known: dict[tuple[bytes, SerializedTokenizer | None], list[str]] = {}

    def compile(self, grammar: str, tokenizer: SerializedTokenizer | None = None) -> list[str]:
        """Compile a grammar, and compute the first tokens that it allows.

        Args:
            grammar: as llguidance reads it.
            tokenizer: of the model; None: any bytes are tokens.

        Returns:
            llguidance's warnings: parts of a schema that it does not enforce.

        Raises:
            ValueError: why it does not compile.
            UnreadableTokenizer: see that.
        """
        key = (hashlib.sha256(grammar.encode(errors="surrogatepass")).digest(), tokenizer)
        with self._lock:
            if key in self._known:
                return self._known[key]
            try:
                result = work_again_if_killed(lambda: self._compile(grammar, tokenizer))
            except WorkerFailed as error:
                raise ValueError(
                    f"expected one that compiles within {CPU_S} s and 1 GB and is not nested more "
                    "deeply than a few hundred levels, references included; simplify it"
                ) from error
            if result["error"]:
                raise ValueError(result["error"])
            while len(self._known) >= KNOWN_GRAMMARS:
                self._known.pop(next(iter(self._known)))
            self._known[key] = list(result["warnings"])
            return self._known[key]

    def _compile(self, grammar: str, tokenizer: SerializedTokenizer | None) -> dict[str, Any]:
        if not self._worker.has_answered:
            self._tokenizer = None
        if tokenizer is not None and self._tokenizer is not tokenizer:
            self._tokenizer = None
            fields = {"tokenizer": tokenizer.text, "stop_tokens": tokenizer.stop_tokens}
            if problem := self._worker.ask(fields)["error"]:
                raise UnreadableTokenizer(problem)
            self._tokenizer = tokenizer
        return self._worker.ask({"grammar": grammar, "with_vocabulary": tokenizer is not None})

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._worker.close()


GRAMMAR_PROCESS = GrammarProcess()  # one for all models of this process
atexit.register(GRAMMAR_PROCESS.close)
