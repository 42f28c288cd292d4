"""KV caches of several streams that share a pass, each with its own length: nothing is padded.

Owns: `StreamCaches`, a layer's caches of several streams, as mlx-lm's `BatchGenerator` handles
caches; attention that goes through each stream's own cache; `SharedPass`.
Does not know: requests, ranks, which models can have them (`stream_support.py`), what a
stream's cache keeps: it is mlx-lm's own.
Why: mlx-lm's batch cache keeps every stream as long as the longest, and copies all when one comes
or goes or 256 tokens have passed. Beside a stream of 8,192 tokens one of 32 takes as much memory.
Invariant: attention of a stream sees what it sees when the stream is alone. Such a cache returns
the new keys and values as they are, as tickets: attention that is called with them attends through
the caches instead. Rows of a buffer that a cache's offset covers are not written again, so whoever
else reads them may, though rows behind them are written in place; only one `StreamCaches` does that
with a buffer, and only with one that was copied for it and never trimmed.
Next: `engine/batch.py`, which puts streams together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

Attention = Callable[[mx.array, mx.array, mx.array, Any], mx.array]
"""Queries, keys, values, mask -> [1, heads, length, width] or [1, length, heads * width]."""

_TICKETS: dict[int, tuple[mx.array, StreamCaches]] = {}
"""By the identity of the keys that a cache returned: these, and the cache."""


@dataclass(frozen=True)
class _Fetched:
    """What one stream attends to in this pass.

    Args:
        stream: index in the batch, or of the first of its rows.
        tokens: how many of its positions are new.
    """

    stream: int
    tokens: int
    keys: mx.array
    values: mx.array
    mask: Any


class Stream:
    """One layer's cache of one stream, on its way into a batch."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    @classmethod
    def merge(cls, streams: Sequence[Stream]) -> StreamCaches:
        """One for all."""
        return StreamCaches(stream.cache for stream in streams)


