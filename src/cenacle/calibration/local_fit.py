"""Clusters that were run on one machine, against the performance model.

Owns: the shapes that are run, the stored measurements, the fit of four numbers on the runs marked
for it, and the prediction of the others.
Does not know: how they are run (`local_runs.py`), MLX.
Invariant: the third shape ("middle") is never fitted, at any number of nodes and any latency.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import InputError
from ..planning.catalog import CATALOG_DIR, CatalogLink, Fact, Machine, Quantization
from ..planning.model_shapes import shape_from_config
from ..planning.perf_model import PaperConstants, Prediction, Workload, predict

RUNS_FILE = CATALOG_DIR / "runs.json"
CONTEXT, PROMPT_TOKENS = 40, 16


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


# The three regimes that this project measures, small: few large experts as in DBRX, those of
# moe-2b, many small ones.
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
    def is_fitted(self) -> bool:
        """Whether parameters are fitted to it: by its configuration, not by its result."""
        if self.placement != "whole" or self.shape not in ("coarse", "fine"):
            return False
        return self.latency_ms == 0 or (self.shape == "fine" and self.latency_ms == 0.3)


@dataclass(frozen=True)
class LocalRuns:
    """All runs of one occasion.

    Args:
        read_gb_s: number of processes at once -> GB/s that each read from memory.
        gflops: of one process.
        slice_dense: whether head and dense layers were sliced over the nodes.
        facts: date, commit, processor, kernels.
    """

    rows: tuple[LocalRun, ...]
    read_gb_s: dict[int, float]
    gflops: float
    slice_dense: bool
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
    """Read a file that `LocalRuns.save` wrote.

    Raises:
        InputError: not such a file.
    """
    try:
        data = json.loads(path.read_text())
        rows = tuple(LocalRun(**row) for row in data.pop("rows"))
        read_gb_s = {int(k): float(v) for k, v in data.pop("read_gb_s").items()}
        return LocalRuns(rows, read_gb_s, **data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a file of local runs: {error}", "runs") from error


# What is fitted: start, low, high.
PARAMETERS = {
    "efficiency": (0.6, 0.2, 1.0),
    "overhead_us": (500.0, 10.0, 5000.0),
    "latency_us": (50.0, 1.0, 2000.0),
    "delay_us": (100.0, 1.0, 2000.0),
}


def predict_run(run: LocalRun, runs: LocalRuns, parameters: dict[str, float]) -> Prediction:
    """The prediction of a run, given the four numbers."""

    def facts(**values: float) -> dict[str, Fact]:
        return {key: Fact(value, "M", RUNS_FILE.name) for key, value in values.items()}

    machine = Machine(
        "here",
        "one process of this machine",
        "cpu-here",
        facts(
            memory_gib=64,
            bandwidth_gb_s=runs.read_gb_s[run.nodes],
            tflops=runs.gflops / 1000,
            usd=0,
            watts=0,
            efficiency=parameters["efficiency"],
            kv_efficiency=0.4,
            compute=1,
            attention_compute=0.2,
            overhead_us=parameters["overhead_us"],
        ),
        1.0,
    )
    latency_us = parameters["latency_us"]
    if run.latency_ms:
        # An emulated link evaluates every all-reduce before it waits, which takes time too.
        latency_us += 1000 * run.latency_ms + parameters["delay_us"]
    link = CatalogLink("here", "", "mesh", facts(latency_us=latency_us, gb_s=2.0))
    shape = shape_from_config(run.shape, SHAPES[run.shape])
    return predict(
        Workload(shape, Quantization("4", 4.5, 4.5), CONTEXT, prompt_tokens=PROMPT_TOKENS),
        "single" if run.nodes == 1 else "expert",
        (machine,) * run.nodes,
        link if run.nodes > 1 else None,
        PaperConstants(0.2, 0, 1, 0),
        placement=run.placement,
        slice_dense=runs.slice_dense,
    )


def fit_runs(runs: LocalRuns) -> tuple[dict[str, float], list[tuple[LocalRun, Prediction]]]:
    """The four numbers fitted to the marked runs, and every run with its prediction."""
    fitted = [run for run in runs.rows if run.is_fitted]
    if not fitted:
        raise InputError("runs: expected rows to fit on; measure with `validate --run`", "runs")

    def loss(parameters: dict[str, float]) -> float:
        return fit_loss(
            math.log(predict_run(run, runs, parameters).tok_per_s / run.tok_per_s) for run in fitted
        )

    parameters = coordinate_descent(PARAMETERS, loss)
    return parameters, [(run, predict_run(run, runs, parameters)) for run in runs.rows]


def fit_loss(log_errors: Iterable[float]) -> float:
    """Sum of |error| and a little of its square: one wrong row does not pull the others far."""
    return sum(abs(error) + error * error for error in log_errors)


def coordinate_descent(
    parameters: dict[Any, tuple[float, float, float]], loss: Callable[[dict[Any, float]], float]
) -> dict[Any, float]:
    """The values with the least loss: one parameter after the other, with shrinking steps.

    Args:
        parameters: name -> start, lowest, highest; all positive.
    """
    values = {name: start for name, (start, _, _) in parameters.items()}
    best, step = loss(values), 0.4
    while step > 0.005:
        improved = False
        for name, (_, low, high) in parameters.items():
            for factor in (1 + step, 1 / (1 + step)):
                candidate = {**values, name: min(high, max(low, values[name] * factor))}
                candidate_loss = loss(candidate)
                if candidate_loss < best - 1e-9:
                    values, best, improved = candidate, candidate_loss, True
        if not improved:
            step /= 2
    return values


def format_runs(
    runs: LocalRuns, parameters: dict[str, float], predicted: Sequence[tuple[LocalRun, Prediction]]
) -> tuple[str, dict[str, Any]]:
    """A table for people, and the same as JSON."""
    lines = [
        "local runs: " + ", ".join(f"{k} {v}" for k, v in runs.facts.items()),
        f"fitted: {', '.join(f'{k} {v:.3g}' for k, v in parameters.items())}; read per process "
        + ", ".join(f"{v:.1f} GB/s with {k}" for k, v in runs.read_gb_s.items()),
        f"{'shape':<9}{'nodes':>6} {'placement':<11}{'link ms':>8}{'measured':>10}{'predicted':>11}"
        f"{'error':>8}",
    ]
    rows = []
    for run, p in predicted:
        error = p.tok_per_s / run.tok_per_s - 1
        lines.append(
            f"{run.shape:<9}{run.nodes:>6} {run.placement:<11}{run.latency_ms:>8.2g}"
            f"{run.tok_per_s:>10.2f}{p.tok_per_s:>11.2f}{error:>+8.0%}"
            f"{' fitted' if run.is_fitted else ''}"
        )
        numbers = {"predicted": p.tok_per_s, "error": error, "fitted": run.is_fitted}
        rows.append({**asdict(run), **numbers})
    data: dict[str, Any] = {"rows": rows, "parameters": parameters, "facts": runs.facts}
    for name, is_fitted in (("fitted", True), ("checked", False)):
        errors = [abs(row["error"]) for row in rows if row["fitted"] is is_fitted]
        if errors:
            data[name] = {"rows": len(errors), "median": median(errors), "worst": max(errors)}
            lines.append(
                f"{name}: {len(errors)} rows, median error {median(errors):.1%}, worst "
                f"{max(errors):.1%}"
            )
    return "\n".join(lines), data
