"""A trunk that is divided among ranks: attention by heads, dense layers by width, the head by rows.

Owns: adding up what ranks computed of a divided part, one exchange each.
Does not know: which rank has what (`plan.py`), how parameters were cut (`cuts.py`).
Invariant: after each part every rank has the same values; an output bias is added once.
Shapes: everything maps [batch, length, width] to the same but the head, which of a prompt gives the
logits of the last position only, [batch, 1, vocabulary]: nothing else is sampled from, and an
exchange of all of them would be hundreds of megabytes. Of a few positions, as a draft has, it gives
those of all.
Next: `experts.py`, the exchange of a block's experts; `engine/engine.py`, which runs the model.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..collective.base import Collective
from ..core.plan import Plan
from . import architecture
from .slicing import O_PROJ
from .step_timer import StepTimer

MAX_VERIFIED_POSITIONS = 32  # positions; more than are ever drafted

AllReduce = Callable[[mx.array], mx.array]


class RowParallelLinear(nn.Module):
    """A layer of which each rank has some columns: the ranks' outputs are added."""

    def __init__(self, layer: nn.Module, exchange: AllReduce) -> None:
        super().__init__()
        self.layer = layer
        self._exchange = exchange

    def __call__(self, x: mx.array) -> mx.array:
        """This rank's features [..., in] -> the whole layer's output [..., out]."""
        return self._exchange(self.layer(x))


class VocabParallelHead(nn.Module):
    """An output head of which each rank has some rows: the ranks' logits are put together.

    Args:
        layer: this rank's rows.
        first: the index of the first one.
        rows: number of rows on all ranks.
    """

    def __init__(self, layer: nn.Module, first: int, rows: int, exchange: AllReduce) -> None:
        super().__init__()
        self.layer = layer
        self._first, self._rows, self._exchange = first, rows, exchange

    def __call__(self, x: mx.array) -> mx.array:
        """[batch, length, width] -> [batch, length or 1, vocabulary], of the last position if there
        are more than `FEW`."""
        y = self.layer(x if x.shape[1] <= MAX_VERIFIED_POSITIONS else x[:, -1:])
        after = self._rows - self._first - y.shape[-1]
        return self._exchange(mx.pad(y, [(0, 0)] * (y.ndim - 1) + [(self._first, after)]))


class VocabParallelEmbedding(nn.Module):
    """An embedding that is the output head too: each rank has all of it and computes some rows."""

    def __init__(self, embedding: nn.Module, first: int, last: int, exchange: AllReduce) -> None:
        super().__init__()
        self.embedding = embedding
        rows = embedding.weight.shape[0]
        self.head = VocabParallelHead(_some_rows(embedding, first, last), first, rows, exchange)

    def __call__(self, ids: mx.array) -> mx.array:
        """As the embedding."""
        return self.embedding(ids)

    def as_linear(self, x: mx.array) -> mx.array:
        """As `DividedHead`."""
        return self.head(x)


def _some_rows(embedding: nn.Module, first: int, last: int) -> nn.Module:
    """A linear layer of some rows of an embedding; it shares their memory."""
    if "scales" not in embedding:
        linear = nn.Linear(1, 1, bias=False)
        linear.weight = embedding.weight[first:last]
        return linear
    size, bits = embedding.group_size, embedding.bits
    quantised = nn.QuantizedLinear(size, 1, False, size, bits, embedding.mode)
    for name in ("weight", "scales", "biases"):
        if name in embedding and embedding[name] is not None:
            quantised[name] = embedding[name][first:last]
    return quantised


def shard_dense(model: nn.Module, plan: Plan, collective: Collective, watch: StepTimer) -> None:
    """Make the parts of a loaded model that `plan` divides exchange what ranks have, in place."""

    def exchange(part: mx.array) -> mx.array:
        watch.lap("trunk", part)
        whole = collective.all_sum(part)
        watch.lap("all_reduce", whole)
        return whole

    for part in plan.spec.dense_modules:
        if not plan.is_sharded(part):
            continue
        module = architecture.get_module(model, part.path)
        if part.kind in ("attention", "mlp"):
            name = next(n for n in (*O_PROJ, "down_proj") if n in module)
            if collective.rank:
                zero_bias(module[name])
            module[name] = RowParallelLinear(module[name], exchange)
            continue
        start, stop = plan.rows_of(part, collective.rank)
        made: nn.Module
        if part.kind == "head":
            each = module.weight.shape[0] // (stop - start)
            made = VocabParallelHead(module, start * each, part.units * each, exchange)
        else:
            each = module.weight.shape[0] // part.units
            made = VocabParallelEmbedding(module, start * each, stop * each, exchange)
        architecture.replace_module(model, part.path, made)


def zero_bias(layer: nn.Module) -> None:
    """Make an output bias that another rank adds zero."""
    if "bias" in layer:
        layer.bias = mx.zeros_like(layer.bias)
