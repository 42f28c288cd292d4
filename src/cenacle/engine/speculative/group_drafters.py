"""Proposals for several requests in one pass of what drafts.

Owns: `GroupDrafter`, what a group asks of it; `GroupDraftModel` and `GroupMtp`, a draft model and
the checkpoint's own layer, on every rank.
Does not know: what becomes of proposals (`group.py`).
Rank 0 has the model, and sends all drafts of a pass to the others in one sum of a few integers, for
the reasons in `draft_model.py`. Requests whose texts are longer than others' share its passes:
their caches are ragged.
Invariant: what is read and drafted depends only on counts of tokens, which are the same on every
rank. All caches together hold at most as many tokens as one context, which is what is planned.
Next: `group.py`, which lets the model verify the drafts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ...collective.base import Collective
from ...model.draft_heads import at_places
from ..cache.ragged_cache import (
    clear_sequence,
    extract_sequence,
    keep_sequences,
    merge_ragged,
)
from ..cache.state_rewinder import Rewinder, drop_tokens, make_rewinder
from .draft_model import (
    MAX_UNREAD_TOKENS,
    READ_TOKENS,
    DraftModelProposer,
    fit_vocabulary,
)
from .mtp import KEPT_TOKENS, MtpProposer, draft_tokens

if TYPE_CHECKING:
    from .decoder import Generation


class GroupDrafter(ABC):
    """Drafts for the requests of a group, in their order.

    Args:
        collective: the ranks; rank 0 has the model.
        vocab_size: number of the served model's token ids.
        context_length: tokens that its caches may hold; None: any number.
    """

    def __init__(self, collective: Collective, vocab_size: int, context_length: int | None) -> None:
        self._collective, self._vocab_size = collective, vocab_size
        self._context_length = context_length
        self._longest: int | None = None  # how many tokens can be drafted

    def _fits(self, lengths: Sequence[int]) -> bool:
        limit = self._context_length
        return limit is None or len(lengths) * max(lengths) <= limit

    @abstractmethod
    def read_ahead(self, generations: Sequence[Generation]) -> bool:
        """Read a part of the texts, beside plain decoding; whether it may be taken for them."""

    @abstractmethod
    def take(self, generations: Sequence[Generation]) -> None:
        """Draft for these requests."""

    @abstractmethod
    def release(self, generations: Sequence[Generation]) -> None:
        """Draft for none."""

    @abstractmethod
    def keep_rows(self, rows: Sequence[int]) -> None:
        """Draft only for some of the requests."""

    @abstractmethod
    def forget(self, request_id: str) -> None:
        """Free what is kept for a request that is not in the group; unknown ids are ignored."""

    @abstractmethod
    def is_ready(self, count: int) -> bool:
        """Whether it can draft so many tokens for each now."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, the served model runs on the group."""
        yield

    @abstractmethod
    def on_verified(self, lengths: Sequence[int], counts: Sequence[int]) -> None:
        """After a pass of the served model.

        Args:
            lengths: of each text, as far as it began like what was drafted.
            counts: tokens of the pass that each of the served model's caches keeps.
        """

    @abstractmethod
    def _draft(self, generations: Sequence[Generation], count: int) -> mx.array:
        """On rank 0: [requests, count] tokens."""

    @abstractmethod
    def _on_drafted(self, generations: Sequence[Generation], count: int) -> None:
        """Count what was read."""

    @property
    @abstractmethod
    def _has_model(self) -> bool: ...

    def propose(self, generations: Sequence[Generation], count: int) -> list[list[int]]:
        """Draft the next `count` tokens of each, or as many as can be; see
        `DraftModelProposer.propose`."""
        count = min(count, self._longest or count)
        shape = (len(generations), count)
        drafted = mx.zeros(shape, dtype=mx.uint32)
        if self._has_model:
            drafted = self._draft(generations, count).astype(mx.uint32)
        drafted = self._collective.broadcast_from(0, drafted.flatten())
        self._on_drafted(generations, count)
        drafts: list[list[int]] = np.asarray(drafted).reshape(shape).tolist()
        return drafts

    def _sample(self, generations: Sequence[Generation], logits: mx.array, index: int) -> mx.array:
        """The tokens at a place of the drafts: [requests, vocabulary] -> [requests, 1]."""
        logits = fit_vocabulary(logits, self._vocab_size)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return mx.concatenate(
            [
                g.sampling.sampler.sample(logprobs[row : row + 1], g.position + index)
                for row, g in enumerate(generations)
            ]
        )[:, None]


