"""Groups of real processes: the same tokens on any number of nodes, and no failure that hangs.

One group of two ranks serves every test that does not break it. Ranks exchange by the default
backend: the mesh on Linux. MLX's ring, which waits by spinning, has one test of its own.
"""

import itertools
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

import cenacle
from cenacle import CenacleError, CheckpointError, ClusterError, InputError, PlanError, RankLost
from cenacle.api import Model, TokenizerLoader
from cenacle.core.model_spec import ModelSpec, MoELayer
from cenacle.core.plan import Plan
from cenacle.core.request import Request, Sampling
from cenacle.demo.run import DEMO_MODEL_DIR
from cenacle.load_options import LoadOptions
from cenacle.model.checkpoint import Checkpoint
from cenacle.ranks.channel import ChannelClosed
from cenacle.ranks.local_ranks import LocalRanks
from cenacle.ranks.messages import LoadOrder, Ready
from cenacle.ranks.rank_group import RankGroup, StepObserver
from cenacle.ranks.step_timings import StepReport
from cenacle.runtime import Deployment
from cenacle.scheduler.scheduler import Scheduler
from support.polling import wait_until

OTHER_ROUTER = Path(__file__).parent / "other_router_rank.py"
VECTORS = Path(__file__).parent.parent / "vectors"
MIXTRAL = VECTORS / "mixtral"
RECORDED = mx.load(str(MIXTRAL / "vectors.safetensors"))
PROMPT = RECORDED["prompt_7.tokens"].tolist()
GREEDY = RECORDED["prompt_7.greedy"].tolist()
OTHERS = ([5, 6, 7], list(range(40)), [200], [17] * 90)
NO_END = {362: -100.0}  # of the demo
DICE = {"temperature": 1.0, "seed": 11, "top_p": 0.95}


def running(pid: int) -> bool:
    """Whether a process lives; one that ended but was not waited for does not."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False


def assert_gone(pids, seconds: float = 60.0) -> None:
    try:
        wait_until(lambda: not any(map(running, pids)), seconds, f"the end of {pids}")
    finally:
        for pid in filter(running, pids):  # a test that fails leaves nothing behind either
            os.kill(pid, signal.SIGKILL)


@contextmanager
def loaded(folder=MIXTRAL, nodes=2, **arguments):
    """A model whose processes are gone at the end, whatever happened."""
    model = cenacle.load(str(folder), nodes, **arguments)
    try:
        yield model
    finally:
        model.close()
        assert_gone(model.ranks.pids)


def answers(model) -> dict[str, list[int]]:
    return {
        "greedy": model.generate(PROMPT, 16).tokens,
        "dice": model.generate(PROMPT, 12, **DICE).tokens,
        "penalties": model.generate(
            PROMPT, 12, repetition_penalty=1.5, presence_penalty=0.5, logit_bias={7: 3.0}
        ).tokens,
        "long prompt": model.generate(list(range(200)), 6).tokens,
    }


@pytest.fixture(scope="module")
def two():
    with loaded() as model:
        yield model


@pytest.fixture(scope="module")
def one():
    with loaded(nodes=1) as model:
        return answers(model) | {"batch": [model.generate(p, 10).tokens for p in OTHERS]}


def test_one_node_gives_the_recorded_tokens(one):
    assert one["greedy"] == GREEDY
    assert len(set(one["dice"])) > 1


def test_two_nodes_give_the_same_tokens(one, two):
    assert answers(two) == {k: v for k, v in one.items() if k != "batch"}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_ranks_that_never_tokenize_do_not_load_a_tokenizer_library(two):
    for pid in two.ranks.pids:
        assert "tokenizers" not in Path(f"/proc/{pid}/maps").read_text()


class ReportRecorder(StepObserver):
    """Keeps rank 0's reports of measured steps."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []

    def on_step_measured(self, reports) -> None:
        self.reports.append(reports[0])


