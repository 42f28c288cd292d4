"""Requests of every kind of cache go on when their ranks are lost or become others.

A real group over ranks that are threads: each loads its part, has an engine of its own, and takes
its steps from a channel. Real processes that fail: `tests/ranks/test_recovery.py`.
"""

import socket
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from one_process import (
    Rendezvous,
    Threads,
    load_rank,
    spec_of,
    start_with_stream,
    tiny_model,
)
from test_batching import (
    RUNNABLE,
    Answers,
    RunningModel,
    find_differences,
    make_prompt,
    make_request,
)

from cenacle.collective.single import SingleRank
from cenacle.core.plan import Plan
from cenacle.core.request import TokenEvent
from cenacle.engine.cache.kv_cache import flatten_caches
from cenacle.engine.engine import Engine
from cenacle.engine.options import EngineOptions
from cenacle.errors import CenacleError, ClusterError, RankLost
from cenacle.message import parse
from cenacle.model.config_catalog import tiny_config
from cenacle.model.families import family_of
from cenacle.model.request_caches import install_request_attention
from cenacle.model.step_timer import StepTimer
from cenacle.model.synth import build_lazy_model
from cenacle.ranks.channel import Channel
from cenacle.ranks.messages import Ready, StepOrder, StepResult
from cenacle.ranks.rank_group import RankGroup
from cenacle.ranks.ranks import Epoch
from cenacle.scheduler.prefix_index import CacheFootprint
from cenacle.scheduler.scheduler import Scheduler

DEADLINE_S = 300
SIZES = (2, 1, 2, 1)  # ranks of each epoch
LOST = {(0, 1): 6, (1, 0): 6}  # epoch, rank: the step at which it dies
REFORMED = {(2, 0): 4}  # likewise: when better nodes are there
PREFILL_CHUNK_SIZE = 40
SHARED = make_prompt(50, 50)
REQUESTS = [
    make_request("running", make_prompt(9, 0), 18),
    make_request("short", make_prompt(1, 1), 16),
    make_request("sampled", make_prompt(23, 5), 10, 1.0, 2),
    make_request("sampled alike", make_prompt(23, 5), 10, 1.0, 3),
    make_request("tail", (*SHARED, 7, 8), 6),
    make_request("same beginning", (*SHARED, 9), 6),
    make_request("long", make_prompt(100, 2), 4),
    make_request("already answered", make_prompt(5, 3), 2),
]


