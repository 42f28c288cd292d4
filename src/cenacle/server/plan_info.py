"""What the server shows of the plan in use.

Owns: the placement map, the speed prediction and the fingerprint of a plan.
Does not know: HTTP, how a plan is chosen.
Invariant: `PlanTracker.current` belongs to `Model.plan` as it is now. A recovery can replace it.
Next: `cluster_view.py`, `metrics.py` and `app.py` show these values.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..core.plan import Plan
from .expected_speed import SpeedPrediction, predict_speed

if TYPE_CHECKING:
    from ..api import Model


@dataclass(frozen=True)
class PlanInfo:
    """Values derived from one plan.

    Args:
        plan: what each rank holds.
        reason: why this plan, in one line.
        placement: see `placement_map`.
        prediction: expected speed, or one sentence that says why there is none.
        fingerprint: changes when the same seed may give other text.
    """

    plan: Plan
    reason: str
    placement: dict[str, Any]
    prediction: SpeedPrediction | str
    fingerprint: str


class PlanTracker:
    """Derives `PlanInfo` again whenever the model's plan was replaced."""

    def __init__(self, model: Model) -> None:
        self._model, self._first_plan = model, model.plan
        self._info = self._describe(model.plan)

    @property
    def current(self) -> PlanInfo:
        """The values of the plan in use."""
        plan = self._model.plan
        if plan is not self._info.plan:
            self._info = self._describe(plan)
        return self._info

    def _describe(self, plan: Plan) -> PlanInfo:
        model = self._model
        reason = model.plan_reason
        if plan != self._first_plan:
            reason = f"re-formed: {model.group.state.reason}"
        identity = repr((__version__, model.name, model.spec.to_json(), plan.to_json()))
        return PlanInfo(
            plan,
            reason,
            placement_map(plan),
            predict_speed(plan, model.config, model.name),
            "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:10],
        )


def placement_map(plan: Plan) -> dict[str, Any]:
    """Which ranks hold which expert, as runs of neighboring experts.

    Returns:
        "rank_sets": lists of ranks; "patterns": lists of runs [index of a rank set, number of
        experts]; "layers": [index in the model, index of its pattern] for each MoE layer; "id":
        identifies all of it.
    """
    rank_sets: list[tuple[int, ...]] = []
    patterns: list[tuple[tuple[int, int], ...]] = []
    layers: list[tuple[int, int]] = []
    for layer in plan.layers:
        runs: list[list[int]] = []
        for parts in layer.experts:
            rank_set = _index_of(tuple(sorted(p.rank for p in parts)), rank_sets)
            if runs and runs[-1][0] == rank_set:
                runs[-1][1] += 1
            else:
                runs.append([rank_set, 1])
        pattern = tuple((rank_set, count) for rank_set, count in runs)
        layers.append((layer.layer, _index_of(pattern, patterns)))
    body = {"rank_sets": rank_sets, "patterns": patterns, "layers": layers}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()[:12]
    return {"id": digest, **body}


def _index_of(item: Any, items: list[Any]) -> int:
    """Index of an item, which is appended if it is new."""
    if item not in items:
        items.append(item)
    return items.index(item)
