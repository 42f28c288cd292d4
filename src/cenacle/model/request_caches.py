"""Attention of one request at a time, where a family's caches cannot be merged into a batch.

Owns: `RequestCaches`, the caches of a layer of several requests, side by side, as mlx-lm's
`BatchGenerator` handles caches; calling a layer's attention for each.
Does not know: ranks, which families need it (`families.py`).
Why: padding would move what these families' sparse attention counts in blocks, and a pass of the
experts is shared all the same: they are most of the work.
Invariant: attention sees what it sees when the request is alone, so its answer is the same.
Next: `expert_parallel.py`, which installs it in a loaded model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

MAX_MASKS = 256  # more than a pass makes: one a layer
_MASKS: dict[int, tuple[mx.array, list[Any]]] = {}
"""By the identity of a mask that a model was given: it, and the masks of each request."""


class RequestCaches:
    """A layer's caches of several requests, each as the family made it."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self.rows = list(rows)

    def __getitem__(self, index: int) -> RequestCaches:
        return RequestCaches(row[index] for row in self.rows)

    @property
    def offset(self) -> Any:
        """Tokens so far, of one request or of each."""
        offsets = [_offset_of(row) for row in self.rows]
        return offsets[0] if len(offsets) == 1 else mx.array(offsets)

    @property
    def state(self) -> list[Any]:
        """All arrays."""
        return [row.state for row in self.rows]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(row.nbytes for row in self.rows)

    def make_mask(self, *args: Any, **keywords: Any) -> Any:
        """The mask of the first request that has one; attention takes each its own."""
        masks = [_first(row).make_mask(*args, **keywords) for row in self.rows]
        first = next((mask for mask in masks if mask is not None), None)
        if len(masks) > 1 and isinstance(first, mx.array):
            while len(_MASKS) >= MAX_MASKS:  # the oldest: those of a pass are among the last
                _MASKS.pop(next(iter(_MASKS)))
            _MASKS[id(first)] = first, masks
        return first

    def empty(self) -> bool:
        """Whether nothing was computed yet."""
        return not any(_offset_of(row) for row in self.rows)

    def size(self) -> int:
        """Tokens of the longest."""
        return max((_offset_of(row) for row in self.rows), default=0)

    def is_trimmable(self) -> bool:
        """They are not."""
        return False

    def to_quantized(self, *_: Any, **__: Any) -> None:
        """Not possible.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("each request has caches of a kind of its own")

    @classmethod
    def merge(cls, caches: Sequence[RequestCaches]) -> RequestCaches:
        """One for all requests."""
        return cls(row for request in caches for row in request.rows)

    def extend(self, other: RequestCaches) -> None:
        """Append another's requests."""
        self.rows += other.rows

    def filter(self, indices: Any) -> None:
        """Keep only some requests."""
        self.rows = [self.rows[int(index)] for index in indices]

    def extract(self, index: int) -> RequestCaches:
        """One request's."""
        return RequestCaches([self.rows[index]])

    def prepare(self, **_: Any) -> None:
        """Nothing is padded."""

    def finalize(self) -> None:
        """Nothing was padded."""


def _first(row: Any) -> Any:
    return row if hasattr(row, "make_mask") else row[0]


def _offset_of(row: Any) -> int:
    return row.offset if hasattr(row, "offset") else _offset_of(row[0])


@cache
def _for_requests(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of attention that computes each request with its own cache."""

    def call(self: Any, *args: Any, **keywords: Any) -> Any:
        arguments = [*args, *keywords.values()]
        caches = next((a for a in arguments if isinstance(a, RequestCaches)), None)
        if caches is None:
            return kind.__call__(self, *args, **keywords)
        count = len(caches.rows)
        outputs = []
        for row in range(count):
            positional = [_of_request(value, row, count) for value in args]
            named = {name: _of_request(value, row, count) for name, value in keywords.items()}
            outputs.append(kind.__call__(self, *positional, **named))
        return _join(outputs)

    return type(kind.__name__, (kind,), {"__call__": call})


@cache
def _without_rows(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of qwen4_exp's decoder that does not compute the requests of a pass one by one.

    It would do so with copies of their states, unless it is asked for hidden states too.
    """

    def call(self: Any, *args: Any, **keywords: Any) -> Any:
        if keywords.get("hidden_sink") is None:
            keywords["hidden_sink"] = []
        return kind.__call__(self, *args, **keywords)

    return type(kind.__name__, (kind,), {"__call__": call})


class _PerRequest(list[Any]):
    """What attention gave for each request and gives on to the next layer's."""


def _of_request(value: Any, row: int, count: int) -> Any:
    """One request's part of an argument."""
    if isinstance(value, RequestCaches):
        return value.rows[row]
    if isinstance(value, _PerRequest):
        return value[row]
    if count == 1 or not isinstance(value, mx.array):
        return value
    if id(value) in _MASKS:
        return _MASKS[id(value)][1][row]
    # Positions of images: three for each request.
    is_positions = value.ndim == 3 and mx.issubdtype(value.dtype, mx.integer)
    if is_positions and value.shape[0] == 3 and value.shape[1] == count:
        return value[:, row : row + 1]
    return value[row : row + 1] if value.ndim and value.shape[0] == count else value


def _join(outputs: list[Any]) -> Any:
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if isinstance(first, tuple):
        return tuple(_join(list(parts)) for parts in zip(*outputs, strict=True))
    if all(output is None for output in outputs):
        return None
    shapes = {None if output is None else output.shape[1:] for output in outputs}
    return _PerRequest(outputs) if len(shapes) > 1 else mx.concatenate(outputs)


def install_request_attention(model: nn.Module, name: str) -> None:
    """Change the class of the layers' attention, in place, and their caches to `RequestCaches`.

    Args:
        name: of the layers' attribute: a module, or a list of modules.
    """
    make_caches: Callable[[], list[Any]] = model.make_cache
    for layer in model.layers:
        attention = layer.get(name)
        for module in attention if isinstance(attention, list) else [attention]:
            if module is not None:
                module.__class__ = _for_requests(type(module))  # type: ignore[arg-type]
    text = model.get("language_model", model)
    if hasattr(text, "_supports_batch_invariant_decode"):  # qwen4_exp's, past its attention
        text._supports_batch_invariant_decode = lambda: False
        kind: Any = type(text.model)
        text.model.__class__ = _without_rows(kind)
    # States of recurrent layers can be merged.
    model.make_cache = lambda: [
        made if type(made).__name__ == "ArraysCache" else RequestCaches([made])
        for made in make_caches()
    ]
