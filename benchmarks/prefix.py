"""How much sooner the first token comes when a long system prompt was seen before.

Run: python benchmarks/prefix.py [--nodes N] [--tokens 4000] [--model DIR]. A random model of the
given form, or that of the folder, is asked twice with the same long beginning and different ends,
then once more after it was loaded again; the last line is JSON: `first_s`, `second_s` and
`restart_s`, seconds to the first token,
how many times shorter the last two are than the first, and how many tokens they found.
"""

from __future__ import annotations

import argparse
import json
import queue
import tempfile
import time
from pathlib import Path

import cenacle
from cenacle.api import Model
from cenacle.core.request import TokenEvent
from cenacle.errors import CenacleError
from cenacle.model.synth import synth
from cenacle.scheduler.disk_index import PAGE_TOKENS

WRITTEN_S = 60.0  # longest time until all is on disk


def first_token(model: Model, prompt: list[int]) -> tuple[float, TokenEvent]:
    """Seconds from asking to the first token, and the token."""
    events: queue.Queue[TokenEvent | CenacleError] = queue.Queue()
    began = time.perf_counter()
    model.group.submit(model.request(prompt, 2), events.put)
    event = events.get(timeout=600)
    seconds = time.perf_counter() - began
    if isinstance(event, CenacleError):
        raise event
    while event.finish is None:
        last = events.get(timeout=600)
        if isinstance(last, CenacleError):
            raise last
        if last.finish is not None:
            break
    return seconds, event


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--family", default="qwen3_moe")
    parser.add_argument("--model", help="a folder, instead of a small random model")
    how = parser.parse_args()
    system = [(131 * i * i + 17 * i + 5) % 257 for i in range(how.tokens)]
    with tempfile.TemporaryDirectory() as folder:
        path = how.model or str(synth(Path(folder) / "model", family=how.family).path)
        kept = Path(folder) / "kept"
        options = {"prefix_cache_disk_gb": 8, "prefix_cache_dir": str(kept)}
        with cenacle.load(path, how.nodes, **options) as model:
            first_token(model, [7] * 250)  # what is compiled and allocated once
            first_s, _ = first_token(model, [*system, 1, 2, 3])
            second_s, second = first_token(model, [*system, 4, 5, 6, 7, 8])
            _wait(kept, how.nodes * (how.tokens // PAGE_TOKENS))
        with cenacle.load(path, how.nodes, **options) as model:
            first_token(model, [7] * 250)
            restart_s, third = first_token(model, [*system, 9, 10, 11, 12])
    result = {
        "model": (how.model and Path(how.model).name) or how.family,
        "nodes": how.nodes,
        "tokens": how.tokens,
        "first_s": first_s,
    }
    result |= {"second_s": second_s, "ratio": first_s / second_s, "cached": second.cached_tokens}
    result |= {
        "restart_s": restart_s,
        "restart_ratio": first_s / restart_s,
        "read": third.disk_tokens,
    }
    print(json.dumps(result))


def _wait(kept: Path, files: int) -> None:
    ends = time.monotonic() + WRITTEN_S
    while (there := len(list(kept.glob("*/*/*.safetensors")))) < files:
        if time.monotonic() > ends:
            raise TimeoutError(f"{there} of {files} pages were written within {WRITTEN_S:g} s")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
