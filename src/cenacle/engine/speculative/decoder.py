"""Speculative decoding: several tokens are drafted, and the model verifies them in one pass.

Owns: `SpeculativeDecoder`, which generates for a single running request, with drafts while they
pay; `Generation`, a request and its output so far.
Does not know: batches, steps.
Invariant: the output is the same as without drafts, token for token, also when sampling. Each
position is sampled from the model's own distribution with that position's random numbers
(`sampling.sampler.Sampler`), and a drafted token is accepted if it equals the sample. For a
deterministic draft this is rejection sampling: accepted with probability p(draft), else sampled
from the rest. All ranks verify the same draft, and keep what rank 0 sampled.
A pass of several tokens has as many all-reduces as a pass of one token, so drafts pay most over
slow links.
Next: `ngram.py` and `draft_model.py`, which propose drafts; `engine/batch.py`, which moves a
request here and back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generation_stream

from ...collective.base import Collective
from ...core.request import Request, TokenEvent
from ...model.step_timer import StepTimer
from ..cache.state_rewinder import Rewinder
from ..sampling.sampler import SamplingState
from .draft_model import MAX_UNREAD_TOKENS, READ_TOKENS, DraftModelProposer
from .mtp import MtpProposer
from .ngram import DraftLengthController, DraftStats, NgramProposer

ALWAYS_TOKENS = 8  # drafted per pass in mode "always"

Drafter = DraftModelProposer | MtpProposer


@dataclass
class Generation:
    """A request and its output so far.

    Args:
        sampling: of the request.
        output: generated tokens.
        ngrams: of the whole text; None: not built yet.
    """

    request: Request
    sampling: SamplingState
    output: list[int] = field(default_factory=list)
    ngrams: NgramProposer | None = None

    @property
    def last_token(self) -> int:
        """Of prompt and output."""
        return self.output[-1] if self.output else self.request.tokens[-1]

    @property
    def tokens(self) -> list[int]:
        """Prompt and output."""
        return [*self.request.tokens, *self.output]

    def tokens_from(self, position: int) -> list[int]:
        """`tokens[position:]`, without a copy of the prompt."""
        prompt = self.request.tokens
        if position < len(prompt):
            return [*prompt[position:], *self.output]
        return self.output[position - len(prompt) :]

    @property
    def length(self) -> int:
        """Number of `tokens`."""
        return len(self.request.tokens) + len(self.output)

    @property
    def remaining(self) -> int:
        """How many tokens may still be generated."""
        return self.request.max_tokens - len(self.output)

    @property
    def position(self) -> int:
        """Of the next token in the output, including output before a restart of the group."""
        return self.request.resumed_tokens + len(self.output)

    def cut_draft(self, draft: list[int]) -> list[int]:
        """A draft without what cannot be accepted: more than may still be generated, what follows
        a stop token, what breaks the grammar."""
        draft = draft[: self.remaining - 1]
        stop_tokens = self.request.stop_tokens
        end = next((i + 1 for i, token in enumerate(draft) if token in stop_tokens), len(draft))
        return draft[: self.sampling.allowed_prefix(self.tokens, draft[:end])]

    def ends_with(self, token: int) -> bool:
        """Whether a token that is sampled ends it."""
        matcher = self.sampling.matcher
        has_error = matcher is not None and bool(matcher.error)
        return has_error or self.remaining < 2 or token in self.request.stop_tokens

    def append(self, token: int) -> TokenEvent:
        """Append a generated token; returns its event."""
        self.output.append(token)
        finish = "length" if not self.remaining else None
        if token in self.request.stop_tokens:
            finish = "stop"
        return self.make_event(token, finish)

    def make_event(self, token: int, finish: str | None) -> TokenEvent:
        """The event of a token that is in `output`."""
        return self.sampling.make_event(self.request.id, token, finish)


class SpeculativeDecoder:
    """Generates for a single running request.

    Between calls the cache holds either all tokens but the last (a draft can be verified) or all of
    them, and the next one is being sampled (`_pending`). A draft comes from the text itself if
    possible, which costs nothing, else from the draft model; each has its own length controller.

    Args:
        model: all its caches can drop tokens of the last pass.
        collective: the ranks that must agree.
        timer: measured steps are slower, and do not count as measurements here.
        mode: "auto" or "always".
        clock: seconds; replaced in tests.
        draft_model: None: drafts come only from the text.
        rewinder: of the model; None: its caches can be cut off.
    """

    PLAIN_AFTER_DRAFTS = 64  # then plain decoding is timed again
    PLAIN_TOKENS = 4  # to time it

    def __init__(
        self,
        model: nn.Module,
        collective: Collective,
        timer: StepTimer,
        mode: str = "auto",
        clock: Callable[[], float] = time.perf_counter,
        draft_model: Drafter | None = None,
        rewinder: Rewinder | None = None,
    ) -> None:
        self._model, self._collective, self._timer = model, collective, timer
        self._clock, self._draft_model = clock, draft_model
        self._rewinder = rewinder or Rewinder()
        self._always = mode == "always"
        fixed = ALWAYS_TOKENS if self._always else None
        self._ngram_control = DraftLengthController(fixed)
        self._model_control = DraftLengthController(fixed)
        self.generation: Generation | None = None
        self.caches: list[Any] = []
        self.ends_unread = False  # whether the caches lack the last token of a request that ended
        self._pending: mx.array | None = None
        self._last_call_at = 0.0  # when the last call ended
        self._timed = False  # whether the time since then counts as a measurement
        self._drafts_in_row = 0  # since a token was generated without a draft
        self._plain_left = 0 if self._always or draft_model is None else self.PLAIN_TOKENS

    @property
    def draft_stats(self) -> DraftStats:
        """Of all drafts so far."""
        ngram, model = self._ngram_control.stats, self._model_control.stats
        return ngram + model + DraftStats(by_model=model.drafted, by_model_accepted=model.accepted)

    def runs(self, request_id: str) -> bool:
        """Whether it generates for this request."""
        return self.generation is not None and self.generation.request.id == request_id

    def should_take(self, generation: Generation) -> bool:
        """Whether to take a single running request, after one of its tokens: there is a draft.

        Call it for each of its tokens; the first call reads the text.
        """
        if generation.ngrams is None:
            generation.ngrams = NgramProposer(generation.tokens)
            self._ngram_control.reset()
            self._model_control.reset(is_same_source=True)
            self._timed = False
        else:
            new_tokens = generation.tokens_from(generation.ngrams.length)
            generation.ngrams.extend(new_tokens)
            self._timed = self._timed and len(new_tokens) == 1  # else other requests ran beside it
            self._count_plain_token()
        self._record_time(None, 0)
        return self._select_source(generation) is not None

    def take(self, generation: Generation, caches: list[Any]) -> None:
        """Continue a request, after `should_take`.

        Args:
            caches: of this request alone, with all its tokens but the last.
        """
        assert generation.ngrams is not None
        generation.ngrams.extend(generation.tokens_from(generation.ngrams.length))
        if self._draft_model is not None:
            self._draft_model.reset(generation.tokens)
        self.generation, self.caches = generation, caches
        self._pending, self._timed = None, False

    def release(self) -> tuple[Generation, list[Any]]:
        """Give the request back, with caches of all its tokens but the last."""
        generation, caches = self.generation, self.caches
        assert generation is not None
        if self._pending is not None:
            self._drop(1)  # it will be sampled again, with the same result
        generation.sampling.discard()
        generation.sampling.sampler.position = generation.position
        generation.ngrams = None
        self.clear()
        return generation, caches

    def clear(self) -> None:
        """Forget the request."""
        self.generation, self.caches, self._pending = None, [], None
        self._rewinder.clear()

    def decode(self) -> list[TokenEvent]:
        """The request's next tokens, at least one."""
        assert self.generation is not None
        with mx.stream(generation_stream):
            events = self._decode(self.generation)
        if events[-1].finish is not None:
            self.ends_unread = self._pending is None
            self.clear()
        return events

    def _decode(self, generation: Generation) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        source = self._ready_source(generation)
        if self._pending is not None:
            if source is None:
                return [self._finish_pending(generation)]
            # The draft must begin after the token that is being sampled.
            events = [self._append(generation, _to_ints(self._pending)[0])]
            self._pending, self._timed = None, False
            if events[-1].finish is not None:
                return events
            source = self._ready_source(generation)
        if source is not None:
            count = min(source.limit, generation.remaining - 1)
            draft = self._propose(generation, source, count)
            if draft:
                return [*events, *self._verify(generation, draft, source, count)]
        self._pending = self._start_sampling(
            mx.array([generation.last_token]), generation, generation.position
        )
        self._timed = False
        return events or [self._finish_pending(generation)]

    def _select_source(self, generation: Generation) -> DraftLengthController | None:
        """Where the next draft comes from, by its controller; None: there is no draft."""
        assert generation.ngrams is not None
        if self._plain_left or generation.remaining < 2:
            return None
        if self._ngram_control.limit and generation.ngrams.has_proposal:
            return self._ngram_control
        model, limit = self._draft_model, self._model_control.limit
        if model is not None and limit and model.fits_context(generation.length + limit):
            return self._model_control
        return None

    def _ready_source(self, generation: Generation) -> DraftLengthController | None:
        """`_select_source`, but None while the draft model still reads the text."""
        source, model = self._select_source(generation), self._draft_model
        if source is not self._model_control or model is None:
            return source
        if not model.is_ready:
            return None
        unread = generation.tokens_from(model.length)
        if len(unread) > MAX_UNREAD_TOKENS:
            model.read(unread[:READ_TOKENS][: len(unread) - 1])
            self._timer.lap("drafting")
            self._timed = False
        return source if generation.length - model.length <= MAX_UNREAD_TOKENS else None

    def _propose(
        self, generation: Generation, source: DraftLengthController, count: int
    ) -> list[int]:
        """A draft, cut before what cannot be accepted."""
        assert generation.ngrams is not None
        if source is self._ngram_control:
            draft = generation.ngrams.propose(count)
        else:
            assert self._draft_model is not None
            unread = generation.tokens_from(self._draft_model.length)
            sample = generation.sampling.sampler.sample
            draft = self._draft_model.propose(unread, count, sample, generation.position)
            self._timer.lap("drafting")
        draft = generation.cut_draft(draft)
        if not draft:
            self._truncate_draft_model(generation.length)
        return draft

    def _truncate_draft_model(self, length: int) -> None:
        if self._draft_model is not None:
            self._draft_model.truncate(length)

    def _drop(self, count: int) -> None:
        """Drop the last tokens of the last pass."""
        self._rewinder.drop(self.caches, [count])
        if self._draft_model is not None:
            self._draft_model.drop_states(count)

    def _append(self, generation: Generation, token: int) -> TokenEvent:
        assert generation.ngrams is not None
        generation.ngrams.extend([token])
        return generation.append(token)

    def _finish_pending(self, generation: Generation) -> TokenEvent:
        """Wait for the token that is being sampled; the next one is started first."""
        token, self._pending = self._pending, None
        assert token is not None
        if generation.remaining > 1:
            self._pending = self._start_sampling(token, generation, generation.position + 1)
        event = self._append(generation, _to_ints(token)[0])
        self._count_plain_token()
        self._record_time(None, 0)
        return event

    def _run_model(self, ids: mx.array) -> mx.array:
        drafter = self._draft_model
        with (
            drafter.recording() if drafter is not None else nullcontext(),
            self._rewinder.recording(self.caches, ids.shape[1]),
        ):
            logits: mx.array = self._model(ids, cache=self.caches)
        return logits

    def _start_sampling(self, token: mx.array, generation: Generation, position: int) -> mx.array:
        """Start to sample what follows a token, [1] -> [1]; the cache holds all before it."""
        logits = self._run_model(token[None])[:, -1]
        tokens = None
        if generation.sampling.processors:
            tokens = mx.array(generation.tokens, dtype=mx.int32)
            if position > generation.position:
                tokens = mx.concatenate([tokens, token.astype(mx.int32)])
        sampled = generation.sampling.sample(tokens, logits, position)
        sampled = self._collective.broadcast_from(0, sampled)
        mx.async_eval(sampled)
        return sampled

    def _verify(
        self,
        generation: Generation,
        draft: list[int],
        source: DraftLengthController,
        proposed: int,
    ) -> list[TokenEvent]:
        """Run the model on the whole draft; returns the accepted tokens and one more."""
        length, tokens = generation.length, None
        logits = self._run_model(mx.array([[generation.last_token, *draft]]))[0]
        if generation.sampling.processors:
            tokens = mx.array([*generation.tokens, *draft], dtype=mx.int32)
        samples = generation.sampling.sample(tokens, logits, generation.position)
        # Drafts from the text must beat the draft model.
        other_speed = self._model_control.tokens_per_s if source is self._ngram_control else 0.0
        next_limit = mx.array([source.propose(other_speed)], dtype=samples.dtype)
        *sampled, limit = _to_ints(
            self._collective.broadcast_from(0, mx.concatenate([samples, next_limit]))
        )
        accepted = 0
        while accepted < len(draft) and draft[accepted] == sampled[accepted]:
            accepted += 1
        events: list[TokenEvent] = []
        for token in sampled[: accepted + 1]:
            events.append(self._append(generation, token))
            if events[-1].finish is not None:
                break
        self._drop(len(draft) + 1 - len(events))
        self._truncate_draft_model(length + accepted)
        generation.sampling.discard(length + accepted)
        source.on_verified(len(draft), min(accepted, len(events)), limit)
        self._other(source).on_undrafted(len(events))
        self._drafts_in_row += 1
        if self._drafts_in_row >= self.PLAIN_AFTER_DRAFTS and not self._always:
            self._plain_left = self.PLAIN_TOKENS
        self._record_time(source, proposed, len(events))
        return events

    def _other(self, source: DraftLengthController) -> DraftLengthController:
        return self._model_control if source is self._ngram_control else self._ngram_control

    def _count_plain_token(self) -> None:
        self._ngram_control.on_undrafted()
        self._model_control.on_undrafted()
        self._drafts_in_row, self._plain_left = 0, max(0, self._plain_left - 1)

    def _record_time(
        self, source: DraftLengthController | None, drafted: int, tokens: int = 1
    ) -> None:
        """Record the time since the end of the last call, if both calls count.

        Args:
            source: of the draft; None: plain decoding, which both are compared with.
            tokens: that the call gave.
        """
        now = self._clock()
        measured = self._timer.running
        if self._timed and not measured:
            controls = (self._ngram_control, self._model_control) if source is None else (source,)
            for control in controls:
                control.on_step_time(drafted, now - self._last_call_at, tokens)
        self._last_call_at, self._timed = now, not measured


def _to_ints(x: mx.array) -> list[int]:
    return [int(i) for i in np.asarray(x)]
