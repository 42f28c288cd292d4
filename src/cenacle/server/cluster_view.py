"""What the cluster view shows: GET /cluster.

Owns: the JSON of nodes, placement, routing, times and the last minutes; reading how much memory a
rank has now.
Does not know: how it is drawn (`web/cluster.js`), who may see it.
Invariant: no text and no token of any request is in it; a poll reads numbers that exist already,
and leaves out what the client says that it has, so that one a second costs next to nothing.
Next: `engine/terms.py` makes the times, `predicted.py` what stands beside them.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.plan import Plan
from .expected_speed import SpeedPrediction, predict_speed

if TYPE_CHECKING:
    from ..api import Model

SAMPLE_INTERVAL_S = 2.0
MAX_SAMPLES = 150  # five minutes
PROC = Path("/proc")


class ClusterView:
    """Everything that GET /cluster says of one model; close it.

    Args:
        model: loaded.
        sample_s: seconds between two samples of the last minutes.
    """

    def __init__(self, model: Model, sample_s: float = SAMPLE_INTERVAL_S) -> None:
        self._model, self._sample_s = model, sample_s
        self._began = time.monotonic()
        self._placement = placement_map(model.plan)
        self._predicted = predict_speed(model.plan, model.config, model.name)
        self._samples: deque[tuple[float, int, int]] = deque(maxlen=MAX_SAMPLES)
        self._closed = threading.Event()
        threading.Thread(target=self._sample, daemon=True, name="sampling").start()

    def close(self) -> None:
        """End the sampling."""
        self._closed.set()

    def to_json(self, have_placement: str = "", have_steps: str = "") -> dict[str, Any]:
        """The state now.

        Args:
            have_placement: the id of the placement that the client has: it is left out then.
            have_steps: the measured steps whose counts the client has, likewise.
        """
        model, group = self._model, self._model.group
        terms, known = group.terms, group.state
        body: dict[str, Any] = {
            "model": model.name,
            "family": model.spec.family,
            "status": known.phase,
            "recoveries": known.recoveries,
            "uptime_s": round(time.monotonic() - self._began, 1),
            "nodes": model.plan.nodes,
            "placed": {
                "experts": model.plan.placement,
                "trunk": model.plan.trunk,
                "reason": model.plan_reason,
                "exchanges": model.plan.all_reduces if model.plan.nodes > 1 else 0,
                "backend": model.ranks.backend if model.plan.nodes > 1 else None,
                "top_k": model.spec.top_k,
                "bytes": model.spec.total_bytes,
            },
            "ranks": self._ranks(),
            "memory": machine_memory(),
            "load": group.load,
            "counts": dict(group.counts),
            "drafts": asdict(group.drafts),
            "terms": {
                "steps": terms.steps,
                "token_ms": _rounded(terms.per_token_ms()),
                "rank_ms": [_rounded(own) for own in terms.per_rank_ms()],
            },
            "history": {
                "every_s": self._sample_s,
                "tokens_per_s": [rate for rate, _, _ in self._samples],
                "running": [running for _, running, _ in self._samples],
                "waiting": [waiting for _, _, waiting in self._samples],
            },
        }
        if known.phase != "ok":
            body |= {"reason": known.reason, "lost_rank": known.rank}
        if isinstance(self._predicted, SpeedPrediction):
            body["predicted"] = self._predicted.to_json()
        else:
            body |= {"predicted": None, "not_predicted": self._predicted}
        if have_placement != self._placement["id"]:
            body["placement"] = self._placement
        if have_steps != str(terms.steps):
            body["routed"] = {
                "steps": terms.steps,
                "counts": routing_counts(model.plan, terms.routed),
            }
        return body

    def _ranks(self) -> list[dict[str, Any]]:
        model, now, heard = self._model, time.monotonic(), self._model.group.heard
        gone = model.group.state.phase != "ok"
        return [
            {
                **{k: own[k] for k in ("rank", "pid", "device", "weights_bytes")},
                "resident_bytes": None if gone else resident_bytes(own["pid"]),
                "silent_s": round(now - last, 1),
            }
            for own, last in zip(model.ranks_json(), heard, strict=False)
        ]

    def _sample(self) -> None:
        before, then = self._generated(), time.monotonic()
        while not self._closed.wait(self._sample_s):
            now, count, load = time.monotonic(), self._generated(), self._model.group.load
            rate = round((count - before) / (now - then), 1)
            # A restarted group may count from nought.
            self._samples.append((max(0.0, rate), load["running"], load["waiting"]))
            before, then = count, now

    def _generated(self) -> int:
        return self._model.group.counts["generated_tokens"]


def placement_map(plan: Plan) -> dict[str, Any]:
    """Who holds which expert, in runs of neighbours.

    Returns:
        "sets": lists of ranks; "maps": lists of runs [set, experts], set an index into "sets";
        "layers": for each MoE layer [its index in the model, map]; "id": of all this.
    """
    sets: list[tuple[int, ...]] = []
    maps: list[tuple[tuple[int, int], ...]] = []
    layers: list[tuple[int, int]] = []
    for layer in plan.layers:
        runs: list[list[int]] = []
        for parts in layer.experts:
            who = _index(sets, tuple(sorted(p.rank for p in parts)))
            if runs and runs[-1][0] == who:
                runs[-1][1] += 1
            else:
                runs.append([who, 1])
        layers.append((layer.layer, _index(maps, tuple((w, n) for w, n in runs))))
    body = {"sets": sets, "maps": maps, "layers": layers}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()[:12]
    return {"id": digest, **body}


def routing_counts(plan: Plan, routed: Mapping[int, Mapping[int, int]]) -> list[list[int]]:
    """How often each expert was chosen: a row per MoE layer, in the plan's order."""
    # Looked up, never iterated: the group's thread adds to it meanwhile.
    rows = [(routed.get(p.layer, {}), len(p.experts)) for p in plan.layers]
    return [[row.get(expert, 0) for expert in range(many)] for row, many in rows]


def resident_bytes(pid: int) -> int | None:
    """Memory that a process of this machine has now; None where the system does not say."""
    try:
        pages = int((PROC / str(pid) / "statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def machine_memory() -> dict[str, int] | None:
    """This machine's memory and what of it is available, in bytes; None if that is not known."""
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
        found = {k: int(v.split()[0]) * 1024 for k, _, v in (x.partition(":") for x in lines[:8])}
        return {"total_bytes": found["MemTotal"], "available_bytes": found["MemAvailable"]}
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _index(known: list[Any], item: Any) -> int:
    if item not in known:
        known.append(item)
    return known.index(item)


def _rounded(terms: Mapping[str, float]) -> dict[str, float]:
    return {k: round(v, 4) for k, v in terms.items()}
