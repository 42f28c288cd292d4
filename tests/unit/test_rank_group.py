"""A group over played ranks that fail by a script: who is told what, and what goes on.

A played rank's token is a number made of all tokens before it, so an answer that goes on in a wrong
place is another answer. Real ranks that fail: `tests/ranks/test_recovery.py`.
"""

import queue
import re
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cenacle.core.request import Request, TokenEvent
from cenacle.core.step import Step
from cenacle.engine.sampling.grammar_process import SerializedTokenizer
from cenacle.errors import CenacleError, ClusterError, InputError, RankLost
from cenacle.ranks import active_requests, rank_group
from cenacle.ranks.channel import ChannelClosed
from cenacle.ranks.messages import RankFailure, Ready, StepResult
from cenacle.ranks.rank_group import RankGroup
from cenacle.ranks.ranks import Epoch
from cenacle.ranks.step_timings import StepReport
from cenacle.scheduler.disk_index import page_keys
from cenacle.scheduler.prefix_index import CacheFootprint, pack_tokens
from cenacle.scheduler.scheduler import Scheduler

Fault = Callable[["PlayedRank", Step], None]


class PlayedRank:
    """A rank, and the front's channel to it."""

    def __init__(self, rank: int, epoch: int, fault: Fault) -> None:
        self.rank, self.epoch, self._fault = rank, epoch, fault
        self._running: dict[str, list[int]] = {}
        self._left: dict[str, int] = {}
        self._said: queue.Queue[dict | None] = queue.Queue()
        self.lie = 0
        self.vocabularies: list[tuple[int, str, list[int]]] = []
        self.report: StepReport | None = None
        self.steps = 0

    def send(self, message: dict) -> None:
        assert message["epoch"] == self.epoch
        if message["type"] == "vocabulary":
            self.vocabularies.append((self.steps, message["text"], message["stop_tokens"]))
            return
        step = Step.from_json(message["step"])  # the channel sends JSON
        assert step.number == self.steps, "a step is missing"
        self.steps += 1
        for request_id in step.cancelled:
            self._running.pop(request_id, None)
        for request in step.admitted:
            self._running[request.id] = list(request.tokens)
            self._left[request.id] = request.max_tokens
        self._fault(self, step)
        time.sleep(0.001)  # somebody else should get a turn
        tokens = []
        for request_id, known in list(self._running.items()):
            known.append((sum(known) * 31 + len(known) + self.lie) % 1009)
            self._left[request_id] -= 1
            finish = None if self._left[request_id] else "length"
            if finish:
                del self._running[request_id]
            tokens.append(TokenEvent(request_id, known[-1], finish))
        self.say(StepResult(self.epoch, step.number, tuple(tokens), self.report).to_json())

    def say(self, message: dict) -> None:
        self._said.put(message)

    def hang_up(self) -> None:
        self._said.put(None)

    def receive(self) -> dict:
        message = self._said.get(timeout=120)
        if message is None:
            raise ChannelClosed("closed the connection")
        return message


class PlayedRanks:
    """Two of them."""

    def __init__(self, epoch: int, fault: Fault) -> None:
        self.channels = [PlayedRank(rank, epoch, fault) for rank in (0, 1)]
        self.pids, self.ready, self.backend, self.backend_reason = [], [], "played", None
        self.plan = None
        self.closed = False

    def blame(self, rank: int, reason: str) -> RankLost:
        return RankLost(rank, f"rank {rank} {reason}")

    def close(self, *, now: bool) -> None:
        self.closed = True
        for channel in self.channels:
            channel.hang_up()


class Stage:
    """Starts played ranks and remembers them."""

    def __init__(self, fault: Fault, refuse: tuple[int, ...] = ()) -> None:
        self.fault, self.refuse = fault, refuse
        self.epochs: list[PlayedRanks] = []
        self.starts: list[int] = []

    def start(self, epoch: Epoch, report: object = None) -> PlayedRanks:
        assert all(ranks.closed for ranks in self.epochs), "two groups at once"
        self.starts.append(epoch.number)
        if epoch.number in self.refuse:
            raise ClusterError("no memory is left")
        self.epochs.append(PlayedRanks(epoch.number, self.fault))
        return self.epochs[-1]


