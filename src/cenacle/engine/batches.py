"""Running the model on several requests at once, with mlx-lm's caches.

Owns: the choice between mlx-lm's continuous batching and one-by-one generation, and both behind
one small interface.
Does not know: steps, ranks.
mlx-lm batches plain, rotating and state-space caches. Quantised and chunked ones (llama4) it cannot
merge, and of a cache that keeps the first tokens (`max_kv_size`) it forgets them on merging; there
each request keeps its own cache and takes its turn in every step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
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

from ..errors import InputError
from ..request import Request, TokenEvent
from .sampler import Drawing

if TYPE_CHECKING:
    from .engine import Options


class Batch(ABC):
    """The requests that are being generated.

    `prefilling` tells whether the last call of `next` processed any prompt.
    """

    prefilling = False

    @abstractmethod
    def insert(self, request: Request, drawing: Drawing) -> None:
        """Begin a request; its prompt is processed by the following calls of `next`."""

    @abstractmethod
    def remove(self, request_id: str) -> None:
        """End a request and free its cache; unknown ids are ignored (it may just have ended)."""

    @abstractmethod
    def next(self) -> list[TokenEvent]:
        """One token for each request whose prompt is done, some prompt for the others."""

    def wait(self) -> None:
        """Return when all that was begun has been computed: `next` leaves a token under way."""
        mx.synchronize(generation_stream)

    @abstractmethod
    def close(self) -> None:
        """Free every cache."""


def make_batch(model: nn.Module, options: Options) -> Batch:
    """Continuous batching where mlx-lm can merge this model's caches, else one by one."""
    plain = options.kv_bits is None and options.max_kv_size is None
    if plain and all(_mergeable(c) for c in make_prompt_cache(model)):
        return Continuous(model, options)
    return OneByOne(model, options)


def _mergeable(cache: Any) -> bool:
    inner = getattr(cache, "caches", None)
    return all(map(_mergeable, inner)) if inner is not None else hasattr(cache, "merge")


class Continuous(Batch):
    """mlx-lm's `BatchGenerator`."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self._generator = BatchGenerator(
            model,
            prefill_step_size=options.prefill_chunk,
            completion_batch_size=options.batch,
            prefill_batch_size=min(8, options.batch),
        )
        self._ids: dict[int, str] = {}
        self._drawings: dict[int, Drawing] = {}

    def insert(self, request: Request, drawing: Drawing) -> None:
        """See `Batch`."""
        (uid,) = self._generator.insert(
            [list(request.tokens)],
            max_tokens=[request.max_tokens],
            samplers=[drawing.choice],
            logits_processors=[drawing.processors],
            stop_sequences=[StopSequences([(t,) for t in request.stop_tokens])],
        )
        self._ids[uid], self._drawings[uid] = request.id, drawing

    def remove(self, request_id: str) -> None:
        """See `Batch`."""
        uids = [uid for uid, known in self._ids.items() if known == request_id]
        for uid in uids:
            self._generator.remove([uid])
            del self._ids[uid], self._drawings[uid]

    def next(self) -> list[TokenEvent]:
        """See `Batch`."""
        if not self._ids:
            return []
        prompts, responses = self._generator.next()
        self.prefilling = bool(prompts)
        events: list[TokenEvent] = []
        for r in responses:
            events.append(self._drawings[r.uid].event(self._ids[r.uid], r.token, r.finish_reason))
            if r.finish_reason is not None:
                del self._ids[r.uid], self._drawings[r.uid]
        return events

    def close(self) -> None:
        """See `Batch`."""
        self._generator.remove(list(self._ids))
        self._generator.close()
        self._ids.clear()
        self._drawings.clear()


class OneByOne(Batch):
    """mlx-lm's `generate_step`, one generator per request, each advanced once per step."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self._model, self._options = model, options
        self._waiting: list[tuple[Request, Drawing]] = []
        self._running: dict[str, tuple[Request, Drawing, Iterator[tuple[int, Any]]]] = {}
        self._given: dict[str, int] = {}
        if options.kv_bits is not None:
            self._try_quantised_cache()

    def _try_quantised_cache(self) -> None:
        """Find out now, not in the middle of an answer, that a cache cannot be quantised."""
        options = self._options
        caches = make_prompt_cache(self._model, options.max_kv_size)
        self._model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
        try:
            maybe_quantize_kv_cache(caches, 0, options.kv_group_size, options.kv_bits)
        except (ValueError, NotImplementedError) as error:
            raise InputError(
                f"kv_bits: this model's cache cannot be quantised to {options.kv_bits} bits in "
                f"groups of {options.kv_group_size}: {error}",
                "kv_bits",
            ) from error

    def insert(self, request: Request, drawing: Drawing) -> None:
        """See `Batch`."""
        self._waiting.append((request, drawing))

    def remove(self, request_id: str) -> None:
        """See `Batch`."""
        self._waiting = [w for w in self._waiting if w[0].id != request_id]
        self._running.pop(request_id, None)
        self._given.pop(request_id, None)

    def next(self) -> list[TokenEvent]:
        """See `Batch`."""
        self.prefilling = bool(self._waiting)
        while self._waiting and len(self._running) < self._options.batch:
            request, drawing = self._waiting.pop(0)
            self._running[request.id] = (request, drawing, self._generate(request, drawing))
            self._given[request.id] = 0
        events: list[TokenEvent] = []
        for request, drawing, generator in list(self._running.values()):
            token, _ = next(generator)
            self._given[request.id] += 1
            finish = None
            if self._given[request.id] >= request.max_tokens:
                finish = "length"
            if token in request.stop_tokens:
                finish = "stop"
            events.append(drawing.event(request.id, token, finish))
            if finish:
                self.remove(request.id)
        return events

    def _generate(self, request: Request, drawing: Drawing) -> Iterator[tuple[int, Any]]:
        options = self._options
        return generate_step(
            mx.array(request.tokens),
            self._model,
            max_tokens=request.max_tokens,
            sampler=drawing.choice,
            logits_processors=drawing.processors,
            max_kv_size=options.max_kv_size,
            prefill_step_size=options.prefill_chunk,
            kv_bits=options.kv_bits,
            kv_group_size=options.kv_group_size,
            quantized_kv_start=0,
        )  # type: ignore[return-value]  # mlx-lm yields ints, its annotation says arrays

    def close(self) -> None:
        """See `Batch`."""
        self._waiting.clear()
        self._running.clear()
