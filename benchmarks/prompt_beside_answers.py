"""What running answers lose while a long prompt comes in.

    python benchmarks/prompt_beside_answers.py MODEL [--nodes N] [--answers 1 4] [--tokens 4000]
    python benchmarks/prompt_beside_answers.py MODEL --cpu-time

Some answers run; after a while a long prompt comes in beside them. Gaps between the tokens of one
answer are taken before (idle) and while the prompt is read, in the same run. The prompt is read
alone too, in a fresh cache: what it loses beside answers is the price of the bound. CENACLE_THREADS
sets the kernels' threads. With `--cpu-time` scheduler and engine run in this process, one rank, and
every time is this process's processor time: for a machine that is busy. The last line is JSON: for
each number of answers the gaps (p50, p95 and longest, milliseconds), `p95_ratio` (beside the prompt
over idle), and tokens a second of the prompt alone and beside the answers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import cenacle
from cenacle import native
from cenacle.api import Model
from cenacle.collective.single import SingleRank
from cenacle.core.plan import Plan
from cenacle.core.request import Request, Sampling
from cenacle.engine.engine import Engine
from cenacle.engine.options import EngineOptions
from cenacle.errors import CenacleError
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.expert_parallel import parallelize
from cenacle.model.families import family_of
from cenacle.model.kv_dtype import install_kv_dtype
from cenacle.model.loader import open_rank_model
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.step_timer import StepTimer
from cenacle.model.stream_support import install_stream_caches
from cenacle.scheduler.scheduler import Scheduler

TOKEN_TIMEOUT_S = 900.0
MAX_ANSWER_TOKENS = 20_000
ANSWER_PROMPT_TOKENS = 32
VOCABULARY = 30_000
OPTIONS: dict[str, Any] = {"prefix_cache_gb": 0, "speculative": "off"}


class Server:
    """What answers requests: submit, wait for tokens, cancel; and a clock."""

    def __init__(self) -> None:
        self.times_s: dict[str, list[float]] = {}

    def submit(self, request: Request) -> None:
        """Begin a request."""
        raise NotImplementedError

    def cancel(self, name: str) -> None:
        """End a request."""
        raise NotImplementedError

    def clock(self) -> float:
        """Seconds."""
        raise NotImplementedError

    def wait(self, name: str, count: int) -> None:
        """Until a request has so many tokens."""
        raise NotImplementedError


class Group(Server):
    """A front and rank processes; wall time."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._model = model
        self._errors: queue.Queue[CenacleError] = queue.Queue()

    def submit(self, request: Request) -> None:
        """See `Server`."""
        times_s = self.times_s[request.id] = []

        def put(event: Any) -> None:
            if isinstance(event, CenacleError):
                self._errors.put(event)
            times_s.append(time.perf_counter())

        self._model.group.submit(request, put)

    def cancel(self, name: str) -> None:
        """See `Server`."""
        self._model.group.cancel(name)

    def clock(self) -> float:
        """See `Server`."""
        return time.perf_counter()

    def wait(self, name: str, count: int) -> None:
        """See `Server`."""
        deadline = time.monotonic() + TOKEN_TIMEOUT_S
        while len(self.times_s[name]) < count:
            if not self._errors.empty():
                raise self._errors.get()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name}: no {count} tokens in {TOKEN_TIMEOUT_S:g} s")
            time.sleep(0.01)


class OneProcess(Server):
    """Scheduler and engine of one rank in this process; processor time."""

    def __init__(self, engine: Engine, scheduler: Scheduler) -> None:
        super().__init__()
        self._engine, self._scheduler = engine, scheduler

    def submit(self, request: Request) -> None:
        """See `Server`."""
        self.times_s[request.id] = []
        self._scheduler.submit(request)

    def cancel(self, name: str) -> None:
        """See `Server`."""
        self._scheduler.cancel(name)

    def clock(self) -> float:
        """See `Server`."""
        return time.process_time()

    def wait(self, name: str, count: int) -> None:
        """See `Server`."""
        while len(self.times_s[name]) < count:
            step = self._scheduler.next_step()
            if step is None:
                raise RuntimeError(f"{name}: nothing runs, and it has no {count} tokens")
            began_s = self.clock()
            events, _ = self._engine.step(step)
            now_s = self.clock()
            self._scheduler.on_step_time(step, now_s - began_s)
            for event in self._scheduler.on_tokens(events):
                self.times_s[event.request_id].append(now_s)


