"""Dropping the last tokens of layers that keep a state, as drafts need.

Owns: `StateRewinder`, which records a pass and takes tokens of it back.
Does not know: requests, drafts.
A state has no tokens to cut off. That of a gated delta net after fewer tokens follows from the one
before the pass and from what its recurrence was given, so these are kept until the next pass. The
layer's matrices, experts and all-reduces are not computed again.
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
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

from .kv_cache import can_trim, flatten_caches

_MODULES = {  # of mlx-lm, and their classes of layers
    "mlx_lm.models.qwen3_next": "Qwen3NextGatedDeltaNet",
    "mlx_lm.models.qwen3_5": "GatedDeltaNet",
}
_UPDATE = "gated_delta_update"


@dataclass
class _LayerPass:
    """What one layer computed in a pass.

    Args:
        convolved: inputs of the convolution, with the last ones of the pass before in front,
            [sequences, kernel - 1 + length, channels].
        inputs: of the recurrence, [sequences, length, ...] each.
        parameters: of it.
        state: before the pass.
        update: the recurrence.
    """

    convolved: mx.array
    inputs: tuple[mx.array, ...] = ()
    parameters: tuple[mx.array, ...] = ()
    state: mx.array | None = None
    update: Callable[..., tuple[mx.array, mx.array]] | None = None

    @property
    def length(self) -> int:
        """Tokens of the pass."""
        return self.inputs[0].shape[1]

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
        longest = max(kept)
        if not longest:
            return [window, self.state]
        assert self.update is not None
        inputs = [array[:, :longest] for array in self.inputs]
        _, state = self.update(*inputs, *self.parameters, self.state, mask)
        return [window, state]


_RECORDED: ContextVar[list[_LayerPass] | None] = ContextVar("recorded layers", default=None)


class StateRewinder:
    """Takes back tokens of the last recorded pass.

    Args:
        model: see `can_rewind`; its layers are taught to record.
    """

    def __init__(self, model: nn.Module) -> None:
        for layer in _find_layers(model):
            _teach(layer)
        self._layers: list[_LayerPass] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the pass inside."""
        self._layers = []
        token = _RECORDED.set(self._layers)
        try:
            yield
        finally:
            _RECORDED.reset(token)

    def drop(self, caches: Sequence[Any], counts: Sequence[int]) -> None:
        """Drop the last tokens of each sequence from the states among `caches`, in place.

        Args:
            caches: that the last recorded pass was computed with.
            counts: at most the length of that pass, for each sequence.
        """
        if not any(counts):
            return
        states: list[Any] = find_states(caches)
        for cache, layer in zip(states, self._layers, strict=True):
            cache.cache = layer.after([layer.length - count for count in counts])

    def clear(self) -> None:
        """Forget the last pass."""
        self._layers = []


def find_states(caches: Sequence[Any]) -> list[Any]:
    """Those of a model's caches that are states, in its order."""
    return [c for c in flatten_caches(list(caches)) if isinstance(c, ArraysCache)]


def can_drop(model: nn.Module) -> bool:
    """Whether a model's caches can drop tokens of the last pass, by themselves or a rewinder."""
    return can_trim(model) or can_rewind(model)


def can_rewind(model: nn.Module) -> bool:
    """Whether the states of a model are of layers that can be recorded, its other caches plain."""
    caches = list(flatten_caches(make_prompt_cache(model)))
    states = find_states(caches)
    plain = sum(type(cache) is KVCache for cache in caches)
    return 0 < len(states) == len(_find_layers(model)) and plain + len(states) == len(caches)


def make_rewinder(model: nn.Module) -> StateRewinder | None:
    """For a model that `can_drop`; None: its caches need no help."""
    return None if can_trim(model) else StateRewinder(model)


def _find_layers(model: nn.Module) -> list[nn.Module]:
    kinds = tuple(
        getattr(sys.modules[name], kind) for name, kind in _MODULES.items() if name in sys.modules
    )
    return [module for _, module in model.named_modules() if isinstance(module, kinds)]


def _teach(layer: Any) -> None:
    """Have a layer's convolution, and the recurrence of its kind, tell what they are given."""
    kind = type(layer.conv1d)
    if not hasattr(kind, "is_recording"):
        members = {"__call__": _make_recording_call(kind), "is_recording": True}
        layer.conv1d.__class__ = type(kind.__name__, (kind,), members)
    for name, layer_kind in _MODULES.items():
        module: Any = sys.modules.get(name)
        if module is not None and isinstance(layer, getattr(module, layer_kind)):
            update = getattr(module, _UPDATE)
            if not hasattr(update, "is_recording"):
                setattr(module, _UPDATE, _make_recorder(update))


def _make_recording_call(kind: type[nn.Module]) -> Callable[[Any, mx.array], mx.array]:
    def call(self: Any, x: mx.array) -> mx.array:
        layers = _RECORDED.get()
        if layers is not None:
            layers.append(_LayerPass(x))
        convolved: mx.array = kind.__call__(self, x)
        return convolved

    return call


def _make_recorder(update: Callable[..., Any]) -> Callable[..., Any]:
    def record(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        a: mx.array,
        b: mx.array,
        decay: mx.array,
        bias: mx.array,
        state: mx.array | None = None,
        mask: mx.array | None = None,
        **keywords: Any,
    ) -> Any:
        layers = _RECORDED.get()
        if layers is not None:
            layer = layers[-1]
            layer.inputs, layer.parameters = (q, k, v, a, b), (decay, bias)
            layer.state = state
            layer.update = lambda *arguments: update(*arguments, **keywords)
        return update(q, k, v, a, b, decay, bias, state, mask, **keywords)

    record.is_recording = True  # type: ignore[attr-defined]
    return record
