"""A sharded trunk: attention by heads, dense layers by width, the output head by vocabulary rows.

Owns: adding up what ranks computed of a sharded module, one all-reduce each.
Does not know: which rank has what (`core/plan.py`), how parameters were sliced (`slicing.py`).
Invariant: after each module every rank has the same values; an output bias is added once.
Shapes: everything maps [batch, length, width] to the same except the head. Of a prompt the head
gives the logits of the last position only, [batch, 1, vocabulary]: nothing else is sampled from,
and an all-reduce of all of them would be hundreds of megabytes. Of a few positions, as a draft has,
it gives those of all.
Next: `expert_parallel.py`, the all-reduce of a block's experts.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..collective.base import Collective
from ..core.plan import Plan
from . import architecture
from .families import AllReduce
from .slicing import O_PROJ
from .step_timer import StepTimer

MAX_VERIFIED_POSITIONS = 32  # more than are ever drafted


class RowParallelLinear(nn.Module):
    """A linear layer of which each rank has some input columns, or a table of which each has some
    rows: the ranks' outputs are added."""

    def __init__(self, layer: nn.Module, all_reduce: AllReduce) -> None:
        super().__init__()
        self.layer = layer
        self._all_reduce = all_reduce

    def __call__(self, x: mx.array) -> mx.array:
        """This rank's features [..., in], or ids -> the whole layer's output [..., out]."""
        return self._all_reduce(self.layer(x))


class VocabParallelHead(nn.Module):
    """An output head of which each rank has some rows: the ranks' logits are put together.

    Args:
        layer: this rank's rows.
        first: the index of the first one.
        rows: number of rows on all ranks.
    """

    def __init__(self, layer: nn.Module, first: int, rows: int, all_reduce: AllReduce) -> None:
        super().__init__()
        self.layer = layer
        self._first, self._rows, self._all_reduce = first, rows, all_reduce

    def __call__(self, x: mx.array) -> mx.array:
        """[batch, length, width] -> [batch, length, vocabulary], or [batch, 1, vocabulary] of the
        last position if there are more than `MAX_VERIFIED_POSITIONS`."""
        y = self.layer(x if x.shape[1] <= MAX_VERIFIED_POSITIONS else x[:, -1:])
        after = self._rows - self._first - y.shape[-1]
        return self._all_reduce(mx.pad(y, [(0, 0)] * (y.ndim - 1) + [(self._first, after)]))


class VocabParallelEmbedding(nn.Module):
    """An embedding that is the output head too: each rank has all of it and computes some rows."""

    def __init__(self, embedding: nn.Module, first: int, last: int, all_reduce: AllReduce) -> None:
        super().__init__()
        self.embedding = embedding
        rows = embedding.weight.shape[0]
        self.head = VocabParallelHead(_head_of(embedding, first, last), first, rows, all_reduce)

    def __call__(self, ids: mx.array) -> mx.array:
        """As the embedding."""
        return self.embedding(ids)

    def as_linear(self, x: mx.array) -> mx.array:
        """As `VocabParallelHead`."""
        return self.head(x)


def _head_of(embedding: nn.Module, first: int, last: int) -> nn.Module:
    """A linear layer of some rows of an embedding; it shares their memory."""
    if "scales" not in embedding:
        linear = nn.Linear(1, 1, bias=False)
        linear.weight = embedding.weight[first:last]
        return linear
    size, bits = embedding.group_size, embedding.bits
    quantized = nn.QuantizedLinear(size, 1, False, size, bits, embedding.mode)
    for name in ("weight", "scales", "biases"):
        if name in embedding and embedding[name] is not None:
            quantized[name] = embedding[name][first:last]
    return quantized


def shard_dense(model: nn.Module, plan: Plan, collective: Collective, timer: StepTimer) -> None:
    """Add the all-reduces of the modules that `plan` shards to a loaded model, in place."""

    def all_reduce(part: mx.array) -> mx.array:
        timer.lap("trunk", part)
        total = collective.all_sum(part)
        timer.lap("all_reduce", total)
        return total

    for part in plan.spec.dense_modules:
        if not plan.is_sharded(part):
            continue
        module = architecture.get_module(model, part.path)
        if part.kind == "table":
            summed = RowParallelLinear(module, all_reduce)
            architecture.replace_module(model, part.path, summed)
            continue
        if part.kind in ("attention", "mlp"):
            name = next(n for n in (*O_PROJ, "down_proj") if n in module)
            if collective.rank:
                zero_bias(module[name])
            module[name] = RowParallelLinear(module[name], all_reduce)
            continue
        start, stop = plan.rows_of(part, collective.rank)
        sharded: nn.Module
        if part.kind == "head":
            unit = module.weight.shape[0] // (stop - start)
            sharded = VocabParallelHead(module, start * unit, part.units * unit, all_reduce)
        else:
            unit = module.weight.shape[0] // part.units
            sharded = VocabParallelEmbedding(module, start * unit, stop * unit, all_reduce)
        architecture.replace_module(model, part.path, sharded)


def zero_bias(layer: nn.Module) -> None:
    """Zero an output bias that another rank adds."""
    if "bias" in layer:
        layer.bias = mx.zeros_like(layer.bias)
