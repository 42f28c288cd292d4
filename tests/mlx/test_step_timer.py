"""The clock of measured steps, with a clock of our own."""

import json

import mlx.core as mx
import pytest
from one_process import VECTORS, load_rank

from cenacle.collective.base import Traffic
from cenacle.collective.single import SingleRank
from cenacle.core.plan import Plan
from cenacle.core.request import TokenEvent
from cenacle.core.step import Step
from cenacle.engine import engine, options
from cenacle.errors import ClusterError
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.step_timer import StepTimer


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_laps_add_up_by_name():
    clock = Clock()
    timer = StepTimer(clock)
    timer.start()
    for name, seconds in [("trunk", 1), ("experts", 2), ("all_reduce", 4), ("trunk", 8)]:
        clock.now += seconds
        timer.lap(name, mx.zeros(1))
    clock.now += 16
    timer.lap("all_reduce", mx.zeros(1))
    clock.now += 32
    assert timer.stop() == {
        **{"total_s": 63.0, "laps_s": {"trunk": 9.0, "experts": 2.0, "all_reduce": 20.0}},
        **{"all_reduces_s": [4.0, 16.0], "routed": {}},
    }


def test_outside_a_measured_step_nothing_is_evaluated_or_kept():
    def must_not_be_called():
        raise AssertionError("the clock was read")

    timer = StepTimer(must_not_be_called)
    timer.lap("trunk", "not even an array")
    timer.record_routing(0, "not even an array")
    assert not timer.running


def test_routed_counts():
    timer = StepTimer()
    timer.start()
    timer.record_routing(3, mx.array([[[0, 2], [2, 5]]]))
    timer.record_routing(3, mx.array([[[2, 1]]], mx.uint32))
    timer.record_routing(4, mx.array([[[7, 7]]]))
    report = timer.stop()
    assert report["routed"] == {3: {0: 1, 1: 1, 2: 3, 5: 1}, 4: {7: 2}}
    json.dumps(report)


def test_every_step_starts_at_zero():
    clock = Clock()
    timer = StepTimer(clock)
    for _ in range(2):
        timer.start()
        timer.record_routing(0, mx.array([[1]]))
        clock.now += 1
        timer.lap("trunk", mx.zeros(1))
        report = timer.stop()
    assert (report["total_s"], report["laps_s"], report["routed"]) == (
        1.0,
        {"trunk": 1.0},
        {0: {1: 1}},
    )


@pytest.mark.parametrize("family", ["dbrx", "mixtral", "qwen3_moe"])
def test_a_models_laps(family):
    """Per layer: what came before the block, its experts, its exchange."""
    folder, timer = VECTORS / family, StepTimer()
    plan = Plan.whole(read_model_spec(Checkpoint.open(folder)), 1)
    model = load_rank(folder, plan, SingleRank(), timer)
    timer.start()
    mx.eval(model(mx.array([[1, 2, 3]])))
    report = timer.stop()
    assert sorted(report["laps_s"]) == ["all_reduce", "experts", "trunk"]
    assert len(report["all_reduces_s"]) == 2
    assert sum(report["laps_s"].values()) <= report["total_s"]
    assert {k: sum(v.values()) for k, v in report["routed"].items()} == {0: 6, 1: 6}


class Recorder:
    """A batch, a timer and a collective in one, that notes what it is told."""

    def __init__(self) -> None:
        self.laps: list[str] = []

    traffic = Traffic()

    def decode(self):
        self.laps.append("decode")
        return [TokenEvent("a", 1)]

    def stop(self):
        self.laps.append("stop")
        return {"laps_s": {}}

    def __getattr__(self, name):
        return lambda *_: self.laps.append(name)


def test_a_measured_step_is_timed_from_when_all_before_it_is_computed(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(engine, "make_batch", lambda *_: recorder)
    it = engine.Engine(None, recorder, recorder, options.EngineOptions())
    it.step(Step(0, measured=True))
    assert recorder.laps == [
        "synchronize",
        "start",
        "decode",
        "raise_if_failed",
        "synchronize",
        "stop",
    ]
    recorder.laps.clear()
    it.step(Step(1))
    assert recorder.laps == ["decode", "raise_if_failed"]


class Lost(Recorder):
    """A collective whose all-reduce failed; `raise_if_failed` gives the reason, if there is one."""

    why: ClusterError | None = None

    def decode(self):
        raise RuntimeError("whatever a task threw")

    def raise_if_failed(self):
        if self.why is not None:
            raise self.why


def test_a_failed_all_reduce_is_reported_in_its_own_words(monkeypatch):
    lost = Lost()
    monkeypatch.setattr(engine, "make_batch", lambda *_: lost)
    it = engine.Engine(None, lost, lost, options.EngineOptions())
    with pytest.raises(RuntimeError, match="whatever a task threw"):  # not an all-reduce
        it.step(Step(0))
    lost.why = ClusterError("rank 1 closed its connection")
    with pytest.raises(ClusterError, match="rank 1 closed its connection"):
        it.step(Step(1))
