"""Measuring this machine: an entry for the catalogue.

Owns: what is measured, and the machine and link entries made of it.
Does not know: how a model's time is predicted from them (`cost.py`).
Measured: read bandwidth by size, kernels by shape, an expert's and a layer's own time, and between
local processes an exchange by message size; by as many processes at once as will later share the
machine, because they share its memory, and then by one of them alone.
Next: `probe.py`, which runs in each process.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..api import load
from ..errors import InputError
from ..model.synth import synth
from ..ranks.local_ranks import LocalRanks
from ..ranks.messages import MeasureOrder

PROBE = (sys.executable, "-m", "cenacle.calibration.probe_worker")
# A model of almost no weights: what a token costs is the layers' own time.
TINY_LAYERS = 16
TINY_CONFIG = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": TINY_LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
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


@dataclass(frozen=True)
class Calibration:
    """What was measured, by one of `nodes` processes that share the machine.

    Args:
        reads: MB -> (GB/s, spread).
        kernels: shape -> (GB/s, spread, GFLOP/s with 64 tokens).
        alone: shape -> GB/s while the other processes are idle; None: there are no others.
        expert_us: what an expert costs besides reading its bytes, and its spread.
        overhead_us: of a layer, and its spread.
        alone_overhead_us: the same while the other processes are idle.
        exchanges: bytes -> (us, spread), of ranks that do nothing else.
        working_us: what one adds to a token of a model of almost no weights, and its spread.
        facts: date, versions, processor, device, threads.
    """

    name: str
    nodes: int
    reads: dict[int, tuple[float, float]]
    kernels: dict[str, tuple[float, float, float]]
    alone: dict[str, float] | None
    expert_us: tuple[float, float]
    overhead_us: tuple[float, float]
    alone_overhead_us: float | None
    exchanges: dict[int, tuple[float, float]]
    working_us: tuple[float, float] | None
    memory_gib: float
    facts: dict[str, Any]

    @property
    def bandwidth(self) -> tuple[float, float]:
        """GB/s, spread: the largest read, which no cache holds."""
        return self.reads[max(self.reads)]

    @property
    def efficiency(self) -> float:
        """Kernels' median over the read bandwidth, at most 1."""
        rates = [k[0] for k in self.kernels.values()]
        return min(1.0, statistics.median(rates) / self.bandwidth[0])

    @property
    def alone_gb_s(self) -> float | None:
        """At which one process reads weights while the others are idle: the kernels' median."""
        return statistics.median(self.alone.values()) if self.alone is not None else None

    @property
    def gflops(self) -> float:
        """Median over shapes, 64 tokens."""
        return statistics.median(k[2] for k in self.kernels.values())

    @property
    def link(self) -> tuple[float, float] | None:
        """Latency in us and GB/s, between ranks that work.

        The rate is what the largest message adds to the smallest. The latency is what an exchange
        adds to a token: a bare one has no wait for the slower rank in it, and is a fraction of that
        where ranks share cores.
        """
        if not self.exchanges or self.working_us is None:
            return None
        small, large = min(self.exchanges), max(self.exchanges)
        bare = self.exchanges[small][0]
        rate = (large - small) / max(1e-9, self.exchanges[large][0] - bare) / 1e3
        return max(bare, self.working_us[0]), rate

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        latency, rate = self.link or (None, None)
        return {
            "name": self.name,
            "nodes": self.nodes,
            "read_gb_s": {str(k): v[0] for k, v in self.reads.items()},
            "kernel_gb_s": {k: v[0] for k, v in self.kernels.items()},
            "alone_kernel_gb_s": self.alone,
            "efficiency": self.efficiency,
            "gflops": self.gflops,
            "expert_us": self.expert_us[0],
            "overhead_us": self.overhead_us[0],
            "alone_overhead_us": self.alone_overhead_us,
            "exchange_us": {str(k): v[0] for k, v in self.exchanges.items()},
            "working_us": self.working_us[0] if self.working_us is not None else None,
            "latency_us": latency,
            "link_gb_s": rate,
            "memory_gib": self.memory_gib,
            "facts": self.facts,
        }

    def table(self) -> str:
        """For people."""
        lines = [
            f"one of {self.nodes} processes; {self.facts['device']}; {self.facts['processor']}"
        ]
        lines += [
            f"read {size:>4} MB   {rate:>8.1f} GB/s  +-{100 * spread:.0f} %"
            for size, (rate, spread) in self.reads.items()
        ]
        lines += [
            f"{name:<22}{rate:>6.1f} GB/s  +-{100 * spread:.0f} %, "
            f"{100 * rate / self.bandwidth[0]:.0f} % of a read; {flops:.0f} GFLOP/s with 64 tokens"
            for name, (rate, spread, flops) in self.kernels.items()
        ]
        if self.alone_gb_s is not None:
            lines.append(f"kernels, alone         {self.alone_gb_s:>5.1f} GB/s")
        us, spread = self.expert_us
        lines.append(f"an expert, besides    {us:>6.1f} us  +-{100 * spread:.0f} %")
        us, spread = self.overhead_us
        lines.append(f"a layer's own time    {us:>6.0f} us  +-{100 * spread:.0f} %")
        if self.alone_overhead_us is not None:
            lines.append(f"the same, alone       {self.alone_overhead_us:>6.0f} us")
        lines += [
            f"exchange {size:>8} B  {us:>8.0f} us  +-{100 * spread:.0f} %"
            for size, (us, spread) in self.exchanges.items()
        ]
        if self.working_us is not None:
            us, spread = self.working_us
            lines.append(f"an exchange of ranks that work {us:.0f} us  +-{100 * spread:.0f} %")
        return "\n".join(lines)


