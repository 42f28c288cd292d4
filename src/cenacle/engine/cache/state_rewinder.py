"""Dropping the last tokens of a pass from a model's caches, as drafts need.

Owns: `Rewinder`, which takes tokens of the last pass back, for caches of four kinds: those that can
be cut off, those that rotate, states, and those of mlx-vlm's families, which keep what they need.
Does not know: requests, drafts.
A cache that rotates has overwritten older tokens: it is as it was before the pass, and is given the
accepted tokens' keys and values again.
A state has no tokens to cut off. That of a gated delta net or of Mamba 2 after fewer tokens follows
from the one before the pass and from what its recurrence was given, so these are kept until the
next pass. The layer's matrices, experts and all-reduces are not computed again. Some families of
mlx-vlm keep states, windows and pools in caches that record a pass themselves.
Invariant: the caches of a pass are dropped from before the next one, and in it only.
Next: `speculative/decoder.py` and `speculative/group.py`, which drop rejected drafts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache, make_prompt_cache

from ...model.request_caches import RequestCaches
from .kv_cache import can_trim, flatten_caches


@dataclass(frozen=True)
class _Recurrence:
    """A function of a module of mlx-lm that gives a layer's outputs and its state after them.

    Args:
        layer: the class of layers in the module that call it.
        update: its name there.
        tokens: the places of its arguments that have a row for each token,
            [sequences, length, ...].
        state, mask: the places of the state before, and of a mask of tokens.
        lengths: the place of the lengths of sequences, where they differ; None: the mask tells
            them.
    """

    layer: str
    update: str
    tokens: tuple[int, ...]
    state: int
    mask: int
    lengths: int | None = None


_DELTA = "gated_delta_update", (0, 1, 2, 3, 4), 7, 8
_MAMBA2 = "ssm_update", (0, 2, 3, 5), 7, 9, 10
_RECURRENCES = {
    "mlx_lm.models.granitemoehybrid": _Recurrence("GraniteMoeHybridMamba2Mixer", *_MAMBA2),
    "mlx_lm.models.nemotron_h": _Recurrence("NemotronHMamba2Mixer", *_MAMBA2),
    "mlx_lm.models.qwen3_next": _Recurrence("Qwen3NextGatedDeltaNet", *_DELTA),
    "mlx_lm.models.qwen3_5": _Recurrence("GatedDeltaNet", *_DELTA),
}

# Of mlx-vlm, all of whose layers tell their caches what they need to be taken back.
_RECORDING_FAMILIES = ("deepseek_v4", "glm5_next", "inkling", "qwen4_exp")


@dataclass
class _LayerPass:
    """What one layer computed in a pass.

    Args:
        convolved: inputs of the convolution, with the last ones of the pass before in front,
            [sequences, kernel - 1 + length, channels].
        recurrence: what it is.
        update: its function.
        inputs: all that it was given.
    """

    convolved: mx.array
    recurrence: _Recurrence | None = None
    update: Callable[..., tuple[mx.array, mx.array]] | None = None
    inputs: tuple[Any, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of the pass."""
        assert self.recurrence is not None
        length: int = self.inputs[self.recurrence.tokens[0]].shape[1]
        return length

    def after(self, kept: Sequence[int]) -> list[mx.array | None]:
        """Both arrays of the layer's cache after the first tokens of each sequence."""
        overlap = self.convolved.shape[1] - self.length
        if len(set(kept)) == 1:
            begin, mask = kept[0], None
            window = mx.contiguous(self.convolved[:, begin : begin + overlap])
        else:
            ends = mx.array(list(kept))[:, None]
            mask = mx.arange(max(kept)) < ends
            window = mx.take_along_axis(
                self.convolved, (ends + mx.arange(overlap))[..., None], axis=1
            )
        return [window, self._state_after(kept, mask)]

    def _state_after(self, kept: Sequence[int], mask: mx.array | None) -> mx.array | None:
        kind, longest = self.recurrence, max(kept)
        assert kind is not None
        assert self.update is not None
        before: mx.array | None = self.inputs[kind.state]
        if not longest:
            return before
        inputs = list(self.inputs)
        for place in kind.tokens:
            inputs[place] = inputs[place][:, :longest]
        inputs[kind.mask] = mask
        if kind.lengths is not None:
            inputs = [*inputs, *[None] * (kind.lengths + 1 - len(inputs))]
            inputs[kind.lengths] = mx.array(list(kept)) if mask is not None else None
        _, state = self.update(*inputs)
        if 0 in kept and before is not None:  # some kernels for one token know no mask
            rows = mx.array(list(kept)).reshape(-1, *[1] * (state.ndim - 1))
            state = mx.where(rows == 0, before, state)
        return state


