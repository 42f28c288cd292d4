"""The program that compiles grammars for another process: `python -P grammar_worker.py`.

Owns: one compilation at a time, with little stack, processor time and memory.
Does not know: the package. It is run as a file and imports only llguidance, so it starts in 0.1 s.
Invariant: what it accepts compiles in every process of the server, because it has an eighth of
their stack. A grammar that overflows it, or needs more time or memory, ends this process.
Next: `grammar_process.py` starts it, and again after its end.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

STACK_BYTES = 1 << 20
CPU_S = 1  # of a grammar; ordinary ones take milliseconds
MEMORY_BYTES = 1 << 30  # of a grammar


def read_frame(stream: IO[bytes]) -> Any:
    """The next message: four bytes of length, then JSON. None: the stream has ended."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    (size,) = struct.unpack("<I", head)
    return json.loads(stream.read(size))


def write_frame(stream: IO[bytes], message: Any) -> None:
    """Send a message as `read_frame` reads it."""
    data = json.dumps(message).encode()
    stream.write(struct.pack("<I", len(data)) + data)
    stream.flush()


def _limit_work() -> None:
    """This process ends when it uses more from now on. Linux keeps both limits, macOS the first."""
    used = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(used + CPU_S) + 1, resource.RLIM_INFINITY))
    try:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, resource.RLIM_INFINITY))


def _compile(grammar: str, tokenizer: Any) -> dict[str, Any]:
    from llguidance import LLMatcher

    failed, reasons = LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        return {"error": reasons[0], "warnings": []}
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    if matcher.is_error():
        return {"error": matcher.get_error().splitlines()[0], "warnings": []}
    matcher.compute_bitmask()
    ended = matcher.is_stopped() and not matcher.is_accepting()
    return {
        "error": "no text matches it" if ended or matcher.is_error() else "",
        "warnings": reasons,
    }


def _serve() -> None:
    from llguidance import LLTokenizer

    source, sink = sys.stdin.buffer, sys.stdout.buffer
    byte_tokenizer = LLTokenizer("byte")
    tokenizer = byte_tokenizer
    while (message := read_frame(source)) is not None:
        if "tokenizer" in message:
            resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY,) * 2)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            tokenizer = LLTokenizer(message["tokenizer"], eos_token=message["stop_tokens"])
            write_frame(sink, {})
            continue
        _limit_work()
        used = tokenizer if message["with_vocabulary"] else byte_tokenizer
        write_frame(sink, _compile(message["grammar"], used))


if __name__ == "__main__":
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()
