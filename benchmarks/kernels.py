"""How close the native kernels come to the memory bandwidth: `python benchmarks/kernels.py`.

For each format: one layer far larger than the caches, in turn with its limit, a pure read of its
bytes by as many threads; medians. Then several tokens at once, in multiplications. The last line of
stdout is JSON. Run it on an idle machine. On a busy one `--real-time` gives each measured call, of
some hundredths of a second, the processors for itself (root, Linux); `--cpu-time` leaves out the
time of others. What they take of the memory's bandwidth neither gives back.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from cenacle import native
from cenacle.ranks.local_ranks import MALLOC_TUNABLES

WIDTH = 2048
FORMATS = (
    *("float32", "bfloat16", "float16", "8-bit g64", "4-bit g32", "4-bit g64", "4-bit g128"),
    *("mxfp4", "nvfp4", "mxfp8", "fp8 g128", "3-bit g64"),
)


def set_real_time(on: bool) -> None:
    """Let all threads of this process go before those of others, or no longer."""
    policy = os.SCHED_FIFO if on else os.SCHED_OTHER
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setscheduler(int(thread.name), policy, os.sched_param(int(on)))


def seconds(work: Callable[[], Any], clock: Callable[[], float], real_time: bool = False) -> float:
    if real_time:
        set_real_time(True)
    start = clock()
    work()
    took = clock() - start
    if real_time:
        set_real_time(False)
        time.sleep(0.02)
    return took


def layer(name: str, rows: int) -> tuple[Any, mx.array, int]:
    """The kernels' weights, the array that holds most of their bytes, and their bytes."""
    weights = native.extension().Weights
    # A block of random rows, repeated: drawing them all takes longer than measuring.
    block = mx.random.normal((1024, WIDTH)).astype(mx.bfloat16)
    if name in ("float32", "bfloat16", "float16"):
        w = mx.contiguous(mx.tile(block.astype(getattr(mx, name)), (rows // 1024, 1)))
        return weights(w, None, None, None, 0, 0, ""), w, w.nbytes
    if name == "fp8 g128":
        codes = mx.to_fp8(block * 100)
        w = mx.contiguous(mx.tile(codes, (rows // 1024, 1))).view(mx.uint32)
        scales = mx.random.uniform(0.01, 0.03, (rows, WIDTH // 128))
        mx.eval(w, scales)
        return weights(w, scales, None, None, 8, 128, "fp8"), w, w.nbytes + scales.nbytes
    bits, group, mode = {
        "4-bit g32": (4, 32, "affine"),
        "4-bit g64": (4, 64, "affine"),
        "4-bit g128": (4, 128, "affine"),
        "8-bit g64": (8, 64, "affine"),
        "3-bit g64": (3, 64, "affine"),
        "mxfp4": (4, 32, "mxfp4"),
        "nvfp4": (4, 16, "nvfp4"),
        "mxfp8": (8, 32, "mxfp8"),
    }[name]
    parts = [
        mx.contiguous(mx.tile(a, (rows // 1024, 1)))
        for a in mx.quantize(block, group, bits, mode=mode)
    ]
    q, s, *b = parts
    layer_weights = weights(q, s, b[0] if b else None, None, bits, group, mode)
    return layer_weights, q, sum(p.nbytes for p in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--kernels", default=None, help="a set of kernels, else the best")
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine; one thread")
    parser.add_argument("--real-time", action="store_true", help="for a busy machine; root, Linux")
    parser.add_argument("--formats", default=",".join(FORMATS), help="by default: %(default)s")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    module = native.extension()
    mx.set_default_device(mx.cpu)
    module.set_threads(args.threads)
    if args.kernels:
        module.select_kernels(args.kernels)
    print(f"{platform.processor() or platform.machine()}, {native.describe_kernels()}")
    print("format        read GB/s   1 token GB/s   % of read   GMAC/s with 1   8   64 tokens")
    results = []
    for name in args.formats.split(","):
        weights, array, size = layer(name, args.rows)
        xs = {t: mx.random.normal((t, WIDTH)) for t in (1, 8, 64)}
        mx.eval(*xs.values())

        def run(tokens: int, weights: Any = weights, xs: dict[int, mx.array] = xs) -> float:
            return seconds(
                lambda: mx.eval(module.linear(xs[tokens], weights)), clock, args.real_time
            )

        run(1)
        pairs = [
            (seconds(lambda array=array: module.read(array), clock, args.real_time), run(1))
            for _ in range(args.repeat)
        ]
        limit = array.nbytes / statistics.median(p[0] for p in pairs) / 1e9
        one = statistics.median(p[1] for p in pairs)
        many = {t: min(run(t) for _ in range(2)) for t in (8, 64)}
        speed = {t: args.rows * WIDTH * t / s / 1e9 for t, s in {1: one, **many}.items()}
        gb_s = size / one / 1e9
        results.append(
            {
                "format": name,
                "read_gb_s": limit,
                "one_token_gb_s": gb_s,
                "percent": 100 * gb_s / limit,
                "gmac_s": speed,
            }
        )
        macs = "  ".join(f"{v:6.1f}" for v in speed.values())
        print(f"{name:12} {limit:9.1f} {gb_s:13.1f} {100 * gb_s / limit:12.0f}      {macs}")
    conditions = {"threads": args.threads, "kernels": module.selected_kernels(), "width": WIDTH}
    print(json.dumps({**conditions, "rows": args.rows, "results": results}))


if __name__ == "__main__":
    if MALLOC_TUNABLES not in os.environ.get("GLIBC_TUNABLES", ""):
        # Memory in pages as a rank's, which glibc must be told before it starts.
        environment = {**os.environ, "GLIBC_TUNABLES": MALLOC_TUNABLES}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    main()
