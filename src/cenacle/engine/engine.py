"""One rank's engine: takes steps, gives tokens.

Owns: the requests that are being generated on this rank, with their caches.
Does not know: text, tokenizers, other ranks' processes, who asks.
Invariant: the same steps in the same order give the same events on every rank; a step that raised
leaves the engine unusable (the group is then re-formed).
Read `Engine.step()` first: it is the program. Next: `batches.py`, which runs the model on what
steps have admitted; `worker.py`, which brings the steps.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..collective.base import Collective
from ..core.request import Request, TokenEvent
from ..core.step import Step
from ..errors import ClusterError
from ..model.step_timer import StepTimer
from ..scheduler.prefix_index import CacheFootprint
from .batch import make_batch
from .cache import kv_cache
from .cache.disk_store import PageStore
from .options import EngineOptions
from .sampling.grammar import Vocabulary
from .sampling.sampler import SamplingStates
from .speculative.draft_model import DraftModelProposer
from .speculative.ngram import DraftStats


class Engine:
    """Generates for several requests at once, in lockstep with the other ranks.

    Args:
        vocabulary: for grammars; None: requests have none.
        drafter: the draft model, if there is one.
        disk: for the beginnings of prompts; None: none are written.
    """

    def __init__(
        self,
        model: nn.Module,
        collective: Collective,
        watch: StepTimer,
        options: EngineOptions,
        vocabulary: Vocabulary | None = None,
        drafter: DraftModelProposer | None = None,
        disk: PageStore | None = None,
    ) -> None:
        self._collective, self._watch = collective, watch
        self._drawings = SamplingStates(collective, vocabulary)
        self._model, self._options = model, options
        self._disk = disk
        self._batch = make_batch(model, options, collective, watch, drafter)
        self._drafts = self._batch.drafts
        self._next_step = 0

    def footprint(self) -> CacheFootprint:
        """What caches take on this rank.

        Raises:
            InputError: they cannot be quantised as asked.
        """
        options = self._options
        return kv_cache.footprint(
            self._model,
            options.max_kv_size,
            options.kv_bits,
            options.kv_group_size,
            keeps=self._batch.keeps,
        )

    def step(self, step: Step) -> tuple[list[TokenEvent], dict[str, Any] | None]:
        """Take one step: end what is cancelled, admit what is new, process the parts of prompts
        that are due, one token for each request that has begun to be answered.

        Returns:
            The tokens of this step, and the measurements if it was a measured one.

        Raises:
            ClusterError: an exchange failed; names the rank. Or this is not the step that follows.
        """
        try:
            return self._take(step)
        except RuntimeError:
            self._collective.raise_if_failed()  # names the rank
            raise

    def _take(self, step: Step) -> tuple[list[TokenEvent], dict[str, Any] | None]:
        self._expect(step)
        for request_id in step.cancelled:
            if request_id in step.retained:
                self._batch.keep(request_id)
            else:
                self._batch.drop(request_id)
            self._batch.remove(request_id)
        if self._disk is not None:
            self._turn_pages(self._disk, step)
        for request in step.admitted:
            self._admit(request)
        for reuse in step.reused:
            self._batch.reuse(reuse)
        if step.measured:
            self._batch.wait()  # the token that is under way is not this step's
            self._watch.start()
        for part in step.prefill:
            self._batch.prefill(part)
        for part in step.final_chunks:
            self._batch.start(part)
        events = self._batch.next()
        for request_id in step.evicted:
            self._batch.drop(request_id)
        self._collective.raise_if_failed()  # else wrong tokens would be served
        return events, self._measured(step, events) if step.measured else None

    def _turn_pages(self, disk: PageStore, step: Step) -> None:
        for load in step.page_loads:
            self._batch.read(load.name, [(p.end, disk.path(p)) for p in load.pages])
        disk.remove(step.page_removals)
        for store in step.page_writes:
            disk.write(store.page, self._batch.page(store.source, store.page, disk.about))
        for load in step.page_checks:
            disk.seek(load)

    def take_drafts(self) -> DraftStats:
        """What became of drafts since the last call."""
        before, self._drafts = self._drafts, self._batch.drafts
        return self._drafts - before

    def _measured(self, step: Step, events: list[TokenEvent]) -> dict[str, Any]:
        self._batch.wait()  # the head and the sampler come after the last lap
        decoding = bool(events) and not (step.prefill or step.final_chunks)
        sent = self._collective.traffic.bytes
        tokens = max(Counter(e.request_id for e in events).values(), default=0)
        said = {"decoding": decoding, "tokens": tokens, "sent_bytes": sent}
        return {**self._watch.stop(), **said}

    def _expect(self, step: Step) -> None:
        if step.number != self._next_step:
            raise ClusterError(
                f"rank {self._collective.rank} expected step {self._next_step}, got {step.number}"
            )
        self._next_step += 1

    def _admit(self, request: Request) -> None:
        self._batch.insert(request, self._drawings.make(request))

    def close(self) -> None:
        """Free the caches."""
        self._batch.close()
        if self._disk is not None:
            self._disk.close()
        mx.clear_cache()
