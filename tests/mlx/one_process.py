"""Several ranks as threads of one process, with real all-reduces, for tests of models and plans.

`Threads` is a `Collective` among threads; `run_ranks` loads a checkpoint's part on each and calls a
function there. No sockets, no processes: what fails here is the model or the plan.
"""

import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from cenacle.collective.base import Collective, RoutingDecision
from cenacle.core.model_spec import ModelSpec
from cenacle.core.plan import Plan
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.expert_parallel import parallelize
from cenacle.model.loader import load_rank_model
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.step_timer import StepTimer
from cenacle.model.synth import synth

VECTORS = Path(__file__).parent.parent / "vectors"
DEADLINE_S = 120


class Rendezvous:
    """Where the threads of a group meet."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.slots: list[mx.array | None] = [None] * size


class Threads(Collective):
    """One thread's end of a `Rendezvous`; every all-reduce is evaluated at once."""

    def __init__(self, meeting: Rendezvous, rank: int) -> None:
        super().__init__()
        self.rank, self.size, self._meeting = rank, meeting.size, meeting

    def _all_sum(self, x: mx.array, chosen: RoutingDecision | None) -> mx.array:
        mx.eval(x)
        slots, barrier = self._meeting.slots, self._meeting.barrier
        slots[self.rank] = x
        barrier.wait(DEADLINE_S)
        if len({(tuple(s.shape), s.dtype) for s in slots}) > 1:
            raise AssertionError(
                f"ranks gave different vectors: {[(s.shape, s.dtype) for s in slots]}"
            )
        y = slots[0]
        for other in slots[1:]:
            y = y + other
        mx.eval(y)
        barrier.wait(DEADLINE_S)
        return y


_idle: list[tuple[ThreadPoolExecutor, mx.Stream]] = []


def start_with_stream(function: Callable[..., None], *arguments: Any) -> Future[None]:
    """Run a function in a thread with a stream that are used again when it is done.

    A stream is its thread's alone, MLX never ends one, and each evaluation takes longer the more
    there are: with 200 four times as long.
    """
    if _idle:
        thread, stream = _idle.pop()
    else:
        thread = ThreadPoolExecutor(1, "rank")
        stream = thread.submit(mx.new_stream, mx.cpu).result()

    def run() -> None:
        with mx.stream(stream):
            function(*arguments)

    started = thread.submit(run)
    started.add_done_callback(lambda _: _idle.append((thread, stream)))
    return started


def in_threads(size: int, function: Callable[[Collective], Any]) -> list[Any]:
    """`function(collective)` on every rank at once, each in a thread with a stream of its own.

    Raises:
        Whatever the first rank that failed raised.
    """
    meeting = Rendezvous(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(Threads(meeting, rank))
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            meeting.barrier.abort()

    for started in [start_with_stream(run, rank) for rank in range(size)]:
        started.result()
    if errors:
        raise errors[0]
    if meeting.barrier.broken:
        raise AssertionError("a rank made fewer all-reduces than the others")
    return results


def load_rank(
    folder: Path,
    plan: Plan,
    collective: Collective,
    timer: StepTimer | None = None,
    kernels: str = "mlx",
) -> nn.Module:
    """One rank's expert-parallel model, in memory."""
    model = load_rank_model(
        Checkpoint.open(folder), plan, collective.rank, lambda done, total: None
    )
    parallelize(model, plan.spec.family, plan, collective, timer or StepTimer(), kernels)
    return model


@cache
def _folder_of_tiny_models() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cenacle-tiny-")


@cache
def tiny_model(family: str) -> Path:
    """What `synth(folder, family=family)` writes, once for all tests, which do not change it."""
    return synth(Path(_folder_of_tiny_models().name) / family, family=family).path


_specs: dict[tuple[Path, tuple[tuple[str, int, int], ...]], ModelSpec] = {}


def spec_of(folder: Path) -> ModelSpec:
    """`read_model_spec`, once for the same files: it builds a model."""
    files = sorted((f.name, f.stat()) for f in folder.iterdir() if f.is_file())
    key = folder, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)
    if key not in _specs:
        _specs[key] = read_model_spec(Checkpoint.open(folder))
    return _specs[key]


def run_ranks(
    folder: Path,
    nodes: int,
    function: Callable[[nn.Module, Collective], Any],
    wrap: Callable[[Collective], Collective] = lambda collective: collective,
    shares: tuple[float, ...] | None = None,
    placement: str = "whole",
) -> list[Any]:
    """`function(model, collective)` on each of `nodes` ranks that hold a checkpoint together.

    Args:
        wrap: puts another collective around each rank's, for instance `Recorded`.
        shares: as in `Plan.whole`.
        placement: "whole", "sliced" or "replicated".
    """
    place = getattr(Plan, placement)
    plan = place(spec_of(folder), nodes, node_weights=shares)

    def run(threads: Collective) -> Any:
        collective = wrap(threads)
        return function(load_rank(folder, plan, collective), collective)

    return in_threads(nodes, run)
