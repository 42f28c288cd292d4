"""Expert-parallel Mixture-of-Experts blocks.

Owns: computing this rank's part of a block and adding up the ranks' parts, with exactly one
all-reduce per block.
Does not know: families (see `families.py`), files, how ranks talk.
Shapes: a block maps [batch, length, width] to the same; its stacked experts take x [..., width]
and ids [..., k] and give [..., k, width]. What this rank does not compute of them is zero, so that
the weighted sum that mlx-lm's own code makes is this rank's part.
Next: `loader.py` loads the experts that `LocalExperts` computes; `engine/engine.py` runs the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from .. import native
from ..collective.base import Collective, RoutingDecision
from ..core.plan import LayerPlan, Plan
from ..errors import InputError
from ..planning import load_balancer
from . import architecture, native_blocks, native_layers
from .architecture import STACKED_LAYERS, MoEBlock
from .families import AllReduce, Family, family_of
from .request_caches import install_request_attention
from .step_timer import StepTimer
from .tensor_parallel import shard_dense, zero_bias

Read = Callable[[nn.Module], None]
"""Brings a module's own parameters into memory; see `loader.WeightReader`."""


def reference_experts(
    experts: nn.Module, x: mx.array, ids: mx.array, held: Sequence[int]
) -> mx.array:
    """What a rank that holds the experts `held` must compute: the slow, obvious reference.

    `experts` is the whole stack of one machine; x [..., width], ids [..., k]; returns
    [..., k, width]. `MaskedExperts` and `CompactedExperts` are compared with it.
    """
    y = experts(x, ids)
    is_held = mx.any(ids[..., None] == mx.array(list(held)), axis=-1)
    return mx.where(is_held[..., None], y, 0)


class LastRouting:
    """The latest routing of a layer: set by its experts, taken by the all-reduce that follows."""

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self._ids: mx.array | None = None

    def put(self, ids: mx.array) -> None:
        """Store the chosen experts: ids [..., k]."""
        self._ids = ids

    def take(self) -> RoutingDecision | None:
        """The routing stored since the last call, or None."""
        ids, self._ids = self._ids, None
        return RoutingDecision(self._layer, ids) if ids is not None else None


@dataclass(frozen=True)
class ReplicaPlacement:
    """Which ranks hold each expert.

    Args:
        ranks_of: by expert, the ranks that hold it, ascending.
        speeds: relative speed of each rank.
        rank: this one.
    """

    ranks_of: tuple[tuple[int, ...], ...]
    speeds: tuple[int, ...]
    rank: int

    def is_elsewhere(self, ids: np.ndarray) -> np.ndarray:
        """Which of the chosen experts `ids` another rank computes: a boolean for each id."""
        count = len(self.ranks_of)
        counts = np.bincount(ids.reshape(-1), minlength=count + 1)[:count]
        assigned = load_balancer.assign_replicas(counts.tolist(), self.ranks_of, self.speeds)
        return np.array([*assigned, -1])[ids] != self.rank


class LocalExperts(nn.Module):
    """The stacked experts that this rank holds, called with global expert ids.

    Args:
        experts: mlx-lm's `SwitchGLU` or `SwitchMLP` over this rank's rows.
        held: the global id of each row.
        count: number of experts of the layer on all ranks; no rank holds ids >= count.
        layer: index of the layer, for measurements.
        timer: records the ids when a step is measured.
        replicas: which ranks hold the same experts; None: each expert is on one rank.

    `routing` has the ids of the last call, for the all-reduce that follows.
    """

    def __init__(
        self,
        experts: nn.Module,
        held: Sequence[int],
        count: int,
        layer: int,
        timer: StepTimer,
        replicas: ReplicaPlacement | None = None,
    ) -> None:
        super().__init__()
        self.experts = experts
        self._replicas = replicas
        # Global id -> local row, or -1. One entry more: the id that no rank holds.
        rows = np.full(count + 1, -1, dtype=np.int32)
        rows[list(held)] = np.arange(len(held), dtype=np.int32)
        self._rows, self._row_of = rows, mx.array(rows)
        self._layer, self._timer = layer, timer
        self.routing = LastRouting(layer)
        # Some families attach more to the stack than linear layers (muse_spark: a norm).
        for name, child in experts.children().items():
            if name not in (*STACKED_LAYERS, "activation"):
                self[name] = child

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        """x [..., width], global ids [..., k] -> [..., k, width]."""
        self._timer.record_routing(self._layer, ids)
        self.routing.put(ids)
        return self.compute(x, ids)

    def compute(self, x: mx.array, ids: mx.array) -> mx.array:
        """x [..., width], ids [..., k] -> [..., k, width], zero where another rank computes."""
        raise NotImplementedError

    def rows(self, ids: mx.array) -> np.ndarray:
        """The row of each chosen expert, or -1: another rank computes it. Evaluates the ids."""
        chosen = np.asarray(ids)
        rows = self._rows[chosen]
        if self._replicas is not None:
            rows[self._replicas.is_elsewhere(chosen)] = -1
        return rows


