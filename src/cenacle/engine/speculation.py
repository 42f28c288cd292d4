"""Several tokens in one pass: a draft is guessed, the model checks it.

Owns: `Alone`, the generation of one request that runs by itself, with drafts where they pay.
Does not know: batches, steps.
Invariant: the answer is the one that is made without drafts, token for token, sampled or not. Each
position is drawn from the model's own distribution with that position's random numbers
(`sampler.Choice`), and a drafted token is kept if it is what was drawn. For a draft that is certain
of its tokens this is rejection sampling: kept with probability p(draft), else drawn from
the rest. All ranks check the same draft, and keep what rank 0 has drawn.
A pass of several tokens has as many exchanges as one of a single token: over slow links
this is worth most.
Next: `drafts.py`, where drafts come from; `batches.py`, which moves a request here and back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

from ..collective.base import Collective
from ..model.watch import Watch
from ..request import Request, TokenEvent
from .drafts import Lookup, Pace
from .sampler import Drawing

ALWAYS = 8  # tokens that are drafted where it need not pay
WAYS = ("auto", "off", "always")


@dataclass
class Answer:
    """A request and what was given of its answer."""

    request: Request
    drawing: Drawing
    given: list[int] = field(default_factory=list)
    lookup: Lookup | None = None

    @property
    def last(self) -> int:
        """The last token of the text so far."""
        return self.given[-1] if self.given else self.request.tokens[-1]

    @property
    def tokens(self) -> list[int]:
        """The text so far, the prompt included."""
        return [*self.request.tokens, *self.given]

    @property
    def length(self) -> int:
        """Number of `tokens`."""
        return len(self.request.tokens) + len(self.given)

    @property
    def left(self) -> int:
        """Most tokens that may still be given."""
        return self.request.max_tokens - len(self.given)

    @property
    def position(self) -> int:
        """Of the next token in the answer, whoever began it."""
        return self.request.answered + len(self.given)

    def give(self, token: int) -> TokenEvent:
        """The answer's next token."""
        self.given.append(token)
        finish = "length" if not self.left else None
        if token in self.request.stop_tokens:
            finish = "stop"
        return self.event(token, finish)

    def event(self, token: int, finish: str | None) -> TokenEvent:
        """What is said of a token that is in `given`."""
        return self.drawing.event(self.request.id, token, finish)


def can_go_back(model: nn.Module) -> bool:
    """Whether this model's caches can forget their last tokens at any time.

    A state has no last token, and a cache that rotates has overwritten what it would return to.
    """

    def plain(cache: Any) -> bool:
        inner = getattr(cache, "caches", None)
        if inner is not None:
            return all(map(plain, inner))
        return bool(cache.is_trimmable()) and not hasattr(cache, "max_size")

    return all(map(plain, make_prompt_cache(model)))


def _ints(x: mx.array) -> list[int]:
    return [int(i) for i in np.asarray(x)]


