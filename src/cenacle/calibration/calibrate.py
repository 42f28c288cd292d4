"""Measuring this machine: an entry for the catalog.

Owns: what is measured, and the machine and link entries made of it.
Does not know: how a model's time is predicted from them (`planning/perf_model.py`).
Measured: read bandwidth by size, kernels by shape, the overhead of an expert and of a layer, and an
all-reduce between local processes by message size; by as many processes at once as will share the
machine later, because they share its memory, and then by one of them alone.
Next: `probes.py`, which measures in each process.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from ..api import load
from ..errors import InputError
from ..machine import processor_name, usable_cores
from ..model.synth import synth
from .probes import probe_machine
from .rank_worker import RankPool

MAX_NODES = 8
PROBE_TIMEOUT_S = 600.0
# A model of almost no weights: its tokens take the overhead of its layers.
TINY_LAYERS = 16
TINY_CONFIG = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": TINY_LAYERS,
    "num_attention_heads": MAX_NODES,
    "num_key_value_heads": MAX_NODES,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
TIMED_ROUNDS = 11
Report = Callable[[str], None]


class Measured(NamedTuple):
    """A median and its relative spread."""

    value: float
    spread: float


class Kernel(NamedTuple):
    """GB/s with one token, their spread, and GFLOP/s with 64 tokens."""

    gb_s: float
    spread: float
    gflops: float


@dataclass(frozen=True)
class Calibration:
    """What was measured, by one of `nodes` processes that share the machine.

    Args:
        reads: MB -> GB/s.
        kernels: shape -> kernel.
        alone: shape -> GB/s while the other processes are idle; None: there are no others.
        expert_us: what an expert takes besides reading its bytes.
        overhead_us: of a layer.
        alone_overhead_us: the same while the other processes are idle.
        all_reduces: bytes -> us, of ranks that do nothing else.
        model_all_reduce_us: what one adds to a token of a model of almost no weights.
        facts: date, versions, processor, device, backend.
    """

    name: str
    nodes: int
    reads: dict[int, Measured]
    kernels: dict[str, Kernel]
    alone: dict[str, float] | None
    expert_us: Measured
    overhead_us: Measured
    alone_overhead_us: float | None
    all_reduces: dict[int, Measured]
    model_all_reduce_us: Measured | None
    memory_gib: float
    facts: dict[str, Any]

    @property
    def bandwidth(self) -> Measured:
        """GB/s of the largest read, which no cache holds."""
        return self.reads[max(self.reads)]

    @property
    def efficiency(self) -> float:
        """The kernels' median over the read bandwidth, at most 1."""
        gb_s = statistics.median(kernel.gb_s for kernel in self.kernels.values())
        return min(1.0, gb_s / self.bandwidth.value)

    @property
    def alone_gb_s(self) -> float | None:
        """GB/s at which one process reads weights while the others are idle."""
        return statistics.median(self.alone.values()) if self.alone is not None else None

    @property
    def gflops(self) -> float:
        """The kernels' median."""
        return statistics.median(kernel.gflops for kernel in self.kernels.values())

    @property
    def link(self) -> tuple[float, float] | None:
        """Latency in us and GB/s between ranks at work.

        The rate is what the largest message adds to the smallest. The latency is what an all-reduce
        adds to a token: a bare one does not include the wait for the slower rank, and takes a
        fraction of that where ranks share cores.
        """
        if not self.all_reduces or self.model_all_reduce_us is None:
            return None
        small, large = min(self.all_reduces), max(self.all_reduces)
        bare_us = self.all_reduces[small].value
        added_us = self.all_reduces[large].value - bare_us
        gb_s = (large - small) / max(1e-9, added_us) / 1e3
        return max(bare_us, self.model_all_reduce_us.value), gb_s

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        latency_us, link_gb_s = self.link or (None, None)
        in_model = self.model_all_reduce_us
        return {
            "name": self.name,
            "nodes": self.nodes,
            "read_gb_s": {str(k): read.value for k, read in self.reads.items()},
            "kernel_gb_s": {k: kernel.gb_s for k, kernel in self.kernels.items()},
            "alone_kernel_gb_s": self.alone,
            "efficiency": self.efficiency,
            "gflops": self.gflops,
            "expert_us": self.expert_us.value,
            "overhead_us": self.overhead_us.value,
            "alone_overhead_us": self.alone_overhead_us,
            "all_reduce_us": {str(k): time.value for k, time in self.all_reduces.items()},
            "model_all_reduce_us": in_model.value if in_model is not None else None,
            "latency_us": latency_us,
            "link_gb_s": link_gb_s,
            "memory_gib": self.memory_gib,
            "facts": self.facts,
        }

    def table(self) -> str:
        """For people."""
        facts = self.facts
        rows: list[tuple[str, float, str, float | None, str]] = [
            (f"read {size} MB", *_row(read, "GB/s"), "") for size, read in self.reads.items()
        ]
        for name, (gb_s, spread, gflops) in self.kernels.items():
            percent = 100 * gb_s / self.bandwidth.value
            remark = f", {percent:.0f} % of a read; {gflops:.0f} GFLOP/s with 64 tokens"
            rows.append((name, gb_s, "GB/s", spread, remark))
        if self.alone_gb_s is not None:
            rows.append(("kernels, alone", self.alone_gb_s, "GB/s", None, ""))
        rows.append(("overhead per expert", *_row(self.expert_us, "us"), ""))
        rows.append(("overhead per layer", *_row(self.overhead_us, "us"), ""))
        if self.alone_overhead_us is not None:
            rows.append(("overhead per layer, alone", self.alone_overhead_us, "us", None, ""))
        for size, time in self.all_reduces.items():
            rows.append((f"all-reduce of {size} B", *_row(time, "us"), ""))
        if self.model_all_reduce_us is not None:
            rows.append(("all-reduce in a model", *_row(self.model_all_reduce_us, "us"), ""))
        title = f"one of {self.nodes} processes; {facts['device']}; {facts['processor']}"
        return "\n".join(
            [title]
            + [
                f"{name:<26}{value:>9.1f} {unit:<5}"
                + (f"+-{100 * spread:.0f} %" if spread is not None else "")
                + remark
                for name, value, unit, spread, remark in rows
            ]
        )

    def to_toml(self) -> str:
        """The entry as a user's file: [machines.NAME], and [links.measured] of several nodes."""
        facts = self.facts
        source = f"calibrate {facts['date']}, cenacle {facts['cenacle']}, mlx {facts['mlx']}"

        def number(value: float, spread: float | None = None) -> str:
            suffix = f", spread = {spread:.3f}" if spread is not None else ""
            return f'{{ v = {value:.6g}, c = "M", s = {json.dumps(source)}{suffix} }}'

        title = f"one of {self.nodes} processes on {facts['processor']}, {facts['device']}"
        family = "cpu" if "cpu" in facts["device"] else "apple-m3-m4"
        memory = f'{{ v = [{self.memory_gib:.1f}], c = "M", s = {json.dumps(source)} }}'
        lines = [
            f"# Measured by `cenacle calibrate` on {facts['date']}. Price and power are unknown.",
            f"[machines.{_toml_key(self.name)}]",
            f"title = {json.dumps(title)}",
            f'family = "{family}"',
            f"memory_gib = {memory}",
            # The nominal bandwidth of memory is not known; that of a read stands for it.
            f"bandwidth_gb_s = {number(*self.bandwidth)}",
            f"tflops = {number(self.gflops / 1000)}",
            'usd = { v = [0], c = "D", s = "unknown" }',
            'watts = { v = 0, c = "D", s = "unknown" }',
            f"efficiency = {number(self.efficiency)}",
            f"compute = {number(1.0)}",
            f"overhead_us = {number(*self.overhead_us)}",
        ]
        if self.expert_us.value > 0:  # on a busy machine the difference may vanish
            lines.append(f"expert_us = {number(*self.expert_us)}")
        if self.alone_gb_s is not None:
            lines.append(f"alone_gb_s = {number(self.alone_gb_s)}")
        if self.alone_overhead_us is not None:
            lines.append(f"alone_overhead_us = {number(self.alone_overhead_us)}")
        if self.link is not None and self.model_all_reduce_us is not None:
            latency_us, gb_s = self.link
            lines += [
                "",
                "[links.measured]",
                f'title = "between {self.nodes} local processes, {facts["backend"]}"',
                f'topology = "{"ring" if facts["backend"] == "ring" else "mesh"}"',
                f"latency_us = {number(latency_us, self.model_all_reduce_us.spread)}",
                f"gb_s = {number(gb_s, self.all_reduces[max(self.all_reduces)].spread)}",
            ]
        return "\n".join(lines) + "\n"