class GroupDraftModel(GroupDrafter):
    """A draft model for several requests.

    Args:
        alone: the same for a single request, with the same model.
    """

    def __init__(self, alone: DraftModelProposer) -> None:
        super().__init__(alone.collective, alone.vocab_size, alone.config.context_length)
        self._alone, self._config, self._model = alone, alone.config, alone.model
        self._kept: dict[str, tuple[int, list[Any]]] = {}  # tokens that were read, and the caches
        self._lengths: list[int] = []
        self._caches: list[Any] = []

    @property
    def _has_model(self) -> bool:
        return self._model is not None

    def read_ahead(self, generations: Sequence[Generation]) -> bool:
        """See `GroupDrafter`."""
        if not self._fits([g.length for g in generations]):
            return False
        for generation in generations:
            length, caches = self._find_kept(generation)
            unread = generation.length - length
            if unread <= MAX_UNREAD_TOKENS:
                continue
            tokens = generation.tokens_from(length)[:READ_TOKENS][: unread - 1]
            if self._model is not None:
                self._model(mx.array([self._ids(tokens)]), cache=caches)
                mx.eval([cache.state for cache in caches])
            self._kept[generation.request.id] = length + len(tokens), caches
            return False
        return True

    def _find_kept(self, generation: Generation) -> tuple[int, list[Any]]:
        name = generation.request.id
        if name not in self._kept:
            self._alone.clear()  # one context is planned, for it or for these
            caches = make_prompt_cache(self._model) if self._model is not None else []
            self._kept[name] = 0, caches
        return self._kept[name]

    def take(self, generations: Sequence[Generation]) -> None:
        """See `GroupDrafter`."""
        kept = [self._find_kept(g) for g in generations]
        self._kept.clear()
        self._lengths = [length for length, _ in kept]
        if self._model is not None:
            self._caches = merge_ragged([caches for _, caches in kept])

    def release(self, generations: Sequence[Generation]) -> None:
        """See `GroupDrafter`."""
        for row, generation in enumerate(generations):
            caches = extract_sequence(self._caches, row)
            mx.eval([cache.state for cache in caches])
            self._kept[generation.request.id] = self._lengths[row], caches
        self._lengths, self._caches = [], []

    def keep_rows(self, rows: Sequence[int]) -> None:
        """See `GroupDrafter`."""
        self._lengths = [self._lengths[row] for row in rows]
        keep_sequences(self._caches, rows)

    def forget(self, request_id: str) -> None:
        """See `GroupDrafter`."""
        self._kept.pop(request_id, None)

    def is_ready(self, count: int) -> bool:
        """See `GroupDrafter`."""
        return self._fits([length + count + MAX_UNREAD_TOKENS for length in self._lengths])

    def on_verified(self, lengths: Sequence[int], counts: Sequence[int]) -> None:  # noqa: ARG002
        """See `GroupDrafter`."""
        surplus = [max(own - n, 0) for own, n in zip(self._lengths, lengths, strict=True)]
        self._lengths = [own - n for own, n in zip(self._lengths, surplus, strict=True)]
        drop_tokens(self._caches, surplus)

    def _draft(self, generations: Sequence[Generation], count: int) -> mx.array:
        assert self._model is not None
        new = [g.tokens_from(n) for g, n in zip(generations, self._lengths, strict=True)]
        width = max(map(len, new))
        padded = [self._ids([*tokens, *[0] * (width - len(tokens))]) for tokens in new]
        logits = self._model(mx.array(padded), cache=self._caches)
        drop_tokens(self._caches, [width - len(tokens) for tokens in new])
        logits = at_places(logits, [len(tokens) - 1 for tokens in new])[:, 0]
        samples = [self._sample(generations, logits, 0)]
        last_id = self._config.vocab_size - 1
        for index in range(1, count):
            ids = mx.minimum(samples[-1], last_id)
            logits = self._model(ids, cache=self._caches)[:, -1]
            samples.append(self._sample(generations, logits, index))
        return mx.concatenate(samples, axis=1)

    def _on_drafted(self, generations: Sequence[Generation], count: int) -> None:
        self._lengths = [g.length + count - 1 for g in generations]

    def _ids(self, tokens: Sequence[int]) -> list[int]:
        """Ids beyond its vocabulary, which no text contains, become the last id."""
        return [min(token, self._config.vocab_size - 1) for token in tokens]