def test_a_measured_step_has_a_pass_of_the_model():
    """A token that was computed in the step before is no measurement."""
    with loaded(DEMO_MODEL_DIR, measure_every=1) as model:
        model.group.observers.append(recorder := ReportRecorder())
        for tokens in (8, 24, 40) * 3:
            stream = model.stream("What is 12 + 30?", tokens, logit_bias=NO_END)
            for _ in itertools.islice(stream, 3):
                pass
            stream.close()
            list(model.stream("What is 12 + 30?", tokens, logit_bias=NO_END))
    steps = [report for report in recorder.reports if report.decoding]
    assert len(steps) > 50
    assert all(report.routed and report.laps_s for report in steps)


def test_ring_gives_the_same_tokens(one):
    with loaded(backend="ring") as model:
        assert (model.ranks.backend, model.ranks.backend_reason) == ("ring", None)
        assert model.generate(PROMPT, 16).tokens == GREEDY


def test_three_nodes_with_unlike_shares_give_the_same_tokens(one):
    with loaded(nodes=3, node_weights=(5, 2, 1), placement="whole", prefill_chunk_size=64) as model:
        assert [len(model.plan.layers[0].experts_of(r)) for r in range(3)] == [5, 2, 1]
        assert model.generate(PROMPT, 16).tokens == GREEDY
        assert model.generate(list(range(200)), 6).tokens == one["long prompt"]


def test_each_rank_reports_its_own_memory_and_disk(two):
    beats = two.group.heartbeats
    wait_until(lambda: all(beat.memory and beat.disk for beat in beats), 60, "first heartbeats")
    for memory, disk in ((beat.memory, beat.disk) for beat in beats):
        assert 10**7 < memory.resident_bytes < memory.total_bytes
        assert memory.available_bytes < memory.total_bytes
        assert 0 < disk.free_bytes <= disk.total_bytes


def test_seeds(two):
    again = [two.generate(PROMPT, 12, **DICE).tokens for _ in range(2)]
    other = two.generate(PROMPT, 12, **DICE | {"seed": 12}).tokens
    assert again[0] == again[1] != other
    fresh = {tuple(two.generate(PROMPT, 12, temperature=1.0).tokens) for _ in range(2)}
    assert len(fresh) > 1, "without a seed every answer is drawn anew"


@pytest.mark.parametrize(
    "how", [{}, DICE, {"repetition_penalty": 1.5, "presence_penalty": 0.5}, DICE | {"top_k": 40}]
)
def test_an_answer_goes_on_where_it_was(two, how):
    """What a group that is formed again is asked, given to one that is whole."""
    request = two.request(PROMPT, 16, Sampling(**how))
    whole = [chunk.token for chunk in two._stream(request, ())]
    for count in (1, 7, 15):
        rest = two._stream(replace(request, id=f"after {count}").resumed_with(whole[:count]), ())
        assert [chunk.token for chunk in rest] == whole[count:]


def test_stream_gives_every_token_and_ends(two):
    chunks = list(two.stream(PROMPT, 16))
    assert [c.token for c in chunks] == GREEDY
    assert [c.finish for c in chunks] == [None] * 15 + ["length"]
    assert two.group.load == {"running": 0, "waiting": 0}


def test_completion_says_what_it_cost(two):
    done = two.generate(PROMPT, 40)
    assert (done.finish, done.prompt_tokens, done.nodes) == ("length", len(PROMPT), 2)
    assert done.first_token_s > 0
    assert done.tok_per_s > 0
    parts = [v for k, v in done.step_timings_ms.items() if k != "total"]
    assert sum(parts) == pytest.approx(done.step_timings_ms["total"])
    assert done.step_timings_ms["total"] > 0, "no step was measured"
    assert done.step_timings_ms["all_reduce"] > 0
    assert sorted(done.routed) == [0, 1]
    chosen = {sum(counts.values()) for counts in done.routed.values()}
    assert len(chosen) == 1, "every layer routes every token"
    assert min(chosen) >= 2


def test_early_end_cancels(two):
    stream = two.stream(PROMPT, 400)
    assert next(stream).token == GREEDY[0]
    assert two.group.load["running"] == 1
    stream.close()
    wait_until(lambda: two.group.load == {"running": 0, "waiting": 0}, 60, "an idle group")
    assert two.generate(PROMPT, 16).tokens == GREEDY


