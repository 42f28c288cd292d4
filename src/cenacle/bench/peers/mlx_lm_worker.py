"""mlx-lm itself as a peer: `python -m cenacle.bench.peers.mlx_lm_worker ORDER`.

Owns: loading a checkpoint with mlx-lm's own code, on one rank or tensor-parallel, and timing it.
Does not know: anything of ours: no plan, kernels or collective.
Invariant: the last line of stdout is one JSON object, {"decode", "prefill"} in tokens a second.
Activations are float32: on a CPU MLX is many times slower with bfloat16 ones.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

LEAST = 4  # tokens that are timed however slow it is


def main() -> None:
    """Load, measure, print."""
    order: dict[str, Any] = json.loads(sys.argv[1])
    group = mx.distributed.init(strict=True, backend="ring") if order["nodes"] > 1 else None
    model, _ = load_model(Path(order["folder"]), lazy=group is not None)
    if group is not None:
        if not hasattr(model, "shard"):
            raise SystemExit("mlx-lm cannot run this family tensor-parallel")
        model.shard(group)
    model.update(
        tree_map(
            lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a,
            model.parameters(),
        )
    )
    mx.eval(model.parameters())

    def times(length: int, tokens: int) -> list[float]:
        """Moments: the beginning, then each token."""
        # Ranks must stop at the same token: the budget is a number of tokens, from a first guess.
        prompt = mx.array(np.random.default_rng(0).integers(0, 256, length))
        seen = [time.perf_counter()]
        for _ in generate_step(prompt, model, max_tokens=tokens, prefill_step_size=512):
            seen.append(time.perf_counter())
        return seen

    def affordable(seconds_each: float, most: int) -> int:
        n = max(LEAST, min(most, int(order["budget_s"] / seconds_each)))
        if group is not None:
            n = int(np.asarray(mx.distributed.all_min(mx.array(n), group=group)))
        return n

    guess = times(order["context"], LEAST)
    tokens = affordable((guess[-1] - guess[1]) / (LEAST - 1), order["tokens"])
    seen = times(order["context"], tokens + 1)
    decode = tokens / (seen[-1] - seen[1])
    per_token = (guess[1] - guess[0]) / order["context"]
    prompt = affordable(per_token, order["prompt"])
    seen = times(prompt, 1)
    print(json.dumps({"decode": decode, "prefill": prompt / (seen[1] - seen[0])}))


if __name__ == "__main__":
    main()
