"""How much sooner the first token comes when a long system prompt was seen before.

Run: python benchmarks/prefix.py [--nodes N] [--tokens 4000]. A random model of the given form is
asked twice with the same long beginning and different ends; the last line is JSON:
`first_s` and `second_s`, seconds to the first token, their `ratio`, and `cached` tokens.
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
from cenacle.errors import CenacleError
from cenacle.model.synth import synth
from cenacle.request import TokenEvent


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
    how = parser.parse_args()
    system = [(131 * i * i + 17 * i + 5) % 257 for i in range(how.tokens)]
    with tempfile.TemporaryDirectory() as folder:
        path = synth(Path(folder) / "model", family=how.family).path
        with cenacle.load(str(path), how.nodes) as model:
            first_token(model, [7] * 600)  # what is compiled and allocated once
            first_s, _ = first_token(model, [*system, 1, 2, 3])
            second_s, event = first_token(model, [*system, 4, 5, 6, 7, 8])
    result = {"family": how.family, "nodes": how.nodes, "tokens": how.tokens, "first_s": first_s}
    result |= {"second_s": second_s, "ratio": first_s / second_s, "cached": event.cached}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
