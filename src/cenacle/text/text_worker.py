"""The program that renders chats and tokenizes for another process, with limits.

Owns: one piece of work at a time, with little processor time and memory.
Does not know: what a chat means.
Invariant: whatever a template or a tokenizer does, at worst this process ends.
Next: `text_process.py` starts it.
"""

from __future__ import annotations

from typing import Any

from .. import deferred_transformers
from ..worker_process import lift_limits, limit_work, serve

MAX_TEXT_CHARACTERS = 64_000_000  # of a rendered chat


class TextWorker:
    """Answers the messages of a `TextProcess`."""

    def __init__(self) -> None:
        # Before any limit: a cold import may need more than a text.
        from tokenizers import Tokenizer

        render_jinja_template = deferred_transformers.import_renderer()
        render_jinja_template(conversations=[[]], chat_template=" ")  # imports more
        self._load, self._render = Tokenizer.from_str, render_jinja_template
        self._tokenizer: Any = None

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to one message: "text" or "ids", or why there is none."""
        limit_work(message["cpu_s"], message["memory_bytes"])
        try:
            return self._work(message)
        except BaseException as error:  # the tokenizers library panics beside `Exception`
            return {"error": f"{error}"[:1000] or type(error).__name__}
        finally:
            lift_limits()

    def _work(self, message: dict[str, Any]) -> dict[str, Any]:
        if (text := message.get("tokenizer")) is not None:
            self._tokenizer = self._load(text)
            return {}
        if (arguments := message.get("render")) is not None:
            rendered: Any = self._render(**arguments)
            text = rendered[0][0]
            if len(text) > MAX_TEXT_CHARACTERS:
                return {"error": f"expected at most {MAX_TEXT_CHARACTERS:,} characters of prompt"}
            return {"text": text}
        encoding = self._tokenizer.encode(message["encode"], add_special_tokens=message["special"])
        return {"ids": encoding.ids}


if __name__ == "__main__":
    serve(TextWorker().answer)
