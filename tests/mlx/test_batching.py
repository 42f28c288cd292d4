"""Requests do not change the answers of others beside them: every family, through the engine."""

import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from one_process import in_threads, load_rank, spec_of, tiny_model

from cenacle import native
from cenacle.collective.base import Collective
from cenacle.collective.single import SingleRank
from cenacle.core.plan import Plan
from cenacle.core.request import Request, Sampling
from cenacle.engine.cache.kv_cache import flatten_caches
from cenacle.engine.engine import Engine
from cenacle.engine.options import EngineOptions
from cenacle.model.families import Batching, family_of, list_families
from cenacle.model.kv_dtype import install_kv_dtype
from cenacle.model.step_timer import StepTimer
from cenacle.model.stream_support import can_have_stream_caches, set_stream_caches
from cenacle.scheduler.prefix_index import CacheFootprint
from cenacle.scheduler.scheduler import Scheduler
from support.products import in_turn

RUNNABLE = [row.name for row in list_families() if row.refused is None]
LENGTHS = (1, 3, 17, 40, 128)
VOCABULARY = 250
TOLERANCE = 5e-3  # of log-probabilities

Answers = dict[str, list[tuple[int, float]]]
# By family, from the first test that needs them: one node's, for two nodes too.
answers_alone: dict[str, Answers] = {}
has_streams: dict[str, bool] = {}
# By family, as one node measures them: where caches tell only their size, it takes long.
footprints: dict[str, CacheFootprint] = {}


def make_prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).randrange(1, VOCABULARY) for _ in range(length))


def make_request(
    name: str, tokens: tuple[int, ...], max_tokens: int, temperature: float = 0.0, seed: int = 1
) -> Request:
    sampling = Sampling(temperature=temperature, seed=seed)
    return Request(name, tokens, max_tokens, sampling=sampling, logprobs=0)


# One answer runs from the beginning; the others join it. The last two are as `n=2` makes them.
RUNNING = make_request("running", make_prompt(9, 0), 20)
JOINING = [make_request(f"{n} tokens", make_prompt(n, n), 3) for n in LENGTHS]
SAMPLED = [make_request(f"choice {k}", make_prompt(23, 5), 3, 1.0, k + 1) for k in range(2)]
REQUESTS = [RUNNING, *JOINING, *SAMPLED]
# Where requests, or their attention, take turns, fewer show it.
FEWER = [make_request("running", make_prompt(9, 0), 8), *JOINING[1:4], SAMPLED[0]]
# Those whose caches other requests can use, and one of those whose caches cannot.
WITH_PREFIXES = [
    name
    for name in RUNNABLE
    if family_of(name).batching is not Batching.ONE_BY_ONE or name == "minimax_m3_vl"
]


def find_streams(folder: Path, family: str) -> bool:
    """Whether streams of this family have caches of their own.

    By one node: the probe changes attention of this process, where ranks of tests are threads.
    """
    if family not in has_streams:
        plan = Plan.whole(spec_of(folder), 1)
        model = load_rank(folder, plan, SingleRank(), StepTimer(), "auto")
        has_streams[family] = can_have_stream_caches(model)
    return has_streams[family]


class RunningModel:
    """One rank's part of a family's tiny model, and answers of its engine."""

    def __init__(self, folder: Path, collective: Collective, kv_dtype: str = "float32") -> None:
        plan = Plan.whole(spec_of(folder), collective.size)
        self.batching = family_of(plan.spec.family).batching
        self.collective, self.timer = collective, StepTimer()
        self.footprint = footprints.get(plan.spec.family) if kv_dtype == "float32" else None
        self.model = load_rank(folder, plan, collective, self.timer, "auto")
        self.rounded, self.streams = 0, False
        if native.is_available():
            self.rounded = install_kv_dtype(self.model, kv_dtype)
            self.streams = find_streams(folder, plan.spec.family)
            set_stream_caches(self.model, on=self.streams)

    def answers(
        self,
        bursts: Iterable[list[Request]],
        cancelled: Mapping[int, str] = MappingProxyType({}),
        prefill_chunk_size: int = 512,
        prefix_cache_gb: float = 0.0,
    ) -> dict[str, list[tuple[int, float]]]:
        """Submit a burst every two steps; cancel before some steps; run to the end."""
        options = EngineOptions(
            prefill_chunk_size=prefill_chunk_size,
            prefix_cache_gb=prefix_cache_gb,
            speculative="off",
        )
        engine = Engine(self.model, self.collective, self.timer, options, batching=self.batching)
        self.footprint = self.footprint or engine.footprint()
        assert self.footprint.total_bytes([100]) > 0
        scheduler = Scheduler(
            prefill_chunk_size=prefill_chunk_size,
            footprint=self.footprint,
            prefix_cache_bytes=int(prefix_cache_gb * 1e9),
        )
        waiting = list(bursts)
        tokens: dict[str, list[tuple[int, float]]] = {}
        for number in range(1000):
            if number % 2 == 0 and waiting:
                for request in waiting.pop(0):
                    scheduler.submit(request)
            if number in cancelled:
                scheduler.cancel(cancelled[number])
            if (step := scheduler.next_step()) is not None:
                for event in scheduler.on_tokens(engine.step(step)[0]):
                    tokens.setdefault(event.request_id, []).append((event.token, event.logprob))
            elif not waiting:
                break
        engine.close()
        return tokens

    def kept_keys(self) -> list[mx.array]:
        """The keys that attention keeps of a token."""
        caches = make_prompt_cache(self.model)
        self.model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
        return [c.keys for c in flatten_caches(caches) if hasattr(c, "keys")]


