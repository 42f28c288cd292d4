"""The data of the cluster view: GET /cluster.

Owns: the JSON of nodes, placement, routing and step timings; the sampling of the history.
Does not know: how it is drawn (`web/cluster.js`), who may see it.
Invariant: it contains no text and no token of any request, and of API keys only the client's own
name. A poll only reads numbers that exist, and omits what the client already has.
Next: `cluster_history.py` keeps the samples, `ranks/step_timings.py` computes the timings,
`plan_info.py` what depends on the plan.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..core.link import Link
from ..core.plan import Plan
from ..planning.memory import MemoryUse
from ..ranks.messages import Heartbeat, RankMemory
from .cluster_history import ClusterHistory, Sample
from .expected_speed import SpeedPrediction
from .plan_info import PlanTracker

if TYPE_CHECKING:
    from ..api import Model
    from .metrics import KeyUsage

SAMPLE_INTERVAL_S = 2.0
MAX_USAGE_ROWS = 20


class ClusterView:
    """The JSON of GET /cluster for one model. Close it to end its sampling thread.

    Args:
        model: loaded.
        plan_tracker: describes the plan in use.
        interval_s: seconds between two samples of the history.
    """

    def __init__(
        self, model: Model, plan_tracker: PlanTracker, interval_s: float = SAMPLE_INTERVAL_S
    ) -> None:
        self._model, self._plan_tracker, self._interval_s = model, plan_tracker, interval_s
        self._started_at = time.monotonic()
        self._history = ClusterHistory(interval_s, self._started_at, time.time())
        self._closed = threading.Event()
        threading.Thread(target=self._sample, daemon=True, name="sampling").start()

    def close(self) -> None:
        """End the sampling."""
        self._closed.set()

    def to_json(
        self, known_placement: str = "", known_steps: str = "", known_timeline: str = ""
    ) -> dict[str, Any]:
        """The present state.

        Args:
            known_placement: id of the placement that the client has; that one is omitted.
            known_steps: number of measured steps whose routing counts the client has; likewise.
            known_timeline: version of the timeline that the client has; likewise.
        """
        model, group, info = self._model, self._model.group, self._plan_tracker.current
        plan, timings = info.plan, group.step_timings
        body: dict[str, Any] = {
            "model": model.name,
            "family": model.spec.family,
            **group_state(model),
            "uptime_s": round(time.monotonic() - self._started_at, 1),
            "nodes": plan.nodes,
            "plan": {
                "placement": plan.placement,
                "trunk": plan.trunk,
                "reason": info.reason,
                "all_reduces": plan.all_reduces if plan.nodes > 1 else 0,
                "backend": model.ranks.backend if plan.nodes > 1 else None,
                "top_k": model.spec.top_k,
                "total_bytes": model.spec.total_bytes,
            },
            "ranks": self._ranks(),
            **group.load,
            "totals": dict(group.counts),
            "drafts": asdict(group.draft_stats),
            "step_timings": {
                "steps": timings.steps,
                "mean_ms": _rounded(timings.per_token_ms()),
                "rank_ms": [_rounded(rank_ms) for rank_ms in timings.per_rank_ms()],
            },
            "history": self._history.recent_json(),
        }
        if isinstance(info.prediction, SpeedPrediction):
            body["prediction"] = info.prediction.to_json()
        else:
            body |= {"prediction": None, "no_prediction_reason": info.prediction}
        if known_placement != info.placement["id"]:
            body["placement"] = info.placement
        if known_steps != str(timings.steps):
            counts = routing_counts(plan, timings.routed)
            body["routing"] = {"steps": timings.steps, "counts": counts}
        if (timeline := self._history.timeline_json(known_timeline)) is not None:
            body["timeline"] = timeline
        return body

    def _ranks(self) -> list[dict[str, Any]]:
        model, now = self._model, time.monotonic()
        running = model.group.state.phase == "ok"
        # The ranks that run may be others than those of the row, for a moment.
        reported = model.group.heartbeats if running else []
        caches, links = model.group.cache_bytes, model.ranks.links
        rows = []
        for row, last_message_at in zip(
            model.ranks_json(), model.group.last_message_s, strict=False
        ):
            rank = row["rank"]
            last = reported[rank] if rank < len(reported) else Heartbeat()
            rows.append(
                {
                    **{k: row[k] for k in ("rank", "pid", "device", "weights_bytes")},
                    "memory": describe_memory(last.memory, row["weights_bytes"], caches),
                    "disk": last.disk.to_json() if last.disk is not None else None,
                    "link": describe_link(rank, links, last) if len(reported) > 1 else None,
                    "silent_s": round(now - last_message_at, 1),
                }
            )
        return rows

    def _sample(self) -> None:
        group = self._model.group
        last, last_time = self._counts(), time.monotonic()
        free_bytes: int | None = None  # while ranks start it stays what it was
        while not self._closed.wait(self._interval_s):
            now, counts, load = time.monotonic(), self._counts(), group.load
            # A group that was restarted can count from zero again.
            tokens_per_s, sent_per_s = (
                max(0.0, (count - before) / (now - last_time))
                for count, before in zip(counts, last, strict=True)
            )
            disks = [beat.disk.free_bytes for beat in group.heartbeats if beat.disk is not None]
            free_bytes = min(disks, default=free_bytes)
            self._history.add_sample(
                now,
                Sample(
                    round(tokens_per_s, 1),
                    load["running"],
                    load["waiting"],
                    round(sent_per_s),
                    free_bytes,
                ),
            )
            self._history.observe(group.state)
            last, last_time = counts, now

    def _counts(self) -> tuple[int, int]:
        """Generated tokens, and bytes that all ranks have put into all-reduces."""
        group = self._model.group
        beats = group.heartbeats
        sent_bytes = sum(beat.sent_bytes for beat in beats) if len(beats) > 1 else 0
        return group.counts["generated_tokens"], sent_bytes


def usage_json(usage: Mapping[str, KeyUsage], own_key: str) -> list[dict[str, Any]]:
    """What API keys use, the client's own first, then the busiest, for a client with the key
    `own_key` ("" without one).

    Only that key has its "name"; another's is None, and requests without a key have "". At most
    `MAX_USAGE_ROWS` rows: the last one adds up the other keys, "keys" in number.
    """
    order = sorted(
        usage,
        key=lambda name: (name != own_key, -usage[name].requests, -usage[name].generated_tokens),
    )
    single = len(order) if len(order) <= MAX_USAGE_ROWS else MAX_USAGE_ROWS - 1
    rows = [
        {"name": name if name in ("", own_key) else None, "keys": 1, **usage[name]._asdict()}
        for name in order[:single]
    ]
    if rest := [usage[name] for name in order[single:]]:
        sums = dict(zip(rest[0]._fields, map(sum, zip(*rest, strict=True)), strict=True))
        rows.append({"name": None, "keys": len(rest), **sums})
    return rows


def describe_memory(
    reported: RankMemory | None, weights: int, caches: int
) -> dict[str, int] | None:
    """A rank's memory beside what it is expected to be; None: it has not reported any.

    Returns:
        What it reported, and of its resident memory: "cache_bytes", "rest_bytes" (neither weights
        nor caches), "limit_bytes" (weights, caches and what the rest may be).
    """
    if reported is None:
        return None
    use = MemoryUse(reported.resident_bytes, weights, caches)
    account = {"cache_bytes": use.caches, "rest_bytes": use.rest, "limit_bytes": use.limit}
    return reported.to_json() | account


def describe_link(
    rank: int, links: Mapping[tuple[int, int], Link], last: Heartbeat
) -> dict[str, float | None]:
    """A rank's way to the others.

    Returns:
        "latency_s" and "bytes_per_s" of the slowest of its links (None: not measured), and
        "sent_bytes", which it has put into all-reduces.
    """
    own = [link for pair, link in links.items() if rank in pair]
    return {
        "latency_s": max((link.latency_s for link in own), default=None),
        "bytes_per_s": min((link.bytes_per_s for link in own), default=None),
        "sent_bytes": last.sent_bytes,
    }


def group_state(model: Model) -> dict[str, Any]:
    """The state of the ranks, for /health and /cluster: "status" and "recoveries"; while the ranks
    do not work also "since_s", "reason" and, where they apply, "detail" and "rank"."""
    state = model.group.state
    body: dict[str, Any] = {"status": state.phase, "recoveries": state.recoveries}
    if state.phase != "ok":
        body |= {"since_s": round(time.monotonic() - state.since_s, 1), "reason": state.reason}
        if state.detail:
            body["detail"] = state.detail
        if state.rank is not None:
            body["rank"] = state.rank
    return body


def routing_counts(plan: Plan, routed: Mapping[int, Mapping[int, int]]) -> list[list[int]]:
    """How often the router chose each expert: a row per MoE layer, in the plan's order."""
    # Looked up, never iterated: the group's thread adds to it at the same time.
    rows = [(routed.get(p.layer, {}), len(p.experts)) for p in plan.layers]
    return [[row.get(expert, 0) for expert in range(experts)] for row, experts in rows]


def _rounded(timings_ms: Mapping[str, float]) -> dict[str, float]:
    return {k: round(v, 4) for k, v in timings_ms.items()}