_RECORDED: ContextVar[list[_LayerPass] | None] = ContextVar("recorded layers", default=None)


class _Window:
    """A rotating cache of one sequence, and what it was given since."""

    def __init__(self, cache: RotatingKVCache) -> None:
        self._cache, self._given = cache, list[tuple[mx.array, mx.array]]()
        before = vars(cache).copy()
        for name in ("keys", "values"):
            if before[name] is not None:
                before[name] = before[name][...]  # it is written in place
        self._before = before
        cache.update_and_fetch = self._record  # type: ignore[method-assign]

    def _record(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self._given.append((keys, values))
        return RotatingKVCache.update_and_fetch(self._cache, keys, values)

    def end(self) -> None:
        """Record no more."""
        del self._cache.update_and_fetch

    def drop(self, count: int) -> None:
        """Drop the last tokens that it was given."""
        if not self._given:  # of a layer that did not run
            return
        keys, values = (mx.concatenate(list(a), axis=2) for a in zip(*self._given, strict=True))
        kept = keys.shape[2] - count
        vars(self._cache).update(self._before)
        if kept:
            self._cache.update_and_fetch(keys[:, :, :kept], values[:, :, :kept])


class Rewinder:
    """Takes back tokens of the last recorded pass, from caches that can be cut off or rotate."""

    def __init__(self) -> None:
        self._windows: list[_Window] = []

    @contextmanager
    def recording(self, caches: Sequence[Any], length: int) -> Iterator[None]:  # noqa: ARG002
        """Record the passes inside.

        Args:
            caches: of the passes, with all sequences.
            length: tokens of each sequence, of all passes together.
        """
        self._windows = [_Window(c) for c in flatten_caches(list(caches)) if _rotates(c)]
        try:
            yield
        finally:
            for window in self._windows:
                window.end()

    def drop(self, caches: Sequence[Any], counts: Sequence[int]) -> None:
        """Drop the last tokens of each sequence from `caches`, in place.

        Args:
            caches: that the last recorded passes were computed with.
            counts: at most their length, for each sequence.
        """
        if any(counts):
            drop_tokens(caches, counts)
            for window in self._windows:
                window.drop(counts[0])

    def clear(self) -> None:
        """Forget the last pass; its tokens stay."""
        self._windows = []


class StateRewinder(Rewinder):
    """The same where some caches are states.

    Args:
        model: see `can_rewind`; its layers are taught to record.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for layer in _find_layers(model):
            _teach(layer)
        self._layers: list[_LayerPass] = []

    @contextmanager
    def recording(self, caches: Sequence[Any], length: int) -> Iterator[None]:
        """See `Rewinder`; of one pass."""
        self._layers = []
        token = _RECORDED.set(self._layers)
        try:
            with super().recording(caches, length):
                yield
        finally:
            _RECORDED.reset(token)

    def drop(self, caches: Sequence[Any], counts: Sequence[int]) -> None:
        """See `Rewinder`."""
        super().drop(caches, counts)
        if not any(counts):
            return
        states: list[Any] = find_states(caches)
        for cache, layer in zip(states, self._layers, strict=True):
            cache.cache = layer.after([layer.length - count for count in counts])

    def clear(self) -> None:
        """See `Rewinder`."""
        super().clear()
        self._layers = []


class TransactionRewinder(Rewinder):
    """The same for caches of mlx-vlm that record passes themselves, until they are told what to
    keep."""

    def __init__(self) -> None:
        super().__init__()
        self._open: list[tuple[list[int], Any]] = []  # rows, and mlx-vlm's transaction
        self._length = self._count = 0

    @contextmanager
    def recording(self, caches: Sequence[Any], length: int) -> Iterator[None]:
        """See `Rewinder`."""
        from mlx_vlm.speculative.cache_state import start_speculative_cache

        self.clear()
        alone = [cache for cache in caches if isinstance(cache, RequestCaches)]
        joint = [cache for cache in caches if not isinstance(cache, RequestCaches)]
        parts = [([row], [c.rows[row] for c in alone]) for row in range(_count_rows(alone))]
        self._length = length
        if joint:
            parts.append(([], joint))
        self._open = [(rows, start_speculative_cache(part, length)) for rows, part in parts]
        yield

    def drop(self, caches: Sequence[Any], counts: Sequence[int]) -> None:  # noqa: ARG002
        """See `Rewinder`."""
        self._keep([self._length - count for count in counts])

    def clear(self) -> None:
        """See `Rewinder`."""
        self._keep(None)

    def _keep(self, lengths: Sequence[int] | None) -> None:
        for rows, transaction in self._open:
            if lengths is None:
                transaction.commit(self._length)
            else:
                transaction.commit([lengths[row] for row in rows] or list(lengths))
        self._open = []


def _count_rows(caches: Sequence[RequestCaches]) -> int:
    return len(caches[0].rows) if caches else 0


def drop_tokens(caches: Sequence[Any], counts: Sequence[int]) -> None:
    """Drop the last tokens of each sequence, in place, but from states and windows."""
    for cache in flatten_caches(list(caches)):
        if isinstance(cache, ArraysCache) or _rotates(cache):
            continue
        if hasattr(cache, "drop"):  # of several sequences
            cache.drop(counts)
        else:
            cache.trim(counts[0])


def _rotates(cache: Any) -> bool:
    return type(cache) is RotatingKVCache


def find_states(caches: Sequence[Any]) -> list[Any]:
    """Those of a model's caches that are states, in its order."""
    return [c for c in flatten_caches(list(caches)) if isinstance(c, ArraysCache)]


def can_drop(model: nn.Module) -> bool:
    """Whether a model's caches can drop tokens of the last pass."""
    return _can_cut(model) or can_rewind(model) or _records_itself(model)


def _can_cut(model: nn.Module) -> bool:
    caches = flatten_caches(make_prompt_cache(model))
    return can_trim(model) or {type(cache) for cache in caches} <= {KVCache, RotatingKVCache}


def can_rewind(model: nn.Module) -> bool:
    """Whether the states of a model are of layers that can be recorded, its other caches plain."""
    caches = list(flatten_caches(make_prompt_cache(model)))
    states = find_states(caches)
    plain = sum(type(cache) in (KVCache, RotatingKVCache) for cache in caches)
    return 0 < len(states) == len(_find_layers(model)) and plain + len(states) == len(caches)


def _records_itself(model: Any) -> bool:
    return getattr(model, "_family", "") in _RECORDING_FAMILIES


def make_rewinder(model: nn.Module) -> Rewinder:
    """For a model that `can_drop`."""
    if _can_cut(model):
        return Rewinder()
    return TransactionRewinder() if _records_itself(model) else StateRewinder(model)


def _find_layers(model: nn.Module) -> list[nn.Module]:
    kinds = tuple(
        getattr(sys.modules[name], kind.layer)
        for name, kind in _RECURRENCES.items()
        if name in sys.modules
    )
    return [module for _, module in model.named_modules() if isinstance(module, kinds)]


def _teach(layer: Any) -> None:
    """Have a layer's convolution, and the recurrence of its kind, tell what they are given."""
    conv_kind = type(layer.conv1d)
    if not hasattr(conv_kind, "is_recording"):
        members = {"__call__": _make_recording_call(conv_kind), "is_recording": True}
        layer.conv1d.__class__ = type(conv_kind.__name__, (conv_kind,), members)
    for name, kind in _RECURRENCES.items():
        module: Any = sys.modules.get(name)
        if module is not None and isinstance(layer, getattr(module, kind.layer)):
            update = getattr(module, kind.update)
            if not hasattr(update, "is_recording"):
                setattr(module, kind.update, _make_recorder(kind, update))


def _make_recording_call(kind: type[nn.Module]) -> Callable[[Any, mx.array], mx.array]:
    def call(self: Any, x: mx.array) -> mx.array:
        layers = _RECORDED.get()
        if layers is not None:
            layers.append(_LayerPass(x))
        convolved: mx.array = kind.__call__(self, x)
        return convolved

    return call


def _make_recorder(kind: _Recurrence, update: Callable[..., Any]) -> Callable[..., Any]:
    def record(*arguments: Any, **keywords: Any) -> Any:
        layers = _RECORDED.get()
        if layers is not None:
            layer = layers[-1]
            layer.recurrence, layer.inputs = kind, arguments
            layer.update = lambda *inputs: update(*inputs, **keywords)
        return update(*arguments, **keywords)

    record.is_recording = True  # type: ignore[attr-defined]
    return record
