"""Waits for what other processes and threads do."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
DEADLINE_S = 120.0  # for anything to happen on a busy machine


def wait_until(
    condition: Callable[[], T], seconds: float = DEADLINE_S, what: str = "the condition holds"
) -> T:
    """The condition's first value that is true; fails if there is none in time."""
    ends = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < ends, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)
    return value
