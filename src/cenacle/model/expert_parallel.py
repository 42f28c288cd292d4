"""The expert-parallel layer.

Owns: computing this rank's part of a Mixture-of-Experts block and adding up the ranks' parts, with
exactly one exchange per block.
Does not know: families (see `architecture.py`), files, how ranks talk.
Shapes: a block maps [batch, length, width] to the same; its stacked experts take x [..., width]
and ids [..., k] and give [..., k, width]. The part of an expert that this rank does not hold is
zero, so that the weighted sum that mlx-lm's own code makes of it is this rank's share.
Next: `weights.py` loads the rows that `LocalExperts` needs; `engine/engine.py` runs the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from .. import native
from ..collective.base import Collective, RoutingDecision
from ..core.plan import Plan
from ..errors import InputError
from ..planning import load_balancer
from . import architecture, native_blocks, native_layers
from .architecture import AllReduce, Family
from .step_timer import StepTimer
from .tensor_parallel import shard_dense, zero_bias

_LINEARS = ("gate_proj", "up_proj", "fc1", "down_proj", "fc2")  # the last of a stack comes last


def reference_experts(
    experts: nn.Module, x: mx.array, ids: mx.array, held: Sequence[int]
) -> mx.array:
    """What a rank that holds the experts `held` must give, the slow and obvious way.

    `experts` is the whole stack of one machine; x [..., width], ids [..., k]; gives
    [..., k, width]. `MaskedExperts` and `PackedExperts` are compared with it.
    """
    y = experts(x, ids)
    mine = mx.any(ids[..., None] == mx.array(list(held)), axis=-1)
    return mx.where(mine[..., None], y, 0)


class LastRouting:
    """The experts chosen last in a layer: put here by its experts, taken by its exchange."""

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self._ids: mx.array | None = None

    def put(self, ids: mx.array) -> None:
        """Note what the router chose: ids [..., k]."""
        self._ids = ids

    def take(self) -> RoutingDecision | None:
        """What was chosen since the last call, or None."""
        ids, self._ids = self._ids, None
        return RoutingDecision(self._layer, ids) if ids is not None else None


@dataclass(frozen=True)
class ReplicaPlacement:
    """Which ranks hold each expert, how fast ranks are, and which rank this is."""

    holders: tuple[tuple[int, ...], ...]
    speeds: tuple[int, ...]
    rank: int

    def others(self, ids: np.ndarray) -> np.ndarray:
        """Which of the chosen experts `ids` another rank computes: a boolean for each id."""
        count = len(self.holders)
        counts = np.bincount(ids.reshape(-1), minlength=count + 1)[:count]
        dealt = load_balancer.assign_replicas(counts.tolist(), self.holders, self.speeds)
        return np.array([*dealt, -1])[ids] != self.rank


class LocalExperts(nn.Module):
    """The stacked experts that this rank holds, called with global expert ids.

    Args:
        experts: mlx-lm's `SwitchGLU` or `SwitchMLP` over this rank's rows.
        held: the global id of each row.
        count: number of experts of the layer on all ranks; ids >= count are nobody's.
        layer: index of the layer, for measurements.
        watch: takes note of the ids when a step is measured.
        replicas: who else holds what is held here, or None: nobody.

    `routing` has the ids of the last call, for the exchange that follows.
    """

    def __init__(
        self,
        experts: nn.Module,
        held: Sequence[int],
        count: int,
        layer: int,
        watch: StepTimer,
        replicas: ReplicaPlacement | None = None,
    ) -> None:
        super().__init__()
        self.experts = experts
        self._replicas = replicas
        # Global id -> row here, or -1. One entry more: the id that is nobody's.
        rows = np.full(count + 1, -1, dtype=np.int32)
        rows[list(held)] = np.arange(len(held), dtype=np.int32)
        self._rows, self._row_of = rows, mx.array(rows)
        self._layer, self._watch = layer, watch
        self.routing = LastRouting(layer)
        # Some families hang more on the stack than its linear layers (muse_spark: a norm).
        for name, child in experts.children().items():
            if name not in (*_LINEARS, "activation"):
                self[name] = child

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        """x [..., width], global ids [..., k] -> [..., k, width]."""
        self._watch.routed(self._layer, ids)
        self.routing.put(ids)
        return self.compute(x, ids)

    def compute(self, x: mx.array, ids: mx.array) -> mx.array:
        """x [..., width], ids [..., k] -> [..., k, width], zero where another rank computes."""
        raise NotImplementedError

    def rows(self, ids: mx.array) -> np.ndarray:
        """The row of each chosen expert, or -1: another rank computes it. Asks the host."""
        chosen = np.asarray(ids)
        rows = self._rows[chosen]
        if self._replicas is not None:
            rows[self._replicas.others(chosen)] = -1
        return rows


class MaskedExperts(LocalExperts):
    """Stays in the lazy graph: absent experts are computed as row 0 and masked.

    For devices on which asking the host costs more than the wasted work (Metal, CUDA). Where
    experts have replicas it asks all the same.
    """

    def compute(self, x: mx.array, ids: mx.array) -> mx.array:
        """See `LocalExperts`."""
        row = self._row_of[ids] if self._replicas is None else mx.array(self.rows(ids))
        y = self.experts(x, mx.maximum(row, 0))
        return mx.where((row >= 0)[..., None], y, mx.zeros((), y.dtype))


class CompactedExperts(LocalExperts):
    """Asks the host which (token, expert) pairs are this rank's and computes only those.

    For CPUs, where the wait for the routing is cheap and the work is not.
    """

    def compute(self, x: mx.array, ids: mx.array) -> mx.array:
        """See `LocalExperts`."""
        row = self.rows(ids)
        k = row.shape[-1]
        pairs = np.flatnonzero(row >= 0)
        # A rank without work still builds one pair's graph, never evaluated, for its type: ranks
        # that put different types into an exchange would hang.
        work = pairs if pairs.size else np.zeros(1, dtype=np.int64)
        tokens = x.reshape(-1, x.shape[-1])[mx.array(work // k)]
        y = self.experts(tokens, mx.array(np.maximum(row.reshape(-1)[work], 0))[:, None])[:, 0]
        out = mx.zeros((row.size, y.shape[-1]), y.dtype)
        if pairs.size:
            out[mx.array(pairs)] = y
        return out.reshape(*row.shape, -1)


class NativeExperts(LocalExperts):
    """Stays in the lazy graph and computes only what is this rank's, with the native kernels.

    For CPUs with the extension. Absent experts' weights are not read; the result is float32.
    """

    @classmethod
    def can(cls, experts: nn.Module) -> bool:
        """Whether the kernels know these experts' matrices and activation."""
        known = type(experts) in (SwitchGLU, SwitchMLP)
        if not known or native_layers.activation_code(experts) is None:
            return False
        children = experts.children()
        linears = [children[n] for n in _LINEARS if n in children]
        plain = len(children) == len(linears) + ("activation" in children)
        return plain and None not in map(native_layers.native_weights, linears)

    def __init__(
        self,
        experts: nn.Module,
        held: Sequence[int],
        count: int,
        layer: int,
        watch: StepTimer,
        replicas: ReplicaPlacement | None = None,
    ) -> None:
        super().__init__(experts, held, count, layer, watch, replicas)
        act = native_layers.activation_code(experts)
        assert act is not None
        made = [native_layers.native_weights(experts[n]) for n in _LINEARS if n in experts]
        *inputs, down = made
        extension = native.extension()
        self._experts = extension.experts
        dealer = None
        if replicas is not None:
            dealer = extension.Dealer(replicas.holders, replicas.speeds, replicas.rank)
        self._stack = extension.Stack(inputs, down, self._row_of, *act, dealer)
        extension.trim()

    def compute(self, x: mx.array, ids: mx.array) -> mx.array:
        """See `LocalExperts`."""
        return self._experts(x, ids, self._stack)

    def weighted(self, x: mx.array, ids: mx.array, weights: mx.array) -> mx.array:
        """x [..., width], global ids and weights [..., k] -> [..., width], the weighted sum of what
        this rank computes."""
        self._watch.routed(self._layer, ids)
        self.routing.put(ids)
        return self._experts(x, ids, self._stack, weights)


