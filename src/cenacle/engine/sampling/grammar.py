"""Answers that match a grammar: which tokens may come next.

Owns: llguidance's view of a model's vocabulary, one matcher per request, the check of a grammar
before it is admitted.
Does not know: MLX, logits, ranks.
Invariant: a matcher depends on the grammar and the answer's tokens only, so every rank has the same
mask; a token that ends the answer is allowed exactly where the grammar may end, and nothing else
where it must.
Next: `sampler.py` applies the masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    from ...text.tokenizer import ChatTokenizer


class Vocabulary:
    """A model's tokens as llguidance sees them; read when the first grammar comes (a second).

    Args:
        text: gives the model's tokenizer; called once.
    """

    def __init__(self, text: Callable[[], ChatTokenizer]) -> None:
        self._text = text

    @cached_property
    def tokenizer(self) -> LLTokenizer:
        """llguidance's tokenizer.

        Raises:
            CheckpointError: there is no tokenizer.
            InputError: it is of a kind that llguidance cannot read.
        """
        from llguidance.hf import from_tokenizer

        text = self._text()
        try:
            return from_tokenizer(text.inner, eos_token=list(text.stop_tokens))
        except Exception as error:  # Rust's errors come as several classes
            raise InputError(
                f"grammar: expected a tokenizer that llguidance can read, and this model's is not "
                f"({error}); ask without a grammar",
                "grammar",
            ) from error

    def matcher(self, grammar: str, prompt: int, limits: LLParserLimits | None = None) -> Matcher:
        """A matcher for one answer.

        Args:
            grammar: as llguidance reads it.
            prompt: number of tokens before the answer.
            limits: of llguidance's work; None: its own.

        Raises:
            InputError: the grammar is wrong, or nothing matches it.
        """
        from llguidance import LLMatcher

        tokenizer = self.tokenizer
        inner = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        found = Matcher(inner, prompt, tokenizer.vocab_size)
        if found.failed:
            raise _wrong(found.failed)
        if not found.can_begin:
            raise _wrong("no text matches it")
        return found


class Matcher:
    """Where one answer stands in its grammar.

    `length` is the number of tokens that it has seen, the prompt's included.
    """

    def __init__(self, matcher: LLMatcher, prompt: int, width: int) -> None:
        self._matcher, self._width = matcher, width
        self.length = self._prompt = prompt
        self._consumed = 0

    @property
    def failed(self) -> str:
        """Why it cannot go on (llguidance reached a limit of its own); empty while it can."""
        if not self._matcher.is_error():
            return ""
        return self._matcher.get_error().splitlines()[0]  # what follows is a dump of its state

    @property
    def can_begin(self) -> bool:
        """Whether any answer at all matches; to be asked before the first token."""
        self._matcher.compute_bitmask()
        stopped = self._matcher.is_stopped() and not self._matcher.is_accepting()
        return not (stopped or self.failed)

    def allowed(self, fresh: Sequence[int]) -> NDArray[np.bool_]:
        """Which tokens may follow.

        Args:
            fresh: the tokens since the last call; they must have been allowed.

        Returns:
            [vocabulary] of llguidance's tokenizer; the model's may be wider. When the grammar has
            ended, or failed, only what ends the answer is allowed.
        """
        self.length += len(fresh)
        for token in fresh:
            if self._matcher.is_stopped():
                break  # what ends the answer is no part of the text
            self._matcher.consume_token(token)
            self._consumed += 1
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._width, bitorder="little").astype(bool)

    def possible(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first, may follow."""
        return self._matcher.validate_tokens(list(tokens))

    def rewind(self, length: int) -> None:
        """Forget the tokens beyond `length`."""
        self.length = min(length, self.length)
        if (extra := self._consumed - (self.length - self._prompt)) > 0:
            self._matcher.rollback(extra)
            self._consumed -= extra


def check(grammar: str, vocabulary: Vocabulary | None = None) -> None:
    """Refuse a grammar that a rank could not follow.

    Args:
        grammar: as llguidance reads it: a JSON object with `grammars`, or a text in its Lark form.
        vocabulary: the model's, to be quite sure; None: only the grammar itself is checked.

    Raises:
        InputError: what is wrong with it, in llguidance's words.
    """
    from llguidance import LLMatcher

    failed, reasons = LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        raise _wrong(reasons[0])
    if vocabulary is not None:
        vocabulary.matcher(grammar, 0)


def _wrong(reason: str) -> InputError:
    line = " ".join(reason.split())
    return InputError(f"grammar: expected one that llguidance can follow, but: {line}", "grammar")
