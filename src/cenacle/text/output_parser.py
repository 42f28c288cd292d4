"""Parses a model's output, token by token.

Owns: `TextStream`, tokens to text; `OutputParser`, tokens to the parts of an output (reasoning,
text and tool calls); stop strings.
Does not know: models, chat templates, APIs.
Invariant: the pieces of a `TextStream`, joined, are the text of all its tokens before the first
stop string; no piece ends inside a character. The parts of an `OutputParser` are the same, without
the markers between them; a tool call that cannot be parsed is text, with its markers.
Next: `tokenizer.py` makes parsers for a model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, Protocol

from ..core.chat import OutputPart, TokenLogprob
from .call_formats import BareMarks
from .detokenizer import Detokenizer

ParseCalls = Callable[[str, bool], list[OutputPart]]
"""From the text of one block of calls, and whether the output was cut in it, to parts."""


# Before a message of gpt-oss's or Muse Spark's: a mark, a role, a recipient, a channel, its format.
_HEADER = re.compile(
    r"\s*(<\|\w+\|>)?\s*\w*\s*(to=[^\s<]*)?\s*(<\|(channel|constrain|message)\|>[^<]*)?\s*"
)


class BareAnswers(Protocol):
    """Knows answers that are calls without marks."""

    def bare_call_state(self, text: str) -> Literal["no", "perhaps", "begun"]:
        """Whether an answer, so far, is the beginning of one."""

    def read_bare(self, text: str) -> list[OutputPart]:
        """The calls of a whole answer; none: it is text."""


@dataclass(frozen=True)
class CallSyntax:
    """How calls are found and read.

    Args:
        parse: reads a block.
        start, end: marks around a block, which are not part of its text.
        bare: marks of a call that lacks them.
        answers: knows answers without any marks.
    """

    parse: ParseCalls
    start: str = ""
    end: str = ""
    bare: BareMarks | None = None
    answers: BareAnswers | None = None


class _StopString:
    """How much of a stop string the text ends with, by Knuth, Morris and Pratt: each letter of the
    text and of the string is looked at a constant number of times."""

    def __init__(self, text: str) -> None:
        self.text, self._borders = text, _borders(text)
        self.length = 0  # of the longest beginning that the text ends with

    def find_end(self, piece: str, *, may_end: bool) -> int | None:
        """Where in the next piece of the text it is complete for the first time."""
        text, borders, length = self.text, self._borders, self.length
        for end, letter in enumerate(piece, 1):
            while length and text[length] != letter:
                length = borders[length - 1]
            if text[length] == letter:
                length += 1
            if length == len(text):
                if may_end:
                    return end
                length = borders[-1]
        self.length = length
        return None


@lru_cache(64)  # the choices of a request have the same ones
def _borders(text: str) -> list[int]:
    """Of each of its beginnings: the length of the longest shorter one with which it ends."""
    borders, length = [0], 0
    for letter in text[1:]:
        while length and text[length] != letter:
            length = borders[length - 1]
        length += text[length] == letter
        borders.append(length)
    return borders


class StopStringFilter:
    """Passes text on until a stop string; `stop_string` is the one that was found."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [_StopString(text) for text in stop if text]
        self._held = ""
        self.stop_string: str | None = None
        self.cut_text = ""  # from the stop string on

    def add(self, piece: str, *, may_end: bool = True) -> str:
        """The text that cannot be part of a stop string. Without `may_end` none ends in `piece`."""
        if self.stop_string is not None:
            return ""
        text, starts = self._held + piece, len(self._held)
        ends = ((stop.find_end(piece, may_end=may_end), stop.text) for stop in self._stop)
        matches = ((starts + end - len(stop), stop) for end, stop in ends if end is not None)
        first = min(matches, default=None)
        if first is not None:
            (position, self.stop_string), self._held = first, ""
            self.cut_text = text[position:]
            return text[:position]
        # Hold back the longest suffix that could begin a stop string.
        held = max((stop.length for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The text that was held back."""
        held, self._held = self._held, ""
        for stop in self._stop:
            stop.length = 0
        return held


class TextStream:
    """Tokens to pieces of text.

    Args:
        detokenizer: new.
        stop: stop strings.
        silent_tokens: ids without text.
    """

    def __init__(
        self, detokenizer: Detokenizer, stop: Sequence[str], silent_tokens: Sequence[int]
    ) -> None:
        self._detokenizer = detokenizer
        self._filter = StopStringFilter(stop)
        self._silent_tokens = frozenset(silent_tokens)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._filter.stop_string is not None

    def add(self, token: int) -> str:
        """The text that is certain after this token; may be empty."""
        if self.stopped or token in self._silent_tokens:
            return ""
        return self._filter.add(self._detokenizer.add(token))

    def finish(self) -> str:
        """The text that was held back."""
        if self.stopped:
            return ""
        return self._filter.add(self._detokenizer.finish()) + self._filter.finish()


class OutputParser:
    """Tokens to parts of an output.

    Args:
        detokenizer: new.
        stop: stop strings for text; reasoning and calls may contain them.
        silent_tokens: ids without text.
        markers: state of mlx-lm's `TextStateMachine`; None: the output stays in its first state.
        calls: None: there are none.
        state: the first one: "normal", "reasoning" or "tool".
        max_calls: the output ends with this many calls; None: unlimited.

    `min_tokens` may be set at any time: in so many tokens from then on no stop string ends.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop: Sequence[str],
        silent_tokens: Sequence[int],
        markers: Any = None,
        calls: CallSyntax | None = None,
        state: str = "normal",
        max_calls: int | None = None,
    ) -> None:
        self._detokenizer, self._filter = detokenizer, StopStringFilter(stop)
        self._silent_tokens = frozenset(silent_tokens)
        self._markers, self._calls, self._state = markers, calls, state
        self._call_text, self._calls_left = "", max_calls
        self._answers = calls.answers if calls is not None else None  # while nothing else has come
        self._answer, self._is_bare_call = "", False
        self._header = ""
        self._after_marker = False  # the state has changed, and no text has come since
        self.min_tokens = 0

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found, or None."""
        return self._filter.stop_string

    @property
    def cut_text(self) -> str:
        """What was generated and is not part of the output: from the stop string on."""
        return self._filter.cut_text

    @property
    def finished(self) -> bool:
        """Whether further tokens add nothing."""
        return self.stop_string is not None or self._calls_left == 0

    @property
    def in_reasoning(self) -> bool:
        """Whether it is inside reasoning."""
        return self._state == "reasoning"

    @property
    def in_call(self) -> bool:
        """Whether it is inside a call."""
        return self._state in ("tool", "bare_tool")

    def add(self, token: int) -> list[OutputPart]:
        """The parts that are certain after this token; may be empty."""
        if self.finished:
            return []
        text = "" if token in self._silent_tokens else self._detokenizer.add(token)
        parts = self._parse(text) if text else []
        self.min_tokens = max(0, self.min_tokens - 1)
        return parts

    def finish(self, *, cut: bool = False) -> list[OutputPart]:
        """The parts that were held back; `cut`: the model had not ended the output."""
        if self.finished:
            return []
        parts = self._parse(self._detokenizer.finish())
        if self._markers is not None and self._markers[0] is not None:
            parts += self._parse_segment(self._state, self._markers[3])  # may begin a marker
        return parts + self._finish_state(closed=False, cut=cut)

    def _parse(self, text: str) -> list[OutputPart]:
        if self._markers is None:
            return self._parse_segment(self._state, text)
        if self._markers[0] is None:
            return []  # nothing follows in this format
        from mlx_lm.generate import TextStateMachine

        self._markers, segments = TextStateMachine.split(self._markers, text)
        parts = []
        for state, piece in segments:
            if state != self._state:
                parts += self._finish_state()
                self._state, self._after_marker = state, True
            parts += self._parse_segment(state, piece)
        return parts

    def _parse_segment(self, state: str | None, text: str) -> list[OutputPart]:
        if self.finished:
            return []
        if state in ("tool", "bare_tool"):  # see `in_call`
            self._call_text += text
            return []
        if state is not None and state.startswith("header"):  # of a message of gpt-oss's
            self._header += text
            return []
        if self._after_marker:  # newlines after a marker belong to no part
            text = text.lstrip("\n")
            self._after_marker = not text
        if state == "reasoning":
            return [OutputPart("reasoning", text)] if text else []
        text = self._hold_answer(text) if state in ("normal", "after_call") else ""
        return self._add_text(text) if text else []

    def _add_text(self, text: str) -> list[OutputPart]:
        text = self._filter.add(text, may_end=not self.min_tokens)
        return [OutputPart("text", text)] if text else []

    def _hold_answer(self, text: str) -> str:
        """Hold an answer back while it may be calls without marks; the text that is none."""
        if self._answers is None:
            return text
        self._answer += text
        if not self._is_bare_call:
            state = self._answers.bare_call_state(self._answer)
            self._is_bare_call = state == "begun"
            if state == "no":
                return self._release_answer()
        return ""

    def _release_answer(self) -> str:
        text, self._answer = self._answer, ""
        if text.strip():
            self._answers = None
        return text

    def _finish_state(self, *, closed: bool = True, cut: bool = False) -> list[OutputPart]:
        if self.finished:
            return []
        if self.in_call:
            self._answers = None
            return self._limit_calls(self._parse_block(closed, cut))
        if not closed and self._answers is not None and self._is_bare_call:
            parts = self._limit_calls(self._answers.read_bare(self._answer))
            if parts:
                return parts
        parts = self._add_text(self._release_answer())
        if self.finished:
            return parts
        return parts + self._finish_text()

    def _parse_block(self, closed: bool, cut: bool) -> list[OutputPart]:
        assert self._calls is not None
        text, self._call_text = self._call_text, ""
        start, end = self._calls.start, self._calls.end if closed else ""
        if self._state == "bare_tool" and self._calls.bare is not None:
            start, end = self._calls.bare.start, self._calls.bare.end if closed else ""
            text = start + text + end
            start = end = ""
        parts = self._calls.parse(text, cut)
        if any(part.kind == "call" for part in parts):
            return parts
        text = start + text + end
        return [OutputPart("text", text)] if text else []

    def _finish_text(self) -> list[OutputPart]:
        held = self._filter.finish()
        header, self._header = self._header, ""
        if not _HEADER.fullmatch(header):  # it began no message
            held += self._filter.add(header) + self._filter.finish()
        return [OutputPart("text", held)] if held else []

    def _limit_calls(self, parts: list[OutputPart]) -> list[OutputPart]:
        if self._calls_left is None:
            return parts
        calls = [at for at, part in enumerate(parts) if part.kind == "call"]
        if len(calls) >= self._calls_left > 0:
            parts = parts[: calls[self._calls_left - 1] + 1]
        self._calls_left -= min(len(calls), self._calls_left)
        return parts


def attach_logprobs(parts: list[OutputPart], logprobs: Sequence[TokenLogprob]) -> list[OutputPart]:
    """The parts, with log-probabilities attached to the last one."""
    return [*parts[:-1], replace(parts[-1], logprobs=tuple(logprobs))]
