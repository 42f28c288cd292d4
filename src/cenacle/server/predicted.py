"""What the performance model says of the model that is being served, where it can say anything.

Owns: from a plan and a config to the terms of one token, on machines that `calibrate` measured.
Does not know: HTTP, what was measured while serving (`engine/terms.py`).
Invariant: nothing is guessed: without a calibrated machine (and, for several nodes, a calibrated
link) there is no prediction but the reason, which says what to do.
Next: `cost/cost.py` is the model itself; `cluster_view.py` and the metrics show it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..cost import catalog, planner
from ..cost.cost import Job, predict
from ..cost.shapes import from_config
from ..errors import CenacleError
from ..plan import Plan

MACHINE, LINK = "this", "measured"  # the names under which `cenacle calibrate` saves
CONTEXT = 512  # positions in the cache of the token that is predicted


@dataclass(frozen=True)
class Predicted:
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


def predicted(plan: Plan, config: dict[str, Any], name: str) -> Predicted | str:
    """The terms of a token on this machine's ranks.

    Args:
        plan: what each rank holds.
        config: the checkpoint's config.json.
        name: of the model, for messages.

    Returns:
        The prediction, or one sentence that says why there is none. Reads files: call it once.
    """
    try:
        known = catalog.load()
        if MACHINE not in known.machines:
            return "this machine was never calibrated: run `cenacle calibrate`"
        if plan.nodes > 1 and LINK not in known.links:
            return "the link between nodes was never calibrated: run `cenacle calibrate --nodes 2`"
        link = LINK if plan.nodes > 1 else None
        machines, between, study = planner.from_catalogue(
            known, ",".join([MACHINE] * plan.nodes), link, None
        )
        spec = plan.spec
        weights = (float(spec.trunk_bytes), float(spec.expert_bytes), float(spec.shared_bytes))
        # Bits are those of the checkpoint, through its bytes.
        job = Job(from_config(name, config), catalog.quant(16), CONTEXT, bytes_=weights)
        found = predict(
            job,
            "expert" if plan.nodes > 1 else "single",
            machines,
            between,
            study,
            placement="weighted" if plan.placement == "sliced" and plan.shares else plan.placement,
            trunk=plan.trunk,
            shares=plan.shares,
            rest_sliced=plan.trunk == "sharded",
        )
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
    basis = machines[0].title + (f"; link {between.title}" if between is not None else "")
    return Predicted({k: 1000 * v for k, v in terms.items()}, found.tok_per_s, basis)


__all__ = ["Predicted", "predicted"]
