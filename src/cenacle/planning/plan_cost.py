"""What the performance model says of a plan that was dealt, on machines that were measured.

Owns: from a plan, a config and measured machines to a prediction; the machines and the link that
`cenacle calibrate` has saved here.
Does not know: which plan to take (`model/balance.py` asks), how other machines are measured.
Invariant: nothing is guessed: without measured machines there is no prediction but a reason.
Next: `cost.py` is the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.plan import Plan
from ..errors import CenacleError
from . import catalog
from .catalog import Link, Machine
from .model_shapes import shape_from_config
from .perf_model import PaperConstants, Prediction, Workload, predict

LOCAL_MACHINE, LOCAL_LINK = "this", "measured"  # the names under which `cenacle calibrate` saves
PREDICTED_CONTEXT = 512  # positions in the cache of the token that is predicted


@dataclass(frozen=True)
class MeasuredMachines:
    """What a group's machines were measured to be.

    Args:
        config: the checkpoint's config.json.
        machines: one for each rank.
        link: between them; None for one.
        study: constants of exchanges.
        said: where the numbers come from, in a few words.
    """

    config: Mapping[str, Any] = field(repr=False)
    machines: tuple[Machine, ...]
    link: Link | None
    study: PaperConstants
    said: str

    @property
    def bytes_s(self) -> float:
        """At which the quickest machine reads weights."""
        return max(m.bytes_per_s for m in self.machines)

    @property
    def latency_s(self) -> float:
        """Of an exchange."""
        return self.link["latency_us"] / 1e6 if self.link is not None else 0.0


def local_measurements(
    config: Mapping[str, Any], nodes: int, latency_s: float = 0.0
) -> MeasuredMachines | str:
    """Ranks of this machine as it was calibrated, or one sentence that says why there are none.

    Args:
        config: the checkpoint's config.json.
        nodes: how many.
        latency_s: added to every exchange.
    """
    try:
        known = catalog.load_catalog()
        if LOCAL_MACHINE not in known.machines:
            return "this machine was never calibrated: run `cenacle calibrate`"
        if nodes > 1 and LOCAL_LINK not in known.links:
            return "the link between nodes was never calibrated: run `cenacle calibrate --nodes 2`"
        link = known.link(LOCAL_LINK) if nodes > 1 else None
        if link is not None and latency_s:
            link = link.with_fact("latency_us", link["latency_us"] + 1e6 * latency_s, "emulated")
        machines = (known.machine(LOCAL_MACHINE),) * nodes
        study = PaperConstants.of(known.fits["study"])
    except CenacleError as error:
        return f"the performance model cannot say: {error}"
    return MeasuredMachines(config, machines, link, study, "calibrated")


def predict_plan(plan: Plan, measured: MeasuredMachines, name: str = "") -> Prediction:
    """One token of one request.

    Args:
        plan: what each rank holds.
        measured: as many machines as the plan has ranks.
        name: of the model, for messages.

    Raises:
        CenacleError: the model has no word on this plan: an unknown shape, heads that do not
            divide.
    """
    spec, machines = plan.spec, measured.machines
    if plan.node_weights is None:  # dealt evenly: all wait for the slowest
        machines = (min(machines, key=lambda m: m.bytes_per_s),) * plan.nodes
    weights = (float(spec.trunk_bytes), float(spec.expert_bytes), float(spec.shared_bytes))
    # Bits are those of the checkpoint, through its bytes.
    shape = shape_from_config(name, dict(measured.config))
    return predict(
        Workload(shape, catalog.parse_quantization(16), PREDICTED_CONTEXT, bytes_=weights),
        "expert" if plan.nodes > 1 else "single",
        machines,
        measured.link,
        measured.study,
        placement="weighted"
        if plan.placement == "sliced" and plan.node_weights
        else plan.placement,
        trunk=plan.trunk,
        shares=[s / sum(plan.node_weights) for s in plan.node_weights]
        if plan.node_weights
        else None,
        rest_sliced=plan.trunk == "sharded",
    )
