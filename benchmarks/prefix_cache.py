"""How much the prefix cache shortens the time to the first token after a long system prompt.

    python benchmarks/prefix_cache.py [--nodes N] [--tokens 4000] [--model DIR]

A model (by default a small random one) gets two prompts with the same long prefix and different
ends, and a third one after it was loaded again. The last line is JSON: seconds to the first token
(`first_s`, `second_s`, `restart_s`), the speed-ups over the first, and the cached tokens.
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

WRITE_TIMEOUT_S = 60.0
TOKEN_TIMEOUT_S = 600.0


def first_token(model: Model, prompt: list[int]) -> tuple[float, TokenEvent]:
    """Seconds until the first token, and its event."""
    events: queue.Queue[TokenEvent | CenacleError] = queue.Queue()
    began = time.perf_counter()
    model.group.submit(model.request(prompt, 2), events.put)
    first = next_event(events)
    seconds, event = time.perf_counter() - began, first
    while event.finish is None:
        event = next_event(events)
    return seconds, first


def next_event(events: queue.Queue[TokenEvent | CenacleError]) -> TokenEvent:
    """The next event; raises the error of a request that failed."""
    event = events.get(timeout=TOKEN_TIMEOUT_S)
    if isinstance(event, CenacleError):
        raise event
    return event


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--family", default="qwen3_moe")
    parser.add_argument("--model", help="a folder, instead of a small random model")
    args = parser.parse_args()
    prefix = [(131 * i * i + 17 * i + 5) % 257 for i in range(args.tokens)]
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or str(synth(Path(folder) / "model", family=args.family).path)
        pages = Path(folder) / "pages"
        options = {"prefix_cache_disk_gb": 8, "prefix_cache_dir": str(pages)}
        with cenacle.load(path, args.nodes, **options) as model:
            first_token(model, [7] * 250)  # compiles and allocates
            first_s, _ = first_token(model, [*prefix, 1, 2, 3])
            second_s, second = first_token(model, [*prefix, 4, 5, 6, 7, 8])
            wait_for_pages(pages, args.nodes * (args.tokens // PAGE_TOKENS))
        with cenacle.load(path, args.nodes, **options) as model:
            first_token(model, [7] * 250)
            restart_s, third = first_token(model, [*prefix, 9, 10, 11, 12])
    result = {
        "model": (args.model and Path(args.model).name) or args.family,
        "nodes": args.nodes,
        "tokens": args.tokens,
        "first_s": first_s,
        "second_s": second_s,
        "ratio": first_s / second_s,
        "cached_tokens": second.cached_tokens,
        "restart_s": restart_s,
        "restart_ratio": first_s / restart_s,
        "disk_tokens": third.disk_tokens,
    }
    print(json.dumps(result))


def wait_for_pages(folder: Path, count: int) -> None:
    """Wait until all pages are on disk."""
    deadline = time.monotonic() + WRITE_TIMEOUT_S
    while (written := len(list(folder.glob("*/*/*.safetensors")))) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{written} of {count} pages written in {WRITE_TIMEOUT_S:g} s")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
