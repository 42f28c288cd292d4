"""Runs the model on several requests at once, with mlx-lm's caches.

Owns: `ContinuousBatch` (mlx-lm's continuous batching) and `SequentialBatch` (one request after the
other), behind one interface, and the choice between them.
Does not know: steps, ranks.
With `StreamCaches` (CPUs, plain attention) streams of any lengths share passes unpadded, and short
chunks of prompts with them. mlx-lm batches plain, rotating and state-space caches. It cannot merge
quantized and chunked ones (llama4), and a merged cache of limited size (`max_kv_size`) forgets its
first tokens. In these cases each request keeps its own cache and takes its turn in every step.
Next: `speculative/decoder.py`, which takes over a single running request, and
`speculative/group.py`, which takes over several.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
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
from ..core.image import position_shift
from ..core.request import PromptLogprobs, Request, TokenEvent
from ..core.step import Page, PrefixReuse, PromptChunk
from ..model import position_caches
from ..model.families import Batching
from ..model.step_timer import StepTimer
from ..model.stream_caches import SharedPass, into_streams, out_of_streams
from ..model.stream_support import has_stream_caches
from .cache.kv_cache import SequenceCache, can_merge, can_reuse, has_exact_ends
from .cache.ragged_cache import can_be_ragged
from .cache.state_rewinder import can_drop, make_rewinder
from .sampling.prompt_logprobs import PART_TOKENS, PromptScores
from .sampling.sampler import SamplingState
from .speculative.decoder import Generation, SpeculativeDecoder
from .speculative.group import GroupDecoder
from .speculative.group_drafters import make_group_drafter
from .speculative.ngram import DraftStats

if TYPE_CHECKING:
    from .options import EngineOptions
    from .prompt_vision import PromptVision
    from .speculative.decoder import Drafter


SHARED_TOKENS = 64  # longest chunk of a prompt that is read in a pass of streams


@dataclass
class PendingPrompt:
    """A request whose prompt is not processed to its end, and the cache so far."""

    request: Request
    sampling: SamplingState
    sequence: SequenceCache | None = None
    features: dict[int, mx.array] = field(default_factory=dict)  # of its images, by their index


class Batch(ABC):
    """The requests of one rank.

    A prompt is processed in chunks, which the scheduler orders: all but the last alone (`prefill`),
    the last one, of at least one token, together with those of others (`start`).

    `reusable_caches`: whether caches can be taken out and used for other requests.
    `prompt_logprobs`: of the parts of prompts that were processed; the caller takes them out.
    """

    reusable_caches = False

    def __init__(
        self, model: nn.Module, options: EngineOptions, vision: PromptVision | None = None
    ) -> None:
        self._model, self._options, self._vision = model, options, vision
        self._prompts: dict[str, PendingPrompt] = {}
        self._prefix_cache_enabled = options.prefix_cache_gb != 0 and self.reusable_caches
        self._retained: dict[str, SequenceCache] = {}  # of ended requests
        self._checkpoints: dict[str, dict[int, list[Any]]] = {}  # of generating requests
        self.prompt_logprobs: list[PromptLogprobs] = []

    @property
    def draft_stats(self) -> DraftStats:
        """Of all drafts so far."""
        return DraftStats()

    def insert(self, request: Request, sampling: SamplingState) -> None:
        """Add a request, without processing its prompt."""
        self._prompts[request.id] = PendingPrompt(request, sampling)

    def prefill(self, chunk: PromptChunk) -> None:
        """Process a chunk that is not the last of its prompt; returns when it is computed."""
        prompt, options = self._prompts[chunk.request_id], self._options
        if prompt.sequence is None:
            prompt.sequence = SequenceCache(make_prompt_cache(self._model, options.max_kv_size))
        # Logits are large: they are computed for a few tokens at once, if they are computed.
        has_scores = prompt.request.prompt_logprobs is not None
        size = PART_TOKENS if has_scores else chunk.end - chunk.begin
        for begin in range(chunk.begin, chunk.end, size):
            end = min(begin + size, chunk.end)
            self._prefill_part(prompt, prompt.sequence.caches, begin, end)
        if chunk.checkpoint:
            prompt.sequence.checkpoint(chunk.end)

    def _prefill_part(self, prompt: PendingPrompt, caches: list[Any], begin: int, end: int) -> None:
        request, options = prompt.request, self._options
        with mx.stream(generation_stream):
            if self._vision is not None:
                logits = self._vision.process(request, begin, end, caches, prompt.features)
            else:
                logits = self._model(mx.array([request.tokens[begin:end]]), cache=caches)
            maybe_quantize_kv_cache(caches, 0, options.kv_group_size, options.kv_bits)
            if request.prompt_logprobs is None:
                mx.eval([cache.state for cache in caches])
            else:  # on every rank, as the output head may need an all-reduce
                following = request.tokens[begin + 1 : end + 1]
                scores = PromptScores(logits[0], following, request.prompt_logprobs)
                mx.eval([cache.state for cache in caches], scores.arrays)
                self.prompt_logprobs.append(scores.read(request.id, begin + 1))
            mx.clear_cache()

    def score(self, chunk: PromptChunk) -> PromptChunk:
        """What is left of a prompt's last chunk for `start`: if log-probabilities of the prompt are
        wanted, or it has images, all but the last token are processed here."""
        last, request = chunk.end - 1, self._prompts[chunk.request_id].request
        has_image = any(image.end > chunk.begin for image in request.images)
        if chunk.begin == last or not (has_image or request.prompt_logprobs is not None):
            return chunk
        self.prefill(replace(chunk, end=last))
        return replace(chunk, begin=last)

    @abstractmethod
    def start(self, chunk: PromptChunk) -> None:
        """Add the last chunk of a prompt; the next calls of `decode` process it."""

    @abstractmethod
    def decode(self) -> list[TokenEvent]:
        """Generate a token for each request whose prompt is processed; process last chunks."""

    def remove(self, request_id: str) -> None:
        """End a request and free its cache; unknown ids are ignored (it may just have ended)."""
        self._prompts.pop(request_id, None)
        if self._vision is not None:
            self._vision.forget(request_id)
        self._checkpoints.pop(request_id, None)

    def synchronize(self) -> None:
        """Wait for all computation, such as the token that `decode` leaves in progress."""
        mx.synchronize(generation_stream)

    @abstractmethod
    def close(self) -> None:
        """Free every cache."""

    # Prefix cache

    def reuse(self, reuse: PrefixReuse) -> None:
        """Let a prompt start from the beginning of another cache."""
        with mx.stream(generation_stream):
            sequence = self._find_sequence(reuse.source).truncate(reuse.tokens)
            self._prompts[reuse.request_id].sequence = sequence

    def retain(self, request_id: str) -> None:
        """Retain the cache of a request that is about to be removed, unless it has ended."""
        if request_id not in self._retained:
            with mx.stream(generation_stream):
                self._retained[request_id] = self._find_sequence(request_id).synchronize()

    def evict(self, name: str) -> None:
        """Free a retained cache; unknown names are ignored."""
        self._retained.pop(name, None)

    def make_page(self, source: str, page: Page, metadata: Mapping[str, str]) -> io.BytesIO:
        """Part of a retained cache, see `SequenceCache.to_page`."""
        with mx.stream(generation_stream):
            return self._retained[source].to_page(page.begin, page.end, metadata)

    def load_pages(self, name: str, pages: Iterable[tuple[int, Path]]) -> None:
        """Retain a cache from files, see `SequenceCache.from_pages`."""
        with mx.stream(generation_stream):
            self._retained[name] = SequenceCache.from_pages(pages)

    def _find_sequence(self, name: str) -> SequenceCache:
        if (retained := self._retained.get(name)) is not None:
            return retained
        sequence = self._prompts[name].sequence
        assert sequence is not None, "the scheduler names only caches that exist"
        return sequence


def make_batch(
    model: nn.Module,
    options: EngineOptions,
    collective: Collective,
    timer: StepTimer,
    draft_model: Drafter | None = None,
    batching: Batching = Batching.PADDED,
    vision: PromptVision | None = None,
) -> Batch:
    """Continuous batching where the model can be batched, else one by one.

    Drafts are possible only with the former, and if the caches can drop rejected tokens.
    """
    batching = find_batching(model, batching)
    if batching is Batching.ONE_BY_ONE or not options.plain_kv_cache:
        return SequentialBatch(model, options, vision)
    decoder = group = None
    if options.speculative != "off" and can_drop(model):
        mode, rewinder = options.speculative, make_rewinder(model)
        decoder = SpeculativeDecoder(
            model, collective, timer, mode, draft_model=draft_model, rewinder=rewinder
        )
        if can_be_ragged(model):
            drafter = make_group_drafter(draft_model) if draft_model is not None else None
            group = GroupDecoder(model, collective, timer, mode, drafter=drafter, rewinder=rewinder)
    return ContinuousBatch(model, options, decoder, batching, vision, group)


def find_batching(model: nn.Module, batching: Batching) -> Batching:
    """What the layers can take (`batching`), where mlx-lm can merge the caches."""
    return batching if can_merge(model) else Batching.ONE_BY_ONE


class ContinuousBatch(Batch):
    """mlx-lm's `BatchGenerator`; while drafts pay, a `SpeculativeDecoder` takes a single request,
    and a `GroupDecoder` several."""

    def __init__(
        self,
        model: nn.Module,
        options: EngineOptions,
        decoder: SpeculativeDecoder | None = None,
        batching: Batching = Batching.PADDED,
        vision: PromptVision | None = None,
        group: GroupDecoder | None = None,
    ) -> None:
        self.reusable_caches = can_reuse(model)
        super().__init__(model, options, vision)
        # Images shift positions, which mlx-lm's batch caches were taught.
        self._streams = SharedPass(model) if has_stream_caches(model) and vision is None else None
        self._generator = BatchGenerator(
            self._streams or model,  # type: ignore[arg-type]  # it is only called
            prefill_step_size=options.prefill_chunk_size,
            completion_batch_size=options.max_batch_size,
            prefill_batch_size=options.max_batch_size if batching is Batching.PADDED else 1,
        )
        self._generations: dict[int, Generation] = {}  # by mlx-lm's uid
        self._decoder, self._group = decoder, group

    @property
    def draft_stats(self) -> DraftStats:
        """See `Batch`."""
        stats = super().draft_stats
        for decoder in (self._decoder, self._group):
            if decoder is not None:
                stats += decoder.draft_stats
        return stats

    def prefill(self, chunk: PromptChunk) -> None:
        """See `Batch`; beside streams a short chunk is read in their next pass."""
        if self._group is not None:
            self._group.skip_timing()
        prompt, streams = self._prompts[chunk.request_id], self._streams
        alone = not self._generations or chunk.end - chunk.begin > SHARED_TOKENS
        if (
            streams is None
            or alone
            or chunk.checkpoint
            or prompt.request.prompt_logprobs is not None
        ):
            super().prefill(chunk)
            return
        if prompt.sequence is None:
            prompt.sequence = SequenceCache(make_prompt_cache(self._model))
        streams.add(prompt.request.tokens[chunk.begin : chunk.end], prompt.sequence.caches)

    def start(self, chunk: PromptChunk) -> None:
        """See `Batch`."""
        self._read_waiting_chunks()
        if self._decoder is not None and self._decoder.generation is not None:
            generation, caches = self._decoder.release()
            self._insert_into_generator(generation, generation.length - 1, caches)
        self._release_group()
        prompt = self._prompts.pop(chunk.request_id)
        sequence = prompt.sequence or SequenceCache([])
        self._checkpoints[chunk.request_id] = sequence.checkpoints
        generation = Generation(prompt.request, prompt.sampling)
        self._insert_into_generator(generation, chunk.begin, sequence.caches)

    def _release_group(self) -> None:
        if self._group is None or not self._group.generations:
            return
        with mx.stream(generation_stream):
            released = self._group.release()
        for generation, caches in released:
            self._insert_into_generator(generation, generation.length - 1, caches)

    def _insert_into_generator(
        self, generation: Generation, cached_tokens: int, caches: list[Any]
    ) -> None:
        tokens, sampling = generation.tokens, generation.sampling
        caches = caches or make_prompt_cache(self._model)
        if self._vision is not None:
            shift = position_shift(generation.request.images, cached_tokens)
            caches = position_caches.into_batch(caches, shift)
        if self._streams is not None:
            caches = into_streams(caches)
        (uid,) = self._generator.insert(
            [tokens[cached_tokens:]],
            max_tokens=[generation.remaining],
            caches=[caches],
            all_tokens=[tokens[:cached_tokens]],
            samplers=[sampling.sampler],
            logits_processors=[sampling.processors],
            stop_sequences=[StopSequences([(t,) for t in generation.request.stop_tokens])],
        )
        self._generations[uid] = generation

    def _find_sequence(self, name: str) -> SequenceCache:
        if self._decoder is not None and self._decoder.runs(name):
            return SequenceCache(self._decoder.caches, self._checkpoints[name])
        if self._group is not None and self._group.runs(name):
            return SequenceCache(self._group.extract(name), self._checkpoints[name])
        for uid, generation in self._generations.items():
            if generation.request.id == name:
                caches, _ = self._generator.extract_cache([uid])[uid]
                caches = out_of_streams(position_caches.out_of_batch(caches))
                return SequenceCache(caches, self._checkpoints[name])
        return super()._find_sequence(name)

    def decode(self) -> list[TokenEvent]:
        """See `Batch`."""
        if self._decoder is not None and self._decoder.generation is not None:
            generation, caches = self._decoder.generation, self._decoder.caches
            events = self._decoder.decode()
            if events[-1].finish is not None:
                self._on_drafted_to_end(generation, caches, is_unread=self._decoder.ends_unread)
            return events
        if self._group is not None and self._group.generations:
            if not self._group.wants_release:
                return self._decode_group(self._group)
            self._release_group()
        if not self._generations:
            return []
        _, responses = self._generator.next()
        self._read_waiting_chunks()
        events = []
        for response in responses:
            generation = self._generations[response.uid]
            generation.output.append(response.token)
            events.append(generation.make_event(response.token, response.finish_reason))
            if response.finish_reason is not None:
                del self._generations[response.uid]
                request_id = generation.request.id
                self._on_finished(request_id, response.prompt_cache)
                if self._prefix_cache_enabled:
                    self._retained[request_id].checkpoint(generation.length)
            else:
                events += self._offer_to_decoder(generation)
        if self._group is not None and len(self._generations) > 1:
            events += self._offer_to_group(self._group, {response.uid for response in responses})
        return events

    def _decode_group(self, group: GroupDecoder) -> list[TokenEvent]:
        generations = {g.request.id: g for g in group.generations}
        events, ended = group.decode()
        for request_id, caches in ended.items():
            self._on_drafted_to_end(generations[request_id], caches, is_unread=True)
        return events

    def _offer_to_group(self, group: GroupDecoder, uids: set[int]) -> list[TokenEvent]:
        """
        Args:
            uids: of requests that a token was just generated for.

        Returns:
            More tokens.
        """
        running = list(self._generations.values())
        if not uids.issuperset(self._generations) or any(g.request.images for g in running):
            group.skip_timing()  # one begins, or has positions of its own
        elif group.should_take(running) and (taken := self._take_out()) is not None:
            caches, events = taken
            with mx.stream(generation_stream):
                group.take(running, caches)
            return events
        return []

    def _take_out(self) -> tuple[list[list[Any]], list[TokenEvent]] | None:
        """Take all requests out of mlx-lm's batch; None: one ends with its next token.

        Returns:
            The caches of each, with all tokens but the last: that was already being sampled, and is
            generated now.
        """
        uids = list(self._generations)
        batch = self._generator._generation_batch
        with mx.stream(generation_stream):
            sampled = dict(zip(batch.uids, batch._next_tokens.tolist(), strict=True))
            if any(g.ends_with(sampled[uid]) for uid, g in self._generations.items()):
                return None
            events = [g.append(sampled[uid]) for uid, g in self._generations.items()]
            taken = self._generator.remove(uids, return_prompt_caches=True)
        self._generations.clear()
        return [taken[uid][0] for uid in uids], events

    def _read_waiting_chunks(self) -> None:
        """In a pass of their own: prompts go on, or no stream had a pass."""
        if self._streams is not None and self._streams.has_chunks:
            with mx.stream(generation_stream):
                self._streams.read()

    def _offer_to_decoder(self, generation: Generation) -> list[TokenEvent]:
        """The request's next token, if it is taken."""
        decoder = self._decoder
        if decoder is None or len(self._generations) != 1 or not decoder.should_take(generation):
            return []
        if (taken := self._take_out()) is None:
            return []
        (caches,), events = taken
        decoder.take(generation, out_of_streams(caches))
        if self._group is not None:
            self._group.forget_texts()
        return events

    def _on_drafted_to_end(
        self, generation: Generation, caches: list[Any], *, is_unread: bool
    ) -> None:
        """
        Args:
            is_unread: the caches lack the last token.
        """
        request_id = generation.request.id
        is_exact = self._prefix_cache_enabled and has_exact_ends(caches)
        if is_exact and is_unread:  # they can be kept as they are at the end alone
            with mx.stream(generation_stream):
                self._model(mx.array([[generation.last_token]]), cache=caches)
        self._on_finished(request_id, caches)
        if is_exact:
            self._retained[request_id].checkpoint(generation.length)

    def _on_finished(self, request_id: str, caches: list[Any]) -> None:
        checkpoints = self._checkpoints.pop(request_id, {})
        if self._prefix_cache_enabled:
            with mx.stream(generation_stream):
                sequence = SequenceCache(caches, checkpoints).synchronize()
            self._retained[request_id] = sequence

    def remove(self, request_id: str) -> None:
        """See `Batch`."""
        super().remove(request_id)
        uids = [uid for uid, g in self._generations.items() if g.request.id == request_id]
        for uid in uids:
            self._generator.remove([uid])
            del self._generations[uid]
        if self._decoder is not None and self._decoder.runs(request_id):
            self._decoder.clear()
        if self._group is not None:
            self._group.remove(request_id)

    def close(self) -> None:
        """See `Batch`."""
        self._prompts.clear()
        self._retained.clear()
        self._generator.remove(list(self._generations))
        self._generator.close()
        self._generations.clear()
        for decoder in (self._decoder, self._group):
            if decoder is not None:
                decoder.clear()


