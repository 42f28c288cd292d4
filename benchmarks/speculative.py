"""Tokens a second with and without speculative decoding, alternating, over an emulated link.

    python benchmarks/speculative.py [--model DIR] [--nodes 2] [--latency-ms 0.3]
        [--draft-model DIR]

The prompt repeats itself. A model of random weights does not continue the repetition; one that is
limited to a few token ids (`--token-ids 2`) soon repeats itself.

The last line is JSON: "ratio", the median over the rounds; "tok_per_s" of both modes; "same",
whether the tokens are the same; "drafted" and "accepted" tokens, and "by_model", those of the draft
model.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import cenacle

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
PHRASE = [81, 82, 83, 84, 85, 86, 87, 88]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--latency-ms", type=float, default=0.3)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draft-model", help="folder of a draft model")
    parser.add_argument("--speculative", default="auto", help="auto or always")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--noise", action="store_true", help="a prompt without repetition")
    parser.add_argument("--token-ids", type=int, default=0, help="limit the output to so many ids")
    return parser.parse_args()


def main() -> None:
    """Run the rounds and print."""
    args = parse_arguments()
    modes = ("off", args.speculative)
    sampling: dict[str, Any] = {"temperature": args.temperature, "seed": 1}
    sampling["logit_bias"] = {token: 100.0 for token in PHRASE[: args.token_ids]}
    models = {
        mode: cenacle.load(
            args.model,
            args.nodes,
            latency_s=args.latency_ms / 1000,
            speculative=mode,
            draft_model=args.draft_model if mode != "off" else None,
            measure_every=0,
            threads=1,
        )
        for mode in modes
    }
    prompt = list(range(60, 90)) if args.noise else PHRASE * 8
    if args.noise:  # an output that does not end
        sampling["logit_bias"] = dict.fromkeys(models["off"].text.stop_tokens, -100.0)
    speeds: dict[str, list[float]] = {mode: [] for mode in modes}
    outputs: dict[str, list[int]] = {}
    try:
        for number in range(args.rounds + 1):
            for mode in modes:
                completion = models[mode].generate(prompt, args.tokens, **sampling)
                outputs[mode] = completion.tokens
                if number:  # the first round warms up
                    speeds[mode].append(completion.tok_per_s)
        stats = models[args.speculative].group.draft_stats
    finally:
        for model in models.values():
            model.close()
    ratios = [b / a for a, b in zip(*speeds.values(), strict=True)]
    result = {
        "model": Path(args.model).name,
        "nodes": args.nodes,
        "latency_ms": args.latency_ms,
        "tokens": len(outputs["off"]),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(r, 3) for r in ratios],
        "tok_per_s": {mode: round(statistics.median(s), 1) for mode, s in speeds.items()},
        "same": outputs["off"] == outputs[args.speculative],
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "by_model": [stats.by_model, stats.by_model_accepted],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
