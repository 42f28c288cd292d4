"""The expected speed of the model that is served.

Owns: from a plan and a config to the predicted step timings, on machines that were calibrated.
Does not know: HTTP, what was measured while serving (`ranks/step_timings.py`).
Invariant: nothing is guessed. Without a calibrated machine (and, for several nodes, a calibrated
link) the result is a sentence that says what to do.
Next: `planning/plan_cost.py` computes it; `plan_info.py` keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.plan import Plan
from ..errors import CenacleError
from ..planning import plan_cost

# Two calibrations of a machine in a row differ by up to this (docs/planning.md).
RELATIVE_BAND = 0.15


@dataclass(frozen=True)
class SpeedPrediction:
    """The predicted time of one token of one request.

    Args:
        step_timings_ms: milliseconds by the names of `StepTimings.per_token_ms`, and their "total".
            "experts" is the slowest rank's, so it includes what the others wait, and "waiting" is
            0. The overhead of a layer counts as "trunk", the output head as "rest".
        tok_per_s: 1000 / total.
        basis: the machine and the link that it was computed for.
    """

    step_timings_ms: dict[str, float]
    tok_per_s: float
    basis: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object; numbers are rounded. "band_ms": the range expected of the total."""
        total = self.step_timings_ms["total"]
        return {
            "band_ms": [round(total * (1 + sign * RELATIVE_BAND), 4) for sign in (-1, 1)],
            "step_timings_ms": {k: round(v, 4) for k, v in self.step_timings_ms.items()},
            "tok_per_s": round(self.tok_per_s, 2),
            "basis": self.basis,
        }


def predict_speed(plan: Plan, config: dict[str, Any], name: str) -> SpeedPrediction | str:
    """Predict the time of a token on this machine's ranks.

    Args:
        plan: what each rank holds.
        config: the checkpoint's config.json.
        name: of the model, for messages.

    Returns:
        The prediction, or one sentence that says why there is none.
    """
    measured = plan_cost.local_measurements(config, plan.nodes)
    if isinstance(measured, str):
        return measured
    try:
        prediction = plan_cost.predict_plan(plan, measured, name)
    except CenacleError as error:
        return f"the performance model cannot predict this plan: {error}"
    seconds = prediction.step_timings
    timings = {
        "trunk": seconds["trunk"] + seconds["overhead"],
        "experts": seconds["experts"],
        "all_reduce": seconds["communication"],
        "waiting": 0.0,
        "rest": seconds["head"],
    }
    timings["total"] = sum(timings.values())
    link = measured.link
    basis = measured.machines[0].title + (f"; link {link.title}" if link is not None else "")
    timings_ms = {k: 1000 * v for k, v in timings.items()}
    return SpeedPrediction(timings_ms, prediction.tok_per_s, basis)
