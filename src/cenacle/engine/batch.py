"""Running the model on several requests at once, with mlx-lm's caches.

Owns: the choice between mlx-lm's continuous batching and one-by-one generation, and both behind
one small interface.
Does not know: steps, ranks.
mlx-lm batches plain, rotating and state-space caches. Quantised and chunked ones (llama4) it cannot
merge, and of a cache that keeps the first tokens (`max_kv_size`) it forgets them on merging; there
each request keeps its own cache and takes its turn in every step.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import (
    BatchGenerator,
    StopSequences,
    generate_step,
    generation_stream,
    maybe_quantize_kv_cache,
)
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import LogitsProcessor

from ..collective.base import Collective
from ..core.request import Request, TokenEvent
from ..core.step import Page, PrefixReuse, PromptChunk
from ..model.step_timer import StepTimer
from .cache.kv_cache import SequenceCache, can_go_back, can_merge
from .sampling.sampler import SamplingState
from .speculative.decoder import Generation, SpeculativeDecoder
from .speculative.ngram import DraftStats

if TYPE_CHECKING:
    from .options import EngineOptions
    from .speculative.draft_model import DraftModelProposer


@dataclass
class PendingPrompt:
    """A request whose prompt has not been processed to its end, and the cache of what has."""

    request: Request
    drawing: SamplingState
    sequence: SequenceCache | None = None


class Batch(ABC):
    """The requests that are being generated.

    A prompt is processed in parts, which the scheduler orders: chunks alone (`prefill`), the last
    part, of at least one token, with those of others (`start`).

    `keeps`: whether caches of requests can be used again.
    """

    keeps = False

    def __init__(self, model: nn.Module, options: EngineOptions) -> None:
        self._model, self._options = model, options
        self._prompts: dict[str, PendingPrompt] = {}
        self._keeping = options.prefix_cache_gb != 0
        self._kept: dict[str, SequenceCache] = {}  # of requests that have ended
        self._marks: dict[str, dict[int, list[Any]]] = {}  # of those that are answered

    @property
    def drafts(self) -> DraftStats:
        """What became of all drafts so far."""
        return DraftStats()

    def insert(self, request: Request, drawing: SamplingState) -> None:
        """Begin a request; its prompt waits for its parts."""
        self._prompts[request.id] = PendingPrompt(request, drawing)

    def prefill(self, part: PromptChunk) -> None:
        """Process a chunk of a prompt, which is not its end; returns when it has been computed."""
        prompt, options = self._prompts[part.request_id], self._options
        if prompt.sequence is None:
            prompt.sequence = SequenceCache(make_prompt_cache(self._model, options.max_kv_size))
        caches = prompt.sequence.caches
        tokens = mx.array([prompt.request.tokens[part.begin : part.end]])
        with mx.stream(generation_stream):
            self._model(tokens, cache=caches)
            maybe_quantize_kv_cache(caches, 0, options.kv_group_size, options.kv_bits)
            mx.eval([cache.state for cache in caches])
            mx.clear_cache()
        if part.checkpoint:
            prompt.sequence.mark(part.end)

    def reuse(self, reuse: PrefixReuse) -> None:
        """Let a prompt begin with the beginning of another request's cache."""
        with mx.stream(generation_stream):
            self._prompts[reuse.request_id].sequence = self._find(reuse.source).cut(reuse.tokens)

    def _find(self, request_id: str) -> SequenceCache:
        if (kept := self._kept.get(request_id)) is not None:
            return kept
        sequence = self._prompts[request_id].sequence
        assert sequence is not None, "the front names only what has been begun"
        return sequence

    def page(self, source: str, page: Page, about: Mapping[str, str]) -> io.BytesIO:
        """A part of what is kept, see `Sequence.page`."""
        with mx.stream(generation_stream):
            return self._kept[source].page(page.begin, page.end, about)

    def read(self, name: str, pages: Iterable[tuple[int, Path]]) -> None:
        """Keep what files have, see `Sequence.read`."""
        with mx.stream(generation_stream):
            self._kept[name] = SequenceCache.read(pages)

    def drop(self, request_id: str) -> None:
        """Let go of what was kept; unknown ids are ignored."""
        self._kept.pop(request_id, None)

    @abstractmethod
    def start(self, part: PromptChunk) -> None:
        """The last part of a prompt: it is processed by the following calls of `next`."""

    def keep(self, request_id: str) -> None:
        """Keep the cache of a request that is to be removed; it may have ended by itself, and have
        been kept then."""
        if request_id not in self._kept:
            with mx.stream(generation_stream):
                self._kept[request_id] = self._find(request_id).settle()

    def remove(self, request_id: str) -> None:
        """End a request and free its cache; unknown ids are ignored (it may just have ended)."""
        self._prompts.pop(request_id, None)
        self._marks.pop(request_id, None)

    @abstractmethod
    def next(self) -> list[TokenEvent]:
        """One token for each request whose prompt is done; the last parts of others' prompts."""

    def wait(self) -> None:
        """Return when all that was begun has been computed: `next` leaves a token under way."""
        mx.synchronize(generation_stream)

    @abstractmethod
    def close(self) -> None:
        """Free every cache."""


