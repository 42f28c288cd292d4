"""Clusters that were run on one machine, against the model: set (a) of `cenacle validate`.

Owns: the shapes that are run, the stored measurements, fitting four numbers on the rows marked so,
and predicting the others.
Does not know: how they are run (`runs.py`), MLX.
Invariant: the third shape ("middle") is never fitted, at no number of nodes and no latency.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import InputError
from ..planning.catalog import CATALOG_DIR, Fact, Link, Machine, Quantization
from ..planning.model_shapes import shape_from_config
from ..planning.perf_model import PaperConstants, Prediction, Workload, predict

RUNS_FILE = CATALOG_DIR / "runs.json"
CONTEXT = 40


def _config(layers: int, hidden: int, experts: int, top_k: int, width: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "moe_intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 16384,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    }


# The three regimes of the project's measuring shapes, small: few large experts as in DBRX,
# moe-2b's, many small ones.
SHAPES = {
    "coarse": _config(4, 2048, 16, 4, 3584),
    "middle": _config(6, 2048, 32, 8, 768),
    "fine": _config(12, 1024, 128, 8, 256),
}


@dataclass(frozen=True)
class LocalRun:
    """One configuration and its speed: the median of `runs` answers."""

    shape: str
    nodes: int
    placement: str
    latency_ms: float
    tok_per_s: float
    spread: float
    runs: int

    @property
    def fitted(self) -> bool:
        """Whether parameters are fitted to it: by what it is, not by how it came out."""
        plain = self.shape in ("coarse", "fine") and self.latency_ms == 0
        return (plain and self.placement == "whole") or (
            self.shape == "fine" and self.latency_ms == 0.3 and self.placement == "whole"
        )


@dataclass(frozen=True)
class LocalRuns:
    """All runs of one occasion.

    Args:
        read_gb_s: processes at once -> what each read from memory, GB/s.
        rest_sliced: whether head and dense layers were cut over nodes.
        facts: date, commit, processor, kernels.
    """

    rows: tuple[LocalRun, ...]
    read_gb_s: dict[int, float]
    gflops: float
    rest_sliced: bool
    facts: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write JSON.

        Raises:
            InputError: the file cannot be written.
        """
        try:
            path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error}", "run") from error


