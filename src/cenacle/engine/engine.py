"""One rank's engine: takes steps and generates tokens.

Owns: the requests of this rank and their caches.
Does not know: text, tokenizers, other processes, clients.
Invariant: the same steps in the same order give the same events on every rank; a step that raised
leaves the engine unusable, and the group is restarted.
Read `Engine.step` first: it is the program. Next: `batch.py`, which runs the model;
`ranks/worker.py`, which receives the steps.
"""

from __future__ import annotations

import base64
from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import native
from ..collective.base import Collective
from ..core.request import PromptLogprobs, TokenEvent
from ..core.step import Step
from ..errors import ClusterError
from ..model.families import Batching
from ..model.step_timer import StepTimer
from ..scheduler.prefix_index import CacheFootprint
from .batch import ContinuousBatch, make_batch
from .cache import kv_cache
from .cache.disk_store import PageStore
from .options import EngineOptions
from .prompt_vision import PromptVision
from .sampling.grammar import Vocabulary
from .sampling.sampler import SamplingStates
from .speculative.decoder import Drafter
from .speculative.ngram import DraftStats


class Engine:
    """Generates for several requests at once, in lockstep with the other ranks.

    Args:
        vocabulary: for grammars; None: requests have none.
        draft_model: for speculative decoding; None: drafts come from the text alone.
        page_store: the prefix cache on disk; None: there is none.
        batching: which requests may share a pass of this model.
        vision: for prompts with images; None: there are none.
    """

    def __init__(
        self,
        model: nn.Module,
        collective: Collective,
        timer: StepTimer,
        options: EngineOptions,
        vocabulary: Vocabulary | None = None,
        draft_model: Drafter | None = None,
        page_store: PageStore | None = None,
        batching: Batching = Batching.PADDED,
        vision: PromptVision | None = None,
    ) -> None:
        self._model, self._options = model, options
        self._collective, self._timer = collective, timer
        self._sampling_states = SamplingStates(collective, vocabulary)
        self._page_store = page_store
        self._batch = make_batch(model, options, collective, timer, draft_model, batching, vision)
        self._vision = vision
        self._draft_stats = self._batch.draft_stats
        self._next_step = 0
        self._has_workspace = False  # prompts were processed since memory was given back

    def add_image(self, request_id: str, index: int, pixels: str) -> None:
        """The pixels of an image of a request that the next step admits, in base64.

        Raises:
            ClusterError: this rank has no tower.
        """
        if self._vision is None:
            raise ClusterError("an image was sent to a rank without a vision tower")
        self._vision.add(request_id, index, base64.b64decode(pixels))

    def step(self, step: Step) -> tuple[list[TokenEvent], dict[str, Any] | None]:
        """Take one step: update the requests, process prompt chunks, generate tokens.

        Returns:
            The tokens, and the measurements if the step is a measured one.

        Raises:
            ClusterError: an all-reduce failed (names the rank), or the step is not the next one.
        """
        self._check_number(step)
        try:
            self._update_requests(step)
            self._start_timer(step)
            self._prefill(step)
            events = self._decode(step)
            report = self._stop_timer(step, events)
        except RuntimeError:
            self._collective.raise_if_failed()  # names the rank
            raise
        if step.prefill or step.final_chunks:
            self._has_workspace = True
        else:
            self.release_memory()
        return events, report

    def release_memory(self) -> None:
        """Give back what the activations of prompts took, once they are computed: MLX and the C
        library keep freed memory for what comes next."""
        if self._has_workspace:
            mx.clear_cache()
            native.trim()
            self._has_workspace = False

    def _check_number(self, step: Step) -> None:
        if step.number != self._next_step:
            raise ClusterError(
                f"rank {self._collective.rank} expected step {self._next_step}, got {step.number}"
            )
        self._next_step += 1

    def _update_requests(self, step: Step) -> None:
        for request_id in step.cancelled:
            if request_id in step.retained:
                self._batch.retain(request_id)
            else:
                self._batch.evict(request_id)
            self._batch.remove(request_id)
        if self._page_store is not None:
            self._move_pages(self._page_store, step)
        for request in step.admitted:
            self._batch.insert(request, self._sampling_states.create(request))
        for reuse in step.reused:
            self._batch.reuse(reuse)

    def _move_pages(self, page_store: PageStore, step: Step) -> None:
        for load in step.page_loads:
            self._batch.load_pages(load.name, [(p.end, page_store.path(p)) for p in load.pages])
        page_store.remove(step.page_removals)
        for write in step.page_writes:
            content = self._batch.make_page(write.source, write.page, page_store.metadata)
            page_store.write(write.page, content)
        for load in step.page_checks:
            page_store.check(load)

    def _prefill(self, step: Step) -> None:
        for chunk in step.prefill:
            self._batch.prefill(chunk)
        for chunk in step.final_chunks:
            self._batch.start(self._batch.score(chunk))

    def _decode(self, step: Step) -> list[TokenEvent]:
        events = self._batch.decode()
        for name in step.evicted:
            self._batch.evict(name)
        self._collective.raise_if_failed()  # else wrong tokens would be served
        return events

    def _start_timer(self, step: Step) -> None:
        if step.measured:
            self._batch.synchronize()  # the token in progress belongs to the step before
            self._timer.start()

    def _stop_timer(self, step: Step, events: list[TokenEvent]) -> dict[str, Any] | None:
        if not step.measured:
            return None
        self._batch.synchronize()  # the head and the sampler come after the last lap
        measured = self._timer.stop()
        # A token may come from a pass of the step before, and nothing be computed in this one.
        has_pass = bool(measured["laps_s"])
        return {
            **measured,
            "decoding": has_pass and bool(events) and not (step.prefill or step.final_chunks),
            "tokens": max(Counter(e.request_id for e in events).values(), default=0),
            "sent_bytes": self._collective.traffic.bytes,
        }

    def footprint(self) -> CacheFootprint:
        """What caches take on this rank.

        Raises:
            InputError: they cannot be quantized as the options say.
        """
        options = self._options
        return kv_cache.measure_footprint(
            self._model,
            options.max_kv_size,
            options.kv_bits,
            options.kv_group_size,
            reusable=self._batch.reusable_caches,
        )

    @property
    def batches_requests(self) -> bool:
        """Whether requests share passes of the model."""
        return isinstance(self._batch, ContinuousBatch)

    def take_draft_stats(self) -> DraftStats:
        """Of the drafts since the last call."""
        last, self._draft_stats = self._draft_stats, self._batch.draft_stats
        return self._draft_stats - last

    def take_prompt_logprobs(self) -> tuple[PromptLogprobs, ...]:
        """Of prompts that were processed since the last call; on rank 0 only."""
        scores, self._batch.prompt_logprobs = self._batch.prompt_logprobs, []
        return tuple(scores) if self._collective.rank == 0 else ()

    def close(self) -> None:
        """Free the caches."""
        self._batch.close()
        if self._page_store is not None:
            self._page_store.close()
        mx.clear_cache()
