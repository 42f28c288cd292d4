"""mlx-lm as a peer: `python -m cenacle.bench.peers.mlx_lm_worker ORDER`.

Owns: loading a checkpoint with mlx-lm's own code, on one rank or tensor-parallel, and timing it.
Does not know: plans, kernels and collectives of Cenacle.
Invariant: the last line of stdout is one JSON object, {"decode", "prefill"} in tokens per second.
Activations are float32: on a CPU MLX is many times slower with bfloat16.
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

MIN_TOKENS = 4  # timed however slow it is


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
        """When it started, and when each token came."""
        prompt = mx.array(np.random.default_rng(0).integers(0, 256, length))
        moments = [time.perf_counter()]
        for _ in generate_step(prompt, model, max_tokens=tokens, prefill_step_size=512):
            moments.append(time.perf_counter())
        return moments

    def affordable(token_s: float, limit: int) -> int:
        """Tokens within the time budget; ranks must stop at the same token."""
        n = max(MIN_TOKENS, min(limit, int(order["budget_s"] / token_s)))
        if group is not None:
            n = int(np.asarray(mx.distributed.all_min(mx.array(n), group=group)))
        return n

    trial = times(order["context"], MIN_TOKENS)
    tokens = affordable((trial[-1] - trial[1]) / (MIN_TOKENS - 1), order["tokens"])
    moments = times(order["context"], tokens + 1)
    decode = tokens / (moments[-1] - moments[1])
    prompt_tokens = affordable((trial[1] - trial[0]) / order["context"], order["prompt_tokens"])
    moments = times(prompt_tokens, 1)
    print(json.dumps({"decode": decode, "prefill": prompt_tokens / (moments[1] - moments[0])}))


if __name__ == "__main__":
    main()
