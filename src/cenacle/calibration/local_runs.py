"""Measuring the local runs of `cenacle validate`: small clusters of processes with one core each.

Owns: making the checkpoints of the shapes, running every configuration, storing the result.
Does not know: what is predicted (`local_fit.py`).
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from ..api import load
from ..machine import processor_name, usable_cores
from ..model.synth import synth
from .calibrate import probe_ranks
from .local_fit import SHAPES, LocalRun, LocalRuns

LATENCIES_MS = (0.0, 0.3, 1.0)
PLACEMENTS = ("whole", "sliced")
MAX_NODES = 2
TOKENS, ANSWERS = 40, 5
PROBE_S = 0.3
PROMPT = list(range(300, 316))


def measure_local_runs(path: Path, report: Callable[[str], None]) -> LocalRuns:
    """Run all configurations (some minutes) and store them.

    Raises:
        ClusterError: a process failed.
    """
    cores = len(usable_cores())
    max_nodes = min(MAX_NODES, cores)
    reads_gb_s, gflops = {}, 0.0
    for nodes in range(1, max_nodes + 1):
        probes, _ = probe_ranks(nodes, 1, PROBE_S)
        largest = max(probes[0]["reads"], key=int)
        reads_gb_s[nodes] = statistics.mean(probe["reads"][largest][0] for probe in probes)
        gflops = statistics.median(kernel[2] for kernel in probes[0]["kernels"].values())
    rows: list[LocalRun] = []
    for shape, config in SHAPES.items():
        folder = Path(tempfile.mkdtemp(prefix=f"cenacle-{shape}-"))
        try:
            synth(folder, config=config, quantize=4, dtype="float32", overwrite=True)
            rows += _measure_shape(folder, shape, max_nodes, report)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "cenacle": version("cenacle"),
        "mlx": version("mlx"),
        "processor": f"{processor_name()}, {cores} cores, one per process",
        "kernels": "native",
    }
    runs = LocalRuns(tuple(rows), reads_gb_s, gflops, slice_dense=True, facts=facts)
    runs.save(path)
    return runs


def _measure_shape(
    folder: Path, shape: str, max_nodes: int, report: Callable[[str], None]
) -> list[LocalRun]:
    configurations = [(1, "whole", 0.0)]
    configurations += [
        (nodes, placement, latency_ms)
        for nodes in range(2, max_nodes + 1)
        for placement in PLACEMENTS
        for latency_ms in LATENCIES_MS
    ]
    rows = []
    for nodes, placement, latency_ms in configurations:
        with load(
            str(folder),
            nodes,
            placement=placement,
            latency_s=latency_ms / 1000,
            kernels="native",
            threads=1,
            measure_every=0,
            recover=False,
        ) as model:
            model.generate(PROMPT, max_tokens=6)  # start-up is not speed
            # Sampled, not greedy: a random model repeats itself, and then the same few experts are
            # always in the caches and the busiest node is always the same.
            speeds = [
                model.generate(PROMPT, max_tokens=TOKENS, temperature=1.0, seed=seed).tok_per_s
                for seed in range(ANSWERS)
            ]
        median = statistics.median(speeds)
        spread = (max(speeds) - min(speeds)) / 2 / median
        rows.append(LocalRun(shape, nodes, placement, latency_ms, median, spread, ANSWERS))
        report(f"{shape}, {nodes} nodes, {placement}, {latency_ms} ms: {median:.2f} tokens/s")
    return rows


def _commit() -> str:
    """The checkout's commit, or "unknown" for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
