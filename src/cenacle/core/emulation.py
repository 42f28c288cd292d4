"""Emulated machines: what they are, as text, and what running on them gave.

Owns: the form `2x(bandwidth=80GB/s)+1x(bandwidth=200GB/s),link=0.3ms,slow=10` and its errors;
`EmulationStats`, which a rank reports.
Does not know: how a rank waits (`engine/emulated_machine.py`), what it reads (`planning`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from operator import add

from ..errors import InputError

EXAMPLE = "4x(bandwidth=80GB/s),link=0.3ms"
MAX_NODES = 64
BANDWIDTH_UNITS = {"MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12}
TIME_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}

_FIELD = "emulate"
_GROUP = re.compile(r"(\d+)x\(([^()]*)\)")


@dataclass(frozen=True)
class EmulatedMachines:
    """Machines that are given by their speeds.

    Args:
        text: as the user wrote it.
        bytes_per_s: at which each node reads memory, in rank order.
        link_s: seconds of an all-reduce, from the last node's arrival to the end on all of them.
        slow: how many times slower than this everything is run, so that computers that are slower
            than the machines can keep up; speeds are then multiplied by it.
    """

    text: str
    bytes_per_s: tuple[float, ...]
    link_s: float = 0.0
    slow: float = 1.0

    @property
    def nodes(self) -> int:
        """How many."""
        return len(self.bytes_per_s)

    @property
    def run_bytes_per_s(self) -> tuple[float, ...]:
        """At which each node reads memory while it is run."""
        return tuple(rate / self.slow for rate in self.bytes_per_s)

    @property
    def run_link_s(self) -> float:
        """Seconds of an all-reduce while it is run; a node alone has none."""
        return self.link_s * self.slow if self.nodes > 1 else 0.0

    @property
    def node_weights(self) -> tuple[float, ...] | None:
        """Relative speeds; None: they are alike."""
        alike = len(set(self.bytes_per_s)) == 1
        return None if alike else tuple(r / max(self.bytes_per_s) for r in self.bytes_per_s)


def parse_emulation(text: str) -> EmulatedMachines:
    """Read machines such as "2x(bandwidth=80GB/s)+1x(bandwidth=200GB/s),link=0.3ms".

    Groups of like nodes are joined by "+". Behind them, each behind a comma: "link", the time of an
    all-reduce, which several nodes need, and "slow", see `EmulatedMachines`.

    Raises:
        InputError: another form, an unknown key or unit, a number out of range.
    """
    groups, *settings = "".join(text.split()).split(",")
    rates: list[float] = []
    for group in groups.split("+"):
        match = _GROUP.fullmatch(group)
        if match is None:
            raise _error("nodes such as 2x(bandwidth=80GB/s), joined by +", group)
        count = int(match[1])
        if not 1 <= len(rates) + count <= MAX_NODES:
            raise _error(f"1 to {MAX_NODES} nodes", f"{len(rates) + count}")
        key, _, value = match[2].partition("=")
        if key != "bandwidth":
            raise _error("the key bandwidth in the parentheses", match[2])
        rates += [_quantity("bandwidth", value, BANDWIDTH_UNITS, "80GB/s")] * count
    values: dict[str, float] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key in values or key not in ("link", "slow"):
            raise _error("link=TIME or slow=FACTOR behind the nodes, each once", setting)
        units = TIME_UNITS if key == "link" else {"": 1.0}
        values[key] = _quantity(key, value, units, "0.3ms" if key == "link" else "10")
    if len(rates) > 1 and "link" not in values:
        raise _error("link=TIME for several nodes, such as link=0.3ms", text)
    if values.get("slow", 1.0) < 1:
        raise _error("slow of at least 1", f"{values['slow']:g}")
    return EmulatedMachines(text, tuple(rates), values.get("link", 0.0), values.get("slow", 1.0))


def _quantity(key: str, text: str, units: Mapping[str, float], example: str) -> float:
    """A number with one of `units`, in the unit whose factor is 1."""
    match = re.fullmatch(r"([0-9.eE+-]+?)([A-Za-z/]*)", text)
    try:
        value = float(match[1]) * units[match[2]] if match is not None else math.nan
    except (KeyError, ValueError):
        value = math.nan
    if not (0 < value < math.inf or (key == "link" and value == 0)):
        named = f" in {', '.join(units)}" if "" not in units else ""
        raise _error(f"{key} as a positive number{named}, such as {key}={example}", text)
    return value


def _error(expected: str, got: str) -> InputError:
    return InputError(
        f"emulate: expected {expected}, got {got[:100]!r}; an example is {EXAMPLE}", _FIELD
    )


@dataclass(frozen=True)
class EmulationStats:
    """What a rank's passes of one token a request took on its emulated machine, in sums.

    Args:
        passes: of the model.
        late: passes that really took more than `engine.emulated_machine.LATE_SHARE` longer than
            they would have on the machine: their speed is this computer's, not the machine's.
        late_s: seconds by which they did.
        read_bytes: weights and KV cache that the machine read.
        read_s: seconds that it read them.
        wait_s: seconds in which it waited for slower ranks.
        link_s: seconds of all-reduces.
        total_s: seconds from the begin of a pass to its end on the machine.
    """

    passes: int = 0
    late: int = 0
    late_s: float = 0.0
    read_bytes: float = 0.0
    read_s: float = 0.0
    wait_s: float = 0.0
    link_s: float = 0.0
    total_s: float = 0.0

    def __add__(self, other: EmulationStats) -> EmulationStats:
        return EmulationStats(*map(add, astuple(self), astuple(other)))
