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
Next: `drafts.py` and `drafting.py`, where drafts come from; `batches.py`, which moves a request
here and back.
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
from mlx_lm.models.cache import trim_prompt_cache

from ...collective.base import Collective
from ...core.request import Request, TokenEvent
from ...model.step_timer import StepTimer
from ..sampling.sampler import SamplingState
from .draft_model import NEAR, PIECE, DraftModelProposer
from .ngram import DraftLengthController, DraftStats, NgramProposer

ALWAYS = 8  # tokens that are drafted where it need not pay


@dataclass
class Generation:
    """A request and what was given of its answer."""

    request: Request
    drawing: SamplingState
    given: list[int] = field(default_factory=list)
    lookup: NgramProposer | None = None

    @property
    def last(self) -> int:
        """The last token of the text so far."""
        return self.given[-1] if self.given else self.request.tokens[-1]

    @property
    def tokens(self) -> list[int]:
        """The text so far, the prompt included."""
        return [*self.request.tokens, *self.given]

    def since(self, position: int) -> list[int]:
        """The tokens from a position on."""
        prompt = self.request.tokens
        if position < len(prompt):
            return [*prompt[position:], *self.given]
        return self.given[position - len(prompt) :]

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
        return self.request.resumed_tokens + len(self.given)

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


def _ints(x: mx.array) -> list[int]:
    return [int(i) for i in np.asarray(x)]