def test_several_at_once_are_as_alone(one, two):
    got: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        got[index] = two.generate(OTHERS[index], 10).tokens

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(OTHERS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [got.get(i) for i in range(len(OTHERS))] == one["batch"]


def test_wrong_requests_are_refused_and_harm_nobody(two):
    for prompt, arguments, message in [
        ([], {}, "at least one token"),
        ([256], {}, "token ids from 0 to 255"),
        ([-1], {}, "token ids from 0 to 255"),
        ([1] * 512, {}, "do not fit the model's context of 512"),
        ([1], {"max_tokens": 0}, "max_tokens: expected at least 1"),
        ([1], {"temperature": 3}, "temperature: expected a number from 0 to 2"),
        ([1], {"color": "red"}, "unknown argument"),
    ]:
        with pytest.raises(InputError, match=message):
            two.generate(prompt, **arguments)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        two.generate("text")
    assert two.generate(PROMPT, 3).tokens == GREEDY[:3]


def ask_all(model) -> tuple[list[threading.Thread], list[CenacleError]]:
    """Several long requests under way, and the errors that end them."""
    errors = []

    def ask(prompt) -> None:
        try:
            list(model.stream(prompt, 400))
        except CenacleError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in OTHERS]
    for thread in threads:
        thread.start()
    wait_until(lambda: model.group.load["running"] == len(OTHERS), 60, "all requests to run")
    return threads, errors


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_is_named_in_mid_answer(rank):
    with loaded(latency_s=0.005, recover=False) as model:
        threads, errors = ask_all(model)
        began = time.monotonic()
        os.kill(model.ranks.pids[rank], signal.SIGKILL)
        for thread in threads:
            thread.join(6)
        assert time.monotonic() - began < 60
        assert [type(e) for e in errors] == [RankLost] * len(OTHERS), "every request is told"
        assert {e.rank for e in errors} == {rank}
        pid = model.ranks.pids[rank]
        assert str(errors[0]).startswith(f"rank {rank} (process {pid}) was killed by SIGKILL")
        assert_gone(model.ranks.pids)
        with pytest.raises(RankLost, match=f"rank {rank} "):
            model.generate(PROMPT, 1)


def test_killed_idle_rank_is_noticed():
    with loaded(recover=False) as model:
        os.kill(model.ranks.pids[1], signal.SIGKILL)
        wait_until(lambda: model.group.failure is not None, 60, "the loss of rank 1")
        assert isinstance(model.group.failure, RankLost)
        assert model.group.failure.rank == 1
        assert_gone(model.ranks.pids)


def test_stopped_rank_is_named_in_mid_answer():
    """SIGSTOP: the process is there and says nothing, as one that swaps or hangs."""
    with loaded(latency_s=0.005, recover=False) as model:
        stream = model.stream(PROMPT, 400)
        next(stream)
        began = time.monotonic()
        os.kill(model.ranks.pids[1], signal.SIGSTOP)
        with pytest.raises(RankLost, match="rank 1 sent nothing for 4 s") as lost:
            list(stream)
        assert lost.value.rank == 1
        assert time.monotonic() - began < 60
        assert_gone(model.ranks.pids)


def test_close_tells_those_who_wait():
    with loaded(nodes=1) as model:
        stream = model.stream(PROMPT, 400)
        next(stream)
        model.close()
        with pytest.raises(ClusterError, match="closed"):
            list(stream)
        model.close()
        assert_gone(model.ranks.pids)


def deployed(plan: Plan) -> Deployment:
    """A deployment of the reference model, without a tokenizer."""
    checkpoint = Checkpoint.open(MIXTRAL)
    return Deployment(LoadOptions(str(MIXTRAL)), "mixtral", checkpoint, None, None, plan, "")