class ThreadRanks:
    """Ranks of one epoch: threads, each with a model, an engine and the far end of a channel.

    Args:
        footprint: of the caches, as one node measures it.
        on_step: called by every rank before a step, with the rank and the step's number; what it
            raises ends that rank.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int,
        epoch: int,
        footprint: CacheFootprint,
        on_step: Callable[[int, int], None],
    ) -> None:
        self._footprint = footprint
        self.plan = Plan.whole(spec_of(folder), nodes)
        self.backend, self.backend_reason, self.pids = "threads", None, [0] * nodes
        self._folder, self._epoch, self._on_step = folder, epoch, on_step
        self._meeting = Rendezvous(nodes)
        self._causes: dict[int, str] = {}
        self.ready: list[Ready | None] = [None] * nodes
        pairs = [socket.socketpair() for _ in range(nodes)]
        self.channels = [Channel(front, DEADLINE_S) for front, _ in pairs]
        self._far_ends = [Channel(back, DEADLINE_S) for _, back in pairs]
        self._loaded = threading.Barrier(nodes + 1)
        self._running = [start_with_stream(self._run, rank) for rank in range(nodes)]
        self._loaded.wait(DEADLINE_S)

    def _run(self, rank: int) -> None:
        try:
            self._serve(rank)
        except (ClusterError, threading.BrokenBarrierError):
            pass  # the group closed the channel, or another rank is lost
        except RankDies as error:
            self._causes[rank] = str(error)
        except Exception as error:
            self._causes[rank] = repr(error)
        finally:
            self._meeting.barrier.abort()
            self._loaded.abort()
            self._far_ends[rank].close()

    def _serve(self, rank: int) -> None:
        timer, channel = StepTimer(), self._far_ends[rank]
        collective = Threads(self._meeting, rank)
        model = load_rank(self._folder, self.plan, collective, timer, "auto")
        options = EngineOptions(
            prefill_chunk_size=PREFILL_CHUNK_SIZE, prefix_cache_gb=1.0, speculative="off"
        )
        batching = family_of(self.plan.spec.family).batching
        engine = Engine(model, collective, timer, options, batching=batching)
        self.ready[rank] = Ready(footprint=self._footprint)
        self._loaded.wait(DEADLINE_S)
        while True:
            order = parse(channel.receive(), StepOrder)
            assert order.epoch == self._epoch
            self._on_step(rank, order.step.number)
            tokens, _ = engine.step(order.step)
            channel.send(StepResult(self._epoch, order.step.number, tuple(tokens)).to_json())

    def blame(self, rank: int, reason: str) -> RankLost:
        for culprit, cause in self._causes.items():
            return RankLost(culprit, f"rank {culprit}: {cause}")
        return RankLost(rank, f"rank {rank} {reason}")

    def close(self, *, now: bool) -> None:
        for channel in self.channels:
            channel.close()
        self._meeting.barrier.abort()
        for rank in self._running:
            rank.result(DEADLINE_S)  # TimeoutError: a rank does not end


class RankDies(Exception):
    """As SIGKILL ends a process."""


class Disturbances:
    """Starts the ranks of each epoch, which die or are ended as `LOST` and `REFORMED` say."""

    def __init__(self, folder: Path, footprint: CacheFootprint) -> None:
        self._folder, self._footprint = folder, footprint
        self.group: RankGroup | None = None
        self.clients: dict[str, Client] = {}
        self.reasons: list[str] = []
        self.half_answered: list[int] = []  # requests, when each epoch begins

    def start(self, epoch: Epoch, report: object = None) -> ThreadRanks:
        self.reasons.append(epoch.reason)
        unfinished = [client for client in self.clients.values() if not client.done.is_set()]
        self.half_answered.append(sum(1 for client in unfinished if client.tokens))

        def disturb(rank: int, step_number: int) -> None:
            if LOST.get((epoch.number, rank)) == step_number:
                raise RankDies(f"lost in epoch {epoch.number}")
            if REFORMED.get((epoch.number, rank)) == step_number:
                assert self.group is not None
                self.group.reform("another node came")

        nodes = SIZES[epoch.number]
        return ThreadRanks(self._folder, nodes, epoch.number, self._footprint, disturb)


class Client:
    """What one request is given."""

    def __init__(self) -> None:
        self.tokens: list[tuple[int, float | None]] = []
        self.error: CenacleError | None = None
        self.done = threading.Event()

    def receive(self, event: Any) -> None:
        if isinstance(event, TokenEvent):
            self.tokens.append((event.token, event.logprob))
        else:
            self.error = event
        if self.error is not None or event.finish is not None:
            self.done.set()


def answer_disturbed(folder: Path, footprint: CacheFootprint) -> Answers:
    """The answers of a group whose ranks are lost twice and exchanged once."""
    source = Disturbances(folder, footprint)
    ranks = source.start(Epoch())
    scheduler = Scheduler(
        prefill_chunk_size=PREFILL_CHUNK_SIZE,
        footprint=footprint,
        prefix_cache_bytes=10**9,
    )
    group = source.group = RankGroup(ranks, scheduler, source)
    clients = source.clients = {request.id: Client() for request in REQUESTS}
    try:
        for request in REQUESTS:
            group.submit(request, clients[request.id].receive)
        for name, client in clients.items():
            assert client.done.wait(DEADLINE_S), f"{name}: no end; {group.state}"
            assert client.error is None, f"{name}: {client.error}"
        reasons = ["", "rank 1: lost in epoch 0", "rank 0: lost in epoch 1", "another node came"]
        assert source.reasons == reasons
        assert min(source.half_answered[1:]) >= 2
    finally:
        group.close()
    return {name: client.tokens for name, client in clients.items()}


def describe_caches(family: str) -> tuple[str, ...]:
    """What tells one kind of cache from another: classes, shapes of keys and values, batching.

    The model is built of its config, and nothing is computed.
    """
    row, model = family_of(family), build_lazy_model(tiny_config(family))
    if row.make_caches is not None:
        model.make_cache = partial(row.make_caches, model)
    if row.request_attention:
        install_request_attention(model, row.request_attention)
    caches = make_prompt_cache(model)
    model(mx.array([[1, 2, 3]]), cache=caches)
    kinds = {row.batching.name}
    for cache in flatten_caches(caches):
        keys, values = getattr(cache, "keys", None), getattr(cache, "values", None)
        alike = keys is None or values is None or keys.shape == values.shape
        kinds.add(type(cache).__name__ + ("" if alike else ", values unlike keys"))
    kinds |= {type(cache).__name__ for cache in caches}
    return tuple(sorted(kinds))


@pytest.fixture(scope="module")
def undisturbed() -> dict[Path, tuple[CacheFootprint, Answers]]:
    """One family's folder for each kind of cache, its footprint, and what each request gives
    alone."""
    kinds = {describe_caches(family): family for family in reversed(RUNNABLE)}
    answers = {}
    for family in kinds.values():
        running = RunningModel(folder := tiny_model(family), SingleRank())
        alone: Answers = {}
        for request in REQUESTS:
            alone |= running.answers([[request]])
        answers[folder] = running.footprint, alone
    return answers


def test_every_kind_of_cache_survives_its_ranks(undisturbed):
    assert len(undisturbed) >= 9
    wrong = {}
    for folder, (footprint, alone) in undisturbed.items():
        differences = find_differences(alone, answer_disturbed(folder, footprint), REQUESTS)
        if differences:
            wrong[folder.name] = differences
    assert not wrong
