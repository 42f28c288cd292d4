"""Between text and tokens, for one model.

Owns: the tokenizer, rendering of chats, turning a stream of tokens into a stream of text.
Does not know: ranks, HTTP.
Invariant: the pieces of a `TextStream` joined are the text of all its tokens, cut before the first
stop string; no piece ends inside a character.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError

Message = dict[str, Any]
"""A chat message: {"role": ..., "content": ...}."""


class Text:
    """A checkpoint's tokenizer, as mlx-lm loads it.

    Args:
        folder: of the checkpoint.
        config: its config.json.

    Raises:
        CheckpointError: there is no tokenizer or it cannot be loaded.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        from mlx_lm.utils import load_tokenizer

        try:
            self._tokenizer = load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
        except Exception as error:  # transformers raises what its many tokenizers raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {reason}") from error

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return tuple(sorted(self._tokenizer.eos_token_ids))

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint says how a chat is rendered."""
        return bool(self._tokenizer.has_chat_template)

    def encode(self, text: str) -> tuple[int, ...]:
        """Plain text to ids, with the tokenizer's own beginning unless the text has it."""
        bos = self._tokenizer.bos_token
        special = bos is None or not text.startswith(bos)
        return tuple(self._tokenizer.encode(text, add_special_tokens=special, verbose=False))

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """A chat to ids, ready for the assistant's answer.

        Without a chat template the messages are rendered one per line, "role: content".

        Raises:
            InputError: the template refuses the messages.
        """
        if not self.has_template:
            lines = [f"{m['role']}: {m['content']}" for m in messages]
            return self.encode("\n".join([*lines, "assistant:"]))
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates are programs of the checkpoint's author
            raise InputError(
                f"messages: the model's chat template refuses them: {error}", "messages"
            ) from error
        return tuple(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def decode(self, tokens: Iterable[int]) -> str:
        """Ids to text."""
        return self._tokenizer.decode(list(tokens))

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """A new stream of text that ends before any of the `stop` strings."""
        return TextStream(self._tokenizer.detokenizer, stop, self.stop_tokens)


class TextStream:
    """Tokens in, pieces of text out. `stopped` tells that a stop string was met."""

    def __init__(self, detokenizer: Any, stop: Sequence[str], silent: Sequence[int]) -> None:
        self._detokenizer = detokenizer
        self._stop = [s for s in stop if s]
        self._silent = frozenset(silent)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that this token makes certain; perhaps empty."""
        if self.stopped or token in self._silent:
            return ""
        self._detokenizer.add_token(token)
        return self._release(self._detokenizer.last_segment)

    def end(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        self._detokenizer.finalize()
        piece = self._release(self._detokenizer.last_segment)
        held, self._held = self._held, ""
        return piece if self.stopped else piece + held

    def _release(self, piece: str) -> str:
        text = self._held + piece
        cuts = [at for s in self._stop if (at := text.find(s)) >= 0]
        if cuts:
            self.stopped, self._held = True, ""
            return text[: min(cuts)]
        # The longest end of the text that could be the beginning of a stop string is kept back.
        keep = max(
            (n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