@contextmanager
def open_server(folder: str, nodes: int, *, cpu_time: bool) -> Iterator[Server]:
    """Load the model."""
    if not cpu_time:
        with cenacle.load(folder, nodes, **OPTIONS) as model:
            yield Group(model)
        return
    model, plan, timer = load_model(folder)
    batching = family_of(plan.spec.family).batching
    engine = Engine(model, SingleRank(), timer, EngineOptions(**OPTIONS), batching=batching)
    yield OneProcess(engine, Scheduler(measure_every=0, footprint=engine.footprint()))
    engine.close()


def load_model(folder: str) -> tuple[nn.Module, Plan, StepTimer]:
    """As a rank does, in this process."""
    mx.disable_compile()
    native.set_threads()
    checkpoint, collective, timer = Checkpoint.open(Path(folder)), SingleRank(), StepTimer()
    plan = Plan.whole(read_model_spec(checkpoint), 1)
    options = EngineOptions(**OPTIONS)
    with open_rank_model(checkpoint, plan, 0, lambda _, __: None) as (model, reader):
        parallelize(model, plan.spec.family, plan, collective, timer, "auto", reader.read)
        install_stream_caches(model)
        install_kv_dtype(model, options.kept_dtype(plan.spec.dtype))
    return model, plan, timer


def make_request(name: str, tokens: int, max_tokens: int) -> Request:
    """Random tokens; nothing ends the answer."""
    rng = random.Random(name)
    prompt = tuple(rng.randrange(1, VOCABULARY) for _ in range(tokens))
    return Request(name, prompt, max_tokens, sampling=Sampling(temperature=0.0, seed=1))


def gaps_s(times_s: list[float], begin_s: float, end_s: float) -> list[float]:
    """Between tokens that came within a time."""
    times = [t for t in times_s if begin_s <= t <= end_s]
    return [b - a for a, b in itertools.pairwise(times)]


def describe_gaps(gaps: list[float]) -> dict[str, float]:
    """Quantiles in milliseconds."""
    gaps_ms = sorted(1000 * gap for gap in gaps)
    p95 = gaps_ms[min(len(gaps_ms) - 1, int(0.95 * len(gaps_ms)))]
    numbers = {"p50_ms": statistics.median(gaps_ms), "p95_ms": p95, "longest_ms": gaps_ms[-1]}
    return {name: round(value, 1) for name, value in numbers.items()}


def read_beside(server: Server, answers: int, tokens: int, idle_tokens: int) -> dict[str, Any]:
    """Measure one number of answers."""
    names = [f"answer {n} of {answers}" for n in range(answers)]
    for name in names:
        server.submit(make_request(name, ANSWER_PROMPT_TOKENS, MAX_ANSWER_TOKENS))
    for name in names:
        server.wait(name, 8)  # the first tokens, in which others still begin
    idle_s = server.clock()
    server.wait(names[-1], len(server.times_s[names[-1]]) + idle_tokens)
    began_s = server.clock()
    prompt = f"prompt beside {answers}"
    server.submit(make_request(prompt, tokens, 1))
    server.wait(prompt, 1)
    ended_s = server.clock()
    for name in names:
        server.cancel(name)
    times = [server.times_s[name] for name in names]
    idle = describe_gaps([gap for t in times for gap in gaps_s(t, idle_s, began_s)])
    gaps = [gap for t in times for gap in gaps_s(t, began_s, ended_s)]
    beside = describe_gaps(gaps)
    return {
        "answers": answers,
        "idle": idle,
        "beside": beside,
        "p95_ratio": round(beside["p95_ms"] / idle["p95_ms"], 2),
        "p50_ratio": round(beside["p50_ms"] / idle["p50_ms"], 2),
        "prompt_tok_s": round(tokens / (ended_s - began_s), 1),
        "answer_tok_s": round(len(gaps) / (ended_s - began_s), 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a checkpoint's folder")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--answers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--idle-tokens", type=int, default=64)
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()

    with open_server(args.model, args.nodes, cpu_time=args.cpu_time) as server:
        server.submit(make_request("first", 250, 2))  # allocates
        server.wait("first", 2)
        rows = []
        for answers in args.answers:
            rows.append(read_beside(server, answers, args.tokens, args.idle_tokens))
            print(json.dumps(rows[-1]), flush=True)
        began_s = server.clock()
        server.submit(make_request("alone", args.tokens, 1))
        server.wait("alone", 1)
        alone = args.tokens / (server.clock() - began_s)
    result = {
        "model": Path(args.model).name,
        "nodes": args.nodes,
        "tokens": args.tokens,
        "clock": "processor time" if args.cpu_time else "wall time",
        "prompt_alone_tok_s": round(alone, 1),
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
