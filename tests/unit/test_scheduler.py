"""Requests are in one place each, come in order, and steps have no gaps."""

from hypothesis import given
from hypothesis import strategies as st

from cenacle.core.request import Request, TokenEvent
from cenacle.core.step import PromptChunk, Step
from cenacle.scheduler.scheduler import Scheduler


def request(name: str) -> Request:
    return Request(name, (1,), 5)


# What may happen, in any order: (what, which request).
acts = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "cancel", "step", "token", "end"]), st.integers(0, 9)
    ),
    max_size=60,
)


@given(acts, st.integers(1, 4), st.integers(0, 3))
def test_invariants(acts, batch, measure_every):
    scheduler = Scheduler(batch, measure_every)
    submitted, admitted, cancelled, ended = [], [], set(), set()
    told, steps = [], []

    def step():
        taken = scheduler.next_step()
        if taken is None:
            return
        steps.append(taken.number)
        admitted.extend(r.id for r in taken.admitted)
        told.extend(taken.cancelled)
        for name in taken.cancelled:
            assert name in admitted, "ranks are told to cancel what they never had"
            assert name not in [r.id for r in taken.admitted]
        assert taken.measured == (measure_every > 0 and (taken.number + 1) % measure_every == 0)

    for what, which in acts:
        known = submitted[which % len(submitted)] if submitted else "nobody"
        if what == "submit":
            submitted.append(f"r{len(submitted)}")
            scheduler.submit(request(submitted[-1]))
        elif what == "cancel":
            scheduler.cancel(known)
            if known not in ended:
                cancelled.add(known)
        elif what == "step":
            step()
        else:
            event = TokenEvent(known, 3, "stop" if what == "end" else None)
            runs = known in admitted and known not in cancelled | ended
            assert scheduler.seen([event]) == ([event] if runs else [])
            if runs and what == "end":
                ended.add(known)
        running = set(admitted) - cancelled - ended
        waiting = set(submitted) - set(admitted) - cancelled
        assert (scheduler.running, scheduler.waiting) == (len(running), len(waiting))
        assert scheduler.running <= batch

    step()
    assert steps == list(range(len(steps)))
    assert len(admitted) == len(set(admitted)), "admitted twice"
    assert admitted == [name for name in submitted if name in admitted], (
        "not first come, first served"
    )
    assert len(told) == len(set(told)), "cancelled twice"
    assert set(told) == {n for n in cancelled if n in admitted}
    left = [n for n in submitted if n not in cancelled | ended]
    assert sorted(scheduler.lost()) == sorted(left)
    assert (scheduler.running, scheduler.waiting) == (0, 0)


def test_idle_takes_no_step():
    scheduler = Scheduler()
    assert scheduler.next_step() is None
    scheduler.cancel("nobody")
    assert scheduler.next_step() is None


def test_cancelling_the_last_request_takes_one_more_step():
    scheduler = Scheduler()
    scheduler.submit(request("a"))
    assert scheduler.next_step().admitted == (request("a"),)
    scheduler.cancel("a")
    assert scheduler.next_step().cancelled == ("a",)
    assert scheduler.next_step() is None


def test_cancelled_while_waiting_never_reaches_the_ranks():
    scheduler = Scheduler()
    scheduler.submit(request("a"))
    scheduler.cancel("a")
    assert scheduler.next_step() is None


def test_a_place_that_is_freed_is_given_to_the_next():
    scheduler = Scheduler(batch=1)
    scheduler.submit(request("a"))
    scheduler.submit(request("b"))
    assert [r.id for r in scheduler.next_step().admitted] == ["a"]
    assert scheduler.next_step().admitted == ()
    scheduler.seen([TokenEvent("a", 1, "length")])
    assert [r.id for r in scheduler.next_step().admitted] == ["b"]


def test_after_a_loss_steps_begin_anew():
    scheduler = Scheduler()
    scheduler.submit(request("a"))
    scheduler.next_step()
    scheduler.cancel("a")
    assert scheduler.lost() == []
    assert scheduler.next_step() is None
    scheduler.submit(request("b"))
    step = scheduler.next_step()
    assert step == Step(0, (request("b"),), final_chunks=(PromptChunk("b", 0, 1),))
