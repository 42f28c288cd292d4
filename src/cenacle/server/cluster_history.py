"""What happened to a cluster: its load over minutes and hours, its faults and recoveries.

Owns: bounded series of samples (five minutes of them, a day of their means by the minute) and a
bounded list of faults.
Does not know: where samples come from, who sees them.
Invariant: memory does not grow: `MAX_SAMPLES`, `MAX_MINUTES` and `MAX_FAULTS` are all there is.
It contains no text of any request; a fault's reason is a sentence of the recovery.
Next: `cluster_view.py` samples and serves it, `scheduler/recovery.py` has the states.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ..scheduler.recovery import RecoveryState

MAX_SAMPLES = 150  # five minutes, one every two seconds
MAX_MINUTES = 24 * 60
MAX_FAULTS = 50
MINUTE_S = 60.0


class Sample(NamedTuple):
    """A moment of a cluster.

    Args:
        tokens_per_s: generated, since the sample before.
        running, waiting: requests.
        sent_bytes_per_s: that all ranks together put into all-reduces, since the sample before.
        disk_free_bytes: of the fullest of the disks with the model; None: not known.
    """

    tokens_per_s: float
    running: int
    waiting: int
    sent_bytes_per_s: float = 0.0
    disk_free_bytes: int | None = None


@dataclass
class Fault:
    """A time in which the ranks did not work.

    Args:
        began_at: seconds since 1970.
        ended_at: likewise; None while it lasts.
        reason: a sentence.
        rank: which rank failed, if it was one.
        is_final: the group failed for good.
    """

    began_at: float
    ended_at: float | None
    reason: str
    rank: int | None
    is_final: bool = False


class ClusterHistory:
    """Samples and faults of one model. Safe for one thread that adds and others that read.

    Args:
        interval_s: seconds between two samples.
        now_s: of the monotonic clock.
        unix_s: seconds since 1970 at the same moment.
    """

    def __init__(self, interval_s: float, now_s: float, unix_s: float) -> None:
        self.interval_s = interval_s
        self._wall_offset_s = unix_s - now_s
        self._samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self._minutes: deque[Sample] = deque(maxlen=MAX_MINUTES)
        self._minute: list[Sample] = []  # the samples of the present one
        self._minute_began = now_s
        self._faults: deque[Fault] = deque(maxlen=MAX_FAULTS)
        self._open: Fault | None = None
        self._recoveries = 0  # that are in the list
        self._first_version = f"{unix_s:.3f}"  # another server's history is never taken for this
        self._version = 0
        self._lock = threading.Lock()

    def add_sample(self, now_s: float, sample: Sample) -> None:
        """Add a sample; after a minute also that minute's mean rates, most requests and least free
        space."""
        with self._lock:
            self._samples.append(sample)
            self._minute.append(sample)
            if now_s - self._minute_began < MINUTE_S:
                return
            self._minutes.append(_summarize(self._minute))
            self._minute, self._minute_began = [], now_s
            self._version += 1

    def observe(self, state: RecoveryState) -> None:
        """Compare a group's state with what is known of its faults.

        A fault that began and ended between two calls is found by its number of recoveries; of
        several such ones only the last one's reason is known.
        """
        with self._lock:
            changed_at = state.since_s + self._wall_offset_s
            if state.phase == "ok":
                missed = state.recoveries - self._recoveries - (self._open is not None)
                if self._open is not None:
                    self._open.ended_at, self._open = changed_at, None
                    self._version += 1
                for _ in range(min(missed, MAX_FAULTS)):
                    self._append(Fault(changed_at, changed_at, state.reason, state.rank))
                self._recoveries = state.recoveries
                return
            if self._open is None:
                self._open = Fault(changed_at, None, state.reason, state.rank)
                self._append(self._open)
            latest = (state.reason, state.rank, state.phase == "failed")
            if latest != (self._open.reason, self._open.rank, self._open.is_final):
                self._open.reason, self._open.rank, self._open.is_final = latest
                self._version += 1

    def _append(self, fault: Fault) -> None:
        self._faults.append(fault)
        self._version += 1

    def recent_json(self) -> dict[str, Any]:
        """The last minutes: the interval in seconds and a list of each quantity, oldest first."""
        with self._lock:
            return {"interval_s": self.interval_s, **_columns(self._samples)}

    def timeline_json(self, known_version: str = "") -> dict[str, Any] | None:
        """The last day by the minute and the faults; None if the client has this version."""
        with self._lock:
            version = f"{self._first_version}-{self._version}"
            if known_version == version:
                return None
            return {
                "version": version,
                "interval_s": MINUTE_S,
                "until": round(self._minute_began + self._wall_offset_s, 1),
                **_columns(self._minutes),
                "faults": [_rounded(asdict(fault)) for fault in self._faults],
            }


def _summarize(samples: Sequence[Sample]) -> Sample:
    tokens, running, waiting, sent, disks = zip(*samples, strict=True)
    return Sample(
        round(sum(tokens) / len(tokens), 1),
        max(running),
        max(waiting),
        round(sum(sent) / len(sent)),
        min((free for free in disks if free is not None), default=None),
    )


def _columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    return {name: [getattr(s, name) for s in samples] for name in Sample._fields}


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 1) if isinstance(v, float) else v for k, v in values.items()}