def _row(measured: Measured, unit: str) -> tuple[float, str, float]:
    return measured.value, unit, measured.spread


def _toml_key(name: str) -> str:
    return f'"{name}"' if "." in name else name


def calibrate(name: str, nodes: int, quick: bool, report: Report = lambda _: None) -> Calibration:
    """Measure this machine, for some seconds (`quick`) or about a minute.

    Raises:
        InputError: a wrong number of nodes or name.
        ClusterError: a process failed.
    """
    if not 1 <= nodes <= MAX_NODES:
        raise InputError(f"nodes: expected 1 to {MAX_NODES}, got {nodes}", "nodes")
    if not name.replace("-", "").replace(".", "").replace("_", "").isalnum():
        raise InputError(f"name: expected letters, digits and dashes, got {name!r}", "name")
    seconds, threads = 0.1 if quick else 1.0, max(1, len(usable_cores()) // nodes)
    report(f"measuring memory, kernels and all-reduces in {nodes} processes at once")
    probes, backend = probe_ranks(nodes, threads, seconds)
    alone = None
    if nodes > 1:
        report("measuring kernels in a single process")
        (probe,), _ = probe_ranks(1, threads, seconds)
        alone = {shape: float(kernel[0]) for shape, kernel in probe["kernels"].items()}
    report("measuring the overhead of a layer, and what an all-reduce adds to it")
    overhead, alone_overhead, model_all_reduce = _measure_overheads(
        nodes, threads, 24 if quick else 96
    )
    # The slowest process of a group is what the others wait for; of reads and kernels: the mean.
    return Calibration(
        name,
        nodes,
        {
            int(size): Measured(*_mean(p["reads"][size] for p in probes))
            for size in probes[0]["reads"]
        },
        {k: Kernel(*_mean(p["kernels"][k] for p in probes)) for k in probes[0]["kernels"]},
        alone,
        Measured(*_mean(p["expert"] for p in probes)),
        overhead,
        alone_overhead,
        {int(size): Measured(*time) for size, time in probes[0]["all_reduces"].items()},
        model_all_reduce,
        psutil.virtual_memory().total / 2**30 / nodes,
        {
            "date": datetime.now(UTC).date().isoformat(),
            "cenacle": version("cenacle"),
            "mlx": version("mlx"),
            "processor": processor_name(),
            "device": probes[0]["device"],
            "backend": backend if nodes > 1 else "alone",
        },
    )


def probe_ranks(nodes: int, threads: int, seconds: float) -> tuple[list[dict[str, Any]], str]:
    """What `nodes` processes measure at once (see `probe_machine`), and their backend."""
    with RankPool(nodes, threads=threads) as ranks:
        return ranks.run(probe_machine, PROBE_TIMEOUT_S, seconds=seconds), ranks.backend


def _mean(rows: Iterable[list[float]]) -> tuple[float, ...]:
    return tuple(statistics.mean(column) for column in zip(*rows, strict=True))


def _measure_overheads(
    nodes: int, threads: int, tokens: int
) -> tuple[Measured, float | None, Measured | None]:
    """Microseconds of a layer; of several nodes also of a layer alone, and of an all-reduce.

    Of a model of almost no weights, on one node and on all, with one all-reduce per layer and with
    two: what the second one adds is an all-reduce, what is left of the first is the layer. The
    embedding and the head take next to nothing.
    """
    folder = Path(tempfile.mkdtemp(prefix="cenacle-tiny-"))
    try:
        synth(folder, config=TINY_CONFIG, dtype="float32", overwrite=True)
        variants = [(1, "replicated")]
        if nodes > 1:
            variants += [(nodes, "replicated"), (nodes, "sharded")]
        one, *several = _time_tokens(folder, variants, threads, tokens)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    alone_us = statistics.median(one)
    if not several:
        return Measured(alone_us / TINY_LAYERS, _half_width(one) / alone_us), None, None
    single, double = several
    second = [b - a for a, b in zip(single, double, strict=True)]
    added_us = max(1.0, statistics.median(second))
    all_reduce_us = added_us / TINY_LAYERS
    # The last all-reduce shares the token. Sharing a machine makes no layer faster.
    layers_us = max(alone_us, statistics.median(single) - (TINY_LAYERS + 1) * all_reduce_us)
    return (
        Measured(layers_us / TINY_LAYERS, _half_width(single) / layers_us),
        alone_us / TINY_LAYERS,
        Measured(all_reduce_us, _half_width(second) / added_us),
    )


def _time_tokens(
    folder: Path, variants: list[tuple[int, str]], threads: int, tokens: int
) -> list[list[float]]:
    """Microseconds of a token for each number of nodes and trunk, several times, in turn."""
    with ExitStack() as stack:
        models = [
            stack.enter_context(
                load(
                    str(folder),
                    nodes,
                    placement="sliced",
                    trunk=trunk,
                    threads=threads,
                    measure_every=0,
                    recover=False,
                )
            )
            for nodes, trunk in variants
        ]
        ids = list(range(8))
        rounds = [
            [1e6 / model.generate(ids, max_tokens=tokens).tok_per_s for model in models]
            for _ in range(TIMED_ROUNDS + 1)
        ]
        return [list(times) for times in zip(*rounds[1:], strict=True)]  # the first compiles


def _half_width(values: list[float]) -> float:
    """Half of the width of the middle half."""
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2