class Alone:
    """Generates for one request, which runs by itself.

    Between calls either all tokens but the last are in the cache (then a draft may be checked), or
    all are and the next one is being drawn (`_ahead`).

    Args:
        model: all its caches can forget tokens.
        collective: the ranks that must agree.
        watch: measured steps are slower than others, and are not counted.
        way: "auto" or "always".
        clock: seconds, replaced in tests.
    """

    def __init__(
        self,
        model: nn.Module,
        collective: Collective,
        watch: Watch,
        way: str = "auto",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model, self._collective, self._watch = model, collective, watch
        self._clock = clock
        self.pace = Pace(ALWAYS if way == "always" else None)
        self.answer: Answer | None = None
        self.caches: list[Any] = []
        self._ahead: mx.array | None = None
        self._last = 0.0  # when the last call ended
        self._steady = False  # whether it was one of a kind that is timed

    def wants(self, answer: Answer) -> bool:
        """Whether to take a request that runs alone, after a token of it: there is a draft for it.

        To be called for each of its tokens; the first call reads the text.
        """
        if answer.lookup is None:
            answer.lookup = Lookup(answer.tokens)
            self.pace.begin()
            self._steady = False
        else:
            fresh = answer.given[answer.lookup.length - len(answer.request.tokens) :]
            answer.lookup.add(fresh)
            self._steady = self._steady and len(fresh) == 1  # else others ran beside it
            self.pace.plain()
        self._tick(0)
        return bool(self.pace.limit) and answer.lookup.hopeful and answer.left > 1

    def take(self, answer: Answer, caches: list[Any]) -> None:
        """Go on with a request that `wants` was asked about.

        Args:
            caches: of this request alone, with all its tokens.
        """
        trim_prompt_cache(caches, 1)
        answer.drawing.forget()
        self.answer, self.caches, self._ahead, self._steady = answer, caches, None, False

    def leave(self) -> tuple[Answer, list[Any]]:
        """Give the request back, with caches of all its tokens but the last."""
        answer, caches = self.answer, self.caches
        assert answer is not None
        if self._ahead is not None:
            trim_prompt_cache(caches, 1)  # it will be drawn again, the same
        answer.drawing.forget()
        answer.drawing.choice.position = answer.position
        answer.lookup = None
        self.end()
        return answer, caches

    def end(self) -> None:
        """Forget the request."""
        self.answer, self.caches, self._ahead = None, [], None

    def next(self) -> list[TokenEvent]:
        """The request's next tokens, one at least."""
        with mx.stream(generation_stream):
            events = self._next()
        if events[-1].finish is not None:
            self.end()
        return events

    def _next(self) -> list[TokenEvent]:
        answer = self.answer
        assert answer is not None
        assert answer.lookup is not None
        events: list[TokenEvent] = []
        if self._ahead is not None:
            if not (self.pace.limit and answer.lookup.hopeful):
                return [self._give_ahead(answer)]
            # The draft must begin behind the token that is being drawn.
            events = [self._give(answer, _ints(self._ahead)[0])]
            self._ahead, self._steady = None, False
            if events[-1].finish is not None:
                return events
        draft = self._draft(answer)
        if draft:
            return [*events, *self._verify(answer, draft)]
        self._ahead = self._draw(mx.array([answer.last]), answer, answer.position)
        self._steady = False
        return events or [self._give_ahead(answer)]

    def _draft(self, answer: Answer) -> list[int]:
        """What may come next, cut before what cannot be kept."""
        assert answer.lookup is not None
        draft = answer.lookup.draft(min(self.pace.limit, answer.left - 1))
        ends = [at for at, token in enumerate(draft) if token in answer.request.stop_tokens]
        draft = draft[: ends[0] + 1] if ends else draft
        return draft[: answer.drawing.possible(answer.tokens, draft)]

    def _give(self, answer: Answer, token: int) -> TokenEvent:
        assert answer.lookup is not None
        answer.lookup.add([token])
        return answer.give(token)

    def _give_ahead(self, answer: Answer) -> TokenEvent:
        """The token that is being drawn; the one behind it is begun first."""
        drawn, self._ahead = self._ahead, None
        assert drawn is not None
        if answer.left > 1:
            self._ahead = self._draw(drawn, answer, answer.position + 1)
        event = self._give(answer, _ints(drawn)[0])
        self.pace.plain()
        self._tick(0)
        return event

    def _draw(self, token: mx.array, answer: Answer, position: int) -> mx.array:
        """Begin to draw what follows a token, [1] -> [1]; all before it is in the cache."""
        logits = self._model(token[None], cache=self.caches)[:, -1]
        context = None
        if answer.drawing.processors:
            context = mx.array(answer.tokens, dtype=mx.int32)
            if position > answer.position:
                context = mx.concatenate([context, token.astype(mx.int32)])
        chosen = self._collective.share(answer.drawing.draw(context, logits, position))
        mx.async_eval(chosen)
        return chosen

    def _verify(self, answer: Answer, draft: list[int]) -> list[TokenEvent]:
        """Let the model see the whole draft at once, and give what it agrees with and one more."""
        length, tokens = answer.length, None
        rows = self._model(mx.array([[answer.last, *draft]]), cache=self.caches)[0]
        if answer.drawing.processors:
            tokens = mx.array([*answer.tokens, *draft], dtype=mx.int32)
        drawn = answer.drawing.draw(tokens, rows, answer.position)
        proposal = mx.array([self.pace.propose()], dtype=drawn.dtype)
        *chosen, limit = _ints(self._collective.share(mx.concatenate([drawn, proposal])))
        accepted = 0
        while accepted < len(draft) and draft[accepted] == chosen[accepted]:
            accepted += 1
        events: list[TokenEvent] = []
        for token in chosen[: accepted + 1]:
            events.append(self._give(answer, token))
            if events[-1].finish is not None:
                break
        trim_prompt_cache(self.caches, len(draft) + 1 - len(events))
        answer.drawing.forget(length + accepted)
        self.pace.verified(len(draft), min(accepted, len(events)), limit)
        self._tick(len(draft))
        return events

    def _tick(self, drafted: int) -> None:
        """Time from the end of the last call to the end of this one, if both can be counted."""
        now = self._clock()
        measured = self._watch.running
        if self._steady and not measured:
            self.pace.took(drafted, now - self._last)
        self._last, self._steady = now, not measured
