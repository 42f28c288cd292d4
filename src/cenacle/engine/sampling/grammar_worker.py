"""The program that compiles grammars for another process.

Owns: one compilation at a time, with little stack, processor time and memory.
Does not know: models. It imports only llguidance, so it starts in 0.2 s.
Invariant: what it accepts compiles in every process of the server, because it has an eighth of
their stack. A grammar that overflows it, or needs more time or memory, ends this process.
Next: `grammar_process.py` starts it, and again after its end.
"""

from __future__ import annotations

import threading
from typing import Any

from ...worker_process import lift_limits, limit_work, serve

STACK_BYTES = 1 << 20
CPU_S = 1  # of a grammar; ordinary ones take milliseconds
MEMORY_BYTES = 1 << 30  # of a grammar


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


class GrammarWorker:
    """Answers the messages of a `GrammarProcess`."""

    def __init__(self) -> None:
        from llguidance import LLTokenizer

        self._byte_tokenizer = self._tokenizer = LLTokenizer("byte")

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Take a tokenizer, or compile a grammar."""
        from llguidance import LLTokenizer

        if "tokenizer" in message:
            lift_limits()
            stop_tokens = message["stop_tokens"]
            try:
                self._tokenizer = LLTokenizer(message["tokenizer"], eos_token=stop_tokens)
            except BaseException as error:  # Rust's errors have several classes; a panic is one
                return {"error": str(error)}
            return {"error": ""}
        limit_work(CPU_S, MEMORY_BYTES)
        tokenizer = self._tokenizer if message["with_vocabulary"] else self._byte_tokenizer
        return _compile(message["grammar"], tokenizer)


if __name__ == "__main__":
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=lambda: serve(GrammarWorker().answer))
    thread.start()
    thread.join()