class SpeculativeDecoder:
    """Generates for one request, which runs by itself.

    Between calls either all tokens but the last are in the cache (then a draft may be checked), or
    all are and the next one is being drawn (`_ahead`). A draft comes from the text itself where it
    has one, which costs nothing, else from the draft model, if there is one; each at its own pace.

    Args:
        model: all its caches can forget tokens.
        collective: the ranks that must agree.
        watch: measured steps are slower than others, and are not counted.
        way: "auto" or "always".
        clock: seconds, replaced in tests.
        drafter: the draft model.
    """

    CHECKS = 64  # drafts after which some tokens are made without, to see what those take now
    GLANCE = 4  # tokens; also at first, where nothing is known

    def __init__(
        self,
        model: nn.Module,
        collective: Collective,
        watch: StepTimer,
        way: str = "auto",
        clock: Callable[[], float] = time.perf_counter,
        drafter: DraftModelProposer | None = None,
    ) -> None:
        self._model, self._collective, self._watch = model, collective, watch
        self._clock, self._drafter = clock, drafter
        fixed = ALWAYS if way == "always" else None
        self._by_text, self._by_model = DraftLengthController(fixed), DraftLengthController(fixed)
        self.answer: Generation | None = None
        self.caches: list[Any] = []
        self._ahead: mx.array | None = None
        self._last = 0.0  # when the last call ended
        self._steady = False  # whether it was one of a kind that is timed
        self._fixed = fixed is not None
        self._checks = 0  # since a token was made without a draft
        self._glance = 0 if self._fixed or drafter is None else self.GLANCE

    @property
    def drafts(self) -> DraftStats:
        """What became of all drafts so far."""
        text, model = self._by_text.drafts, self._by_model.drafts
        return text + model + DraftStats(by_model=model.drafted, by_model_accepted=model.accepted)

    def wants(self, answer: Generation) -> bool:
        """Whether to take a request that runs alone, after a token of it: there is a draft for it.

        To be called for each of its tokens; the first call reads the text.
        """
        if answer.lookup is None:
            answer.lookup = NgramProposer(answer.tokens)
            self._by_text.begin()
            self._by_model.begin()
            self._steady = False
        else:
            fresh = answer.since(answer.lookup.length)
            answer.lookup.add(fresh)
            self._steady = self._steady and len(fresh) == 1  # else others ran beside it
            self._without()
        self._tick(None, 0)
        return self._source(answer) is not None

    def take(self, answer: Generation, caches: list[Any]) -> None:
        """Go on with a request that `wants` was asked about.

        Args:
            caches: of this request alone, with all its tokens.
        """
        trim_prompt_cache(caches, 1)
        answer.drawing.forget()
        if self._drafter is not None:
            self._drafter.begin(answer.tokens)
        self.answer, self.caches, self._ahead, self._steady = answer, caches, None, False

    def leave(self) -> tuple[Generation, list[Any]]:
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
        events: list[TokenEvent] = []
        source = self._ready(answer)
        if self._ahead is not None:
            if source is None:
                return [self._give_ahead(answer)]
            # The draft must begin behind the token that is being drawn.
            events = [self._give(answer, _ints(self._ahead)[0])]
            self._ahead, self._steady = None, False
            if events[-1].finish is not None:
                return events
            source = self._ready(answer)
        if source is not None:
            asked = min(source.limit, answer.left - 1)
            draft = self._draft(answer, source, asked)
            if draft:
                return [*events, *self._verify(answer, draft, source, asked)]
        self._ahead = self._draw(mx.array([answer.last]), answer, answer.position)
        self._steady = False
        return events or [self._give_ahead(answer)]

    def _source(self, answer: Generation) -> DraftLengthController | None:
        """Where the next draft comes from, by its pace; None: there is none."""
        assert answer.lookup is not None
        if self._glance or answer.left < 2:
            return None
        if self._by_text.limit and answer.lookup.hopeful:
            return self._by_text
        model, limit = self._drafter, self._by_model.limit
        if model is not None and limit and model.reaches(answer.length + limit):
            return self._by_model
        return None

    def _ready(self, answer: Generation) -> DraftLengthController | None:
        """As `_source`, when the draft model has read the text; else it reads on."""
        source, model = self._source(answer), self._drafter
        if source is not self._by_model or model is None:
            return source
        fresh = answer.since(model.length)
        if len(fresh) > NEAR:
            model.read(fresh[:PIECE][: len(fresh) - 1])
            self._watch.lap("drafting")
            self._steady = False
        return source if answer.length - model.length <= NEAR else None

    def _draft(self, answer: Generation, source: DraftLengthController, most: int) -> list[int]:
        """What may come next, cut before what cannot be kept."""
        assert answer.lookup is not None
        if source is self._by_text:
            draft = answer.lookup.draft(most)
        else:
            assert self._drafter is not None
            fresh = answer.since(self._drafter.length)
            draw = answer.drawing.choice.draw
            draft = self._drafter.draft(fresh, most, draw, answer.position)
            self._watch.lap("drafting")
        ends = [at for at, token in enumerate(draft) if token in answer.request.stop_tokens]
        draft = draft[: ends[0] + 1] if ends else draft
        draft = draft[: answer.drawing.possible(answer.tokens, draft)]
        if not draft:
            self._kept(answer.length)
        return draft

    def _kept(self, length: int) -> None:
        """So many tokens of the text are certain: what was drafted behind them is wrong."""
        if self._drafter is not None:
            self._drafter.forget(length)

    def _give(self, answer: Generation, token: int) -> TokenEvent:
        assert answer.lookup is not None
        answer.lookup.add([token])
        return answer.give(token)

    def _give_ahead(self, answer: Generation) -> TokenEvent:
        """The token that is being drawn; the one behind it is begun first."""
        drawn, self._ahead = self._ahead, None
        assert drawn is not None
        if answer.left > 1:
            self._ahead = self._draw(drawn, answer, answer.position + 1)
        event = self._give(answer, _ints(drawn)[0])
        self._without()
        self._tick(None, 0)
        return event

    def _draw(self, token: mx.array, answer: Generation, position: int) -> mx.array:
        """Begin to draw what follows a token, [1] -> [1]; all before it is in the cache."""
        logits = self._model(token[None], cache=self.caches)[:, -1]
        context = None
        if answer.drawing.processors:
            context = mx.array(answer.tokens, dtype=mx.int32)
            if position > answer.position:
                context = mx.concatenate([context, token.astype(mx.int32)])
        chosen = self._collective.broadcast_from(0, answer.drawing.draw(context, logits, position))
        mx.async_eval(chosen)
        return chosen

    def _verify(
        self, answer: Generation, draft: list[int], source: DraftLengthController, asked: int
    ) -> list[TokenEvent]:
        """Let the model see the whole draft at once, and give what it agrees with and one more."""
        length, tokens = answer.length, None
        rows = self._model(mx.array([[answer.last, *draft]]), cache=self.caches)[0]
        if answer.drawing.processors:
            tokens = mx.array([*answer.tokens, *draft], dtype=mx.int32)
        drawn = answer.drawing.draw(tokens, rows, answer.position)
        # Copying must be better than what the draft model gives where there is nothing to copy.
        least = self._by_model.speed if source is self._by_text else 0.0
        proposal = mx.array([source.propose(least)], dtype=drawn.dtype)
        *chosen, limit = _ints(
            self._collective.broadcast_from(0, mx.concatenate([drawn, proposal]))
        )
        accepted = 0
        while accepted < len(draft) and draft[accepted] == chosen[accepted]:
            accepted += 1
        events: list[TokenEvent] = []
        for token in chosen[: accepted + 1]:
            events.append(self._give(answer, token))
            if events[-1].finish is not None:
                break
        trim_prompt_cache(self.caches, len(draft) + 1 - len(events))
        self._kept(length + accepted)
        answer.drawing.forget(length + accepted)
        source.verified(len(draft), min(accepted, len(events)), limit)
        other = self._by_model if source is self._by_text else self._by_text
        other.passed(len(events))
        self._checks += 1
        if self._checks >= self.CHECKS and not self._fixed:
            self._glance = self.GLANCE
        self._tick(source, asked)
        return events

    def _without(self) -> None:
        """A token was made without a draft."""
        self._by_text.passed()
        self._by_model.passed()
        self._checks, self._glance = 0, max(0, self._glance - 1)

    def _tick(self, source: DraftLengthController | None, drafted: int) -> None:
        """Time from the end of the last call to the end of this one, if both can be counted.

        Args:
            source: of the draft; None: there was none, which both are compared with.
        """
        now = self._clock()
        measured = self._watch.running
        if self._steady and not measured:
            for pace in (self._by_text, self._by_model) if source is None else (source,):
                pace.took(drafted, now - self._last)
        self._last, self._steady = now, not measured