class SequentialBatch(Batch):
    """mlx-lm's `generate_step`: one generator per request, each advanced once per step."""

    def __init__(
        self, model: nn.Module, options: EngineOptions, vision: PromptVision | None = None
    ) -> None:
        super().__init__(model, options, vision)
        self._running: dict[str, tuple[Generation, Iterator[tuple[int, Any]]]] = {}

    def start(self, chunk: PromptChunk) -> None:
        """See `Batch`."""
        prompt = self._prompts.pop(chunk.request_id)
        generation = Generation(prompt.request, prompt.sampling)
        tokens = self._generate(prompt, chunk.begin)
        self._running[chunk.request_id] = (generation, tokens)

    def remove(self, request_id: str) -> None:
        """See `Batch`."""
        super().remove(request_id)
        self._running.pop(request_id, None)

    def decode(self) -> list[TokenEvent]:
        """See `Batch`."""
        events: list[TokenEvent] = []
        for generation, tokens in list(self._running.values()):
            token, _ = next(tokens)
            events.append(generation.append(token))
            if events[-1].finish:
                self.remove(generation.request.id)
        return events

    def _generate(self, prompt: PendingPrompt, begin: int) -> Iterator[tuple[int, Any]]:
        options, request = self._options, prompt.request
        cached = mx.array(request.tokens[:begin], dtype=mx.int32)

        def with_cached_tokens(processor: LogitsProcessor) -> LogitsProcessor:
            return lambda tokens, logits: processor(mx.concatenate([cached, tokens]), logits)

        return generate_step(
            mx.array(request.tokens[begin:]),
            self._model,
            max_tokens=request.max_tokens,
            sampler=prompt.sampling.sampler,
            logits_processors=[with_cached_tokens(p) for p in prompt.sampling.processors],
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
