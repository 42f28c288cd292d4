"""."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..core.chat import OutputPart, TokenLogprob

Read = Callable[[str], list[OutputPart]]
"""From the text of calls to calls."""


class StopStringFilter:
    """Text in, the same text out until a stop string: `met` is the one that was met."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [s for s in stop if s]
        self._held = ""
        self.met: str | None = None

    def add(self, piece: str) -> str:
        """The text that is certain now."""
        if self.met is not None:
            return ""
        text = self._held + piece
        found = min(((at, s) for s in self._stop if (at := text.find(s)) >= 0), default=None)
        if found is not None:
            (at, self.met), self._held = found, ""
            return text[:at]
        # The longest end of the text that could be the beginning of a stop string is kept back.
        keep = max(
            (n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """Tokens in, pieces of text out. `stopped` tells that a stop string was met."""

    def __init__(self, detokenizer: Any, stop: Sequence[str], silent: Sequence[int]) -> None:
        self._detokenizer = detokenizer
        self._cutter = StopStringFilter(stop)
        self._silent = frozenset(silent)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._cutter.met is not None

    def add(self, token: int) -> str:
        """The text that this token makes certain; perhaps empty."""
        if self.stopped or token in self._silent:
            return ""
        self._detokenizer.add_token(token)
        return self._cutter.add(self._detokenizer.last_segment)

    def end(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        self._detokenizer.finalize()
        return self._cutter.add(self._detokenizer.last_segment) + self._cutter.end()


class OutputParser:
    """Tokens in, parts of an answer out. `stopped` is the stop string that was met in its text,
    `ended` tells that nothing more comes, `thinking` whether it is inside reasoning.

    Args:
        detokenizer: mlx-lm's, fresh.
        stop: text ends before any of these; reasoning and calls may have them.
        silent: ids that have no text.
        state: of mlx-lm's `TextStateMachine`; None: the answer stays in the state it begins in.
        read: reads calls.
        begin: "normal", "reasoning" or "tool".
        calls: the answer ends with so many calls; None: whenever it ends.
    """

    def __init__(
        self,
        detokenizer: Any,
        stop: Sequence[str],
        silent: Sequence[int],
        state: Any = None,
        read: Read | None = None,
        begin: str = "normal",
        calls: int | None = None,
    ) -> None:
        self._detokenizer, self._cutter, self._silent = (
            detokenizer,
            StopStringFilter(stop),
            frozenset(silent),
        )
        self._state, self._read, self._now = state, read, begin
        self._call, self._calls_left = "", calls
        self._turned = False  # from one kind to another, and nothing has come since

    @property
    def stopped(self) -> str | None:
        """The stop string that was met, or None."""
        return self._cutter.met

    @property
    def ended(self) -> bool:
        """Whether nothing more comes, whatever tokens do."""
        return self.stopped is not None or self._calls_left == 0

    @property
    def thinking(self) -> bool:
        """Whether it is inside reasoning."""
        return self._now == "reasoning"

    def add(self, token: int) -> list[OutputPart]:
        """The parts that this token makes certain; perhaps none."""
        if self.ended or token in self._silent:
            return []
        self._detokenizer.add_token(token)
        return self._split(self._detokenizer.last_segment)

    def end(self) -> list[OutputPart]:
        """What was held back."""
        if self.ended:
            return []
        self._detokenizer.finalize()
        parts = self._split(self._detokenizer.last_segment)
        if self._state is not None and self._state[0] is not None:
            parts += self._in_state(self._now, self._state[3])  # perhaps a mark's beginning
        return parts + self._leave()

    def _split(self, text: str) -> list[OutputPart]:
        if self._state is None:
            return self._in_state(self._now, text)
        if self._state[0] is None:
            return []  # the format says that nothing follows
        from mlx_lm.generate import TextStateMachine

        self._state, segments = TextStateMachine.split(self._state, text)
        parts = []
        for state, piece in segments:
            if state != self._now:
                parts += self._leave()
                self._now, self._turned = state, True
            parts += self._in_state(state, piece)
        return parts

    def _in_state(self, state: str | None, text: str) -> list[OutputPart]:
        if self.ended:
            return []
        if state == "tool":
            self._call += text
            return []
        if self._turned:  # lines between reasoning, calls and text belong to none of them
            text = text.lstrip("\n")
            self._turned = not text
        if state == "reasoning":
            return [OutputPart("reasoning", text)] if text else []
        text = self._cutter.add(text) if state == "normal" else ""
        return [OutputPart("text", text)] if text else []

    def _leave(self) -> list[OutputPart]:
        """The end of a stretch of one kind."""
        if self._now == "tool":
            call, self._call = self._call, ""
            parts = self._read(call) if self._read is not None and call else []
            if self._calls_left is not None:
                parts = parts[: self._calls_left]
                self._calls_left -= sum(part.kind == "call" for part in parts)
            return parts
        held = self._cutter.end()
        return [OutputPart("text", held)] if held else []


def attach_logprobs(parts: list[OutputPart], logged: Sequence[TokenLogprob]) -> list[OutputPart]:
    """The parts, the last of which carries the reports about tokens."""
    return [*parts[:-1], replace(parts[-1], logprobs=tuple(logged))]
