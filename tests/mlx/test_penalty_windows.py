"""Over how many tokens penalties count."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from cenacle.core.request import Sampling
from cenacle.engine.sampling.sampler import make_processors

TOKENS = [1, 2, 2, 3]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"repetition_penalty": 2.0}, [4, 2, 2, 2]),
        ({"repetition_penalty": 2.0, "repetition_context_size": -1}, [4, 2, 2, 2]),
        ({"repetition_penalty": 2.0, "repetition_context_size": 1}, [4, 4, 4, 2]),
        ({"repetition_penalty": 2.0, "repetition_context_size": 0}, [4, 4, 4, 4]),
        ({"presence_penalty": 1.0, "presence_context_size": 2}, [4, 4, 3, 3]),
        ({"presence_penalty": 1.0, "presence_context_size": 0}, [4, 4, 4, 4]),
        ({"frequency_penalty": 1.0, "frequency_context_size": -1}, [4, 3, 2, 3]),
        ({"frequency_penalty": 1.0, "frequency_context_size": 3}, [4, 4, 2, 3]),
    ],
)
def test_a_penalty_counts_over_its_last_tokens(
    sampling: dict[str, Any], expected: list[float]
) -> None:
    logits = mx.full((1, 4), 4.0)
    for process in make_processors(Sampling(**sampling)):
        logits = process(mx.array(TOKENS), logits)
    np.testing.assert_allclose(np.asarray(logits)[0], expected)


def test_all_tokens_are_more_than_the_usual_ones() -> None:
    tokens = mx.array([1] + [2] * 50)
    for size, expected in ((20, 4.0), (-1, 3.0)):
        logits = mx.full((1, 4), 4.0)
        (process,) = make_processors(Sampling(presence_penalty=1.0, presence_context_size=size))
        assert float(process(tokens, logits)[0, 1]) == expected