class Client:
    """Asks for a number of tokens, and keeps what it is told."""

    def __init__(
        self,
        group: RankGroup,
        name: str,
        length: int = 20,
        prompt: tuple = (1, 2),
        grammar: str | None = None,
    ) -> None:
        self.tokens: list[int] = []
        self.error: CenacleError | None = None
        self._done = threading.Event()
        request = Request(name, prompt, length, grammar=grammar)
        known = list(prompt)
        for _ in range(length):
            known.append((sum(known) * 31 + len(known)) % 1009)
        self.expected = known[len(prompt) :]
        group.submit(request, self._on_event)

    def _on_event(self, event: TokenEvent | CenacleError) -> None:
        assert not self._done.is_set(), "told after the end"
        if isinstance(event, CenacleError):
            self.error = event
        else:
            self.tokens.append(event.token)
        if self.error is not None or event.finish is not None:
            self._done.set()

    def wait(self) -> list[int]:
        assert self._done.wait(120), f"not told the end, got {len(self.tokens)}"
        if self.error is not None:
            raise self.error
        return self.tokens


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cenacle.scheduler.recovery.BACKOFF_S", (0.0, 0.01, 0.02))


@pytest.fixture
def play() -> Iterator[Callable[..., tuple[RankGroup, Stage]]]:
    made: list[tuple[RankGroup, Stage]] = []

    def begin(
        fault: Fault, refuse: tuple[int, ...] = (), batch: int = 8
    ) -> tuple[RankGroup, Stage]:
        stage = Stage(fault, refuse)
        group = RankGroup(stage.start(Epoch()), Scheduler(batch, 0), stage)
        made.append((group, stage))
        return made[-1]

    yield begin
    for group, stage in made:
        group.close()
        assert all(ranks.closed for ranks in stage.epochs)


def until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.002)


def failure(epoch: int, message: str) -> dict:
    return RankFailure.of(epoch, ClusterError(message)).to_json()


def die(rank: PlayedRank, step: Step) -> None:
    rank.say(failure(rank.epoch, "its disk is gone"))


def disagree(rank: PlayedRank, step: Step) -> None:
    rank.lie = 1


def leave(rank: PlayedRank, step: Step) -> None:
    rank.hang_up()
    raise ChannelClosed("lost its connection")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [(die, "failed: its disk is gone"), (disagree, "disagrees at step 5"), (leave, "connection")],
)
def test_every_answer_goes_on_where_it_was(play, wrong, reason):
    def fault(rank: PlayedRank, step: Step) -> None:
        if rank.epoch < 3 and rank.rank == 1 and step.number == 5:
            wrong(rank, step)

    group, stage = play(fault, batch=3)
    clients = [Client(group, f"{n}", 20 + n, (n, 7)) for n in range(5)]  # two of them wait
    for client in clients:
        assert client.wait() == client.expected
    assert stage.starts == [0, 1, 2, 3]
    state = group.state
    assert (state.phase, state.epoch, state.rank, state.recoveries) == ("ok", 3, 1, 3)
    assert reason in state.reason
    assert group.load == {"running": 0, "waiting": 0}


def test_ranks_get_the_vocabulary_once_before_the_first_grammar(play):
    def fault(rank: PlayedRank, step: Step) -> None:
        if rank.epoch == 0 and rank.rank == 1 and any(r.id == "last" for r in step.admitted):
            die(rank, step)

    group, stage = play(fault)
    group.read_vocabulary = lambda: SerializedTokenizer("tokens", (7,))
    assert Client(group, "free").wait()
    channels = stage.epochs[0].channels
    assert [rank.vocabularies for rank in channels] == [[], []]
    steps = channels[0].steps
    for name in ("first", "second", "last"):
        assert Client(group, name, grammar="{}").wait()
    for rank in channels:
        ((step, *vocabulary),) = rank.vocabularies
        assert step <= steps + 1  # before anything of the request
        assert vocabulary == ["tokens", [7]]
    for rank in stage.epochs[1].channels:
        assert rank.vocabularies == [(0, "tokens", [7])]