def load_runs(path: Path) -> LocalRuns:
    """Read what `save` wrote.

    Raises:
        InputError: not such a file.
    """
    try:
        data = json.loads(path.read_text())
        rows = tuple(LocalRun(**r) for r in data.pop("rows"))
        reads = {int(k): float(v) for k, v in data.pop("read_gb_s").items()}
        return LocalRuns(rows, reads, **data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a file of measured runs: {error}", "runs") from error


# What is fitted: start, low, high.
PARAMETERS = {
    "efficiency": (0.6, 0.2, 1.0),
    "overhead_us": (500.0, 10.0, 5000.0),
    "latency_us": (50.0, 1.0, 2000.0),
    "delay_us": (100.0, 1.0, 2000.0),
}


def predict_run(run: LocalRun, runs: LocalRuns, at: dict[str, float]) -> Prediction:
    """What the model says of a run, given the four numbers."""

    def fact(value: float) -> Fact:
        return Fact(value, "M", "runs.json")

    facts = {
        "memory_gib": fact(64),
        "bandwidth_gb_s": fact(runs.read_gb_s[run.nodes]),
        "tflops": fact(runs.gflops / 1000),
        "usd": fact(0),
        "watts": fact(0),
        "efficiency": fact(at["efficiency"]),
        "kv_efficiency": fact(0.4),
        "compute": fact(1),
        "attention_compute": fact(0.2),
        "overhead_us": fact(at["overhead_us"]),
    }
    machine = Machine("here", "one process of this machine", "cpu-here", facts, 1.0)
    latency = at["latency_us"]
    if run.latency_ms:
        # An emulated link evaluates every exchange before it waits: that costs something too.
        latency += 1000 * run.latency_ms + at["delay_us"]
    link = Link("here", "", "mesh", {"latency_us": fact(latency), "gb_s": fact(2.0)})
    job = Workload(
        shape_from_config(run.shape, SHAPES[run.shape]),
        Quantization("4", 4.5, 4.5),
        CONTEXT,
        prompt_tokens=16,
    )
    scheme = "single" if run.nodes == 1 else "expert"
    machines, between = (machine,) * run.nodes, link if run.nodes > 1 else None
    return predict(
        job,
        scheme,
        machines,
        between,
        PaperConstants(0.2, 0, 1, 0),
        placement=run.placement,
        slice_dense=runs.rest_sliced,
    )


def fit_runs(runs: LocalRuns) -> tuple[dict[str, float], list[tuple[LocalRun, Prediction]]]:
    """The four numbers fitted to the marked rows, and every row with its prediction."""
    marked = [r for r in runs.rows if r.fitted]
    if not marked:
        raise InputError("runs: no row to fit on; measure again with `validate --run`", "runs")

    def loss(at: dict[str, float]) -> float:
        errors = [math.log(predict_run(r, runs, at).tok_per_s / r.tok_per_s) for r in marked]
        return sum(abs(e) + e * e for e in errors)

    at = coordinate_descent(PARAMETERS, loss)
    return at, [(r, predict_run(r, runs, at)) for r in runs.rows]


def coordinate_descent(
    parameters: dict[Any, tuple[float, float, float]], loss: Callable[[dict[Any, float]], float]
) -> dict[Any, float]:
    """The values with the least loss: going through the parameters with shrinking steps.

    Args:
        parameters: name -> start, lowest, highest; all positive.
    """
    values = {name: start for name, (start, _, _) in parameters.items()}
    best, step = loss(values), 0.4
    while step > 0.005:
        better = False
        for name, (_, low, high) in parameters.items():
            for factor in (1 + step, 1 / (1 + step)):
                tried = {**values, name: min(high, max(low, values[name] * factor))}
                now = loss(tried)
                if now < best - 1e-9:
                    values, best, better = tried, now, True
        if not better:
            step /= 2
    return values


def format_runs(
    runs: LocalRuns, at: dict[str, float], rows: list[tuple[LocalRun, Prediction]]
) -> tuple[str, dict[str, Any]]:
    """For people, and the same as JSON."""
    lines = [
        "clusters run here: " + ", ".join(f"{k} {v}" for k, v in runs.facts.items()),
        f"fitted: {', '.join(f'{k} {v:.3g}' for k, v in at.items())}; read per process "
        + ", ".join(f"{v:.1f} GB/s with {k}" for k, v in runs.read_gb_s.items()),
        f"{'shape':<9}{'nodes':>6} {'placement':<11}{'link ms':>8}{'measured':>10}{'predicted':>11}"
        f"{'error':>8}",
    ]
    data = []
    for run, p in rows:
        error = p.tok_per_s / run.tok_per_s - 1
        mark = " fitted" if run.fitted else ""
        lines.append(
            f"{run.shape:<9}{run.nodes:>6} {run.placement:<11}{run.latency_ms:>8.2g}"
            f"{run.tok_per_s:>10.2f}{p.tok_per_s:>11.2f}{error:>+8.0%}{mark}"
        )
        data.append({**asdict(run), "predicted": p.tok_per_s, "error": error, "fitted": run.fitted})
    out: dict[str, Any] = {"rows": data, "parameters": at, "facts": runs.facts}
    for name, wanted in (("fitted", True), ("checked", False)):
        errors = [abs(d["error"]) for d in data if d["fitted"] is wanted]
        if errors:
            out[name] = {"rows": len(errors), "median": median(errors), "worst": max(errors)}
            lines.append(
                f"{name}: {len(errors)} rows, median error {median(errors):.1%}, worst "
                f"{max(errors):.1%}"
            )
    return "\n".join(lines), out