class StreamCaches:
    """A layer's caches of several streams.

    Args:
        rows: of each, mlx-lm's own.
    """

    def __init__(self, rows: Iterable[Any]) -> None:
        self.rows = list(rows)
        self._lengths: list[int] | None = None  # of prompts padded on the right, still to come
        # Prompts whose next tokens are rows of their own behind those of the streams: the cache,
        # and how many tokens.
        self.prompts: list[tuple[Any, int]] = []
        self._fetched: list[_Fetched] = []
        self._ticket = 0
        # Of a row by its identity: keys and values whose buffers nobody else writes into.
        self._owned: dict[int, tuple[mx.array, mx.array]] = {}

    @property
    def offset(self) -> mx.array:
        """Tokens so far, of each row."""
        offsets = [row.offset for row in self.rows]
        for cache, tokens in self.prompts:
            offsets += range(cache.offset, cache.offset + tokens)
        return mx.array(offsets)

    @property
    def state(self) -> list[Any]:
        """All arrays."""
        return [row.state for row in self.rows if row.keys is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(row.nbytes for row in self.rows)

    def make_mask(self, length: int, **_: Any) -> str | None:
        """What a stream alone would be given; each takes its own when it attends."""
        return None if length == 1 else "causal"

    def empty(self) -> bool:
        """Whether nothing was computed yet."""
        return not any(row.offset for row in self.rows)

    def size(self) -> int:
        """Tokens of the longest."""
        return max((row.offset for row in self.rows), default=0)

    def is_trimmable(self) -> bool:
        """They are not; each alone is, if its kind can be trimmed."""
        return False

    def extend(self, other: StreamCaches) -> None:
        """Append another's streams."""
        self.rows += other.rows
        self._owned |= other._owned
        other._owned = {}

    def filter(self, indices: Any) -> None:
        """Keep only some streams."""
        self.rows = [self.rows[int(index)] for index in indices]
        kept = {id(row) for row in self.rows}
        self._owned = {key: arrays for key, arrays in self._owned.items() if key in kept}

    def drop(self, counts: Sequence[int]) -> None:
        """Drop the last tokens of each stream, whose caches can."""
        for row, count in zip(self.rows, counts, strict=True):
            row.trim(count)
            if count:  # what is written over next may be read elsewhere
                self._owned.pop(id(row), None)

    def extract(self, index: int) -> Any:
        """One stream's cache, as it is now."""
        return copy.copy(self.rows[index])

    def __deepcopy__(self, memo: Any) -> StreamCaches:
        """For a batch that is split: each half keeps other streams."""
        return StreamCaches(self.rows)

    def prepare(self, *, lengths: Sequence[int] | None = None, **_: Any) -> None:
        """The next passes have prompts of these lengths, padded on the right."""
        self._lengths = None if lengths is None else list(lengths)

    def finalize(self) -> None:
        """The padded prompts are processed."""
        self._lengths = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Put new keys and values into the caches, [rows, heads, length, width].

        Returns:
            The same arrays: see the module's invariant.
        """
        length, self._fetched = keys.shape[2], []
        for i, row in enumerate(self.rows):
            tokens = length
            if self._lengths is not None:
                tokens = min(length, self._lengths[i])
                self._lengths[i] -= tokens
            if tokens:
                self._update(i, row, keys[i : i + 1, :, :tokens], values[i : i + 1, :, :tokens])
        begin = len(self.rows)
        for cache, tokens in self.prompts:
            of_prompt = slice(begin, begin + tokens)
            self._update(
                begin, cache, keys[of_prompt].swapaxes(0, 2), values[of_prompt].swapaxes(0, 2)
            )
            begin += tokens
        _TICKETS.pop(self._ticket, None)  # of a pass that failed
        self._ticket = id(keys)
        _TICKETS[self._ticket] = keys, self
        return keys, values

    def _update(self, index: int, row: Any, keys: mx.array, values: mx.array) -> None:
        tokens = keys.shape[2]
        mask = row.make_mask(tokens, return_array=False, window_size=None)
        keys, values = row.update_and_fetch(keys, values)
        self._fetched.append(_Fetched(index, tokens, keys, values, mask))

    def attend_next(self, attention: Any, x: mx.array, dtype: mx.Dtype) -> mx.array | None:
        """A layer's attention for one new token of each stream, in one call.

        Args:
            attention: the extension's `StreamAttention`.
            x: [rows, 1, width].
            dtype: of the caches.

        Returns:
            [rows, 1, width]; None, with nothing done: some stream needs more than that.
        """
        if x.shape[1] != 1 or self.prompts or self._lengths is not None:
            return None
        owned = []
        for row in self.rows:
            if type(row) is not KVCache or row.keys is None or row.keys.dtype != dtype:
                return None
            arrays = self._owned.get(id(row))
            owned.append(arrays is not None and arrays[0] is row.keys and arrays[1] is row.values)
        keys, values = [row.keys for row in self.rows], [row.values for row in self.rows]
        out, *updated = attention(x, keys, values, [row.offset for row in self.rows], owned)
        count = len(self.rows)
        for i, row in enumerate(self.rows):
            row.keys, row.values = self._owned[id(row)] = updated[i], updated[count + i]
            row.offset += 1
        return out

    def attend(self, queries: mx.array, attention: Attention) -> mx.array:
        """Attention of all rows, [rows, heads, length, width], after `update_and_fetch`."""
        _TICKETS.pop(self._ticket, None)
        length, fetched = queries.shape[2], {f.stream: f for f in self._fetched}
        self._fetched = []
        outputs: list[mx.array | None] = []
        for i in range(len(self.rows)):
            if (f := fetched.get(i)) is None:  # its prompt has ended: what follows is not read
                outputs.append(None)
                continue
            out = attention(queries[i : i + 1, :, : f.tokens], f.keys, f.values, f.mask)
            padding = [(0, 0)] * out.ndim
            padding[out.ndim - 2] = (0, length - f.tokens)
            outputs.append(mx.pad(out, padding) if f.tokens < length else out)
        begin = len(self.rows)
        for _, tokens in self.prompts:
            f = fetched[begin]
            rows = queries[begin : begin + tokens].swapaxes(0, 2)
            out = attention(rows, f.keys, f.values, f.mask)
            outputs.append(out.swapaxes(0, out.ndim - 2))
            begin += tokens
        nothing = mx.zeros_like(next(out for out in outputs if out is not None)[:1])
        return mx.concatenate([nothing if out is None else out for out in outputs])


class SharedPass:
    """A model for `BatchGenerator` that reads chunks of prompts in the passes of its streams."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._chunks: list[tuple[list[int], list[Any]]] = []

    @property
    def has_chunks(self) -> bool:
        """Whether a chunk was not read yet."""
        return bool(self._chunks)

    def add(self, tokens: Sequence[int], caches: list[Any]) -> None:
        """Read a chunk in the next pass.

        Args:
            caches: of its prompt, one for each layer.
        """
        self._chunks.append((list(tokens), caches))

    def read(self) -> None:
        """Read the chunks that wait, each in a pass of its own."""
        chunks, self._chunks = self._chunks, []
        for tokens, caches in chunks:
            self._model(mx.array([tokens]), cache=caches)
            mx.eval([cache.state for cache in caches])

    def __call__(self, ids: mx.array, cache: list[Any]) -> mx.array:
        """ids [streams, length] -> logits [streams, length, vocabulary]."""
        if not self._chunks or ids.shape[1] != 1:
            logits: mx.array = self._model(ids, cache=cache)
            return logits
        chunks, self._chunks = self._chunks, []
        for index, layer in enumerate(cache):
            layer.prompts = [(caches[index], len(tokens)) for tokens, caches in chunks]
        try:
            read = mx.array([token for tokens, _ in chunks for token in tokens], dtype=ids.dtype)
            rows = mx.concatenate([ids, read[:, None]])
            logits = self._model(rows, cache=cache)
            return logits[: ids.shape[0]]
        finally:
            for layer in cache:
                layer.prompts = []


def dispatching(attention: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`mx.fast.scaled_dot_product_attention` that knows the tickets of `StreamCaches`."""

    def attend(q: mx.array, k: mx.array, v: mx.array, **keywords: Any) -> mx.array:
        ticket = _TICKETS.get(id(k)) if _TICKETS else None
        if ticket is None:
            return attention(q, k, v, **keywords)
        keywords.pop("mask", None)
        return ticket[1].attend(q, lambda *qkv: attention(*qkv[:3], mask=qkv[3], **keywords))

    return attend


def into_streams(caches: Iterable[Any]) -> list[Any]:
    """A sequence's caches as a batch merges them."""
    return [Stream(cache) for cache in caches]


def out_of_streams(caches: Iterable[Any]) -> list[Any]:
    """The inverse, for a sequence that the batch has not merged yet."""
    return [c.cache if isinstance(c, Stream) else c for c in caches]
