"""Proposals by what reads hidden states: the multi-token prediction layer of the served checkpoint,
or a drafter that was made for the model.

Owns: `HiddenStates`, those of the last tokens that the model has seen; `draft_tokens`, which has a
head draft; `MtpProposer`, its proposals, on every rank.
Does not know: requests, what becomes of proposals (`decoder.py`).
Rank 0 has the layer, whole, and sends each draft to the others, as a draft model's
(`draft_model.py` says why). The layer reads hidden states of the model, which each pass of the
decoder leaves behind: of the prompt it knows only what these contain. Of those that it has not read
about `KEPT_TOKENS` are kept.
Invariant: hidden states are those of the last tokens in the decoder's cache; how many there are is
the same on every rank.
Next: `decoder.py`, which lets the model verify the drafts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import numpy as np

from ...collective.base import Collective
from ...model.dflash import DFlashHead
from ...model.draft_heads import DraftHead, TokenHead, at_places
from ..cache.state_rewinder import Rewinder, make_rewinder
from .draft_model import SampleToken, fit_vocabulary

KEPT_TOKENS = 256

ChooseToken = Callable[[mx.array, int], mx.array]
"""Logits [rows, vocabulary] and a place of the draft -> tokens [rows, 1]."""


def draft_tokens(
    head: DraftHead,
    ids: mx.array,
    states: mx.array,
    caches: list[Any],
    count: int,
    choose: ChooseToken,
    rewinder: Rewinder,
    padding: Sequence[int] | None = None,
) -> mx.array:
    """Draft the tokens after the last ones of `ids`.

    The caches then have what was read of the served model's states, and nothing of the drafts: they
    will be read again with the model's own states.

    Args:
        ids: those after each of `states`, [rows, length].
        states: of the served model, as they were recorded, [rows, length, any].
        caches: of the head.
        choose: logits and a place of the draft -> tokens, [rows, vocabulary] -> [rows, 1].
        rewinder: of the head's model.
        padding: how many of the last places of each row are not used; None: there is one row, and
            all are.

    Returns:
        [rows, count].
    """
    hidden, length = head.join(states), ids.shape[1]
    places = [length - 1 - n for n in padding or (0,)]
    with rewinder.recording(caches, length) if padding else nullcontext():
        if isinstance(head, DFlashHead):
            head.read(hidden, caches)
        else:
            assert isinstance(head, TokenHead)
            logits, hidden = head(ids, hidden, caches, places)
    if padding:
        rewinder.drop(caches, padding)
    if isinstance(head, DFlashHead):
        token = mx.take_along_axis(ids, mx.array(places)[:, None], axis=1)
        return _draft_block(head, token, caches, count, choose)
    tokens = [choose(logits, 0)]
    if count > 1:
        last = at_places(hidden, places)
        with rewinder.recording(caches, count - 1):
            for index in range(1, count):
                logits, last = head(tokens[-1], last, caches)
                tokens.append(choose(logits, index))
        rewinder.drop(caches, [count - 1] * len(places))
    return mx.concatenate(tokens, axis=1)


def _draft_block(
    head: DFlashHead, token: mx.array, caches: list[Any], count: int, choose: ChooseToken
) -> mx.array:
    states, tokens = head.draft_states(token, caches, count), []
    for index in range(count):
        token = choose(head.score(states[:, index], token), index)
        tokens.append(token)
    return mx.concatenate(tokens, axis=1)


class HiddenStates:
    """Hidden states of the last tokens that the model has seen, of one sequence.

    Args:
        limit: how many tokens, about.
    """

    def __init__(self, limit: int = KEPT_TOKENS) -> None:
        self._limit = limit
        self._parts: deque[mx.array] = deque()  # [n, width]
        self._is_recording = False
        self._passes: list[mx.array] | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the passes inside, which all ranks must compute to their end.

        Of a pass for its caches alone, as prompts have, the last layer is never computed. If rank 0
        did, it would wait for the others' all-reduce.
        """
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    @contextmanager
    def handing_over(self) -> Iterator[list[mx.array]]:
        """The states of each pass inside, [batch, length, width]; none of them are kept here."""
        passes: list[mx.array] = []
        self._passes = passes
        try:
            yield passes
        finally:
            self._passes = None

    def record(self, states: mx.array) -> None:
        """Append those of a pass, [1, length, width]."""
        if self._passes is not None:
            self._passes.append(states)
        if not self._is_recording:
            return
        self._parts.append(states[0])
        while len(self) - self._parts[0].shape[0] >= self._limit:
            self._parts.popleft()

    def __len__(self) -> int:
        return sum(part.shape[0] for part in self._parts)

    def drop(self, count: int) -> None:
        """Forget the last tokens."""
        while count and self._parts:
            last = self._parts.pop()
            if last.shape[0] > count:
                self._parts.append(last[: last.shape[0] - count])
            count = max(0, count - last.shape[0])

    def clear(self) -> None:
        """Forget all."""
        self._parts.clear()

    def last(self, count: int) -> mx.array:
        """[count, width] of the last tokens."""
        return mx.concatenate(list(self._parts))[-count:]


