"""What a checkpoint's drafting layer brings on two nodes, beside the same group without it.

    python tools/train_mtp.py --out /tmp/mtp       # and another with --spoiled
    python benchmarks/mtp.py --checkpoints /tmp/mtp /tmp/spoiled
    python benchmarks/mtp.py                       # layers that are set by hand

`--checkpoints` are the demo model with a trained layer, and with one that was trained badly on
purpose. Else the model is small and random, its layers turned down, so that a layer set by hand
expects nearly what it does (`tests/support/mtp_checkpoint.py`); a random layer is always wrong.
Both groups answer in turn; medians of the rounds. Answers are drawn, so that little repeats.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cenacle
from cenacle.core.request import Sampling

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from support.mtp_checkpoint import write_mtp

PROMPTS = ([5, 80, 200, 17, 9],) * 4
QUESTIONS = (
    "Count from 18 to 24.",
    "What is the capital of Peru?",
    "Sort the letters of planet alphabetically.",
    "What is 47 + 385?",
)


def tokens_per_s(
    model: cenacle.Model,
    prompts: Sequence[str | list[int]],
    arguments: argparse.Namespace,
    seed: int,
) -> float:
    streams, tokens = len(prompts), arguments.tokens

    def ask(stream: int) -> int:
        sampling = Sampling(temperature=arguments.temperature, seed=100 * seed + stream)
        request = model.request(prompts[stream], tokens, sampling, ignore_eos=True)
        return sum(1 for _ in model._stream(request, ()))

    started = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        total = sum(pool.map(ask, range(streams)))
    return total / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="glm4_moe")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latencies-ms", type=float, nargs="*", default=[0.0, 0.3, 1.0])
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--skills", nargs="*", default=["trained", "random"])
    parser.add_argument("--checkpoints", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    for latency_ms in arguments.latencies_ms:
        for checkpoint in arguments.checkpoints:
            measure(checkpoint, checkpoint.name, latency_ms, arguments, QUESTIONS)
    if arguments.checkpoints:
        return
    for skill in arguments.skills:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = write_mtp(
                Path(folder) / skill, arguments.family, skill, layers=arguments.layers
            )
            for latency_ms in arguments.latencies_ms:
                measure(checkpoint, skill, latency_ms, arguments, PROMPTS)


def measure(
    checkpoint: Path,
    skill: str,
    latency_ms: float,
    arguments: argparse.Namespace,
    prompts: Sequence[str | list[int]],
) -> None:
    options = {"latency_s": latency_ms / 1e3, "threads": 1, "placement": "sliced"}
    with (
        cenacle.load(str(checkpoint), 2, speculative="off", **options) as plain,
        cenacle.load(str(checkpoint), 2, **options) as drafting,
    ):
        for streams in arguments.streams:
            before = drafting.group.draft_stats
            speeds: dict[str, list[float]] = {"plain": [], "drafting": []}
            for seed in range(arguments.rounds + 1):
                for name, model in (("plain", plain), ("drafting", drafting)):
                    speed = tokens_per_s(model, prompts[:streams], arguments, seed)
                    if seed:  # the first round warms up
                        speeds[name].append(speed)
            without, with_it = (statistics.median(s) for s in speeds.values())
            drafts = drafting.group.draft_stats - before
            print(
                f"{skill:8} +{latency_ms} ms {streams} streams: {without:6.1f} -> {with_it:6.1f} "
                f"tokens/s, {with_it / without:.2f} times; accepted {drafts.by_model_accepted} of "
                f"{drafts.by_model} of the layer, {drafts.accepted - drafts.by_model_accepted} of "
                f"{drafts.drafted - drafts.by_model} from the text",
                flush=True,
            )


if __name__ == "__main__":
    main()