class GroupMtp(GroupDrafter):
    """The checkpoint's own layer for several requests.

    It begins to read when the group does, as `MtpProposer` with one request.

    Args:
        alone: the same for a single request, with the same layer.
    """

    def __init__(self, alone: MtpProposer) -> None:
        super().__init__(alone.collective, alone.vocab_size, alone.context_length)
        self._head, self._states = alone.head, alone.states
        self._rewinder = Rewinder()
        self._longest = alone.longest
        self._caches: list[Any] = []
        self._read: list[int] = []  # tokens in each cache
        self._unread: list[list[mx.array]] = []  # of each request: [n, width], ..., on rank 0
        self._counts: list[int] = []  # tokens of those
        self._pass: mx.array | None = None

    @property
    def _has_model(self) -> bool:
        return self._head is not None

    def read_ahead(self, generations: Sequence[Generation]) -> bool:  # noqa: ARG002
        """See `GroupDrafter`."""
        return True

    def take(self, generations: Sequence[Generation]) -> None:
        """See `GroupDrafter`."""
        count = len(generations)
        self._read, self._counts = [0] * count, [0] * count
        if self._head is not None:
            self._unread = [[] for _ in generations]
            self._caches = merge_ragged([self._head.make_caches() for _ in generations])
            self._rewinder = make_rewinder(self._head.model)

    def release(self, generations: Sequence[Generation]) -> None:  # noqa: ARG002
        """See `GroupDrafter`."""
        self._read, self._counts, self._unread, self._caches = [], [], [], []

    def keep_rows(self, rows: Sequence[int]) -> None:
        """See `GroupDrafter`."""
        self._read = [self._read[row] for row in rows]
        self._counts = [self._counts[row] for row in rows]
        if self._head is not None:
            self._unread = [self._unread[row] for row in rows]
            keep_sequences(self._caches, rows)

    def forget(self, request_id: str) -> None:
        """Nothing is kept."""

    def is_ready(self, count: int) -> bool:
        """See `GroupDrafter`."""
        lengths = [n + m + count for n, m in zip(self._read, self._counts, strict=True)]
        return all(self._counts) and self._fits(lengths)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """See `GroupDrafter`."""
        with self._states.handing_over() as passes:
            yield
        self._pass = passes[-1] if self._head is not None else None

    def on_verified(self, lengths: Sequence[int], counts: Sequence[int]) -> None:  # noqa: ARG002
        """See `GroupDrafter`."""
        for row, count in enumerate(counts):
            self._counts[row] += count
            if self._pass is not None:
                self._unread[row].append(self._pass[row, :count])
        self._pass = None
        # Drafts from the text need no states; what comes long before is of no use.
        for row in [r for r, count in enumerate(self._counts) if count > KEPT_TOKENS]:
            self._restart(row)

    def _restart(self, row: int) -> None:
        kept = min(self._counts[row], MAX_UNREAD_TOKENS)
        self._counts[row] = kept
        if self._head is not None:
            self._unread[row] = [mx.concatenate(self._unread[row])[-kept:]]
            clear_sequence(self._caches, row, self._head.make_caches())
        self._read[row] = 0

    def _draft(self, generations: Sequence[Generation], count: int) -> mx.array:
        assert self._head is not None
        width = max(self._counts)
        missing = [width - n for n in self._counts]
        ids = mx.array(
            [
                [*g.tokens_from(g.length - n), *[0] * m]
                for g, n, m in zip(generations, self._counts, missing, strict=True)
            ]
        )
        hidden = mx.stack(
            [
                mx.pad(mx.concatenate(parts), [(0, m), (0, 0)])
                for parts, m in zip(self._unread, missing, strict=True)
            ]
        )
        drafted = draft_tokens(
            self._head,
            ids,
            hidden,
            self._caches,
            count,
            lambda logits, index: self._sample(generations, logits, index),
            self._rewinder,
            missing,
        )
        self._unread = [[] for _ in generations]
        return drafted

    def _on_drafted(self, generations: Sequence[Generation], count: int) -> None:  # noqa: ARG002
        self._read = [n + m for n, m in zip(self._read, self._counts, strict=True)]
        self._counts = [0] * len(generations)


def make_group_drafter(drafter: DraftModelProposer | MtpProposer) -> GroupDrafter:
    """For several requests what `drafter` is for one; they share the model."""
    if isinstance(drafter, MtpProposer):
        return GroupMtp(drafter)
    return GroupDraftModel(drafter)
