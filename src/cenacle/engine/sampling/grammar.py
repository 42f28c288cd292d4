"""Grammars: which tokens may come next.

Owns: llguidance's view of a model's vocabulary, one matcher per request, the check of a grammar
before its request is admitted.
Does not know: MLX, logits, ranks.
Invariant: a matcher depends only on the grammar and the output, so every rank has the same mask; a
token that ends the output is allowed exactly where the grammar may end, and is the only one where
it must.
Next: `grammar_process.py`, which compiles first; `sampler.py` applies the masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from .grammar_process import GRAMMAR_PROCESS, SerializedTokenizer, UnreadableTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    from ...text.tokenizer import ChatTokenizer

MAX_GRAMMAR_CHARACTERS = 1_000_000
MAX_REASON_CHARACTERS = 300


class Vocabulary:
    """A model's tokens as llguidance sees them; read on the first use, which may take a second.

    Args:
        load_tokenizer: called once.
    """

    def __init__(self, load_tokenizer: Callable[[], ChatTokenizer]) -> None:
        self._load_tokenizer = load_tokenizer

    def set_serialized(self, serialized: SerializedTokenizer) -> None:
        """Take them from another process that has read them; they are not read here then."""
        self.__dict__["serialized"] = serialized  # where `cached_property` keeps it

    @cached_property
    def serialized(self) -> SerializedTokenizer:
        """The vocabulary for another process.

        Raises:
            CheckpointError: there is no tokenizer.
            InputError: llguidance cannot read this kind of tokenizer.
        """
        tokenizer = self._load_tokenizer()
        backend = getattr(tokenizer.inner, "backend_tokenizer", None)
        if backend is None:
            raise _describe_unreadable("only those of the tokenizers library are")
        backend = copy(backend)
        backend.no_padding()
        backend.no_truncation()
        return SerializedTokenizer(backend.to_str(), tokenizer.stop_tokens)

    @cached_property
    def tokenizer(self) -> LLTokenizer:
        """llguidance's tokenizer.

        Raises:
            CheckpointError: there is no tokenizer.
            InputError: llguidance cannot read this kind of tokenizer.
        """
        from llguidance import LLTokenizer

        serialized = self.serialized
        try:
            return LLTokenizer(serialized.text, eos_token=list(serialized.stop_tokens))
        except Exception as error:  # Rust's errors have several classes
            raise _describe_unreadable(str(error)) from error

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


def check_grammar(grammar: str, vocabulary: Vocabulary | None = None) -> list[str]:
    """Check that a rank can follow a grammar, in a process of its own: a grammar can end it.

    Args:
        grammar: as llguidance reads it: a JSON object with `grammars`, or its Lark format.
        vocabulary: of the model; None: check only the grammar itself.

    Returns:
        What it does not enforce, in llguidance's words.

    Raises:
        InputError: what is wrong, in llguidance's words.
    """
    if len(grammar) > MAX_GRAMMAR_CHARACTERS:
        raise _describe_error(
            f"expected at most {MAX_GRAMMAR_CHARACTERS:,} characters, got {len(grammar):,}"
        )
    try:
        return GRAMMAR_PROCESS.compile(grammar, vocabulary.serialized if vocabulary else None)
    except UnreadableTokenizer as error:
        raise _describe_unreadable(str(error)) from error
    except ValueError as error:
        raise _describe_error(str(error)) from error


def _describe_error(reason: str) -> InputError:
    line = " ".join(reason.split())[:MAX_REASON_CHARACTERS]
    return InputError(f"grammar: expected one that llguidance can follow, but: {line}", "grammar")


def _describe_unreadable(reason: str) -> InputError:
    return InputError(
        f"grammar: expected a tokenizer that llguidance can read, and this model's is not "
        f"({reason}); send the request without a grammar",
        "grammar",
    )
