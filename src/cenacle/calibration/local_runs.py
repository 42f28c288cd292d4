"""Running set (a) of `cenacle validate`: small clusters of local processes, one core each.

Owns: making the shapes' checkpoints, running every configuration, storing what came out.
Does not know: what is predicted (`here.py`).
"""

from __future__ import annotations

import inspect
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..api import load
from ..model.synth import synth
from ..ranks.local_ranks import LocalRanks
from ..ranks.messages import MeasureOrder
from .calibrate import PROBE, processor_name, usable_core_count
from .local_fit import SHAPES, LocalRun, LocalRuns

LATENCIES_MS = (0.0, 0.3, 1.0)
TOKENS, ANSWERS = 40, 5


def measure_local_runs(path: Path, say: Callable[[str], None]) -> LocalRuns:
    """Run all configurations (some minutes) and store them.

    Each process gets one core. Placements other than whole are run where `api.load` has them.

    Raises:
        ClusterError: a process failed.
    """
    knows_placements = "placement" in inspect.signature(load).parameters
    placements = ("whole", "sliced") if knows_placements else ("whole",)
    most = min(2, usable_core_count())
    reads, gflops = _machine(most)
    rows: list[LocalRun] = []
    with _threads(1):
        for shape, config in SHAPES.items():
            folder = Path(tempfile.mkdtemp(prefix=f"cenacle-{shape}-"))
            try:
                synth(folder, config=config, quantize=4, dtype="float32", overwrite=True)
                rows += _runs(folder, shape, placements, most, knows_placements, say)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "cenacle": version("cenacle"),
        "mlx": version("mlx"),
        "processor": f"{processor_name()}, {usable_core_count()} cores, one a process",
        "kernels": "native",
    }
    made = LocalRuns(tuple(rows), reads, gflops, rest_sliced=knows_placements, facts=facts)
    made.save(path)
    return made


def _runs(
    folder: Path,
    shape: str,
    placements: tuple[str, ...],
    most: int,
    knows_placements: bool,
    say: Callable[[str], None],
) -> list[LocalRun]:
    asked = [(1, "whole", 0.0)]
    asked += [(n, p, ms) for n in range(2, most + 1) for p in placements for ms in LATENCIES_MS]
    rows = []
    for nodes, placement, latency_ms in asked:
        options: dict[str, Any] = {"placement": placement} if knows_placements else {}
        with load(
            str(folder),
            nodes,
            latency_s=latency_ms / 1000,
            kernels="native",
            measure_every=0,
            recover=False,
            **options,
        ) as model:
            ids = list(range(300, 316))
            model.generate(ids, max_tokens=6)  # start-up is not speed
            # Drawn, not greedy: a random model repeats itself, and then a few experts are always in
            # the caches and the busiest node is always the same.
            speeds = [
                model.generate(ids, max_tokens=TOKENS, temperature=1.0, seed=seed).tok_per_s
                for seed in range(ANSWERS)
            ]
        middle = statistics.median(speeds)
        spread = (max(speeds) - min(speeds)) / 2 / middle
        rows.append(LocalRun(shape, nodes, placement, latency_ms, middle, spread, ANSWERS))
        say(f"{shape}, {nodes} nodes, {placement}, {latency_ms} ms: {middle:.2f} tokens/s")
    return rows


def _machine(most: int) -> tuple[dict[int, float], float]:
    """GB/s that each of n processes reads at once, and GFLOP/s of one."""
    reads, gflops = {}, 0.0
    for nodes in range(1, most + 1):
        with _threads(1):
            ranks = LocalRanks(nodes, "auto", PROBE)
            try:
                ranks.load(MeasureOrder(nodes, arguments={"share": nodes, "seconds": 0.3}))
                found = [ready.result for ready in ranks.ready]
            finally:
                ranks.close(now=False)
        largest = max(found[0]["reads"], key=int)
        reads[nodes] = statistics.mean(f["reads"][largest][0] for f in found)
        gflops = statistics.median(k[2] for k in found[0]["kernels"].values())
    return reads, gflops


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = os.environ.get("CENACLE_THREADS")
    os.environ["CENACLE_THREADS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CENACLE_THREADS"]
        else:
            os.environ["CENACLE_THREADS"] = before


def _commit() -> str:
    """The checkout's commit, or "unknown" for an installed package."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
