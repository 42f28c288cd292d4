"""Measurements of an injected fault over all trials, and their line in a table.

Owns: the numbers and their form. `local_faults.py` and `host_faults.py` fill it.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

MAX_DETECTION_S = 5.0  # a failure must be noticed, and its node or rank named, within this time
TIMES = ("detected_s", "recovered_s", "pause_s", "back_s")
COUNTS = ("answers", "lost", "ended", "other", "left")
HEADER = f"{'':30}{'detected s':14}{'recovered s':14}{'pause s':14}{'back s':14}" + "".join(
    f"{name:>8}" for name in COUNTS
)


@dataclass
class FaultRecord:
    """Measurements of all trials of one fault. Seconds count from the fault.

    Args:
        detected_s: until /health was no longer 200.
        recovered_s: until /health was 200 again.
        pause_s: longest time that each stream was without a token.
        back_s: from the end of the fault until all machines took part again.
        answers: number of requests.
        lost: requests that ended with an error, or not at all.
        ended: requests that were told that the head ends, which is all that can be promised then.
        other: requests with another text than without the fault.
        left: processes, ports and files that the fault left behind.
        wrong: broken promises, as sentences.
    """

    detected_s: list[float] = field(default_factory=list)
    recovered_s: list[float] = field(default_factory=list)
    pause_s: list[float] = field(default_factory=list)
    back_s: list[float] = field(default_factory=list)
    answers: int = 0
    lost: int = 0
    ended: int = 0
    other: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        """Whether a promise was broken."""
        return bool(self.lost or self.other or self.left or self.wrong)

    def to_json(self) -> dict[str, Any]:
        """The numbers, each time as [median, worst]."""
        times = {name: spread(getattr(self, name)) for name in TIMES}
        return {**times, **{name: getattr(self, name) for name in (*COUNTS, "wrong")}}

    def line(self, name: str) -> str:
        """A row of the table, and below it the broken promises."""
        times = [spread(getattr(self, n)) or ("-", "-") for n in TIMES]
        cells = "".join(f"{a!s:>5} {b!s:>6}  " for a, b in times)
        counts = "".join(f"{getattr(self, n):8}" for n in COUNTS)
        wrong = "".join(f"\n    {why}" for why in dict.fromkeys(self.wrong))
        return f"{name:30}{cells}{counts}{wrong}"


def spread(values: list[float]) -> list[float] | None:
    """Median and worst; None without values."""
    return [round(statistics.median(values), 2), round(max(values), 2)] if values else None