def calibrate(
    name: str, nodes: int, quick: bool, say: Callable[[str], None] = lambda _: None
) -> Calibration:
    """Measure for some seconds (`quick`) or about a minute.

    Raises:
        InputError: no nodes or more than 8, or a name that is not one.
        ClusterError: a process failed.
    """
    most = int(TINY_CONFIG["num_key_value_heads"])  # type: ignore[call-overload]
    if not 1 <= nodes <= most:
        raise InputError(f"nodes: expected 1 to {most}, got {nodes}", "nodes")
    if not name.replace("-", "").replace(".", "").replace("_", "").isalnum():
        raise InputError(f"name: expected letters, digits and dashes, got {name!r}", "name")
    say(f"measuring memory, kernels and exchanges in {nodes} processes at once")
    found, backend = _probe(nodes, nodes, quick)
    alone = None
    if nodes > 1:
        say("measuring kernels in one of them alone")
        kernels_alone = _probe(1, nodes, quick)[0][0]["kernels"]
        alone = {shape: float(rate[0]) for shape, rate in kernels_alone.items()}
    say("measuring a layer's own time, and what an exchange adds to it")
    overhead, overhead_alone, working = _own_times(nodes, 24 if quick else 96)
    # The slowest process of a group is what the others wait for; reads and kernels: the mean.
    reads = {int(size): _mean([f["reads"][size] for f in found]) for size in found[0]["reads"]}
    kernels = {k: _mean([f["kernels"][k] for f in found]) for k in found[0]["kernels"]}
    expert = _mean([f["expert"] for f in found])
    exchanges = {int(size): (us, spread) for size, (us, spread) in found[0]["exchanges"].items()}
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "cenacle": version("cenacle"),
        "mlx": version("mlx"),
        "processor": processor_name(),
        "device": found[0]["device"],
        "backend": backend,
    }
    return Calibration(
        name,
        nodes,
        reads,  # type: ignore[arg-type]
        kernels,  # type: ignore[arg-type]
        alone,
        expert,  # type: ignore[arg-type]
        overhead,
        overhead_alone,
        exchanges,
        working,
        memory_gib() / nodes,
        facts,
    )


def _probe(processes: int, share: int, quick: bool) -> tuple[list[dict[str, Any]], str]:
    """What as many processes find, each with the threads of one of `share`; how they exchanged."""
    ranks = LocalRanks(processes, "auto", PROBE)
    try:
        arguments = {"share": share, "seconds": 0.1 if quick else 1.0}
        ranks.load(MeasureOrder(processes, arguments=arguments))
        return [ready.result for ready in ranks.ready], ranks.backend if processes > 1 else "alone"
    finally:
        ranks.close(now=False)


def _mean(rows: list[list[float]]) -> tuple[float, ...]:
    return tuple(statistics.mean(column) for column in zip(*rows, strict=True))


