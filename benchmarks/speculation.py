"""Tokens a second with drafts and without, in turn, over an emulated link.

    python benchmarks/speculation.py [--model DIR] [--nodes 2] [--latency-ms 0.3] [--draft DIR]

The prompt is a text that says the same thing again and again. A model of random weights goes on
with something else; one that may say only a few tokens (`--words 2`) soon repeats itself.

The last line of stdout is JSON: "ratio", the median of the rounds'; "tok_per_s" of both ways;
"same", whether the tokens are the same; "drafted" and "accepted" of the drafting way, "by_model"
what of both is the draft model's.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import cenacle

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
PIECE = [81, 82, 83, 84, 85, 86, 87, 88]


def main() -> None:
    """Run the rounds and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--latency-ms", type=float, default=0.3)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draft", help="a draft model, DIR")
    parser.add_argument("--way", default="auto", help="auto or always")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--noise", action="store_true", help="a prompt that repeats nothing")
    parser.add_argument("--words", type=int, default=0, help="let a model say only so many tokens")
    given = parser.parse_args()
    ways = ("off", given.way)
    how: dict[str, Any] = {"temperature": given.temperature, "seed": 1}
    how["logit_bias"] = {token: 100.0 for token in PIECE[: given.words]}
    models = {
        way: cenacle.load(
            given.model,
            given.nodes,
            latency_s=given.latency_ms / 1000,
            speculative=way,
            draft_model=given.draft if way != "off" else None,
            measure_every=0,
            threads=1,
        )
        for way in ways
    }
    prompt = list(range(60, 90)) if given.noise else PIECE * 8
    if given.noise:  # and an answer that does not end
        stops = models["off"].text.stop_tokens
        how["logit_bias"] = dict.fromkeys(stops, -100.0)
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    answers: dict[str, list[int]] = {}
    try:
        for number in range(given.rounds + 1):
            for way in ways:
                done = models[way].generate(prompt, given.tokens, **how)
                answers[way] = done.tokens
                if number:  # the first is for warming up
                    speeds[way].append(done.tok_per_s)
        drafts = models[given.way].group.draft_stats
    finally:
        for model in models.values():
            model.close()
    ratios = [b / a for a, b in zip(*speeds.values(), strict=True)]
    said = {
        "model": Path(given.model).name,
        "nodes": given.nodes,
        "latency_ms": given.latency_ms,
        "tokens": len(answers["off"]),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(r, 3) for r in ratios],
        "tok_per_s": {way: round(statistics.median(s), 1) for way, s in speeds.items()},
        "same": answers["off"] == answers[given.way],
        "drafted": drafts.drafted,
        "accepted": drafts.accepted,
        "by_model": [drafts.by_model, drafts.by_model_accepted],
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
