"""Hosts are made by modules that the benchmarks use too."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(scope="module", autouse=True)
def ordinary_scheduling() -> Iterator[None]:
    """Deadlines of a second or two are measured: hosts are scheduled as those of users are."""
    if not hasattr(os, "SCHED_BATCH"):
        yield
        return
    before = os.sched_getscheduler(0)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    yield
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, before, os.sched_param(0))