def test_bf16_on_the_wire(two):
    with loaded(nodes=3, comm_dtype="bf16") as model:
        tokens = model.generate(PROMPT, 16).tokens
        assert len(tokens) == 16
        assert tokens[:2] == GREEDY[:2]  # rounded, but near
    with pytest.raises(InputError, match="since the backend ring sends vectors unchanged"):
        cenacle.load(str(MIXTRAL), 2, backend="ring", comm_dtype="bf16")
    with pytest.raises(InputError, match="expected one of f32, bf16, got 'int8'"):
        cenacle.load(str(MIXTRAL), 2, comm_dtype="int8")


@pytest.mark.parametrize("kernels", ["mlx", "auto"])
def test_rank_that_routes_otherwise_is_caught_before_a_token_is_served(kernels):
    plan = cenacle.inspect(str(MIXTRAL), 2)
    ranks = LocalRanks(2, program=(sys.executable, str(OTHER_ROUTER)))
    try:
        ranks.load(LoadOrder(str(MIXTRAL), plan, kernels))
        group = RankGroup(ranks, Scheduler(4, 0))
        model = Model(deployed(plan), group)
        message = (
            "rank 1 chose other experts than rank 0 for the same tokens in all-reduce [0-9]+, "
        )
        tokens = []
        with pytest.raises(RankLost, match=message + "layer 1"):
            tokens.extend(model.stream(PROMPT, 16))
        assert tokens == []
        assert "chose other experts" in str(group.failure)
    finally:
        ranks.close(now=True)
        assert_gone(ranks.pids)


class Ending:
    """A rank that says why it ends while the next step is on its way to it."""

    def __init__(self):
        self.channels, self.pids, self.ready = [self], [], [Ready()]
        self._sent, self._said = threading.Event(), False

    def send(self, message):
        self._sent.set()
        raise ChannelClosed("lost its connection (Broken pipe)")

    def receive(self):
        self._sent.wait(120)
        time.sleep(0.1)
        if self._said:
            raise ChannelClosed("the connection was closed")
        self._said = True
        return {"type": "error", "epoch": 0, "error": {"message": "it has a reason"}}

    def blame(self, rank, reason):
        return RankLost(rank, f"rank {rank} {reason}")

    def close(self, *, now):
        pass


def test_last_words_are_heard_though_a_step_cannot_be_sent():
    group = RankGroup(Ending(), Scheduler(4, 0))
    group.submit(Request("r", (1, 2), 3), lambda event: None)
    wait_until(lambda: group.failure is not None, 60, "the end of the group")
    assert str(group.failure) == "rank 0 failed: it has a reason"
    group.close()


def test_ranks_that_cannot_load_say_why(tmp_path):
    """The front has read the headers; a moment later, on the ranks, the file is truncated."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(MIXTRAL / "config.json", folder)
    shutil.copy(MIXTRAL / "model.safetensors", folder)
    plan = cenacle.inspect(str(folder), 2)
    ranks = LocalRanks(2)
    try:
        os.truncate(folder / "model.safetensors", 300_000)
        with pytest.raises(CheckpointError, match=r"rank [01]: .*is truncated"):
            ranks.load(LoadOrder(str(folder), plan, "mlx"))
    finally:
        ranks.close(now=True)
    assert_gone(ranks.pids)
    assert not ranks.folder.exists()


def children() -> set[int]:
    """Processes started by this one that have not ended."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
    pairs = [map(int, line.split()) for line in listing.stdout.splitlines()]
    return {pid for pid, parent in pairs if parent == os.getpid() and running(pid)}


def test_load_that_fails_on_the_ranks_leaves_no_process():
    """What one rank says is what the caller gets, in its own class."""
    before = children()
    moe = tuple(MoELayer(i, 4, 18432) for i in range(2))
    other = Plan.whole(ModelSpec("mixtral", 2, moe, 2, 0, 512, 256, "float32"), 2)
    with pytest.raises(PlanError, match=r"rank [01]: the plan is of another model"):
        cenacle.load(str(MIXTRAL), plan=other)
    assert children() == before


