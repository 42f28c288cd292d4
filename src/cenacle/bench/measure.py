"""`cenacle bench`: how fast a model runs, where its time goes, what the hardware could give.

Owns: what is measured, in which order, and the JSON object of the results.
Does not know: how results are printed (`report.py`), peers' formats.
Invariant: with peers, ours and theirs take turns, round by round, and medians are compared; total
throughput is all tokens over wall time; the step timings of a token add up to its total.
Next: `hardware_limits.py`, `peers/peers.py`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from .. import api
from ..calibration.rank_worker import split_cores
from ..core.model_spec import ModelSpec
from ..core.request import GroupEvent, PromptLogprobs
from ..errors import CenacleError, ClusterError, InputError
from ..load_options import LoadOptions
from ..machine import usable_cores
from ..model import config_catalog, native_layers, synth
from ..model.checkpoint import Checkpoint, locate_checkpoint
from ..model.spec_reader import read_model_spec
from ..paths import cache_dir, resolve_model
from ..planning.plan_cost import token_read_bytes
from ..runtime import select_plan
from .hardware_limits import measure_limits
from .peers.peers import Peer, PeerFailed, PeerSpeed, PeerVariant, PeerWorkload

ANSWER_TIMEOUT_S = 900.0
MEASURED_ANSWERS = 4
REPORTED_OPTIONS = (
    *("backend", "comm_dtype", "latency_s", "kernels", "activations", "draft_model", "speculative"),
    *("prefill_chunk_size", "kv_dtype", "kv_bits", "max_kv_size"),
)

Report = Callable[[str], None]


@dataclass(frozen=True)
class BenchConfig:
    """What to measure.

    Args:
        load: the model and how to run it; threads: None: an even share of the cores.
        contexts: context lengths at which decoding is measured; the first one `repeat` times in
            turn with the peers, and with concurrent requests.
        concurrency: numbers of concurrent requests.
        tokens: decoded per measurement.
        repeat: number of rounds.
        prompt_tokens: length of the prompt that is timed in each round.
        cache_dir: folder for models that are kept between runs.
        peer_timeout_s: longest that one process of a peer may take.
    """

    load: LoadOptions
    contexts: tuple[int, ...] = (32, 2048, 8192)
    concurrency: tuple[int, ...] = (1, 2, 4, 8)
    tokens: int = 64
    repeat: int = 3
    prompt_tokens: int = 512
    cache_dir: Path = field(default_factory=cache_dir)
    peer_timeout_s: float = 300.0


def run_bench(
    config: BenchConfig, peers: Sequence[Peer] = (), report: Report = lambda _: None
) -> dict[str, Any]:
    """Measure a model.

    Returns:
        A JSON object: "conditions", "decode", "prefill", "concurrency", "step_timings_ms", "ranks",
        "hardware_limits", "peers"; see docs/internals/benchmarks.md.

    Raises:
        InputError: an impossible combination of options.
        CheckpointError, PlanError, ClusterError: as `api.load`.
    """
    load = config.load
    checkpoint = Checkpoint.open(locate_checkpoint(load.model))
    spec = read_model_spec(checkpoint)
    _check(config, spec)
    cores, threads = split_cores(load.nodes, load.threads)
    workload = _peer_workload(config, checkpoint, cores, threads)
    variants = [variant for peer in peers for variant in peer.variants(workload)]
    load_before, cpu_times = os.getloadavg()[0], _read_cpu_times()
    plan, reason = select_plan(load, checkpoint)
    report(reason or f"placement {plan.placement}, trunk {plan.trunk}")
    report("measuring the limits of memory, all-reduce and kernels")
    native = load.kernels != "mlx" and native_layers.is_supported()
    limits = measure_limits(
        load.nodes,
        load.backend,
        cores,
        threads,
        checkpoint.folder if native else None,
        plan if native else None,
        load.activations,
    )
    report(f"loading {load.model} on {load.nodes} nodes")
    pinned = replace(
        load,
        plan=plan,
        cores=cores,
        threads=threads,
        measure_every=0,
        recover=False,
        max_batch_size=max(*config.concurrency, 1),
    )
    with api.Model.load(pinned) as model:
        results = _Bench(model, config, report).run(variants, limits)
        ranks = model.ranks_json()
        backend = model.ranks.backend
    for rank, row in enumerate(results["ranks"]):
        row |= {"cores": list(cores[rank]) if cores else None, **ranks[rank]}
    return {
        "benchmark": "bench",
        "model": load.model,
        "family": spec.family,
        "quantization": spec.quantization,
        "dtype": spec.dtype,
        "conditions": {
            "machine": platform.machine(),
            "cores": len(usable_cores()),
            "load_before": round(load_before, 2),
            "cpu_steal_percent": _cpu_steal_percent(cpu_times),
            "nodes": load.nodes,
            "threads": threads,
            "pinned": cores is not None,
            "backend": backend,
            "kernels": ranks[0]["device"],
            "placement": plan.placement,
            "trunk": plan.trunk,
            "options": {name: getattr(load, name) for name in REPORTED_OPTIONS},
            "versions": {n: importlib.metadata.version(n) for n in ("cenacle", "mlx", "mlx-lm")},
        },
        **results,
    }


def _check(config: BenchConfig, spec: ModelSpec) -> None:
    if config.tokens < 2 or config.repeat < 1 or not config.contexts or min(config.contexts) < 1:
        raise InputError(
            "bench: expected at least 2 tokens, 1 repetition and contexts of at least 1 token"
        )
    longest, decoded = max(*config.contexts, config.prompt_tokens), config.repeat * config.tokens
    if spec.context_length is not None and longest + decoded + 1 > spec.context_length:
        raise InputError(
            f"--contexts and --prompt-tokens: expected at most "
            f"{spec.context_length - decoded - 1}, since {config.repeat} times {config.tokens} "
            f"tokens follow and the model's context is {spec.context_length}, got {longest}",
            "contexts",
        )


def _peer_workload(
    config: BenchConfig, checkpoint: Checkpoint, cores: list[list[int]] | None, threads: int
) -> PeerWorkload:
    return PeerWorkload(
        checkpoint.folder,
        checkpoint.config,
        config.load.nodes,
        threads,
        cores or [usable_cores()] * config.load.nodes,
        config.contexts[0],
        config.tokens,
        config.prompt_tokens,
        config.cache_dir / "peers",
        config.peer_timeout_s,
        config.concurrency,
    )


def _read_cpu_times() -> list[int]:
    """The cores' time by its use since the start of the machine (Linux); else empty."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return []
    return [int(ticks) for ticks in stat.read_text().split("\n", 1)[0].split()[1:9]]


