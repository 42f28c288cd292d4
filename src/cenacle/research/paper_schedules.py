"""The paper's schedules of a Mixture-of-Experts layer, for comparison (arXiv:2506.23635).

Owns: which experts a rank computes besides those it must, and which rank routes.
Does not know: how experts are computed: all rows use the `LocalExperts` of this machine, so their
kernels are Cenacle's; links (`collective/delayed.py`).
Shapes: x [batch, length, width], ids and scores [batch, length, k]. A schedule computes the tokens
of a prompt one after the other, as the paper does, but all-reduces them at once.
Invariant: whatever is computed besides the chosen experts is thrown away, so every schedule gives
mlx-lm's output. Only for blocks that are a weighted sum of their experts and nothing else.

    naive    experts as separate arrays; the central rank alone runs the trunk and routes: it sends
             x, ids and scores to all (first all-reduce), and their sums come back (second)
    P-LB     as naive, with stacked experts; every rank computes all that it holds
    P-LR     as P-LB, but each rank tops up to the busiest rank's number of chosen experts with its
             least recently used ones
    P-LR-D   as P-LR, decentralized: every rank runs trunk and router; one all-reduce

Two things are faster here than in the paper, for all rows: a rank weighs and adds its experts'
outputs before sending them, one vector instead of one for each computed expert; and ranks use
Cenacle's collectives instead of gRPC, pipes and pickled maps.
Next: `model/expert_parallel.py`, Cenacle's own; `schedule_ablation.py`, which measures them.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..collective.base import Collective
from ..core.plan import LayerPlan, Plan
from ..errors import PlanError
from ..model import architecture, native_layers
from ..model.architecture import input_width
from ..model.expert_parallel import ExpertParallel, LocalExperts, parallelize
from ..model.families import family_of
from ..model.fp8_layers import MODE, Fp8Linear
from ..model.step_timer import StepTimer

SCHEDULES = ("naive", "P-LB", "P-LR", "P-LR-D")
CENTRALIZED_SCHEDULES = ("naive", "P-LB", "P-LR")


class _RouterProbe(nn.Module):
    """Stands in for the experts, to learn which ones the block chooses and how it weighs them.

    The block's output is the sum over j of score j times row j of this module's output; rows of the
    identity make that the scores themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ids = mx.array(0)

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:  # noqa: ARG002
        """x [..., width], ids [..., k] -> [..., k, k]."""
        self.ids = ids
        k = ids.shape[-1]
        return mx.broadcast_to(mx.eye(k), (*ids.shape, k))

    def weighted(self, x: mx.array, ids: mx.array, weights: mx.array) -> mx.array:  # noqa: ARG002
        """For blocks that leave the sum to their experts: the scores themselves."""
        self.ids = ids
        return weights


class _SeparateExperts(nn.Module):
    """This rank's experts as separate arrays: gate, up and down of each."""

    def __init__(self, stack: nn.Module, rows: int, kernels: str) -> None:
        super().__init__()
        self.experts = [self._extract(stack, row) for row in range(rows)]
        self.activation = stack.activation
        mx.eval(self.parameters())
        if kernels != "mlx" and native_layers.is_supported():
            native_layers.install_native_layers(self)

    @staticmethod
    def _extract(stack: nn.Module, row: int) -> dict[str, nn.Module]:
        layers: dict[str, nn.Module] = {}
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = stack[name]
            quantized = "scales" in linear
            kind = nn.QuantizedLinear if quantized else nn.Linear
            if quantized and linear.mode == MODE:
                kind = Fp8Linear
            layer = kind.__new__(kind)  # not its __init__, which draws random weights
            nn.Module.__init__(layer)
            for key in ("weight", "scales", "biases", "bias"):
                if linear.get(key) is not None:
                    layer[key] = mx.contiguous(linear[key][row])
            if quantized:
                layer.group_size, layer.bits = linear.group_size, linear.bits
                layer.mode = linear.mode
            layers[name] = layer
        return layers

    def __call__(self, x: mx.array, row: int) -> mx.array:
        """x [width] -> [width], by one expert."""
        e = self.experts[row]
        x = x[None]
        return e["down_proj"](self.activation(e["up_proj"](x), e["gate_proj"](x)))[0]