def _own_times(
    nodes: int, tokens: int
) -> tuple[tuple[float, float], float | None, tuple[float, float] | None]:
    """Microseconds a layer, and spread; if there are several nodes, the same of one alone, and an
    exchange, and spread.

    Of a model of almost no weights, on one node and on all, with one exchange a layer and with two:
    what the second one adds is an exchange, what is left of the first is the layer. Threads as one
    of `nodes` processes has. The embedding and the head are next to nothing.
    """
    folder = Path(tempfile.mkdtemp(prefix="cenacle-empty-"))
    before = os.environ.get("CENACLE_THREADS")
    os.environ["CENACLE_THREADS"] = str(max(1, usable_core_count() // nodes))
    try:
        synth(folder, config=TINY_CONFIG, dtype="float32", overwrite=True)
        ways = [(1, "replicated")]
        if nodes > 1:
            ways += [(nodes, "replicated"), (nodes, "sharded")]
        one, *several = _in_turn(folder, ways, tokens)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if before is None:
            del os.environ["CENACLE_THREADS"]
        else:
            os.environ["CENACLE_THREADS"] = before
    alone = statistics.median(one)
    if not several:
        return (alone / TINY_LAYERS, _half_width(one) / alone), None, None
    single, double = several
    second = [b - a for a, b in zip(single, double, strict=True)]
    added = max(1.0, statistics.median(second))
    exchange = added / TINY_LAYERS
    # The last exchange shares the token. Sharing a machine makes no layer faster.
    together = max(alone, statistics.median(single) - (TINY_LAYERS + 1) * exchange)
    return (
        (together / TINY_LAYERS, _half_width(single) / together),
        alone / TINY_LAYERS,
        (exchange, _half_width(second) / added),
    )


def _in_turn(folder: Path, ways: list[tuple[int, str]], tokens: int) -> list[list[float]]:
    """Microseconds a token with so many nodes and such a trunk, each several times, in turn."""
    with ExitStack() as loaded:
        models = [
            loaded.enter_context(
                load(
                    str(folder), n, placement="sliced", trunk=trunk, measure_every=0, recover=False
                )
            )
            for n, trunk in ways
        ]
        ids = list(range(8))
        found: list[list[float]] = [[] for _ in models]
        for turn in range(12):
            for model, times in zip(models, found, strict=True):
                times.append(1e6 / model.generate(ids, max_tokens=tokens).tok_per_s)
            if turn == 0:
                for times in found:
                    times.clear()  # the first compiles
        return found


def _half_width(values: list[float]) -> float:
    """Half of the middle half's width."""
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def as_toml(c: Calibration) -> str:
    """The entry as an owner's file: [machines.NAME], and [links.measured] where there were two."""
    f = c.facts
    said = f"calibrate {f['date']}, cenacle {f['cenacle']}, mlx {f['mlx']}"
    # Memory's nominal bandwidth is not known; what a read reaches stands for it.
    rate, spread = c.bandwidth

    def number(value: float, spread: float | None = None) -> str:
        beside = f", spread = {spread:.3f}" if spread is not None else ""
        return f'{{ v = {value:.6g}, c = "M", s = {json.dumps(said)}{beside} }}'

    title = f"one of {c.nodes} processes on {f['processor']}, {f['device']}"
    lines = [
        f"# Measured by `cenacle calibrate` on {f['date']}. Price and watts were not measured.",
        f"[machines.{_key(c.name)}]",
        f"title = {json.dumps(title)}",
        'family = "cpu"' if "cpu" in f["device"] else 'family = "apple-m3-m4"',
        f'memory_gib = {{ v = [{c.memory_gib:.1f}], c = "M", s = {json.dumps(said)} }}',
        f"bandwidth_gb_s = {number(rate, spread)}",
        f"tflops = {number(c.gflops / 1000)}",
        'usd = { v = [0], c = "D", s = "unknown" }',
        'watts = { v = 0, c = "D", s = "unknown" }',
        f"efficiency = {number(c.efficiency)}",
        f"compute = {number(1.0)}",
        f"overhead_us = {number(*c.overhead_us)}",
    ]
    if c.expert_us[0] > 0:  # on a busy machine nothing may come out
        lines.append(f"expert_us = {number(*c.expert_us)}")
    if c.alone_gb_s is not None:
        lines.append(f"alone_gb_s = {number(c.alone_gb_s)}")
    if c.alone_overhead_us is not None:
        lines.append(f"alone_overhead_us = {number(c.alone_overhead_us)}")
    if c.link is not None:
        latency, gb_s = c.link
        lines += [
            "",
            "[links.measured]",
            f'title = "between {c.nodes} local processes, {f["backend"]}"',
            f'topology = "{"ring" if f["backend"] == "ring" else "mesh"}"',
            f"latency_us = {number(latency, c.working_us[1] if c.working_us else None)}",
            f"gb_s = {number(gb_s, c.exchanges[max(c.exchanges)][1])}",
        ]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return f'"{name}"' if "." in name else name


def usable_core_count() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def memory_gib() -> float:
    """This machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def processor_name() -> str:
    """The processor's name."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