@pytest.mark.parametrize("length", [None, rank_group.MAX_VOCABULARY_CHARACTERS + 1])
def test_ranks_read_a_vocabulary_that_cannot_be_sent(play, length):
    def read() -> SerializedTokenizer:
        if length is None:
            raise InputError("not readable", "grammar")
        return SerializedTokenizer(" " * length, ())

    group, stage = play(lambda rank, step: None)
    group.read_vocabulary = read
    client = Client(group, "first", grammar="{}")
    assert client.wait() == client.expected
    assert stage.epochs[0].channels[0].vocabularies == []


def test_ranks_that_work_can_be_ended_between_steps(play):
    group, stage = play(lambda rank, step: None, batch=3)
    end, under_way = group._reform, []

    def note_and_end() -> None:
        under_way.append(len(group._in_flight))
        end()

    group._reform = note_and_end
    clients = [Client(group, f"{n}", 400 + n, (n, 7)) for n in range(5)]  # two of them wait
    for number in range(1, 6):  # more often than a request may be there when a group is lost
        tokens = sum(len(c.tokens) for c in clients)
        until(lambda: sum(len(c.tokens) for c in clients) > tokens)  # noqa: B023
        group.reform(f"machine {number} is back")
        until(lambda: stage.starts[-1] == number)  # noqa: B023
        until(lambda: group.state.phase == "ok")
    assert group.state.reason == "machine 5 is back"
    for client in clients:
        assert client.wait() == client.expected
    assert stage.starts == [0, 1, 2, 3, 4, 5]
    assert under_way == [0] * 5, "steps were under way"
    group.reform("machine 6 is back")  # nobody asks for anything
    until(lambda: group.state.recoveries == 6)
    assert Client(group, "late").wait()


def test_what_an_older_epoch_says_is_not_heard(play):
    def fault(rank: PlayedRank, step: Step) -> None:
        if rank.epoch == 0 and rank.rank == 0 and step.number == 3:
            die(rank, step)
        if rank.epoch == 1:  # late messages of ranks that were ended, over whatever way
            rank.say(StepResult(0, step.number, (TokenEvent("a", 7),)).to_json())
            rank.say(failure(0, "old"))

    group, stage = play(fault)
    client = Client(group, "a")
    assert client.wait() == client.expected
    assert stage.starts == [0, 1]


def test_a_group_that_fails_again_and_again_is_given_up_and_says_why(play):
    def fault(rank: PlayedRank, step: Step) -> None:
        leave(rank, step)  # no step is ever finished

    group, stage = play(fault, refuse=(2, 3))
    client = Client(group, "a", 3)
    with pytest.raises(ClusterError, match=r"no memory is left \(given up after 4 failures"):
        client.wait()
    assert stage.starts == [0, 1, 2, 3]
    assert group.state.phase == "failed"
    with pytest.raises(ClusterError, match="no memory is left"):
        Client(group, "b")


def test_a_request_that_ends_the_ranks_is_ended_and_the_others_go_on(play):
    def fault(rank: PlayedRank, step: Step) -> None:
        if any(request.id == "poison" for request in step.admitted):
            leave(rank, step)

    group, stage = play(fault)
    others = [Client(group, f"{n}", 60 + n, (n,)) for n in range(3)]
    until(lambda: len(others[0].tokens) > 3)
    poison = Client(group, "poison")
    with pytest.raises(ClusterError, match="the group was lost 3 times while it ran: rank 0"):
        poison.wait()
    for other in others:
        assert other.wait() == other.expected
    assert stage.starts == [0, 1, 2, 3]
    assert group.failure is None


