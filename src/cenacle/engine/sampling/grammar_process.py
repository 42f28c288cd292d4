"""Compiles grammars where a crash costs only the request that brought them.

Owns: the process that compiles (`grammar_worker.py`), its start, deadline and restart.
Does not know: matchers, MLX, HTTP.
Invariant: no grammar is compiled in a process of the server before it was compiled there.
llguidance recurses as deeply as a grammar does, and a stack that overflows ends the process.
Next: `grammar.check_grammar`, which everybody calls.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import select
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import IO, Any

from .grammar_worker import CPU_S, write_frame

DEADLINE_S = 60  # of an answer, on a busy machine; the processor time is limited to `CPU_S`
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


class GrammarProcess:
    """Compiles grammars in a process that is started on the first use. Safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
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
        """
        key = (hashlib.sha256(grammar.encode(errors="surrogatepass")).digest(), tokenizer)
        with self._lock:
            if key in self._known:
                return self._known[key]
            try:
                if tokenizer is not None and self._tokenizer is not tokenizer:
                    self._tokenizer = None
                process = self._start()
                if tokenizer is not None and self._tokenizer is None:
                    fields = {"tokenizer": tokenizer.text, "stop_tokens": tokenizer.stop_tokens}
                    self._ask(process, fields)
                    self._tokenizer = tokenizer
                with_vocabulary = tokenizer is not None
                result = self._ask(
                    process, {"grammar": grammar, "with_vocabulary": with_vocabulary}
                )
            except (OSError, EOFError, ValueError) as error:
                self._stop()
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

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._stop()
            # Not for Ctrl-C: it ends when its input does.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("grammar_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,
            )
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        self._process = self._tokenizer = None

    def _ask(self, process: subprocess.Popen[bytes], message: dict[str, Any]) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        write_frame(process.stdin, message)
        ends = monotonic() + DEADLINE_S
        (size,) = struct.unpack("<I", _read(process.stdout, 4, ends))
        result: dict[str, Any] = json.loads(_read(process.stdout, size, ends))
        return result


def _read(stream: IO[bytes], size: int, ends: float) -> bytes:
    """Exactly `size` bytes.

    Raises:
        EOFError: the process has ended.
        TimeoutError: they did not come in time.
    """
    data = b""
    poll = select.poll()  # unlike select(), for any number of open files
    poll.register(stream, select.POLLIN)
    while len(data) < size:
        if not poll.poll(max(0.0, 1000 * (ends - monotonic()))):
            raise TimeoutError("no answer")
        piece = stream.read(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


GRAMMAR_PROCESS = GrammarProcess()  # one for all models of this process
atexit.register(GRAMMAR_PROCESS.close)