class LoopedGatherLinear(nn.Module):
    """A stacked linear layer, one expert at a time, for what MLX's CPU `gather_mm` cannot do.

    MLX's Linux CPU backend gathers float32 matrices only; checkpoints come in bfloat16.
    x [..., 1, in], ids [...] -> [..., 1, out].
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.weight = linear.weight
        if "bias" in linear:
            self.bias = linear.bias

    def __call__(self, x: mx.array, ids: mx.array, sorted_indices: bool = False) -> mx.array:  # noqa: ARG002
        """As mlx-lm's `SwitchLinear`; the order of the ids makes no difference here."""
        wanted = np.asarray(ids)
        x = mx.broadcast_to(x, (*wanted.shape, *x.shape[-2:])).reshape(-1, x.shape[-1])
        out = mx.zeros((x.shape[0], self.weight.shape[1]), x.dtype)
        for expert in np.unique(wanted):
            rows = mx.array(np.flatnonzero(wanted == expert))
            y = x[rows] @ self.weight[int(expert)].T
            out[rows] = y + self.bias[int(expert)] if "bias" in self else y
        return out.reshape(*wanted.shape, 1, -1)


class Zeros(nn.Module):
    """Shared experts that another rank computes: zeros, shaped like the input."""

    def __call__(self, x: mx.array) -> mx.array:
        """Zeros like x."""
        return mx.zeros_like(x)