def test_who_left_while_ranks_are_started_is_not_asked_for_again(play):
    started = threading.Event()
    admitted = []

    def fault(rank: PlayedRank, step: Step) -> None:
        if rank.epoch == 0 and step.number == 4:
            leave(rank, step)
        admitted.extend((rank.epoch, request.id) for request in step.admitted)

    group, stage = play(fault)
    plain = stage.start

    def slow(epoch: Epoch) -> PlayedRanks:
        started.wait(120)
        return plain(epoch)

    stage.start = slow
    gone, stays = Client(group, "gone"), Client(group, "stays")
    until(lambda: group.state.phase == "recovering")
    group.cancel("gone")
    late = Client(group, "late")
    started.set()
    assert stays.wait() == stays.expected
    assert late.wait() == late.expected
    assert {name for epoch, name in admitted if epoch == 1} == {"stays", "late"}
    assert len(gone.tokens) < 20


def test_a_group_can_be_closed_while_its_ranks_are_started(play):
    begun = threading.Event()

    def never(epoch: Epoch) -> PlayedRanks:
        begun.set()
        assert epoch.closing.wait(120), "not told that the group is closed"
        raise ClusterError("ended")

    def fault(rank: PlayedRank, step: Step) -> None:
        leave(rank, step)

    group, stage = play(fault)
    stage.start = never
    client = Client(group, "a")
    assert begun.wait(120)
    group.close()
    with pytest.raises(ClusterError, match="closed"):
        client.wait()
    assert not group._thread.is_alive()


def test_a_start_says_what_it_waits_for(play):
    back = threading.Event()

    def fault(rank: PlayedRank, step: Step) -> None:
        if rank.epoch == 0 and step.number == 4:
            leave(rank, step)

    group, stage = play(fault)
    plain = stage.start

    def wait(epoch: Epoch) -> PlayedRanks:
        epoch.report("waiting for carol")
        assert back.wait(120)
        return plain(epoch)

    stage.start = wait
    client = Client(group, "a")
    until(lambda: group.state.detail == "waiting for carol")
    assert group.state.phase == "recovering"
    back.set()
    assert client.wait() == client.expected
    assert group.state.detail == ""


def test_without_a_way_to_start_others_the_first_failure_is_the_last():
    group = RankGroup(PlayedRanks(0, die), Scheduler(4, 0))
    client = Client(group, "a")
    with pytest.raises(RankLost, match="its disk is gone"):
        client.wait()
    assert group.state.phase == "failed"
    assert active_requests.MAX_LOSSES > 1
    group.close()


def test_a_disk_that_does_not_answer_is_not_waited_for(monkeypatch, caplog):
    monkeypatch.setattr(rank_group, "DISK_TIMEOUT_S", 0.1)
    prompt = tuple(range(600))
    key = page_keys(pack_tokens(prompt), [256])[256]
    ranks = PlayedRanks(0, lambda rank, step: None)
    ranks.ready = [Ready(pages=((key, "", 0, 256, 9),), notices=("one is odd",))] * 2
    how = {
        "footprint": CacheFootprint(1, reusable=True),
        "prefix_cache_bytes": 10**6,
        "disk_bytes": 10**6,
    }
    group = RankGroup(ranks, Scheduler(8, 0, prefill_chunk_size=1000, **how))
    try:
        client = Client(group, "a", prompt=prompt)  # these ranks do not look for pages
        assert client.wait() == client.expected
    finally:
        group.close()
    assert "rank 1: one is odd" in caplog.text
    assert "prefix cache on disk did not respond within 0.1 s" in caplog.text


def odd_step(rank: PlayedRank, step: Step) -> None:
    rank.say(StepResult(rank.epoch, step.number + 7, ()).to_json())


def odd_type(rank: PlayedRank, step: Step) -> None:
    rank.say({"type": "greeting", "epoch": rank.epoch})


def no_number(rank: PlayedRank, step: Step) -> None:
    message = StepResult(rank.epoch, step.number, ()).to_json()
    del message["number"]
    rank.say(message)


def odd_token(rank: PlayedRank, step: Step) -> None:
    message = StepResult(rank.epoch, step.number, (TokenEvent("a", 7),)).to_json()
    message["tokens"][0][1] = "seven"
    rank.say(message)


def odd_report(rank: PlayedRank, step: Step) -> None:
    message = StepResult(rank.epoch, step.number, ()).to_json()
    rank.say(message | {"report": {"total_s": 1.0}})


