"""Log-probabilities of prompt tokens.

Owns: how they are computed from the logits of a part of a prompt.
Does not know: requests, caches, the rest of the prompt.
Invariant: a token's own value equals its value among the best, bit for bit: clients compare them.
Next: `engine/batch.py` calls it for each part.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ...core.request import PromptLogprobs
from ...model.tensor_parallel import MAX_VERIFIED_POSITIONS
from .sampler import MIN_LOGPROB

# A part of a prompt, whose logits are in memory: 19 MB with a vocabulary of 152,000. Of more
# positions a sharded output head gives those of the last one.
PART_TOKENS = MAX_VERIFIED_POSITIONS


class PromptScores:
    """The scores of some prompt tokens, not yet computed.

    Args:
        logits: [tokens, vocabulary], at the position before each token.
        tokens: ids.
        top: number of alternatives to report.
    """

    def __init__(self, logits: mx.array, tokens: Sequence[int], top: int) -> None:
        assert logits.shape[0] == len(tokens), "one row for each token"
        logits = logits.astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        own = mx.take_along_axis(logprobs, mx.array(list(tokens))[:, None], axis=-1)
        ranks = mx.sum(logprobs > own, axis=-1) + 1
        self.arrays = [own[:, 0], ranks]
        if top := min(top, logits.shape[-1]):
            best = mx.argpartition(-logprobs, top - 1, axis=-1)[:, :top]
            self.arrays += [best, mx.take_along_axis(logprobs, best, axis=-1)]

    def read(self, request_id: str, begin: int) -> PromptLogprobs:
        """The computed scores; `begin`: position of the first token."""
        own, ranks, *top = (np.asarray(array) for array in self.arrays)
        rows: list[tuple[tuple[int, float], ...]] = [()] * len(own)
        if top:
            for at, (ids, values) in enumerate(zip(*top, strict=True)):
                order = np.lexsort((ids, -values))
                rows[at] = tuple((int(ids[i]), _finite(values[i])) for i in order)
        values = tuple(_finite(value) for value in own)
        return PromptLogprobs(request_id, begin, values, tuple(map(int, ranks)), tuple(rows))


def _finite(value: float) -> float:
    return max(float(value), MIN_LOGPROB) if np.isfinite(value) else MIN_LOGPROB