class AllReduceBefore(nn.Module):
    """A module that is not linear: the ranks' parts are added before it."""

    def __init__(self, module: nn.Module, all_sum: AllReduce) -> None:
        super().__init__()
        self.module = module
        self._all_sum = all_sum

    def __call__(self, x: mx.array) -> mx.array:
        """The module of the sum of every rank's x."""
        return self.module(self._all_sum(x))


class ExpertParallel(nn.Module):
    """A Mixture-of-Experts block whose experts live on several ranks: one exchange.

    Args:
        block: mlx-lm's own block over this rank's experts.
        routing: where those experts note what was chosen.
        collective: the ranks.
        watch: the clock of measured steps.
        family: see `architecture.Family`.
        inside: whether the exchange happens in the middle of the block.
    """

    def __init__(
        self,
        block: nn.Module,
        routing: LastRouting,
        collective: Collective,
        watch: StepTimer,
        family: Family,
        inside: bool,
    ) -> None:
        super().__init__()
        self.block = block
        self._routing, self._collective, self._watch = routing, collective, watch
        self._forward: Callable[..., mx.array]
        if family.forward is not None:
            custom = family.forward
            self._forward = lambda *args: custom(block, *args, all_sum=self._exchange)
        elif inside:
            self._forward = block
        else:
            self._forward = lambda *args: self._exchange(block(*args))
        if inside:
            name = family.sum_before
            assert name is not None
            block[name] = AllReduceBefore(block[name], self._exchange)

    def __call__(self, *args: mx.array) -> mx.array:
        """As the block; the same on every rank."""
        self._watch.lap("trunk", *args)
        return self._forward(*args)

    def _exchange(self, part: mx.array) -> mx.array:
        self._watch.lap("experts", part)
        whole = self._collective.all_sum(part, self._routing.take())
        self._watch.lap("all_reduce", whole)
        return whole


def parallelize(
    model: nn.Module,
    family: str,
    plan: Plan,
    collective: Collective,
    watch: StepTimer,
    kernels: str = "auto",
) -> None:
    """Replace the MoE blocks of a loaded model by expert-parallel ones, in place.

    The model's expert stacks must hold the rows that `plan` gives to this rank, in order.

    Args:
        kernels: "native": all the model's layers are made to use ours, much faster, with float32
            activations (16 bits inside quantised layers); "mlx": none; "auto": native on a CPU
            that has the extension. Norms, rotary positions and attention of this process's models
            are those of the last call (see `native_layers.use_operations`).

    Raises:
        InputError: "native" cannot be used here.
    """
    row = architecture.FAMILIES.get(family, architecture.GENERIC)
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    swapped = kernels != "mlx" and native_layers.is_supported()
    if kernels == "native" and not swapped:
        why = native.unavailable_reason() or "they are for CPUs, this is a GPU"
        raise InputError(f"kernels: native ones cannot be used: {why}; auto and mlx can", "kernels")
    native_layers.install_operations(swapped)
    for block, layer in zip(architecture.find_blocks(model), plan.layers, strict=True):
        if layer.slice_of(collective.rank)[0]:
            zero_bias(next(block.linears[n] for n in ("down_proj", "fc2") if n in block.linears))
        local: type[LocalExperts] = CompactedExperts if on_cpu else MaskedExperts
        if swapped and NativeExperts.can(block.experts):
            local = NativeExperts
        elif on_cpu:
            _replace_ungatherable_linears(block)
        held = layer.experts_of(collective.rank)
        count = len(layer.experts)
        holders = layer.replica_ranks(collective.rank)
        replicas = None
        if any(len(ranks) > 1 for ranks in holders):
            speeds = tuple(load_balancer.integer_speeds(plan.nodes, plan.node_weights))
            replicas = ReplicaPlacement(holders, speeds, collective.rank)
        experts = local(block.experts, held, count, block.layer, watch, replicas)
        block.module[block.switch] = experts
        mine = layer.shared_slice_of(collective.rank)
        for name in block.shared if mine is not None and mine[0] else ():
            zero_bias(block.module[name].down_proj)
        if collective.rank:
            for path in row.once:
                _zero(block.module, path)
        inside = block.sums_inside(row)
        wrapped = ExpertParallel(block.module, experts.routing, collective, watch, row, inside)
        architecture.replace_module(model, block.path, wrapped)
    shard_dense(model, plan, collective, watch)
    if swapped:
        native_layers.install_native_layers(model, keep=(LoopedGatherLinear,))
        native_blocks.install_native_blocks(model)


def _replace_ungatherable_linears(block: architecture.MoEBlock) -> None:
    for name, linear in block.linears.items():
        if "scales" not in linear and linear.weight.dtype != mx.float32:
            block.experts[name] = LoopedGatherLinear(linear)


def _zero(module: nn.Module, path: str) -> None:
    parent, _, name = path.rpartition(".")
    try:
        owner = architecture.get_module(module, parent)
    except (AttributeError, KeyError):
        return
    if name in owner:
        owner[name] = mx.zeros_like(owner[name])