def odd_pages(rank: PlayedRank, step: Step) -> None:
    rank.say({"type": "pages", "epoch": rank.epoch, "report": {"written": ["key"]}})


def odd_failure(rank: PlayedRank, step: Step) -> None:
    rank.say({"type": "error", "epoch": rank.epoch, "error": "gone"})


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (odd_step, "sent a result of step 12, not in flight"),
        (odd_type, r"sent a malformed message \(type: expected heartbeat, .*, got 'greeting'\)"),
        (no_number, r"sent a malformed message \(step_result.number: missing\)"),
        (odd_token, r"step_result.tokens\[0\]: ValueError"),
        (odd_report, r"step_result.report.laps_s: missing"),
        (odd_pages, r"pages.report.written: expected 2 items, got 1"),
        (odd_failure, r"error.error: expected an object, got 'gone'"),
    ],
)
def test_a_malformed_message_is_the_failure_of_its_rank(play, wrong, reason):
    def fault(rank: PlayedRank, step: Step) -> None:
        if rank.epoch == 0 and rank.rank == 1 and step.number == 5:
            wrong(rank, step)

    group, stage = play(fault)
    client = Client(group, "a")
    assert client.wait() == client.expected
    assert stage.starts == [0, 1]
    assert group.state.rank == 1
    assert re.search(f"^rank 1 {reason}" if wrong is odd_step else reason, group.state.reason)


def test_ranks_that_measure_different_all_reduces_disagree(play):
    def fault(rank: PlayedRank, step: Step) -> None:
        if rank.epoch == 0 and step.number == 2:
            times = (0.1,) * (2 + rank.rank)
            rank.report = StepReport(1.0, {}, times, {}, decoding=True)

    group, _ = play(fault)
    client = Client(group, "a")
    assert client.wait() == client.expected
    assert "expected 2 measured all-reduces, got 3" in group.state.reason


def test_ranks_that_were_started_again_may_have_room_for_less():
    def fault(rank: PlayedRank, step: Step) -> None:
        if rank.epoch == 0 and step.number == 3:
            leave(rank, step)

    stage, scheduler = Stage(fault), Scheduler(8, 0)
    sizes = (10**6, CacheFootprint(8), 0)
    group = RankGroup(stage.start(Epoch()), scheduler, stage, lambda ranks: sizes)
    try:
        client = Client(group, "a")
        assert client.wait() == client.expected
        assert (scheduler.kv_cache_bytes, scheduler.footprint) == sizes[:2]
    finally:
        group.close()


@pytest.mark.parametrize("wrong", ["pages", "result", "report", "unreadable"])
def test_a_message_that_cannot_be_used_is_its_ranks_failure(play, wrong):
    def fault(rank: PlayedRank, step: Step) -> None:
        if rank.epoch or rank.rank != 1 or step.number != 5:
            return
        if wrong == "result":
            rank.say(StepResult(0, 10**9, ()).to_json())
        elif wrong == "report":
            rank.say(StepResult(0, step.number, (), StepReport(0.0, {}, (), {}, True)).to_json())
        elif wrong == "pages":
            rank.say({"type": "pages", "epoch": 0, "report": {"checked": ["never asked", []]}})
        else:
            rank.say(None.__class__)  # what no decoder has foreseen

    group, stage = play(fault)
    if wrong == "pages":

        def fail(rank: int, report: object) -> None:
            raise KeyError("never asked")

        group._scheduler.on_pages = fail
    client = Client(group, "a")
    assert client.wait() == client.expected
    assert stage.starts == [0, 1]
    assert group.state.reason.startswith("rank 1 ")
    assert group.failure is None


def test_ranks_that_cannot_be_used_are_started_again(play):
    group, _ = play(lambda rank, step: leave(rank, step) if step.number == 3 else None)
    measured = []

    def measure(ranks: object) -> tuple:
        measured.append(ranks)
        if len(measured) == 1:
            raise ZeroDivisionError("of a number that a rank has reported")
        return None, CacheFootprint(0), 0

    group._measure_capacity = measure
    client = Client(group, "a", 3)
    assert client.wait() == client.expected
