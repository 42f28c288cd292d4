"""`cenacle bench`: how fast a model runs, where its time goes, what the machine could give.

Owns: what is measured, in which order, and the JSON object that comes of it.
Does not know: how it is printed (`cli.py`), peers' formats.
Invariant: with peers, ours and theirs take turns, round by round, and medians are compared; total
throughput is all tokens over wall time; a token's terms add up to its total.
Next: `ceilings.py`, `peers.py`.
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

from .. import api, runtime
from ..core.request import TokenEvent
from ..errors import CenacleError, ClusterError, InputError
from ..model import config_catalogue, native_layers, synth
from ..model.checkpoint import Checkpoint, locate_checkpoint
from ..model.spec_reader import read_model_spec
from ..paths import cache_dir
from . import hardware_limits
from .expected_work import expected_bytes, split_cores, usable_cores
from .peers.peers import Peer, PeerFailed, PeerSpeed, PeerVariant, PeerWorkload

ANSWER_S = 900.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class BenchConfig:
    """What to measure.

    Args:
        model: a folder or a hub repository's name.
        threads: per node; None: the cores, shared evenly.
        contexts: tokens before the first decoded one; the first is measured `repeat` times in turn
            with the peers and is that of the concurrent streams.
        streams: numbers of requests at once.
        tokens: decoded per measurement.
        repeat: rounds.
        prompt: tokens of the prompt that is timed in each round.
        placed: `LoadOptions` that say how to place the model.
        options: other `LoadOptions` (kernels, backend, latency_s, ...).
        cache: folder for what is kept between runs.
        deadline_s: longest that one process of a peer may take.
    """

    model: str
    nodes: int = 1
    threads: int | None = None
    contexts: tuple[int, ...] = (32, 2048, 8192)
    streams: tuple[int, ...] = (1, 2, 4, 8)
    tokens: int = 64
    repeat: int = 3
    prompt: int = 512
    placed: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    cache: Path = field(default_factory=cache_dir)
    deadline_s: float = 300.0


def run_bench(
    asked: BenchConfig, peers: Sequence[Peer] = (), say: Say = lambda _: None
) -> dict[str, Any]:
    """Measure; `say` is told what is being done.

    Returns:
        A JSON object: "conditions", "decode", "prefill", "streams", "terms_ms", "ranks",
        "ceilings", "peers"; see docs/performance.md.

    Raises:
        InputError: an impossible combination of arguments.
        CheckpointError, PlanError, ClusterError: as `api.load`.
    """
    if asked.tokens < 2 or asked.repeat < 1 or not asked.contexts or min(asked.contexts) < 1:
        raise InputError(
            "bench: expected at least 2 tokens, 1 repetition and contexts of at least 1 token"
        )
    checkpoint = Checkpoint.open(locate_checkpoint(asked.model))
    spec = read_model_spec(checkpoint)
    longest = max(*asked.contexts, asked.prompt) + asked.repeat * asked.tokens + 1
    if spec.context_length is not None and longest > spec.context_length:
        raise InputError(
            f"--contexts and --prompt-tokens: with {asked.repeat} times {asked.tokens} tokens "
            f"after them this model has room for "
            f"{spec.context_length - asked.repeat * asked.tokens - 1}, "
            f"got {max(*asked.contexts, asked.prompt)}",
            "contexts",
        )
    cores, threads = split_cores(asked.nodes, asked.threads)
    job = PeerWorkload(
        checkpoint.folder,
        checkpoint.config,
        asked.nodes,
        threads,
        cores or [usable_cores()] * asked.nodes,
        asked.contexts[0],
        asked.tokens,
        asked.prompt,
        asked.cache / "peers",
        asked.deadline_s,
    )
    setups = [setup for peer in peers for setup in peer.setups(job)]
    load, stolen = os.getloadavg()[0], _cpu_steal()
    backend = asked.options.get("backend", "auto")
    latency_s = asked.options.get("latency_s", 0.0)
    plan, reason = runtime.select_plan(
        runtime.LoadOptions(asked.model, asked.nodes, latency_s=latency_s, **asked.placed)
    )
    say(reason or f"placement {plan.placement}, trunk {plan.trunk}")
    activations = asked.options.get("activations", "int16")
    say("measuring what memory, exchange and kernels give on their own")
    native = asked.options.get("kernels", "auto") != "mlx" and native_layers.is_supported()
    folder, dealt = (checkpoint.folder, plan) if native else (None, None)
    limits = hardware_limits.measure_limits(
        asked.nodes, backend, cores, threads, folder, dealt, activations
    )
    say(f"loading {asked.model} on {asked.nodes} nodes")
    batch = max(*asked.streams, 1)
    with api.load(
        asked.model,
        asked.nodes,
        plan=plan,
        cores=cores,
        threads=threads,
        measure_every=0,
        recover=False,
        max_batch_size=batch,
        **asked.options,
    ) as model:
        bench = _Bench(model, asked, say)
        theirs = bench.rounds(setups)
        for context in asked.contexts[1:]:
            bench.context(context)
        bench.concurrently()
        bench.terms()
        bench.use(limits)
        ranks = model.ranks_json()
        for rank, row in enumerate(bench.ranks):
            row |= {"cores": list(cores[rank]) if cores else None, **ranks[rank]}
        conditions = {
            "machine": platform.machine(),
            "cores": len(usable_cores()),
            "load_before": round(load, 2),
            "stolen_percent": stolen(),
            "nodes": asked.nodes,
            "threads": threads,
            "pinned": cores is not None,
            "backend": model.ranks.backend,
            "kernels": ranks[0]["device"],
            "placement": model.plan.placement,
            "trunk": model.plan.trunk,
            "options": asked.options,
            "versions": {n: importlib.metadata.version(n) for n in ("cenacle", "mlx", "mlx-lm")},
        }
    return {
        "benchmark": "bench",
        "model": asked.model,
        "family": spec.family,
        "quantization": spec.quantization,
        "dtype": spec.dtype,
        "conditions": conditions,
        "decode": bench.decode,
        "prefill": bench.prefill,
        "streams": bench.streams,
        "terms_ms": bench.terms_ms,
        "ranks": bench.ranks,
        "ceilings": {**limits, "token": bench.token},
        "peers": bench.compare(setups, theirs),
    }


def _cpu_steal() -> Callable[[], float | None]:
    """Percent of the cores' time that other guests of this machine's host took since the call."""
    stat = Path("/proc/stat")

    def read() -> list[int]:
        return [int(n) for n in stat.read_text().split("\n", 1)[0].split()[1:9]]

    if not stat.exists():
        return lambda: None
    before = read()

    def since() -> float:
        spent = [b - a for a, b in zip(before, read(), strict=True)]
        return round(100 * spent[7] / max(1, sum(spent)), 1)

    return since


class _Bench:
    """A loaded model, and what has been found of it so far."""

    def __init__(self, model: api.Model, asked: BenchConfig, say: Say) -> None:
        self._model, self._asked, self._say = model, asked, say
        self._draw = random.Random(0)
        self.decode: list[dict[str, Any]] = []
        self.prefill: list[dict[str, Any]] = []
        self.streams: list[dict[str, Any]] = []
        self.ranks: list[dict[str, Any]] = []
        self.terms_ms: dict[str, float] = {}
        self.token: dict[str, Any] = {}

    def rounds(self, setups: Sequence[PeerVariant]) -> list[list[PeerSpeed] | str]:
        """The first context and the prompt, in turn with the peers.

        Returns:
            For each setup its speeds, or why it has none: it is not tried again.
        """
        asked, context = self._asked, self._asked.contexts[0]
        self._say("warming up")
        self._ask(context, 2)
        decode: list[float] = []
        prefill: list[float] = []
        theirs: list[list[PeerSpeed] | str] = [[] for _ in setups]
        for i in range(asked.repeat):
            self._say(f"round {i + 1} of {asked.repeat}: ours")
            times = self._ask(context, asked.tokens + 1)
            decode.append(asked.tokens / (times[-1] - times[1]))
            times = self._ask(asked.prompt, 1)
            prefill.append(asked.prompt / (times[1] - times[0]))
            for peer, setup in enumerate(setups):
                seen = theirs[peer]
                if isinstance(seen, str):
                    continue
                self._say(f"round {i + 1} of {asked.repeat}: {setup.name}")
                try:
                    seen.append(setup.run())
                except PeerFailed as error:
                    theirs[peer] = str(error)
        self.decode.append(_row(decode, context=context))
        self.prefill.append(_row(prefill, tokens=asked.prompt))
        return theirs

    def compare(
        self, setups: Sequence[PeerVariant], theirs: Sequence[list[PeerSpeed] | str]
    ) -> list[dict[str, Any]]:
        """A row for each peer: medians and ours over theirs, or how it failed."""
        rows: list[dict[str, Any]] = []
        for setup, seen in zip(setups, theirs, strict=True):
            if isinstance(seen, str):
                rows.append({"name": setup.name, "failed": seen})
                continue
            row: dict[str, Any] = {"name": setup.name}
            for what, ours in (("decode", self.decode[0]), ("prefill", self.prefill[0])):
                all_ = [getattr(s, what) for s in seen]
                median = statistics.median(all_)
                row[f"{what}_tok_s"], row[f"{what}_all"] = median, all_
                row[f"{what}_ratio"] = ours["tok_s"] / median if median else None
            rows.append(row)
        return rows

    def context(self, context: int) -> None:
        """Decoding after a long prompt; the prompt once, the decoding in `repeat` blocks."""
        asked = self._asked
        self._say(f"context {context}")
        times = self._ask(context, asked.repeat * asked.tokens + 1)
        ends = times[1 :: asked.tokens]
        blocks = [asked.tokens / (b - a) for a, b in pairwise(ends)]
        self.decode.append(_row(blocks, context=context))
        self.prefill.append(_row([context / (times[1] - times[0])], tokens=context))

    def concurrently(self) -> None:
        """Several requests at once: all tokens over wall time."""
        asked = self._asked
        for streams in asked.streams:
            self._say(f"{streams} streams")
            speeds = []
            for _ in range(asked.repeat):
                began = time.perf_counter()
                times = self._many(asked.contexts[0], asked.tokens, streams)
                wall = max(t[-1] for t in times) - began
                speeds.append(sum(len(t) for t in times) / wall)
            self.streams.append(_row(speeds, streams=streams))
        one = next((s["tok_s"] for s in self.streams if s["streams"] == 1), None)
        for row in self.streams:
            row["ratio"] = row["tok_s"] / one if one else None

    def terms(self) -> None:
        """Where a token's time goes, by term and by rank, from measured steps."""
        self._say("where the time goes")
        self._model.group.measure_steps(2)
        # Several short answers: a random model repeats itself, and one token has one routing.
        for _ in range(4):
            self._ask(self._asked.contexts[0], max(8, self._asked.tokens // 2))
        found = self._model.group.step_timings
        self._model.group.measure_steps(0)
        self.terms_ms = {**found.per_token_ms(), "steps": found.steps}
        self.ranks = [{"rank": r, "terms_ms": ms} for r, ms in enumerate(found.per_rank_ms())]
        self.ranks = self.ranks or [{"rank": r} for r in range(self._asked.nodes)]

    def use(self, limits: dict[str, Any]) -> None:
        """Put the decoding speed beside what the ranks' memory allows."""
        plan = self._model.plan
        expected, busiest = expected_bytes(plan)
        speeds = limits["ranks_read_gb_s"]
        for rank, row in enumerate(self.ranks):
            row |= {"token_bytes": expected[rank], "read_gb_s": speeds[rank]}
        tok_s = self.decode[0]["tok_s"]
        slowest = max(b / (s * 1e9) for b, s in zip(busiest, speeds, strict=True))
        self.token = {
            "bytes": max(busiest),
            "read_ms": slowest * 1000,
            "token_ms": 1000 / tok_s,
            "percent": 100 * slowest * tok_s,
            "kernels_ms": None,
            "outside_percent": None,
        }
        alone = [k for k in limits["kernels_ms"] or () if k is not None]
        if alone:
            # What is neither a matrix nor an exchange: on one node all the rest of a token.
            kernels = max(k["linear"] + k["experts"] for k in alone)
            busy = kernels + self.terms_ms["all_reduce"] + self.terms_ms["waiting"]
            self.token |= {"kernels_ms": kernels, "outside_percent": 100 - busy * tok_s / 10}

    def _ask(self, length: int, tokens: int) -> list[float]:
        """One request of random tokens; the moment it was made, then that of each token."""
        began = time.perf_counter()
        return [began, *self._many(length, tokens, 1)[0]]

    def _many(self, length: int, tokens: int, streams: int) -> list[list[float]]:
        """Random requests at once; the moments of each one's tokens."""
        vocabulary = self._model.spec.vocab_size
        requests = [
            self._model.request([self._draw.randrange(vocabulary) for _ in range(length)], tokens)
            for _ in range(streams)
        ]
        times: dict[str, list[float]] = {r.id: [] for r in requests}
        left, failed = len(requests), list[CenacleError]()
        done = threading.Event()

        def sink(event: TokenEvent | CenacleError) -> None:
            nonlocal left
            if isinstance(event, CenacleError):
                failed.append(event)
                done.set()
                return
            times[event.request_id].append(time.perf_counter())
            left -= event.finish is not None
            if not left:
                done.set()

        for request in requests:
            # To the end, even where the model would stop: every answer has as many tokens.
            self._model.group.submit(replace(request, stop_tokens=()), sink)
        if not done.wait(ANSWER_S):
            raise ClusterError(f"no answer came within {ANSWER_S:g} s")
        if failed:
            raise failed[0]
        return list(times.values())


def _row(speeds: Sequence[float], **what: int) -> dict[str, Any]:
    return {**what, "tok_s": statistics.median(speeds), "all": list(speeds)}


def prepare_model(model: str | None, name: str | None, quantize: int, cache: Path, say: Say) -> str:
    """The checkpoint to measure: a given one, or a random one of a known shape, written once.

    Args:
        name: of the catalogue, or a family (its small config).
        quantize: bits; 0: not quantised.

    Raises:
        InputError: neither or both are given, or no shape has that name.
    """
    if (model is None) == (name is None):
        raise InputError("bench: expected either --model or --synth", "model")
    if model is not None:
        return model
    assert name is not None
    folder = cache / "synth" / f"{name}-{quantize or 'full'}"
    if not (folder / "config.json").exists():
        tiny = name in config_catalogue.family_names()
        if not tiny:
            config_catalogue.full_config(name)  # an unknown name ends here
        say(f"writing a random {name} to {folder}")
        synth.synth(
            folder,
            family=name if tiny else None,
            name=None if tiny else name,
            quantize=quantize or None,
            group_size=32 if tiny else 64,
            overwrite=True,
        )
    return str(folder)