def make_batch(
    model: nn.Module,
    options: EngineOptions,
    collective: Collective,
    watch: StepTimer,
    drafter: DraftModelProposer | None = None,
) -> Batch:
    """Continuous batching where mlx-lm can merge this model's caches, else one by one.

    Drafts only with the first, and where its caches can forget what was drafted in vain.
    """
    if not (options.plain_kv_cache and can_merge(model)):
        return SequentialBatch(model, options)
    alone = None
    if options.speculative != "off" and can_go_back(model):
        alone = SpeculativeDecoder(model, collective, watch, options.speculative, drafter=drafter)
    return ContinuousBatch(model, options, alone)


class ContinuousBatch(Batch):
    """mlx-lm's `BatchGenerator`; a request that runs by itself is `Alone`'s while drafts pay."""

    keeps = True

    def __init__(
        self, model: nn.Module, options: EngineOptions, alone: SpeculativeDecoder | None = None
    ) -> None:
        super().__init__(model, options)
        self._generator = BatchGenerator(
            model,
            prefill_step_size=options.prefill_chunk_size,
            completion_batch_size=options.max_batch_size,
            prefill_batch_size=options.max_batch_size,
        )
        self._answers: dict[int, Generation] = {}
        self._alone = alone

    @property
    def drafts(self) -> DraftStats:
        """See `Batch`."""
        return self._alone.drafts if self._alone is not None else super().drafts

    def start(self, part: PromptChunk) -> None:
        """See `Batch`."""
        if self._alone is not None and self._alone.answer is not None:
            answer, caches = self._alone.leave()
            self._generate(answer, answer.length - 1, caches)
        prompt = self._prompts.pop(part.request_id)
        sequence = prompt.sequence or SequenceCache([])
        self._marks[part.request_id] = sequence.marks
        self._generate(Generation(prompt.request, prompt.drawing), part.begin, sequence.caches)

    def _generate(self, answer: Generation, begin: int, caches: list[Any]) -> None:
        """Give a request to mlx-lm.

        Args:
            begin: how many of its tokens are in `caches`.
        """
        tokens, drawing = answer.tokens, answer.drawing
        (uid,) = self._generator.insert(
            [tokens[begin:]],
            max_tokens=[answer.left],
            caches=[caches or make_prompt_cache(self._model)],
            all_tokens=[tokens[:begin]],
            samplers=[drawing.choice],
            logits_processors=[drawing.processors],
            stop_sequences=[StopSequences([(t,) for t in answer.request.stop_tokens])],
        )
        self._answers[uid] = answer

    def _find(self, request_id: str) -> SequenceCache:
        alone = self._alone
        if alone is not None and alone.answer is not None and alone.answer.request.id == request_id:
            return SequenceCache(alone.caches)
        for uid, answer in self._answers.items():
            if answer.request.id == request_id:
                caches, _ = self._generator.extract_cache([uid])[uid]
                return SequenceCache(caches, self._marks[request_id])
        return super()._find(request_id)

    def _ended(self, event: TokenEvent, caches: list[Any]) -> None:
        """Keep the cache of an answer that is complete."""
        marks = self._marks.pop(event.request_id, {})
        if self._keeping:
            with mx.stream(generation_stream):
                self._kept[event.request_id] = SequenceCache(caches, marks).settle()

    def remove(self, request_id: str) -> None:
        """See `Batch`."""
        super().remove(request_id)
        uids = [uid for uid, known in self._answers.items() if known.request.id == request_id]
        for uid in uids:
            self._generator.remove([uid])
            del self._answers[uid]
        alone = self._alone
        if alone is not None and alone.answer is not None and alone.answer.request.id == request_id:
            alone.end()

    def next(self) -> list[TokenEvent]:
        """See `Batch`."""
        if self._alone is not None and self._alone.answer is not None:
            caches = self._alone.caches
            events = self._alone.next()
            if events[-1].finish is not None:
                self._ended(events[-1], caches)
            return events
        if not self._answers:
            return []
        _, responses = self._generator.next()
        events = []
        for r in responses:
            answer = self._answers[r.uid]
            answer.given.append(r.token)
            events.append(answer.event(r.token, r.finish_reason))
            if r.finish_reason is not None:
                del self._answers[r.uid]
                self._ended(events[-1], r.prompt_cache)
                if self._keeping:
                    self._kept[answer.request.id].mark(answer.length)
            elif self._alone is not None and len(self._answers) == 1 and self._alone.wants(answer):
                caches, _ = self._generator.remove([r.uid], return_prompt_caches=True)[r.uid]
                self._alone.take(self._answers.pop(r.uid), caches)
        return events

    def close(self) -> None:
        """See `Batch`."""
        self._prompts.clear()
        self._kept.clear()
        self._generator.remove(list(self._answers))
        self._generator.close()
        self._answers.clear()
        if self._alone is not None:
            self._alone.end()


