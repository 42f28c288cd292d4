"""Phases add up to the total, whatever the ranks' clocks say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle.ranks.step_timings import StepReport, StepTimings

seconds = st.floats(0, 10, allow_subnormal=False)


def report(all_reduces, trunk=0.0, experts=0.0, total=None, decoding=True, routed=None):
    laps = {"trunk": trunk, "experts": experts, "all_reduce": sum(all_reduces)}
    total = sum(laps.values()) if total is None else total
    return StepReport(total, laps, tuple(all_reduces), routed or {}, decoding)


@st.composite
def steps(draw):
    ranks, layers = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    each = st.builds(
        report, st.lists(seconds, min_size=layers, max_size=layers), seconds, seconds, seconds
    )
    return draw(st.lists(st.lists(each, min_size=ranks, max_size=ranks), min_size=1, max_size=4))


@given(steps())
def test_timings_add_up(steps):
    timings = StepTimings()
    for reports in steps:
        timings.add(reports)
    ms = timings.per_token_ms()
    assert list(ms) == ["trunk", "experts", "all_reduce", "waiting", "rest", "total"]
    parts = sum(v for k, v in ms.items() if k != "total")
    assert parts == pytest.approx(ms["total"], abs=1e-6)
    assert ms["waiting"] >= -1e-6
    means = [sum(r.total_s for r in reports) / len(reports) for reports in steps]
    assert ms["total"] == pytest.approx(1000 * sum(means) / len(steps), abs=1e-6)


def test_the_all_reduce_is_the_shortest_and_the_rest_is_waiting():
    """Layer 0: rank 1 comes last, rank 0 waits 3 s. Layer 1: rank 0 comes last."""
    timings = StepTimings()
    timings.add(
        [report([4.0, 1.0], trunk=1.0, experts=2.0), report([1.0, 2.0], 3.0, 4.0, total=12.0)]
    )
    assert timings.per_token_ms() == {
        **{"trunk": 2000.0, "experts": 3000.0, "all_reduce": 2000.0, "waiting": 2000.0},
        **{"rest": 1000.0, "total": 10000.0},
    }


def test_one_rank_waits_for_nobody():
    timings = StepTimings()
    timings.add([report([0.5, 0.25])])
    assert timings.per_token_ms()["waiting"] == 0
    assert timings.per_token_ms()["all_reduce"] == 750


def test_means_are_over_measured_decode_steps():
    timings = StepTimings()
    timings.add([report([1.0]), report([1.0])])
    timings.add([report([3.0]), report([3.0])])
    timings.add([report([9.0]), report([9.0], decoding=False)])
    assert timings.steps == 2
    assert timings.per_token_ms()["all_reduce"] == 2000


def test_nothing_measured_is_zero():
    assert set(StepTimings().per_token_ms().values()) == {0.0}


def test_routed_counts_are_rank_0s_added_up():
    """They come through JSON, which makes strings of keys."""
    timings = StepTimings()
    timings.add([report([1.0], routed={0: {3: 2}}), report([1.0], routed={0: {3: 2}})])
    timings.add([report([1.0], routed={0: {3: 1, 5: 1}, 4: {0: 1}}), report([1.0])])
    assert timings.routed == {0: {3: 3, 5: 1}, 4: {0: 1}}


def test_ranks_of_different_depth_are_an_error():
    with pytest.raises(ValueError, match="longer"):
        StepTimings().add([report([1.0]), report([1.0, 2.0])])
