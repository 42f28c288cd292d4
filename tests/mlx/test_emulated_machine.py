"""A rank on an emulated machine: the same logits, and the time that its reads and links take."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from one_process import VECTORS, in_threads, load_rank

from cenacle.core.plan import Plan
from cenacle.engine.emulated_machine import IDLE_S, EmulatedMachine
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.spec_reader import read_model_spec
from cenacle.planning import plan_cost
from cenacle.planning.model_shapes import shape_from_config
from cenacle.planning.plan_cost import RankReads

FOLDER, LINK_S, TOKENS, PROMPT = VECTORS / "mixtral", 2e-3, 5, 4
RATES = (1e6, 2e6)


class FakeClock:
    """Stands still but for sleeps, and for `work_s` at each look."""

    def __init__(self, work_s=0.0):
        self.now_s, self.work_s = 1000.0, work_s

    def __call__(self):
        self.now_s += self.work_s
        return self.now_s

    def sleep(self, seconds):
        assert seconds > 0
        self.now_s += seconds


def decode(plan, work_s=(0.0, 0.0)):
    """Logits, statistics and time at the end of each rank; every rank reads at its own rate."""
    checkpoint = Checkpoint.open(FOLDER)
    shape = shape_from_config("mixtral", checkpoint.config)

    def run(threads):
        clock = FakeClock(work_s[threads.rank])
        reads = RankReads(plan, threads.rank, shape)
        rate = RATES[threads.rank]
        machine = EmulatedMachine(threads, reads, rate, LINK_S, clock, clock.sleep)
        model = load_rank(FOLDER, plan, machine)
        cache = make_prompt_cache(model)
        machine.observe_passes(model)
        mx.eval(model(mx.array([list(range(PROMPT))]), cache=cache))
        machine.broadcast_from(0, mx.array([0]))
        for token in range(TOKENS):
            logits = model(mx.array([[token]]), cache=cache)
            machine.broadcast_from(0, mx.array([token]))
        return np.array(logits), machine.take_stats(), clock.now_s

    return in_threads(2, run)


@pytest.fixture(scope="module")
def sliced():
    return Plan.sliced(read_model_spec(Checkpoint.open(FOLDER)), 2, trunk="sharded")


def test_a_pass_takes_its_reads_and_links_and_the_slowest_rank_is_waited_for(sliced):
    (logits, slow, end_s), (same, fast, other_end_s) = decode(sliced)
    assert np.array_equal(logits, same)
    assert end_s == pytest.approx(other_end_s)
    assert (slow.passes, slow.late) == (TOKENS, 0)  # the prompt is not counted
    # Even slices at twice the speed: the fast rank waits half of its time.
    assert slow.wait_s == pytest.approx(0, abs=1e-3)
    assert fast.wait_s == pytest.approx(slow.read_s - fast.read_s, rel=1e-3)
    assert slow.read_s == pytest.approx(slow.read_bytes / RATES[0])
    links = sliced.all_reduces + 1
    assert slow.link_s == pytest.approx(TOKENS * links * LINK_S)
    for stats in (slow, fast):
        assert stats.total_s == pytest.approx(stats.read_s + stats.wait_s + stats.link_s, rel=1e-3)


def test_the_performance_model_predicts_a_pass(sliced):
    (_, slow, _), _ = decode(sliced)
    config = Checkpoint.open(FOLDER).config
    measured = plan_cost.emulated_machines(config, RATES, LINK_S)
    context = PROMPT + (TOKENS + 1) // 2
    predicted_s = plan_cost.predict_plan(sliced, measured, "", context).token_s
    assert slow.total_s / TOKENS == pytest.approx(predicted_s, rel=0.03)  # norms


def test_what_really_takes_longer_is_late_and_slows_every_rank(sliced):
    (_, punctual, _), _ = decode(sliced)
    (_, waiting, _), (_, late, _) = decode(sliced, work_s=(0.0, 0.04))
    assert (late.late, waiting.late) == (TOKENS, 0)
    assert late.late_s > 0
    assert late.total_s > punctual.total_s + 0.1
    assert waiting.total_s == pytest.approx(late.total_s, rel=1e-3)
    assert waiting.wait_s > 0.1


def test_python_between_passes_overlaps_unless_the_machine_is_idle(sliced):
    shape = shape_from_config("mixtral", Checkpoint.open(FOLDER).config)

    def run(threads):
        clock = FakeClock()
        reads = RankReads(sliced, threads.rank, shape)
        machine = EmulatedMachine(threads, reads, 1e12, LINK_S, clock, clock.sleep)
        ends = []
        for pause_s in (2 * IDLE_S, LINK_S / 2, 2 * IDLE_S):
            clock.now_s += pause_s
            machine.begin_pass([1], 1)
            begin_s = clock.now_s
            machine.all_sum(mx.zeros(3))
            ends.append(clock.now_s - begin_s)
        return ends

    for ends in in_threads(2, run):
        assert ends == pytest.approx([LINK_S, LINK_S, LINK_S], rel=1e-2)
