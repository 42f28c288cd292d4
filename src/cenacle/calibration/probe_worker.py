"""One local process of `cenacle calibrate`: `python -m cenacle.calibration.probe_worker`.

Owns: timing reads, kernels and exchanges while its neighbours do the same.
Does not know: what is made of the numbers (`calibrate.py`).
Invariant: as every rank: it says all the time that it is alive, and ends when its connection does.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import CenacleError
from ..message import parse
from ..ranks import worker
from ..ranks.channel import Channel
from ..ranks.messages import MeasureOrder, Ready, Stop

if TYPE_CHECKING:
    from ..collective.base import Collective

READS_MB = (1, 4, 16, 64, 256)
KERNELS = {  # name -> rows, columns: what a layer of such a model multiplies
    "attention 2048x2048": (2048, 2048),
    "expert 768x2048": (768, 2048),
    "expert 3584x2048": (3584, 2048),
    "head 32000x2048": (32000, 2048),
}
MESSAGES = (64, 4096, 24576, 262144, 1572864)
NARROW, WIDE, HIDDEN = 128, 1024, 2048  # experts' widths, of equal bytes together


def main() -> None:
    """Measure what the order asks for and send it in `Ready`."""
    channel = worker.connect_to_front()
    threading.Thread(target=worker.send_heartbeats, args=(channel,), daemon=True).start()
    try:
        _serve(channel, parse(worker.receive_message(channel), MeasureOrder))
    except Exception as error:
        if not isinstance(error, CenacleError):
            traceback.print_exc()
        worker.report_failure(channel, error)
        os._exit(0)


def _serve(channel: Channel, order: MeasureOrder) -> None:
    import mlx.core as mx

    from .. import native

    mx.set_default_device(mx.cpu) if native.is_available() else None
    threads = native.set_threads(local_ranks=int(order.arguments["share"]))
    collective = worker.join_collective(order.backend, order.nodes)
    seconds = float(order.arguments["seconds"])
    result = {
        "threads": threads,
        "device": f"{mx.default_device()}, {native.describe_kernels()}",
        "reads": _reads(collective, seconds),
        "kernels": _kernels(collective, seconds),
        "expert": _expert(collective, seconds),
        "exchanges": _exchanges(collective, seconds) if order.nodes > 1 else {},
    }
    channel.send(Ready(result=result).to_json())
    parse(worker.receive_message(channel), Stop)
    collective.close()


def _timed(work: Callable[[], Any], seconds: float, most: int = 400) -> list[float]:
    """Seconds of each run, after one that does not count, for about `seconds`."""
    work()
    out: list[float] = []
    ends = time.perf_counter() + seconds
    while len(out) < 3 or (time.perf_counter() < ends and len(out) < most):
        began = time.perf_counter()
        work()
        out.append(time.perf_counter() - began)
    return out


def _reads(collective: Collective, seconds: float) -> dict[str, list[float]]:
    """MB -> [GB/s, spread]: reading an array of that size again and again."""
    import mlx.core as mx

    from .. import native

    found = {}
    for size in READS_MB:
        array = mx.zeros(size * 250_000, dtype=mx.float32)
        mx.eval(array)

        def read(array: mx.array = array) -> None:
            if native.is_available():
                native.extension().read(array)
            else:
                mx.eval(mx.max(array))

        collective.barrier()
        found[str(size)] = _rate(_timed(read, seconds), size / 1000)
    return found


def _kernels(collective: Collective, seconds: float) -> dict[str, list[float]]:
    """Shape -> [GB/s, spread, GFLOP/s with 64 tokens] of 4-bit matrices in groups of 64.

    Each is copied until it is far larger than the caches, and the copies are read in turn.
    """
    import mlx.core as mx

    found = {}
    for name, (rows, columns) in KERNELS.items():
        dense = mx.random.normal((rows, columns)).astype(mx.bfloat16)
        parts = mx.quantize(dense, 64, 4)
        nbytes = sum(p.nbytes for p in parts)
        copies = max(2, 200_000_000 // nbytes)
        stack = [[mx.array(p) + 0 for p in parts] for _ in range(copies)]
        x1, x64 = mx.random.normal((1, columns)), mx.random.normal((64, columns))
        mx.eval(stack, x1, x64)
        made = [_weights(s) for s in stack]

        def one(made: list[Any] = made, x: mx.array = x1) -> None:
            mx.eval([apply(x) for apply in made])

        def many(made: list[Any] = made, x: mx.array = x64) -> None:
            mx.eval(made[0](x))

        collective.barrier()
        rate = _rate(_timed(one, seconds), copies * nbytes / 1e9)
        flops = 2 * 64 * rows * columns / statistics.median(_timed(many, seconds / 2)) / 1e9
        found[name] = [*rate, flops]
    return found


def _expert(collective: Collective, seconds: float) -> list[float]:
    """Microseconds, and spread, that an expert costs besides reading its bytes.

    Eight narrow experts less one that has as many bytes as they have together, over seven; each
    time others, out of more than caches hold.
    """
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_map
    from mlx_lm.models.switch_layers import SwitchGLU

    from ..model.expert_parallel import NativeExperts
    from ..model.native_layers import is_supported
    from ..model.step_timer import StepTimer

    links, times = 24, WIDE // NARROW
    made: list[tuple[Any, int, int]] = []
    for width, active in ((NARROW, times), (WIDE, 1)):
        few: Any = SwitchGLU(HIDDEN, width, active)
        nn.quantize(few, 64, 4)
        few.set_dtype(mx.bfloat16)  # scales, as they come in checkpoints
        count = active * max(1, 200_000_000 // (3 * HIDDEN * width * active * 9 // 16))
        few.update(tree_map(lambda p, n=count // active: mx.tile(p, (n, 1, 1)), few.parameters()))
        mx.eval(few.parameters())
        native = is_supported() and NativeExperts.supports(few)
        experts = NativeExperts(few, range(count), count, 0, StepTimer()) if native else few
        made.append((experts, active, count))
    x = mx.random.normal((1, HIDDEN))

    def run(experts: Any, active: int, count: int, turn: int) -> float:
        # Neighbours of one token are far from one another, and so are those of the next.
        far = count // active
        ids = [
            mx.array([[(turn * links + i) % far + far * e for e in range(active)]], mx.uint32)
            for i in range(links)
        ]
        mx.eval(ids, x)
        began = time.perf_counter()
        mx.eval([experts(x, chosen) for chosen in ids])
        return (time.perf_counter() - began) / links * 1e6

    collective.barrier()
    added: list[float] = []
    ends = time.perf_counter() + 2 * seconds
    while len(added) < 6 or time.perf_counter() < ends:
        narrow, wide = (run(*one, turn=len(added)) for one in made)
        added.append((narrow - wide) / (times - 1))
    return [max(0.0, statistics.median(added[1:])), _spread(added[1:])]


def _weights(parts: list[Any]) -> Callable[[Any], Any]:
    import mlx.core as mx

    from .. import native

    q, scales, biases = parts
    if native.is_available():
        held = native.extension().Weights(
            q, scales, biases, None, bits=4, group_size=64, mode="affine"
        )
        return lambda x: native.extension().linear(x, held)
    return lambda x: mx.quantized_matmul(x, q, scales, biases, True, 64, 4)


def _exchanges(collective: Collective, seconds: float) -> dict[str, list[float]]:
    """Bytes -> [microseconds, spread] of an exchange, 50 chained in a graph as in a model."""
    import mlx.core as mx

    found = {}
    for size in MESSAGES:
        x = mx.zeros(size // 4)
        links = 50 if size < 100_000 else 10

        def chain(x: mx.array = x, links: int = links) -> None:
            for _ in range(links):
                x = collective.all_sum(x)
            mx.eval(x)

        chain()
        # Every rank must run it equally often: rank 0's pace decides.
        first = statistics.median(_timed(chain, 0, 3))
        times = max(5, min(200, int(seconds / max(first, 1e-6))))
        rounds = int(collective.broadcast_from(0, mx.array([times])).tolist()[0])  # type: ignore[index,arg-type]
        runs = []
        for _ in range(rounds):
            began = time.perf_counter()
            chain()
            runs.append((time.perf_counter() - began) / links * 1e6)
        found[str(size)] = [statistics.median(runs), _spread(runs)]
    return found


def _rate(times: list[float], amount: float) -> list[float]:
    rates = [amount / t for t in times]
    return [statistics.median(rates), _spread(rates)]


def _spread(values: list[float]) -> float:
    """Half of the middle half's width over the median."""
    if len(values) < 4:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / middle


if __name__ == "__main__":
    main()