class MaskedExperts(LocalExperts):
    """Stays in the lazy graph: absent experts are computed as row 0 and masked.

    For devices on which a host synchronization costs more than the wasted work (Metal, CUDA). Where
    experts have replicas it synchronizes all the same.
    """

    def compute(self, x: mx.array, ids: mx.array) -> mx.array:
        """See `LocalExperts`."""
        row = self._row_of[ids] if self._replicas is None else mx.array(self.rows(ids))
        y = self.experts(x, mx.maximum(row, 0))
        return mx.where((row >= 0)[..., None], y, mx.zeros((), y.dtype))


class CompactedExperts(LocalExperts):
    """Evaluates the routing and computes only the (token, expert) pairs that are this rank's.

    For CPUs, where a host synchronization is cheap and the work is not.
    """

    def compute(self, x: mx.array, ids: mx.array) -> mx.array:
        """See `LocalExperts`."""
        row = self.rows(ids)
        k = row.shape[-1]
        pairs = np.flatnonzero(row >= 0)
        # A rank without work still builds one pair's graph, never evaluated, for its type: ranks
        # that put different types into an all-reduce would hang.
        work = pairs if pairs.size else np.zeros(1, dtype=np.int64)
        tokens = x.reshape(-1, x.shape[-1])[mx.array(work // k)]
        y = self.experts(tokens, mx.array(np.maximum(row.reshape(-1)[work], 0))[:, None])[:, 0]
        out = mx.zeros((row.size, y.shape[-1]), y.dtype)
        if pairs.size:
            out[mx.array(pairs)] = y
        return out.reshape(*row.shape, -1)


class NativeExperts(LocalExperts):
    """Stays in the lazy graph and computes only this rank's pairs, with the native kernels.

    For CPUs with the extension. Absent experts' weights are not read; the result is float32.
    """

    @classmethod
    def supports(cls, experts: nn.Module, read: Read = lambda _: None) -> bool:
        """Whether the kernels support these experts' matrices and activation.

        Args:
            read: called with each layer before its weights are used.
        """
        known = type(experts) in (SwitchGLU, SwitchMLP)
        if not known or native_layers.activation_code(experts) is None:
            return False
        children = experts.children()
        linears = [children[n] for n in STACKED_LAYERS if n in children]
        plain = len(children) == len(linears) + ("activation" in children)
        if not plain:
            return False
        for linear in linears:
            read(linear)
            if native_layers.native_weights(linear) is None:
                return False
        return True

    def __init__(
        self,
        experts: nn.Module,
        held: Sequence[int],
        count: int,
        layer: int,
        timer: StepTimer,
        replicas: ReplicaPlacement | None = None,
    ) -> None:
        super().__init__(experts, held, count, layer, timer, replicas)
        act = native_layers.activation_code(experts)
        assert act is not None
        matrices = [
            native_layers.native_weights(experts[n]) for n in STACKED_LAYERS if n in experts
        ]
        *inputs, down = matrices
        extension = native.extension()
        self._experts, self._moe = extension.experts, extension.moe
        assigner = None
        if replicas is not None:
            assigner = extension.ReplicaAssigner(replicas.ranks_of, replicas.speeds, replicas.rank)
        self._stack = extension.Stack(inputs, down, self._row_of, *act, assigner)

    def compute(self, x: mx.array, ids: mx.array) -> mx.array:
        """See `LocalExperts`."""
        return self._experts(x, ids, self._stack)

    def weighted(self, x: mx.array, ids: mx.array, weights: mx.array) -> mx.array:
        """x [..., width], global ids and weights [..., k] -> [..., width]: the weighted sum of what
        this rank computes."""
        self._timer.record_routing(self._layer, ids)
        self.routing.put(ids)
        return self._experts(x, ids, self._stack, weights)

    def routed(
        self,
        x: mx.array,
        gate: native_layers.Gate,
        norm: nn.RMSNorm | None = None,
        *,
        add: bool = False,
    ) -> mx.array:
        """`weighted` with the ids and weights that a gate chooses, in one node.

        Args:
            norm: comes before, if there is one.
            add: whether x is added.
        """
        of_norm = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        y, ids = self._moe(x, gate.weights, self._stack, gate.k, gate.normalized, *of_norm, add)
        self._timer.record_routing(self._layer, ids)
        self.routing.put(ids)
        return y


class LoopedGatherLinear(nn.Module):
    """A stacked linear layer, one expert at a time, where MLX's `gather_mm` does not work.

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
        chosen = np.asarray(ids)
        x = mx.broadcast_to(x, (*chosen.shape, *x.shape[-2:])).reshape(-1, x.shape[-1])
        out = mx.zeros((x.shape[0], self.weight.shape[1]), x.dtype)
        for expert in np.unique(chosen):
            rows = mx.array(np.flatnonzero(chosen == expert))
            y = x[rows] @ self.weight[int(expert)].T
            out[rows] = y + self.bias[int(expert)] if "bias" in self else y
        return out.reshape(*chosen.shape, 1, -1)


class Zeros(nn.Module):
    """Shared experts that another rank computes: zeros, shaped like the input."""

    def __call__(self, x: mx.array, *_: mx.array) -> mx.array:
        """Zeros like x."""
        return mx.zeros_like(x)


class AllReduceBefore(nn.Module):
    """A module that is not linear, with an all-reduce of its input."""

    def __init__(self, module: nn.Module, all_reduce: AllReduce) -> None:
        super().__init__()
        self.module = module
        self._all_reduce = all_reduce

    def __call__(self, x: mx.array) -> mx.array:
        """The module of the sum of every rank's x."""
        return self.module(self._all_reduce(x))


class ExpertParallel(nn.Module):
    """A Mixture-of-Experts block whose experts are on several ranks: one all-reduce.

    Args:
        block: mlx-lm's own block over this rank's experts.
        routing: where those experts store what was chosen.
        collective: the ranks.
        timer: times measured steps.
        family: see `families.Family`.
        inside: whether the all-reduce happens in the middle of the block.
    """

    def __init__(
        self,
        block: nn.Module,
        routing: LastRouting,
        collective: Collective,
        timer: StepTimer,
        family: Family,
        inside: bool,
    ) -> None:
        super().__init__()
        self.block = block
        self._routing, self._collective, self._timer = routing, collective, timer
        self._is_plain = family.forward is None and not inside
        self._forward: Callable[..., mx.array]
        if family.forward is not None:
            custom = family.forward
            self._forward = lambda *args: custom(block, *args, all_reduce=self._all_reduce)
        elif inside:
            self._forward = block
        else:
            self._forward = lambda *args: self._all_reduce(block(*args))
        if inside:
            name = family.all_reduce_before
            assert name is not None
            block[name] = AllReduceBefore(block[name], self._all_reduce)

    def __call__(self, *args: mx.array) -> mx.array:
        """As the block; the same on every rank."""
        self._timer.lap("trunk", *args)
        return self._forward(*args)

    @property
    def can_add(self) -> bool:
        """Whether `add_to` can be called."""
        native = type(self.block) is native_blocks.NativeBlock and self.block.has_gate
        return self._is_plain and native

    def add_to(self, x: mx.array, norm: nn.RMSNorm) -> mx.array:
        """x + the block of norm(x), [batch, length, width]; the same on every rank."""
        self._timer.lap("trunk", x)
        is_alone = self._collective.size == 1
        total = self._all_reduce(self.block.of_norm(x, norm, add=is_alone))
        return total if is_alone else x + total

    def _all_reduce(self, part: mx.array) -> mx.array:
        self._timer.lap("experts", part)
        total = self._collective.all_sum(part, self._routing.take())
        self._timer.lap("all_reduce", total)
        return total


def parallelize(
    model: nn.Module,
    family_name: str,
    plan: Plan,
    collective: Collective,
    timer: StepTimer,
    kernels: str = "auto",
    read: Read = lambda _: None,
) -> None:
    """Replace the MoE blocks of a loaded model by expert-parallel ones, in place.

    The model's expert stacks must hold the rows that `plan` assigns to this rank, in order.

    Args:
        family_name: mlx-lm's module.
        kernels: "native": all layers compute with the native kernels, much faster, with float32
            activations (16 bits inside quantized layers); "mlx": none; "auto": native on a CPU
            that has the extension. Norms, rotary positions and attention of this process's models
            are those of the last call (see `native_layers.install_operations`).
        read: called with each layer before the native kernels take its weights.

    Raises:
        InputError: "native" cannot be used here.
    """
    family, rank = family_of(family_name), collective.rank
    if family.make_caches is not None:
        model.make_cache = partial(family.make_caches, model)
    if family.request_attention:
        install_request_attention(model, family.request_attention)
    use_native = kernels != "mlx" and native_layers.is_supported()
    if kernels == "native" and not use_native:
        reason = native.unavailable_reason() or "they are for CPUs, this is a GPU"
        raise InputError(f"kernels: native cannot be used: {reason}; use auto or mlx", "kernels")
    native_layers.install_operations(use_native)
    for block, layer in zip(architecture.find_blocks(model), plan.layers, strict=True):
        _zero_biases_of_others(block, layer, family, rank)
        experts = _local_experts(block, layer, plan, rank, timer, use_native, read)
        block.module[block.experts_name] = experts
        inside = block.all_reduces_inside(family)
        parallel = ExpertParallel(block.module, experts.routing, collective, timer, family, inside)
        architecture.replace_module(model, block.path, parallel)
    shard_dense(model, plan, collective, timer)
    if use_native:
        native_layers.install_native_layers(model, (LoopedGatherLinear,), read)
        native_blocks.install_native_blocks(model)


def _local_experts(
    block: MoEBlock,
    layer: LayerPlan,
    plan: Plan,
    rank: int,
    timer: StepTimer,
    use_native: bool,
    read: Read,
) -> LocalExperts:
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    kind: type[LocalExperts] = CompactedExperts if on_cpu else MaskedExperts
    if use_native and NativeExperts.supports(block.experts, read):
        kind = NativeExperts
    elif on_cpu:
        _replace_ungatherable_linears(block)
    replicas = None
    ranks_of = layer.replica_ranks(rank)
    if any(len(ranks) > 1 for ranks in ranks_of):
        speeds = tuple(load_balancer.integer_speeds(plan.nodes, plan.node_weights))
        replicas = ReplicaPlacement(ranks_of, speeds, rank)
    held, count = layer.experts_of(rank), len(layer.experts)
    return kind(block.experts, held, count, block.layer, timer, replicas)


def _zero_biases_of_others(block: MoEBlock, layer: LayerPlan, family: Family, rank: int) -> None:
    """Zero the output biases that another rank adds."""
    if layer.slice_of(rank)[0]:
        zero_bias(block.output)
    span = layer.shared_slice_of(rank)
    if span is not None and span[0]:
        for name in block.shared_names:
            zero_bias(block.module[name].down_proj)
    for path in family.biases_after_sum if rank else ():
        owner_path, _, name = path.rpartition(".")
        try:
            owner = architecture.get_module(block.module, owner_path)
        except (AttributeError, KeyError):
            continue
        if name in owner:
            owner[name] = mx.zeros_like(owner[name])


def _replace_ungatherable_linears(block: MoEBlock) -> None:
    for name, linear in block.linears.items():
        if "scales" not in linear and linear.weight.dtype != mx.float32:
            block.experts[name] = LoopedGatherLinear(linear)