def find_differences(alone: Answers, together: Answers, requests: list[Request]) -> dict[str, str]:
    differences = {}
    for request in requests:
        name = request.id
        if [t for t, _ in alone[name]] != [t for t, _ in together[name]]:
            differences[name] = "tokens"
            continue
        error = max(abs(a - b) for (_, a), (_, b) in zip(alone[name], together[name], strict=True))
        if error > TOLERANCE:
            differences[name] = f"log-probabilities, by {error:.1e}"
    return differences


def on_every_rank(
    family: str, nodes: int, function: Callable[[RunningModel], Any], kv_dtype: str = "float32"
) -> Any:
    """What `function` gives on rank 0."""
    folder = tiny_model(family)
    if native.is_available():
        find_streams(folder, family)

    def run(collective: Collective) -> Any:
        return function(RunningModel(folder, collective, kv_dtype))

    if nodes == 1:
        model = RunningModel(folder, SingleRank(), kv_dtype)
        result = function(model)
        if kv_dtype == "float32":
            footprints[family] = model.footprint
        return result
    return in_threads(nodes, run)[0]


NODES = (1, 2)


def run_together(model: RunningModel, requests: list[Request]) -> Answers:
    """Many join at once."""
    running, *others = requests
    return model.answers([[running], others[:-2], others[-2:]])


def cancelled_of(requests: list[Request]) -> dict[int, str]:
    """By step: one in the middle of its answer, and one in the middle of its prompt."""
    names = [request.id for request in requests]
    return {2 * names.index(name) + 1: name for name in ("3 tokens", "40 tokens")}


def run_in_chunks(model: RunningModel, requests: list[Request]) -> Answers:
    """One joins after the other, in chunks, and some end early."""
    bursts = [[request] for request in requests]
    return model.answers(bursts, cancelled_of(requests), prefill_chunk_size=16)


ARRIVALS = (run_together, run_in_chunks)


def arrivals_of(family: str, nodes: int) -> list[Callable[[RunningModel, list[Request]], Answers]]:
    return in_turn(ARRIVALS, RUNNABLE.index(family) + nodes)


def test_every_family_has_all_arrivals_and_so_has_every_number_of_nodes():
    for family in RUNNABLE:
        assert {run for nodes in NODES for run in arrivals_of(family, nodes)} == set(ARRIVALS)
    for nodes in NODES:
        assert {run for family in RUNNABLE for run in arrivals_of(family, nodes)} == set(ARRIVALS)


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("family", RUNNABLE)
def test_requests_beside_each_other_give_what_each_gives_alone(family, nodes):
    row = family_of(family)
    alone_often = row.batching is Batching.ONE_BY_ONE or row.request_attention
    requests = FEWER if alone_often else REQUESTS
    known = answers_alone.get(family, {})

    def run(model: RunningModel) -> tuple[Answers, list[Answers]]:
        alone = dict(known)
        for request in () if known else requests:
            alone |= model.answers([[request]])
        return alone, [arrive(model, requests) for arrive in arrivals_of(family, nodes)]

    alone, others = on_every_rank(family, nodes, run)
    answers_alone[family] = alone
    assert all(len(alone[r.id]) == r.max_tokens for r in requests)
    for arrive, answers in zip(arrivals_of(family, nodes), others, strict=True):
        cancelled = cancelled_of(requests).values() if arrive is run_in_chunks else ()
        complete = [request for request in requests if request.id not in cancelled]
        assert find_differences(alone, answers, complete) == {}


@pytest.mark.parametrize("family", WITH_PREFIXES)
def test_kept_prefixes_give_the_same_answers(family):
    shared = make_prompt(60, 60)
    first = make_request("first", shared, 3)
    requests = [make_request(f"tail {n}", shared + make_prompt(n, n), 4) for n in (1, 5, 40)]

    def run(running: RunningModel) -> tuple[Answers, Answers]:
        alone: Answers = {}
        for request in requests:
            alone |= running.answers([[request]])
        bursts = [[first, RUNNING], [], [], requests]
        return alone, running.answers(bursts, prefill_chunk_size=16, prefix_cache_gb=1.0)

    alone, together = on_every_rank(family, 1, run)
    assert find_differences(alone, together, requests) == {}


@pytest.mark.skipif(not native.is_available(), reason=native.unavailable_reason())
@pytest.mark.parametrize(
    ("family", "modules", "kv_dtype"),
    [
        ("gpt_oss", 4, "bfloat16"),  # windows and sinks
        ("qwen3_next", 2, "float16"),  # beside states
        ("qwen3_moe", 3, "bfloat16"),  # as one node of the graph
    ],
)
def test_caches_of_16_bits_are_batched_and_kept(family, modules, kv_dtype):
    """Beside each other, joining and leaving, and with a prefix of another: as alone."""
    shared = make_prompt(60, 60)
    first = make_request("first", shared, 3)
    requests = [*JOINING[2:4], SAMPLED[0], make_request("tail", shared + make_prompt(5, 5), 4)]

    def run(running: RunningModel) -> tuple[Answers, Answers, int]:
        alone: Answers = {}
        for request in requests:
            alone |= running.answers([[request]])
        bursts = [[first, RUNNING], [], [], requests]
        together = running.answers(bursts, prefill_chunk_size=16, prefix_cache_gb=1.0)
        sizes = {cache.dtype.size for cache in running.kept_keys()}
        assert sizes == {2}
        return alone, together, running.rounded

    alone, together, rounded = on_every_rank(family, 1, run, kv_dtype)
    assert rounded == modules
    assert find_differences(alone, together, requests) == {}