class SequentialBatch(Batch):
    """mlx-lm's `generate_step`, one generator per request, each advanced once per step."""

    def __init__(self, model: nn.Module, options: EngineOptions) -> None:
        super().__init__(model, options)
        self._running: dict[str, tuple[PendingPrompt, Iterator[tuple[int, Any]]]] = {}
        self._given: dict[str, int] = {}

    def start(self, part: PromptChunk) -> None:
        """See `Batch`."""
        prompt = self._prompts.pop(part.request_id)
        self._running[part.request_id] = (prompt, self._generate(prompt, part.begin))
        self._given[part.request_id] = 0

    def remove(self, request_id: str) -> None:
        """See `Batch`."""
        super().remove(request_id)
        self._running.pop(request_id, None)
        self._given.pop(request_id, None)

    def next(self) -> list[TokenEvent]:
        """See `Batch`."""
        events: list[TokenEvent] = []
        for prompt, generator in list(self._running.values()):
            request = prompt.request
            token, _ = next(generator)
            self._given[request.id] += 1
            finish = None
            if self._given[request.id] >= request.max_tokens:
                finish = "length"
            if token in request.stop_tokens:
                finish = "stop"
            events.append(prompt.drawing.event(request.id, token, finish))
            if finish:
                self.remove(request.id)
        return events

    def _generate(self, prompt: PendingPrompt, begin: int) -> Iterator[tuple[int, Any]]:
        options, request = self._options, prompt.request
        before = mx.array(request.tokens[:begin], dtype=mx.int32)

        def behind(processor: LogitsProcessor) -> LogitsProcessor:
            return lambda tokens, logits: processor(mx.concatenate([before, tokens]), logits)

        return generate_step(
            mx.array(request.tokens[begin:]),
            self._model,
            max_tokens=request.max_tokens,
            sampler=prompt.drawing.choice,
            logits_processors=[behind(p) for p in prompt.drawing.processors],
            max_kv_size=options.max_kv_size,
            prompt_cache=prompt.sequence.caches if prompt.sequence else None,
            prefill_step_size=options.prefill_chunk_size,
            kv_bits=options.kv_bits,
            kv_group_size=options.kv_group_size,
            quantized_kv_start=0,
        )  # type: ignore[return-value]  # mlx-lm yields ints, its annotation says arrays

    def close(self) -> None:
        """See `Batch`."""
        self._prompts.clear()
        self._running.clear()
