"""A rank fails in the middle of an answer, and the answer goes on where it was.

Real processes, the demo model; what is streamed is compared with what the same group gave
undisturbed. `tests/unit/test_lockstep.py` has what only ranks that are out of their minds do.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import cenacle
from cenacle.api import Model
from cenacle.cluster.launcher import WORKER, LocalRanks
from cenacle.engine.engine import Options
from cenacle.engine.lockstep import Epoch, Group
from cenacle.engine.scheduler import Scheduler
from cenacle.request import Request, Sampling

HERE = Path(__file__).parent
OTHER_ROUTER = HERE / "other_router_rank.py"
FAULTS = HERE.parent.parent / "benchmarks" / "faults.py"
MIXTRAL = HERE.parent / "vectors" / "mixtral"
DEMO = Path(cenacle.__file__).parent / "demo_model"
QUESTIONS = ("What is 12 + 30?", "Who are you? Tell me more.", "What is 7 + 8?")
LENGTH = 60
DICE = {"temperature": 0.8, "seed": 11}


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_until(condition, seconds: float, what: str) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - began


@contextmanager
def loaded(nodes: int, **how: Any) -> Iterator[Model]:
    model = cenacle.load(str(DEMO), nodes, latency_s=0.002, **how)
    pids = [*model.ranks.pids]
    try:
        yield model
    finally:
        model.close()
        wait_until(lambda: not any(map(alive, pids + model.ranks.pids)), 2, "the ranks' end")


def never_ending(model: Model, question: str, **sampling: Any) -> Request:
    """A request whose answer has `LENGTH` tokens, whatever they are."""
    return replace(model.request(question, LENGTH, Sampling(**sampling)), stop_tokens=())


def asked(model: Model) -> list[Request]:
    return [
        *(never_ending(model, question) for question in QUESTIONS[:2]),
        never_ending(model, QUESTIONS[2], **DICE),
        never_ending(model, QUESTIONS[1], repetition_penalty=1.3, **DICE),
    ]


class Client:
    """Reads one stream in a thread of its own."""

    def __init__(self, model: Model, request: Request) -> None:
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.text = ""
        self.error: Exception | None = None
        self._stream = model._stream(request, ())
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            for chunk in self._stream:
                self.tokens.append(chunk.token)
                self.times.append(time.monotonic())
                self.text += chunk.text
        except cenacle.CenacleError as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(40)
        assert not self._thread.is_alive(), "the stream does not end"
        if self.error is not None:
            raise self.error


@pytest.fixture(scope="module")
def group() -> Iterator[tuple[Model, list[str]]]:
    """A group, which every test leaves working, and what it answers undisturbed."""
    with loaded(3) as model:
        yield model, answers(model)


def answers(model: Model) -> list[str]:
    clients = [Client(model, request) for request in asked(model)]
    for client in clients:
        client.join()
    return [client.text for client in clients]


@pytest.mark.parametrize(("fault", "noticed_s"), [("SIGKILL", 1.5), ("SIGSTOP", 5)])
def test_answers_go_on_where_they_were(group, fault, noticed_s):
    model, undisturbed = group
    clients = [Client(model, request) for request in asked(model)]
    wait_until(lambda: all(len(c.tokens) >= 5 for c in clients), 10, "some tokens")
    before, pids = model.group.state, model.ranks.pids
    victim = len(pids) - 1
    os.kill(pids[victim], getattr(signal, fault))
    wait_until(lambda: model.group.state.phase == "recovering", noticed_s, "the loss is noticed")
    state = model.group.state
    assert state.rank == victim, state.reason
    assert f"rank {victim}" in state.reason
    late = Client(model, never_ending(model, QUESTIONS[0]))  # it waits, rather than fail
    wait_until(lambda: model.group.state.phase == "ok", 15, "recovery")
    assert (model.group.state.epoch, model.group.state.recoveries) == (
        before.epoch + 1,
        before.recoveries + 1,
    )
    for client in [*clients, late]:
        client.join()
    assert [c.text for c in clients] == undisturbed
    assert late.text == undisturbed[0]
    assert [len(c.tokens) for c in clients] == [LENGTH] * len(clients)
    assert not any(map(alive, pids)), "the old ranks are gone"
    assert model.group.load == {"running": 0, "waiting": 0}


def test_a_rank_that_routes_otherwise_is_replaced_and_nobody_notices():
    plan = cenacle.inspect(str(MIXTRAL), 2)
    order = {"type": "load", "folder": str(MIXTRAL), "wire": "f32", "latency_s": 0.0}
    order |= {"kernels": "mlx", "options": asdict(Options()), "plan": plan.to_json()}

    def start(epoch: Epoch) -> LocalRanks:
        program = (sys.executable, str(OTHER_ROUTER)) if epoch.number == 0 else WORKER
        ranks = LocalRanks(2, program=program, epoch=epoch)
        ranks.load(order)
        return ranks

    ranks = start(Epoch(0, threading.Event()))
    group = Group(ranks, Scheduler(4, 0), start=start)
    try:
        recorded = mx.load(str(MIXTRAL / "vectors.safetensors"))
        model = Model("mixtral", plan, None, group)
        prompt, expected = (recorded[f"prompt_7.{what}"].tolist() for what in ("tokens", "greedy"))
        assert model.generate(prompt, len(expected)).tokens == expected
        assert "chose other experts" in group.state.reason
        assert group.state.recoveries == 1
    finally:
        group.close()
        assert not any(map(alive, [*ranks.pids, *model.ranks.pids]))


def test_what_the_clients_of_a_server_see():
    """`benchmarks/faults.py`, each of some faults once; it compares the texts."""
    rows = (
        "local-kill-twice",
        "local-no-memory",
        "local-end-recovering",
        "local-kill-server",
    )
    command = [sys.executable, str(FAULTS), "--times", "1", "--rows", ",".join(rows)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["rows"]
    if set(found) != set(rows):
        warnings.warn(f"not all rows were run: {done.stdout}", stacklevel=1)
    assert sum(row["answers"] for row in found.values()) >= 5
