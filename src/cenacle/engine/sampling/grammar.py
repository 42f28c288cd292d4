"""Grammars: which tokens may come next.

Owns: llguidance's view of a model's vocabulary, one matcher per request, the check of a grammar
before its request is admitted.
Does not know: MLX, logits, ranks.
Invariant: a matcher depends only on the grammar and the output, so every rank has the same mask; a
token that ends the output is allowed exactly where the grammar may end, and is the only one where
it must.
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
    """A model's tokens as llguidance sees them; read on the first use, which takes a second.

    Args:
        load_tokenizer: called once.
    """

    def __init__(self, load_tokenizer: Callable[[], ChatTokenizer]) -> None:
        self._load_tokenizer = load_tokenizer

    @cached_property
    def tokenizer(self) -> LLTokenizer:
        """llguidance's tokenizer.

        Raises:
            CheckpointError: there is no tokenizer.
            InputError: llguidance cannot read this kind of tokenizer.
        """
        from llguidance.hf import from_tokenizer

        tokenizer = self._load_tokenizer()
        try:
            return from_tokenizer(tokenizer.inner, eos_token=list(tokenizer.stop_tokens))
        except Exception as error:  # Rust's errors have several classes
            raise InputError(
                f"grammar: expected a tokenizer that llguidance can read, and this model's is not "
                f"({error}); send the request without a grammar",
                "grammar",
            ) from error

    def matcher(
        self, grammar: str, prompt_tokens: int, limits: LLParserLimits | None = None
    ) -> Matcher:
        """A matcher for one output.

        Args:
            grammar: as llguidance reads it.
            prompt_tokens: number of tokens before the output.
            limits: of llguidance's work; None: its defaults.

        Raises:
            InputError: the grammar is invalid, or nothing matches it.
        """
        from llguidance import LLMatcher

        tokenizer = self.tokenizer
        inner = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        matcher = Matcher(inner, prompt_tokens, tokenizer.vocab_size)
        if matcher.error:
            raise _describe_error(matcher.error)
        if not matcher.allows_first:
            raise _describe_error("no text matches it")
        return matcher


class Matcher:
    """The state of one output in its grammar.

    `length` is the number of tokens read, including the prompt's.
    """

    def __init__(self, matcher: LLMatcher, prompt_tokens: int, vocabulary_size: int) -> None:
        self._matcher, self._vocabulary_size = matcher, vocabulary_size
        self.length = self._prompt_tokens = prompt_tokens
        self._consumed = 0

    @property
    def error(self) -> str:
        """Why it cannot continue (llguidance reached an internal limit); empty while it can."""
        if not self._matcher.is_error():
            return ""
        return self._matcher.get_error().splitlines()[0]  # the rest is a dump of its state

    @property
    def allows_first(self) -> bool:
        """Whether any output matches; valid before the first token."""
        self._matcher.compute_bitmask()
        stopped = self._matcher.is_stopped() and not self._matcher.is_accepting()
        return not (stopped or self.error)

    def allowed(self, new_tokens: Sequence[int]) -> NDArray[np.bool_]:
        """Which tokens may follow.

        Args:
            new_tokens: since the last call; they must have been allowed.

        Returns:
            [vocabulary] of llguidance's tokenizer; the model's may be larger. When the grammar has
            ended, or failed, only tokens that end the output are allowed.
        """
        self.length += len(new_tokens)
        for token in new_tokens:
            if self._matcher.is_stopped():
                break  # a token that ends the output is not part of it
            self._matcher.consume_token(token)
            self._consumed += 1
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._vocabulary_size, bitorder="little").astype(bool)

    def allowed_prefix(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first, may follow."""
        return self._matcher.validate_tokens(list(tokens))

    def rewind(self, length: int) -> None:
        """Forget the tokens beyond `length`."""
        self.length = min(length, self.length)
        if (extra := self._consumed - (self.length - self._prompt_tokens)) > 0:
            self._matcher.rollback(extra)
            self._consumed -= extra


def check_grammar(grammar: str, vocabulary: Vocabulary | None = None) -> None:
    """Check that a rank can follow a grammar.

    Args:
        grammar: as llguidance reads it: a JSON object with `grammars`, or its Lark format.
        vocabulary: of the model; None: check only the grammar itself.

    Raises:
        InputError: what is wrong, in llguidance's words.
    """
    from llguidance import LLMatcher

    failed, reasons = LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        raise _describe_error(reasons[0])
    if vocabulary is not None:
        vocabulary.matcher(grammar, 0)


def _describe_error(reason: str) -> InputError:
    line = " ".join(reason.split())
    return InputError(f"grammar: expected one that llguidance can follow, but: {line}", "grammar")