class ScheduledBlock(nn.Module):
    """A block under one of the `SCHEDULES`; ranks other than the central one call `serve`.

    Args:
        block: mlx-lm's own block, whose experts are `local`.
        switch: the attribute of the block that holds them.
        local: this rank's experts.
        plan: of this layer.
        schedule: see the module.
        separate: the experts as separate arrays, for "naive".
    """

    def __init__(
        self,
        block: nn.Module,
        switch: str,
        local: LocalExperts,
        plan: LayerPlan,
        schedule: str,
        collective: Collective,
        timer: StepTimer,
        separate: _SeparateExperts | None,
    ) -> None:
        super().__init__()
        self.block, self.width = block, input_width(local.experts)
        # None where the experts are separate arrays, so that their stack is freed.
        self.local = local if separate is None else None
        self._rows, self._probe = local._rows, _RouterProbe()
        block[switch] = self._probe
        self._layer, self._schedule, self._separate = plan.layer, schedule, separate
        self._collective, self._timer = collective, timer
        self._experts_of = [
            np.array(plan.experts_of(rank), dtype=np.int64) for rank in range(collective.size)
        ]
        # Least recently used first.
        self._recent = [int(e) for e in self._experts_of[collective.rank]]

    def __call__(self, x: mx.array) -> mx.array:
        """x [batch, length, width] -> the same, on every rank of the decentralized schedule and on
        the central one of the others."""
        scores, dtype = self.block(x), x.dtype
        ids = self._probe.ids
        self._timer.record_routing(self._layer, ids)
        if self._schedule in CENTRALIZED_SCHEDULES:
            self._timer.lap("trunk", x, ids, scores)
            x, ids, scores = self._broadcast(x.shape, ids.shape[-1], x, ids, scores)
        else:
            self._timer.lap("trunk", x)
        return self._sum(self._part(x, ids, scores)).astype(dtype)

    def serve(self, batch: int, length: int, k: int) -> None:
        """The part of a rank that is not the central one."""
        self._timer.lap("trunk")
        self._sum(self._part(*self._broadcast((batch, length, self.width), k)))

    def _broadcast(
        self, shape: tuple[int, ...], k: int, *own: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """First all-reduce: the central rank's x, ids and scores on every rank."""
        batch, length, width = shape
        if own:
            whole = mx.concatenate([a.astype(mx.float32) for a in own], axis=-1)
        else:
            whole = mx.zeros((batch, length, width + 2 * k))
        whole = self._collective.all_sum(whole)
        self._timer.lap("all_reduce", whole)
        x, ids, scores = mx.split(whole, [width, width + k], axis=-1)
        return x, ids.astype(mx.int32), scores

    def _sum(self, part: mx.array) -> mx.array:
        self._timer.lap("experts", part)
        whole = self._collective.all_sum(part)
        self._timer.lap("all_reduce", whole)
        mx.eval(whole)  # also where nobody measures: the paper's ranks wait for every all-reduce
        return whole

    def _part(self, x: mx.array, ids: mx.array, scores: mx.array) -> mx.array:
        """This rank's part of the weighted sum: [batch, length, width]."""
        chosen = np.asarray(ids).reshape(-1, ids.shape[-1])
        weights = np.asarray(scores.astype(mx.float32)).reshape(chosen.shape)
        tokens = x.reshape(-1, x.shape[-1])
        parts = [
            self._token(tokens[i], row, weight)
            for i, (row, weight) in enumerate(zip(chosen, weights, strict=True))
        ]
        return mx.stack(parts).reshape(x.shape)

    def _token(self, x: mx.array, ids: np.ndarray, scores: np.ndarray) -> mx.array:
        score_of = dict(zip(ids.tolist(), scores.tolist(), strict=True))
        experts = self.computed_experts(ids)
        if not experts:
            return mx.zeros(x.shape, mx.float32)
        if self._separate is not None:
            outputs = mx.stack([self._separate(x, int(self._rows[e])) for e in experts])
        else:
            assert self.local is not None
            outputs = self.local.compute(x[None], mx.array([experts], dtype=mx.int32))[0]
        weights = mx.array([score_of.get(e, 0.0) for e in experts])
        return (outputs.astype(mx.float32) * weights[:, None]).sum(axis=0)

    def computed_experts(self, ids: np.ndarray) -> list[int]:
        """The experts that this rank computes for a token: the chosen ones, then others."""
        chosen = [np.intersect1d(experts, ids) for experts in self._experts_of]
        own = [int(e) for e in chosen[self._collective.rank]]
        if self._schedule == "naive":
            return own
        local = self._experts_of[self._collective.rank]
        if self._schedule == "P-LB":
            return own + [int(e) for e in local if e not in own]
        idle = [e for e in self._recent if e not in own]
        computed = own + idle[: max(map(len, chosen)) - len(own)]
        self._recent = [e for e in self._recent if e not in computed] + computed
        return computed


def install_schedule(
    model: nn.Module,
    family: str,
    plan: Plan,
    collective: Collective,
    timer: StepTimer,
    kernels: str,
    name: str,
) -> list[ScheduledBlock]:
    """`parallelize` under one of the `SCHEDULES`, in place.

    Returns:
        The layers' blocks, in order.

    Raises:
        PlanError: an unknown schedule, experts that are not whole on one rank each, or a family
            whose block is more than a weighted sum of its experts.
    """
    if name not in SCHEDULES:
        raise PlanError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {name!r}")
    facts = family_of(family)
    blocks = architecture.find_blocks(model)
    is_plain = facts.forward is None and not facts.biases_after_sum
    if not is_plain or any(b.shared_names or b.all_reduces_inside(facts) for b in blocks):
        raise PlanError(
            f"schedule: expected a family whose blocks are a weighted sum of experts, such as "
            f"dbrx, mixtral or qwen3_moe, got {family}"
        )
    if any(len(slices) != 1 for layer in plan.layers for slices in layer.experts):
        raise PlanError(f"schedule {name}: expected whole experts, got placement {plan.placement}")
    separate: list[_SeparateExperts | None] = [None] * len(blocks)
    if name == "naive":
        if any("gate_proj" not in b.experts for b in blocks):
            raise PlanError(
                f"schedule naive: {family}'s experts have no gate; try another schedule"
            )
        counts = [len(layer.experts_of(collective.rank)) for layer in plan.layers]
        separate = [
            _SeparateExperts(b.experts, n, kernels) for b, n in zip(blocks, counts, strict=True)
        ]
    parallelize(model, family, plan, collective, timer, kernels)
    scheduled = []
    for block, layer, arrays in zip(blocks, plan.layers, separate, strict=True):
        parallel: Any = architecture.get_module(model, block.path)
        assert isinstance(parallel, ExpertParallel)
        switch = block.experts_name
        local = parallel.block[switch]
        new = ScheduledBlock(parallel.block, switch, local, layer, name, collective, timer, arrays)
        architecture.replace_module(model, block.path, new)
        scheduled.append(new)
    return scheduled
