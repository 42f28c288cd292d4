"""A step of streams of very different lengths, with padded caches and with caches of their own.

    python benchmarks/mixed_lengths.py MODEL [--lengths 32 8192] [--steps 12]

Caches are filled with one number. Steps with mlx-lm's batch caches, which pad every stream to
the longest, and with `StreamCaches` take turns; also each length alone, and all streams as short as
the shortest; and what it costs when a short stream joins, with the bytes of all caches then. Times
are this process's processor time, milliseconds a step, the median; the last line is JSON.
CENACLE_THREADS sets the kernels' threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from cenacle.model.stream_caches import into_streams
from prompt_beside_answers import load_model


def fill_caches(model: nn.Module, length: int) -> list[Any]:
    """Caches of a stream."""
    caches = make_prompt_cache(model)
    model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
    for cache in caches:
        assert type(cache) is KVCache, "expected a model with plain caches"
        for name in ("keys", "values"):
            like = getattr(cache, name)
            shape = (1, like.shape[1], length, like.shape[3])
            setattr(cache, name, mx.full(shape, 0.1, like.dtype))
        cache.offset = length
    mx.eval([cache.state for cache in caches])
    return caches


def merge(streams: list[list[Any]]) -> list[Any]:
    """One cache a layer."""
    merged = [layer[0].merge(layer) for layer in zip(*streams, strict=True)]
    mx.eval([cache.state for cache in merged])
    return merged


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a checkpoint's folder")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 8192])
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    model, _, _ = load_model(args.model)

    def streams(lengths: list[int]) -> list[list[Any]]:
        return [fill_caches(model, length) for length in lengths]

    short = [min(args.lengths)] * len(args.lengths)
    cases = {
        "padded": merge(streams(args.lengths)),
        "own": merge([into_streams(s) for s in streams(args.lengths)]),
        "padded, all short": merge(streams(short)),
        "own, all short": merge([into_streams(s) for s in streams(short)]),
    }
    cases |= {f"alone at {n}": fill_caches(model, n) for n in args.lengths}
    times_ms: dict[str, list[float]] = {name: [] for name in cases}
    for step in range(args.steps):
        for name, caches in cases.items():
            rows = 1 if name.startswith("alone") else len(args.lengths)
            began_s = time.process_time()
            mx.eval(model(mx.array([[step + 5]] * rows), cache=caches))
            times_ms[name].append(1000 * (time.process_time() - began_s))
    join_ms = {}
    for name, convert in (("padded", list), ("own", into_streams)):
        times = []
        for _ in range(3):
            running = merge([convert(s) for s in streams(args.lengths)])
            joining = merge([convert(s) for s in streams(short[:1])])
            began_s = time.process_time()
            for cache, other in zip(running, joining, strict=True):
                cache.extend(other)
            mx.eval([cache.state for cache in running])
            times.append(1000 * (time.process_time() - began_s))
            kept_bytes = sum(cache.nbytes for cache in running)
        join_ms[name] = {"ms": round(statistics.median(times), 1), "bytes": kept_bytes}
    medians = {name: round(statistics.median(values), 1) for name, values in times_ms.items()}
    result: dict[str, Any] = {
        "model": Path(args.model).name,
        "lengths": args.lengths,
        "step_ms": medians,
    }
    result["join"] = join_ms
    result["ratio"] = round(medians["padded"] / medians["own"], 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
