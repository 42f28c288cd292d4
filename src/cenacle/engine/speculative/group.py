"""Speculative decoding for several requests: each has a draft, and one pass verifies all.

Owns: `GroupDecoder`, which generates for all running requests while drafts pay.
Does not know: steps, mlx-lm's batch, prompts.
Invariant: as in `decoder.py`, each answer is what it would be without drafts, token for token. Rank
0 sends what it sampled for all requests, and the length of the next drafts, in one sum.
A draft comes from the request's own text where that was the better source for it, else from the
draft model or the checkpoint's own layer. Shorter drafts are padded: a pass costs what its longest
draft costs. After it each cache drops what its own request did not accept.
The clock decides as for one request, with times of this number of requests: their tokens choose
different experts, so that one more token for each may cost nearly a whole step, or hardly anything.
Next: `group_drafters.py`, the proposals; `engine/batch.py`, which moves requests here and back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generation_stream

from ...collective.base import Collective
from ...core.request import TokenEvent
from ...model.step_timer import StepTimer
from ...model.stream_caches import StreamCaches
from ...model.stream_support import has_stream_caches
from ..cache.ragged_cache import extract_sequence, keep_sequences, merge_ragged
from ..cache.state_rewinder import Rewinder
from .decoder import ALWAYS_TOKENS, Generation
from .group_drafters import GroupDrafter
from .ngram import DraftStats, GroupLengthController, NgramProposer


@dataclass
class _Text:
    """What is known of a request's text.

    Args:
        accepted, rejected: drafts from the text, older ones count less.
    """

    ngrams: NgramProposer
    accepted: float = 1.0
    rejected: float = 1.0

    @property
    def share(self) -> float:
        """Of tokens drafted from the text that were accepted, about."""
        return self.accepted / (self.accepted + self.rejected)

    def count(self, drafted: int, accepted: int) -> None:
        """Learn from a draft."""
        self.accepted = 0.9 * self.accepted + accepted
        self.rejected = 0.9 * self.rejected + (accepted < drafted)


class GroupDecoder:
    """Generates for several running requests.

    Between calls the caches hold all tokens of each request but the last.

    Args:
        model: with caches of several requests, see `ragged_cache.can_be_ragged`.
        collective: the ranks that must agree.
        timer: measured steps are slower, and do not count as measurements here.
        mode: "auto" or "always".
        clock: seconds; replaced in tests.
        drafter: None: drafts come only from the texts.
        rewinder: of the model; None: its caches can be cut off.
    """

    PLAIN_AFTER_PASSES = 128  # then plain decoding is timed again
    PLAIN_STEPS = 4  # to time it
    MAX_EMPTY_PASSES = 4  # without a draft for any request

    def __init__(
        self,
        model: nn.Module,
        collective: Collective,
        timer: StepTimer,
        mode: str = "auto",
        clock: Callable[[], float] = time.perf_counter,
        drafter: GroupDrafter | None = None,
        rewinder: Rewinder | None = None,
    ) -> None:
        self._model, self._collective, self._timer = model, collective, timer
        self._clock, self._drafter = clock, drafter
        self._rewinder = rewinder or Rewinder()
        self._always = mode == "always"
        self._control = GroupLengthController(ALWAYS_TOKENS if self._always else None)
        self._texts: dict[str, _Text] = {}
        self._model_source = _Text(NgramProposer(()))  # its counts only
        self.generations: list[Generation] = []
        self._caches: list[Any] = []
        self._uses_model = False  # whether the drafter was taken along
        self._stats_by_model = (0, 0)
        self._empty_passes = self._passes = self._plain_left = 0
        self._names: tuple[str, ...] = ()  # of the last step
        self._last_call_at = 0.0
        self._timed = self._is_first = False
        self._wants_release = False

    @property
    def draft_stats(self) -> DraftStats:
        """Of all drafts so far."""
        drafted, accepted = self._stats_by_model
        return self._control.stats + DraftStats(by_model=drafted, by_model_accepted=accepted)

    def runs(self, request_id: str) -> bool:
        """Whether it generates for this request."""
        return any(g.request.id == request_id for g in self.generations)

    def extract(self, request_id: str) -> list[Any]:
        """A copy of a request's caches."""
        (row,) = (i for i, g in enumerate(self.generations) if g.request.id == request_id)
        return extract_sequence(self._caches, row)

    def skip_timing(self) -> None:
        """The step before the next call does more than decode."""
        self._timed = False

    def should_take(self, generations: Sequence[Generation]) -> bool:
        """Whether to take all running requests, at least two, after a token of each.

        Call it after each of their steps.
        """
        self._observe(generations)
        self._control.on_undrafted()
        has_model = self._drafter is not None and self._drafter.read_ahead(generations)
        if not self._may_begin() or min(g.remaining for g in generations) < 2:
            return False
        self._uses_model = has_model
        proposals = sum(self._texts[g.request.id].ngrams.has_proposal for g in generations)
        return has_model or 2 * proposals >= len(generations)

    def _observe(self, generations: Sequence[Generation]) -> None:
        """Time a plain step, and read its tokens."""
        names = tuple(g.request.id for g in generations)
        self._control.select(len(names))
        now, measured = self._clock(), self._timer.running
        counts = self._timed and names == self._names and not measured
        if counts:
            self._control.on_step_time(0, now - self._last_call_at)
        if counts or self._control.is_timed:
            self._plain_left = max(0, self._plain_left - 1)
        self._last_call_at, self._timed, self._names = now, not measured, names
        for gone in set(self._texts) - set(names):
            self._forget(gone)
        for generation in generations:
            self._read_text(generation)

    def _read_text(self, generation: Generation) -> None:
        text = self._texts.get(generation.request.id)
        if text is None:
            self._texts[generation.request.id] = _Text(NgramProposer(generation.tokens))
        else:
            text.ngrams.extend(generation.tokens_from(text.ngrams.length))

    def _may_begin(self) -> bool:
        if self._always:
            return True
        return bool(self._control.limit and self._control.is_timed and not self._plain_left)

    def take(self, generations: Sequence[Generation], caches: Sequence[list[Any]]) -> None:
        """Continue requests, after `should_take`.

        Args:
            caches: of each request alone, with all its tokens but the last; they are used up.
        """
        for generation in generations:
            self._read_text(generation)
        self.generations, self._caches = list(generations), self._merge(caches)
        if self._drafter is not None and self._uses_model:
            self._drafter.take(generations)
        self._empty_passes = self._passes = 0
        self._is_first, self._wants_release = True, False
        self._control.begin(len(self.generations))

    def _merge(self, caches: Sequence[list[Any]]) -> list[Any]:
        if has_stream_caches(self._model):  # each keeps its own, and nothing is copied
            return [StreamCaches(layer) for layer in zip(*caches, strict=True)]
        return merge_ragged(caches)

    def release(self) -> list[tuple[Generation, list[Any]]]:
        """Give the requests back, each with caches of all its tokens but the last."""
        released = []
        for row, generation in enumerate(self.generations):
            generation.sampling.discard()
            generation.sampling.sampler.position = generation.position
            generation.ngrams = None
            released.append((generation, extract_sequence(self._caches, row)))
        if self._drafter is not None and self._uses_model:
            self._drafter.release(self.generations)
        self.clear()
        return released

    def clear(self) -> None:
        """Forget the requests."""
        self.generations, self._caches = [], []
        self._timed = False
        self._rewinder.clear()

    def remove(self, request_id: str) -> None:
        """Forget one request; unknown ids are ignored."""
        rows = [i for i, g in enumerate(self.generations) if g.request.id != request_id]
        if len(rows) < len(self.generations):
            self._keep(rows)
        self._forget(request_id)

    def forget_texts(self) -> None:
        """Forget what was read of requests that another decoder has taken."""
        for name in list(self._texts):
            self._forget(name)

    def _forget(self, request_id: str) -> None:
        self._texts.pop(request_id, None)
        if self._drafter is not None:
            self._drafter.forget(request_id)

    def _keep(self, rows: Sequence[int]) -> None:
        """Continue with some of the requests."""
        if not rows:
            if self._drafter is not None and self._uses_model:
                self._drafter.release([])
            self.clear()
            return
        self.generations = [self.generations[row] for row in rows]
        keep_sequences(self._caches, rows)
        if self._drafter is not None and self._uses_model:
            self._drafter.keep_rows(rows)
        self._control.keep_rows(rows)
        self._timed = False
        is_known = self._always or self._control.is_timed
        if len(rows) == 1 or not is_known:
            self._wants_release = True

    @property
    def wants_release(self) -> bool:
        """Whether plain decoding, or drafts for one request, are to go on."""
        return self._wants_release

    def decode(self) -> tuple[list[TokenEvent], dict[str, list[Any]]]:
        """The next tokens of each request, at least one.

        Returns:
            The tokens, and the caches of those requests that have ended, by their ids.
        """
        with mx.stream(generation_stream):
            return self._decode()

    def _decode(self) -> tuple[list[TokenEvent], dict[str, list[Any]]]:
        longest = max(g.remaining for g in self.generations) - 1
        count = min(self._control.limit, longest)
        drafts, by_model = self._propose(count)
        if any(drafts):
            self._empty_passes = 0
        else:
            count = 0
            self._empty_passes += 1
        events = self._verify(drafts, by_model)
        self._record_time(count, sum(map(len, events)) / len(events))
        self._passes += 1
        if not self._always and (
            not self._control.limit
            or self._passes >= self.PLAIN_AFTER_PASSES
            or self._empty_passes >= self.MAX_EMPTY_PASSES
        ):
            self._wants_release = True
            self._plain_left = self.PLAIN_STEPS
        ended = {
            g.request.id: extract_sequence(self._caches, row)
            for row, g in enumerate(self.generations)
            if events[row][-1].finish is not None
        }
        if ended:
            self._keep([i for i, own in enumerate(events) if own[-1].finish is None])
            for request_id in ended:
                self._forget(request_id)
        return [event for own in events for event in own], ended

    def _propose(self, count: int) -> tuple[list[list[int]], list[bool]]:
        """A draft of each request, cut before what cannot be accepted, and whose it is."""
        generations, drafter = self.generations, self._drafter
        drafts: list[list[int]] = [[] for _ in generations]
        if count < 1:
            return drafts, [False] * len(drafts)
        has_model = drafter is not None and self._uses_model and drafter.is_ready(count)
        from_text = []
        for generation in generations:
            text = self._texts[generation.request.id]
            is_better = not has_model or text.share >= self._model_source.share
            from_text.append(text.ngrams.has_proposal and is_better)
        if has_model and not all(from_text):
            assert drafter is not None
            drafts = drafter.propose(generations, count)
            self._timer.lap("drafting")
        drafts = [
            g.cut_draft(self._texts[g.request.id].ngrams.propose(count) if own else draft)
            for g, own, draft in zip(generations, from_text, drafts, strict=True)
        ]
        return drafts, [not own and has_model for own in from_text]

    def _verify(self, drafts: list[list[int]], by_model: list[bool]) -> list[list[TokenEvent]]:
        """Run the model on all drafts; the accepted tokens of each request and one more."""
        generations, longest = self.generations, max(map(len, drafts))
        lengths = [g.length for g in generations]
        rows = [
            [g.last_token, *draft, *[g.last_token] * (longest - len(draft))]
            for g, draft in zip(generations, drafts, strict=True)
        ]
        drafter = self._drafter if self._uses_model else None
        with (
            drafter.recording() if drafter is not None else nullcontext(),
            self._rewinder.recording(self._caches, longest + 1),
        ):
            logits = self._model(mx.array(rows), cache=self._caches)
        samples = [
            self._sample(g, draft, logits[row, : len(draft) + 1])
            for row, (g, draft) in enumerate(zip(generations, drafts, strict=True))
        ]
        next_limit = mx.array([self._control.propose()], dtype=samples[0].dtype)
        joined = self._collective.broadcast_from(0, mx.concatenate([*samples, next_limit]))
        *sampled, limit = [int(i) for i in np.asarray(joined)]
        events, results, agreed = [], [], []
        for generation, draft, length in zip(generations, drafts, lengths, strict=True):
            own, sampled = sampled[: len(draft) + 1], sampled[len(draft) + 1 :]
            accepted = next(
                (i for i, (a, b) in enumerate(zip(draft, own, strict=False)) if a != b), len(draft)
            )
            events.append(self._append(generation, own[: accepted + 1]))
            results.append((len(draft), min(accepted, len(events[-1]))))
            agreed.append(length + accepted)
            generation.sampling.discard(length + accepted)
        kept = [len(own) for own in events]
        dropped = [longest + 1 - count for count in kept]
        self._rewinder.drop(self._caches, dropped)
        if drafter is not None:
            drafter.on_verified(agreed, kept)
        self._count(results, by_model, limit)
        return events

    def _sample(self, generation: Generation, draft: list[int], logits: mx.array) -> mx.array:
        tokens = None
        if generation.sampling.processors:
            tokens = mx.array([*generation.tokens, *draft], dtype=mx.int32)
        return generation.sampling.sample(tokens, logits, generation.position)

    def _append(self, generation: Generation, tokens: Sequence[int]) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        for token in tokens:
            events.append(generation.append(token))
            if events[-1].finish is not None:
                break
        self._read_text(generation)
        return events

    def _count(
        self, results: Sequence[tuple[int, int]], by_model: Sequence[bool], limit: int
    ) -> None:
        self._control.on_group_verified(results, limit)
        drafted, accepted = self._stats_by_model
        for row, (own, kept) in enumerate(results):
            source = self._model_source
            if by_model[row]:
                drafted, accepted = drafted + own, accepted + kept
            else:
                source = self._texts[self.generations[row].request.id]
            if own:
                source.count(own, kept)
        self._stats_by_model = drafted, accepted

    def _record_time(self, count: int, tokens: float) -> None:
        now, measured = self._clock(), self._timer.running
        if self._timed and not measured:
            if self._is_first:
                self._control.on_first_pass(now - self._last_call_at, tokens)
            elif count:
                self._control.on_step_time(count, now - self._last_call_at, tokens)
            else:
                self._control.on_empty_pass(now - self._last_call_at)
        self._last_call_at, self._timed, self._names = now, not measured, ()
        self._is_first = False
