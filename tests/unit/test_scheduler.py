"""A request is in one place at a time, requests are served in order, steps have no gaps."""

from hypothesis import given
from hypothesis import strategies as st

from cenacle.core.request import Request, TokenEvent
from cenacle.core.step import PromptChunk, Step
from cenacle.scheduler.scheduler import Scheduler


def request(name: str) -> Request:
    return Request(name, (1,), 5)


# Events in any order: (kind, index of the request).
events = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "cancel", "step", "token", "end"]), st.integers(0, 9)
    ),
    max_size=60,
)


@given(events, st.integers(1, 4), st.integers(0, 3))
def test_invariants(events, batch_size, measure_every):
    scheduler = Scheduler(batch_size, measure_every)
    submitted, admitted, cancelled, ended = [], [], set(), set()
    cancel_orders, steps = [], []

    def step():
        step_taken = scheduler.next_step()
        if step_taken is None:
            return
        steps.append(step_taken.number)
        admitted.extend(r.id for r in step_taken.admitted)
        cancel_orders.extend(step_taken.cancelled)
        for name in step_taken.cancelled:
            assert name in admitted, "ranks must cancel a request that they never had"
            assert name not in [r.id for r in step_taken.admitted]
        assert step_taken.measured == (
            measure_every > 0 and (step_taken.number + 1) % measure_every == 0
        )

    for kind, index in events:
        known = submitted[index % len(submitted)] if submitted else "nobody"
        if kind == "submit":
            submitted.append(f"r{len(submitted)}")
            scheduler.submit(request(submitted[-1]))
        elif kind == "cancel":
            scheduler.cancel(known)
            if known not in ended:
                cancelled.add(known)
        elif kind == "step":
            step()
        else:
            event = TokenEvent(known, 3, "stop" if kind == "end" else None)
            runs = known in admitted and known not in cancelled | ended
            assert scheduler.on_tokens([event]) == ([event] if runs else [])
            if runs and kind == "end":
                ended.add(known)
        running = set(admitted) - cancelled - ended
        waiting = set(submitted) - set(admitted) - cancelled
        assert (scheduler.running, scheduler.waiting) == (len(running), len(waiting))
        assert scheduler.running <= batch_size

    step()
    assert steps == list(range(len(steps)))
    assert len(admitted) == len(set(admitted)), "admitted twice"
    assert admitted == [name for name in submitted if name in admitted], (
        "not first come, first served"
    )
    assert len(cancel_orders) == len(set(cancel_orders)), "cancelled twice"
    assert set(cancel_orders) == {n for n in cancelled if n in admitted}
    unfinished = [n for n in submitted if n not in cancelled | ended]
    assert sorted(scheduler.on_ranks_lost()) == sorted(unfinished)
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


def test_a_request_cancelled_while_waiting_never_reaches_the_ranks():
    scheduler = Scheduler()
    scheduler.submit(request("a"))
    scheduler.cancel("a")
    assert scheduler.next_step() is None


def test_a_free_place_is_given_to_the_next_request():
    scheduler = Scheduler(max_batch_size=1)
    scheduler.submit(request("a"))
    scheduler.submit(request("b"))
    assert [r.id for r in scheduler.next_step().admitted] == ["a"]
    assert scheduler.next_step().admitted == ()
    scheduler.on_tokens([TokenEvent("a", 1, "length")])
    assert [r.id for r in scheduler.next_step().admitted] == ["b"]


def test_steps_restart_at_zero_after_ranks_are_lost():
    scheduler = Scheduler()
    scheduler.submit(request("a"))
    scheduler.next_step()
    scheduler.cancel("a")
    assert scheduler.on_ranks_lost() == []
    assert scheduler.next_step() is None
    scheduler.submit(request("b"))
    step = scheduler.next_step()
    assert step == Step(0, (request("b"),), final_chunks=(PromptChunk("b", 0, 1),))