class MtpProposer:
    """Proposes what a layer expects that reads the served model's hidden states.

    Args:
        collective: the ranks; rank 0 has the layer.
        head: on rank 0; None on the others.
        states: where the served model records its passes, on every rank.
        vocab_size: number of the served model's token ids.
        context_length: tokens that the caches of several requests may hold; None: any number.
        longest: how many tokens the head drafts at most; None: any number.
    """

    def __init__(
        self,
        collective: Collective,
        head: DraftHead | None,
        states: HiddenStates,
        vocab_size: int,
        context_length: int | None = None,
        longest: int | None = None,
    ) -> None:
        self.collective, self.head, self.states = collective, head, states
        self.vocab_size, self.context_length = vocab_size, context_length
        self.longest = longest
        self._rewinder = None if head is None else make_rewinder(head.model)
        self._text: list[int] = []
        self._caches: list[Any] = []
        self._next = 0  # position of the hidden state that the layer reads next, on rank 0

    @property
    def length(self) -> int:
        """How many tokens of the text it knows."""
        return len(self._text)

    def fits_context(self, length: int) -> bool:  # noqa: ARG002
        """Always: it reads only the last tokens."""
        return True

    @property
    def is_ready(self) -> bool:
        """Whether the model has left a hidden state behind since the text was started."""
        return len(self.states) > 0

    def recording(self) -> AbstractContextManager[None]:
        """See `HiddenStates`."""
        return self.states.recording()

    def reset(self, text: Sequence[int]) -> None:
        """Start a text, of which the model has seen all but the last token."""
        self._text = list(text)
        self.states.clear()
        self._next = len(text)  # nothing is known yet

    def truncate(self, length: int) -> None:
        """Forget the tokens beyond `length`."""
        del self._text[length:]

    def drop_states(self, count: int) -> None:
        """Forget the hidden states of the last tokens that the model has seen."""
        self.states.drop(count)

    def read(self, new_tokens: Sequence[int]) -> None:
        """Learn more of the text without drafting."""
        self._text += new_tokens

    def propose(
        self, new_tokens: Sequence[int], count: int, sample: SampleToken, position: int
    ) -> list[int]:
        """Draft the next `count` tokens, or as many as the head can; see
        `DraftModelProposer.propose`."""
        self._text += new_tokens
        count = min(count, self.longest or count)
        drafted = mx.zeros((count,), dtype=mx.uint32)
        if self.head is not None and self._rewinder is not None:
            drafted = self._draft(self.head, self._rewinder, count, sample, position)[0]
        drafted = self.collective.broadcast_from(0, drafted.astype(mx.uint32))
        draft = [int(t) for t in np.asarray(drafted)]
        self._text += draft[:-1]
        return draft

    def _draft(
        self,
        head: DraftHead,
        rewinder: Rewinder,
        count: int,
        sample: SampleToken,
        position: int,
    ) -> mx.array:
        seen = len(self._text) - 1
        first = seen - len(self.states)
        if not self._caches or self._next < first or self._next >= seen:
            self._next, self._caches = first, head.make_caches()
        unread, self._next = seen - self._next, seen
        ids = mx.array([self._text[-unread:]])

        def choose(logits: mx.array, index: int) -> mx.array:
            logits = fit_vocabulary(logits, self.vocab_size)
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            return sample(logprobs, position + index)[None]

        return draft_tokens(
            head,
            ids,
            self.states.last(unread)[None],
            self._caches,
            count,
            choose,
            rewinder,
        )
