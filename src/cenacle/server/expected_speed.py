"""What the performance model says of the model that is being served, where it can say anything.

Owns: from a plan and a config to the terms of one token, on machines that `calibrate` measured.
Does not know: HTTP, what was measured while serving (`engine/terms.py`).
Invariant: nothing is guessed: without a calibrated machine (and, for several nodes, a calibrated
link) there is no prediction but the reason, which says what to do.
Next: `cost/dealt.py` asks the model; `cluster_view.py` and the metrics show it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.plan import Plan
from ..errors import CenacleError
from ..planning import plan_cost


@dataclass(frozen=True)
class SpeedPrediction:
    """A prediction for one token of one request.

    Args:
        terms_ms: milliseconds by the terms of `Terms.per_token_ms` and their "total". The model
            has no waiting of its own: its experts are the busiest rank's, so what the others wait
            for is in there. A layer's own overhead is counted with the trunk, the head is rest.
        tok_per_s: 1000 / total.
        basis: which machine and link it was made for.
    """

    terms_ms: dict[str, float]
    tok_per_s: float
    basis: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object, numbers rounded to what can be read."""
        return {
            "terms_ms": {k: round(v, 4) for k, v in self.terms_ms.items()},
            "tok_per_s": round(self.tok_per_s, 2),
            "basis": self.basis,
        }


def predict_speed(plan: Plan, config: dict[str, Any], name: str) -> SpeedPrediction | str:
    """The terms of a token on this machine's ranks.

    Args:
        plan: what each rank holds.
        config: the checkpoint's config.json.
        name: of the model, for messages.

    Returns:
        The prediction, or one sentence that says why there is none. Reads files: call it once.
    """
    measured = plan_cost.here(config, plan.nodes)
    if isinstance(measured, str):
        return measured
    try:
        found = plan_cost.predict_plan(plan, measured, name)
    except CenacleError as error:
        return f"the performance model cannot say: {error}"
    seconds = found.terms
    terms = {
        "trunk": seconds["trunk"] + seconds["overhead"],
        "experts": seconds["experts"],
        "exchange": seconds["exchange"],
        "waiting": 0.0,
        "rest": seconds["head"],
    }
    terms["total"] = sum(terms.values())
    link = measured.link
    basis = measured.machines[0].title + (f"; link {link.title}" if link is not None else "")
    return SpeedPrediction({k: 1000 * v for k, v in terms.items()}, found.tok_per_s, basis)


__all__ = ["SpeedPrediction", "predict_speed"]