@pytest.mark.parametrize("what", ["plan", "tokenizer", "model"])
def test_ranks_that_were_started_early_end_when_the_front_fails(tmp_path, what):
    """What is wrong is found only when the ranks run."""
    folder = tmp_path / "model"
    shutil.copytree(MIXTRAL, folder)
    options, message = {}, "the tokenizer cannot be loaded"
    if what == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    if what == "plan":
        options, message = {"node_weights": [1, 2, 3]}, "expected 2 numbers"
    if what == "model":
        (folder / "config.json").write_text('{"model_type": "unheard_of"}')
        message = "unheard_of"
    before, started = children(), []
    start_early = LocalRanks.start_early.__func__

    def record(cls, load):
        started.append(start_early(cls, load))
        return started[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalRanks, "start_early", classmethod(record))
        with pytest.raises(CenacleError, match=message):
            cenacle.load(str(folder), nodes=2, **options)
    (ranks,) = started
    assert isinstance(ranks, LocalRanks)
    assert children() == before
    assert not ranks.folder.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"model": "org/model"},
        {"nodes": 0},
        {"nodes": 1000},
        {"draft_model": str(MIXTRAL)},
        {"verify": True},
    ],
)
def test_ranks_do_not_start_early_where_they_would_wait(options):
    before = children()
    assert LocalRanks.start_early(LoadOptions(**{"model": str(MIXTRAL), **options})) is None
    assert children() == before


def test_ranks_wait_for_a_front_that_takes_its_time():
    """They are silent until they have an order, and then are heard."""
    order = LoadOrder(str(MIXTRAL), cenacle.inspect(str(MIXTRAL), 2), "auto")
    ranks = LocalRanks(2, wait=False)
    try:
        ranks.connect()
        readable, _, _ = select.select(ranks.channels, [], [], 1.0)
        assert readable == []
        ranks.load(order)
        assert len(ranks.ready) == 2
        ranks.channels[0].receive()  # a heartbeat
    finally:
        ranks.close(now=True)


def test_ranks_without_an_order_end_with_their_front():
    ranks = LocalRanks(2, wait=False)
    try:
        ranks.connect()
        for channel in ranks.channels:
            channel.close()
        for process in ranks._processes:
            process.wait(timeout=120)
    finally:
        ranks.close(now=True)


def test_a_tokenizer_that_comes_too_late_leaves_no_process():
    may_end, closed = threading.Event(), threading.Event()
    tokenizer = SimpleNamespace(start_process=lambda: may_end.wait(120), close=closed.set)
    deployment = SimpleNamespace(tokenizer=tokenizer)
    with (
        pytest.raises(ClusterError, match="lost"),
        TokenizerLoader(deployment, isolate_text=True),
    ):
        raise ClusterError("lost")
    assert not closed.is_set()
    may_end.set()
    assert closed.wait(120)


def test_rank_that_does_not_start():
    with pytest.raises(ClusterError, match=r"ranks \[0, 1\] did not start: .* status 3"):
        LocalRanks(2, program=(sys.executable, "-c", "raise SystemExit(3)"))


FRONT = """
import signal, sys, cenacle
# The tests may run where SIGINT is ignored, as behind `&` in a shell.
signal.signal(signal.SIGINT, signal.default_int_handler)
model = cenacle.load(sys.argv[1], int(sys.argv[2]), latency_s=0.005)
print(*model.ranks.pids, flush=True)
for chunk in model.stream([1, 2, 3], 500):
    pass
"""


@contextmanager
def front(nodes: int):
    """A front in a process of its own that generates, with its ranks' ids."""
    command = [sys.executable, "-c", FRONT, str(MIXTRAL), str(nodes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == nodes
        assert all(map(running, pids))
        try:
            yield process, pids
        finally:
            process.kill()
            assert_gone(pids)


def test_killed_front_leaves_no_rank():
    """Not even one that waits in an exchange for a rank that hangs."""
    with front(2) as (process, pids):
        os.kill(pids[1], signal.SIGSTOP)
        time.sleep(0.2)
        process.kill()
        try:
            assert_gone(pids[:1])
        finally:
            os.kill(pids[1], signal.SIGCONT)


def test_interrupted_front_leaves_no_rank():
    """Ctrl-C goes to the front only."""
    with front(1) as (process, _):
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.stderr.read()