def _cpu_steal_percent(before: list[int]) -> float | None:
    """Percent of the cores' time since `before` that the host gave to other guests."""
    spent = [b - a for a, b in zip(before, _read_cpu_times(), strict=True)]
    return round(100 * spent[7] / max(1, sum(spent)), 1) if spent else None


class _Bench:
    """A loaded model and its results so far."""

    def __init__(self, model: api.Model, config: BenchConfig, report: Report) -> None:
        self._model, self._config, self._report = model, config, report
        self._rng = random.Random(0)
        self._decode: list[dict[str, Any]] = []
        self._prefill: list[dict[str, Any]] = []
        self._concurrency: list[dict[str, Any]] = []

    def run(self, variants: Sequence[PeerVariant], limits: dict[str, Any]) -> dict[str, Any]:
        """The results of everything but the conditions."""
        peer_speeds = self._measure_rounds(variants)
        for context in self._config.contexts[1:]:
            self._measure_context(context)
        timings_ms, ranks = self._measure_steps()
        mean_bytes, max_bytes = token_read_bytes(self._model.plan)
        for rank, row in enumerate(ranks):
            rate = limits["ranks_read_gb_s"][rank]
            row |= {"token_bytes": mean_bytes[rank], "read_gb_s": rate}
        token = _relate_to_limits(self._decode[0]["tok_per_s"], max_bytes, timings_ms, limits)
        return {
            "decode": self._decode,
            "prefill": self._prefill,
            "concurrency": self._concurrency,
            "step_timings_ms": timings_ms,
            "ranks": ranks,
            "hardware_limits": {**limits, "token": token},
            "peers": self._compare(variants, peer_speeds),
        }

    def _measure_rounds(self, variants: Sequence[PeerVariant]) -> list[list[PeerSpeed] | str]:
        """The first context, the prompt and concurrent requests, in turn with the peers.

        Returns:
            For each variant its speeds, or why it failed; it is not tried again then.
        """
        config, context = self._config, self._config.contexts[0]
        self._report("warming up")
        self._time_request(context, 2)
        decode: list[float] = []
        prefill: list[float] = []
        concurrent: dict[int, list[float]] = {count: [] for count in config.concurrency}
        results: list[list[PeerSpeed] | str] = [[] for _ in variants]
        for i in range(config.repeat):
            self._report(f"round {i + 1} of {config.repeat}: ours")
            times = self._time_request(context, config.tokens + 1)
            decode.append(config.tokens / (times[-1] - times[1]))
            times = self._time_request(config.prompt_tokens, 1)
            prefill.append(config.prompt_tokens / (times[1] - times[0]))
            for count, speeds in concurrent.items():
                speeds.append(self._measure_requests(count))
            for peer, variant in enumerate(variants):
                result = results[peer]
                if isinstance(result, str):
                    continue
                self._report(f"round {i + 1} of {config.repeat}: {variant.name}")
                try:
                    result.append(variant.run())
                except PeerFailed as error:
                    results[peer] = str(error)
        self._decode.append(_row(decode, context=context))
        self._prefill.append(_row(prefill, tokens=config.prompt_tokens))
        self._concurrency = [_row(all_, requests=count) for count, all_ in concurrent.items()]
        single = next((r["tok_per_s"] for r in self._concurrency if r["requests"] == 1), None)
        for row in self._concurrency:
            row["ratio"] = row["tok_per_s"] / single if single else None
        return results

    def _compare(
        self, variants: Sequence[PeerVariant], results: Sequence[list[PeerSpeed] | str]
    ) -> list[dict[str, Any]]:
        """A row for each variant: medians and ours over theirs, or how it failed.

        A peer with several variants has one more row, with the best of them in each cell.
        """
        rows: list[dict[str, Any]] = []
        measured: dict[str, list[list[PeerSpeed]]] = {}
        for variant, speeds in zip(variants, results, strict=True):
            if isinstance(speeds, str):
                rows.append({"name": variant.name, "failed": speeds})
                continue
            rows.append(self._compare_with(variant.name, [speeds]))
            if variant.peer is not None:
                measured.setdefault(variant.peer, []).append(speeds)
        for peer, all_speeds in measured.items():
            if len(all_speeds) > 1:
                rows.append(self._compare_with(f"{peer}, best in each cell", all_speeds))
        return rows

    def _compare_with(self, name: str, variants: Sequence[list[PeerSpeed]]) -> dict[str, Any]:
        """The row of the variant with the highest median, cell by cell."""
        row: dict[str, Any] = {"name": name}
        for phase, ours in (("decode", self._decode[0]), ("prefill", self._prefill[0])):
            all_ = max(
                ([getattr(speed, phase) for speed in speeds] for speeds in variants),
                key=statistics.median,
            )
            median = statistics.median(all_)
            row[f"{phase}_tok_per_s"], row[f"{phase}_all"] = median, all_
            row[f"{phase}_ratio"] = ours["tok_per_s"] / median if median else None
        row["concurrency"] = [
            {**cell, "ratio": ours["tok_per_s"] / cell["tok_per_s"]}
            for ours in self._concurrency
            if (cell := _best_concurrency(ours["requests"], variants)) is not None
        ]
        return row

    def _measure_context(self, context: int) -> None:
        """Decoding after a long prompt; the prompt once, the decoding in `repeat` blocks."""
        config = self._config
        self._report(f"context {context}")
        times = self._time_request(context, config.repeat * config.tokens + 1)
        blocks = [config.tokens / (b - a) for a, b in pairwise(times[1 :: config.tokens])]
        self._decode.append(_row(blocks, context=context))
        self._prefill.append(_row([context / (times[1] - times[0])], tokens=context))

    def _measure_requests(self, count: int) -> float:
        """Several requests at once: all tokens over wall time."""
        self._report(f"{count} concurrent requests")
        started = time.perf_counter()
        times = self._time_requests(self._config.contexts[0], self._config.tokens, count)
        return sum(map(len, times)) / (max(t[-1] for t in times) - started)

    def _measure_steps(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The time of a token by phase, and a row for each rank, from measured steps."""
        self._report("measuring steps")
        group = self._model.group
        group.measure_steps(2)
        # Several short answers: a random model repeats itself, and one token has one routing.
        for _ in range(MEASURED_ANSWERS):
            self._time_request(self._config.contexts[0], max(8, self._config.tokens // 2))
        timings = group.step_timings
        group.measure_steps(0)
        ranks: list[dict[str, Any]] = [{"rank": rank} for rank in range(self._config.load.nodes)]
        for row, timings_ms in zip(ranks, timings.per_rank_ms(), strict=False):
            row["step_timings_ms"] = timings_ms
        return {**timings.per_token_ms(), "steps": timings.steps}, ranks

    def _time_request(self, prompt_tokens: int, tokens: int) -> list[float]:
        """A request of random tokens: when it was submitted, and when each token came."""
        started = time.perf_counter()
        return [started, *self._time_requests(prompt_tokens, tokens, 1)[0]]

    def _time_requests(self, prompt_tokens: int, tokens: int, count: int) -> list[list[float]]:
        """See `time_requests`."""
        return time_requests(self._model, self._rng, prompt_tokens, tokens, count)


def time_requests(
    model: api.Model, rng: random.Random, prompt_tokens: int, tokens: int, count: int
) -> list[list[float]]:
    """Random requests at once: when the tokens of each came, by `time.perf_counter`.

    Args:
        prompt_tokens, tokens: of each request.
        count: how many requests.

    Raises:
        CenacleError: a request failed, or took more than `ANSWER_TIMEOUT_S`.
    """
    vocab_size = model.spec.vocab_size
    requests = [
        model.request([rng.randrange(vocab_size) for _ in range(prompt_tokens)], tokens)
        for _ in range(count)
    ]
    times: dict[str, list[float]] = {r.id: [] for r in requests}
    running, errors = len(requests), list[CenacleError]()
    done = threading.Event()

    def on_event(event: GroupEvent) -> None:
        nonlocal running
        if isinstance(event, CenacleError):
            errors.append(event)
            done.set()
            return
        assert not isinstance(event, PromptLogprobs), "they are not wanted"
        times[event.request_id].append(time.perf_counter())
        running -= event.finish is not None
        if not running:
            done.set()

    for request in requests:
        # To the end, even where the model would stop: every answer has as many tokens.
        model.group.submit(replace(request, stop_tokens=()), on_event)
    if not done.wait(ANSWER_TIMEOUT_S):
        raise ClusterError(f"bench: expected an answer within {ANSWER_TIMEOUT_S:g} s, got none")
    if errors:
        raise errors[0]
    return list(times.values())


def _relate_to_limits(
    tok_per_s: float, max_bytes: list[int], timings_ms: dict[str, float], limits: dict[str, Any]
) -> dict[str, Any]:
    """The decoding speed beside what the memory of the ranks allows."""
    rates = limits["ranks_read_gb_s"]
    read_s = max(size / (gb_s * 1e9) for size, gb_s in zip(max_bytes, rates, strict=True))
    token = {
        "bytes": max(max_bytes),
        "read_ms": 1000 * read_s,
        "token_ms": 1000 / tok_per_s,
        "percent": 100 * read_s * tok_per_s,
        "kernels_ms": None,
        "outside_percent": None,
    }
    kernels = [k for k in limits["kernels_ms"] or () if k is not None]
    if kernels:
        # What is neither a matrix nor an all-reduce: on one node all the rest of a token.
        kernels_ms = max(k["linear"] + k["experts"] for k in kernels)
        busy_ms = kernels_ms + timings_ms["all_reduce"] + timings_ms["waiting"]
        outside_percent = 100 - busy_ms * tok_per_s / 10
        token |= {"kernels_ms": kernels_ms, "outside_percent": outside_percent}
    return token


def _best_concurrency(requests: int, variants: Sequence[list[PeerSpeed]]) -> dict[str, Any] | None:
    """Of the variants that were measured with so many requests."""
    measured = [
        [speed.concurrency[requests] for speed in speeds]
        for speeds in variants
        if all(requests in speed.concurrency for speed in speeds)
    ]
    best = max(measured, key=statistics.median, default=None)
    return None if best is None else _row(best, requests=requests)


def _row(speeds: Sequence[float], **condition: int) -> dict[str, Any]:
    return {**condition, "tok_per_s": statistics.median(speeds), "all": list(speeds)}


def prepare_model(
    model: str | None, name: str | None, quantize: int, cache_dir: Path, report: Report
) -> str:
    """The checkpoint to measure: a given one, or a random one of a known shape, written once.

    Args:
        model: a folder, the name of a Hub repository, or `demo`.
        name: of a random model in the catalog, or a family (its small config).
        quantize: bits; 0: not quantized.

    Raises:
        InputError: neither or both are given, or an unknown name.
    """
    if (model is None) == (name is None):
        raise InputError("bench: expected either --model or --synth", "model")
    if model is not None:
        return resolve_model(model)
    assert name is not None
    folder = cache_dir / "synth" / f"{name}-{quantize or 'full'}"
    if not (folder / "config.json").exists():
        small = name in config_catalog.family_names()
        if not small:
            config_catalog.full_config(name, field="synth")  # raises for an unknown name
        report(f"writing a random {name} to {folder}")
        synth.synth(
            folder,
            family=name if small else None,
            name=None if small else name,
            quantize=quantize or None,
            group_size=32 if small else 64,
            overwrite=True,
        )
    return str(folder)
