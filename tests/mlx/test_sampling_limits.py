"""Parameters of sampling at the ends of their ranges, and made up anew with every request."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from cenacle.collective.single import SingleRank
from cenacle.core.request import Sampling
from cenacle.engine.sampling.sampler import Sampler, make_processors, mask_unlikely

VOCABULARY = 500
MANY_VALUES = """
import mlx.core as mx
from cenacle.collective.single import SingleRank
from cenacle.core.request import Sampling
from cenacle.engine.sampling.sampler import Sampler

logprobs = mx.log(mx.softmax(mx.arange(50.0)[None], axis=-1))
for at in range(1, 4):
    value = at / 7
    sampling = Sampling(value, value, at, value)
    mx.eval(Sampler(SingleRank(), sampling, 1).sample(logprobs, 0))
"""


def logprobs(seed: int = 0) -> mx.array:
    logits = np.random.default_rng(seed).normal(0, 3, (1, VOCABULARY)).astype(np.float32)
    return mx.log(mx.softmax(mx.array(logits), axis=-1))


def test_values_of_a_request_are_not_compiled(tmp_path: Path) -> None:
    """MLX calls the C++ compiler for each new constant: seconds, in which all requests wait."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", MANY_VALUES], env=environment, check=True, timeout=300)
    assert list(tmp_path.rglob("*.so")) == []


@pytest.mark.parametrize("least", [1e-5, 1e-30, 1e-38, 1e-44, 1e-300, 5e-324])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_least_values_choose_the_best_token(dtype: mx.Dtype, least: float) -> None:
    values = logprobs().astype(dtype)
    best = float(mx.max(values))
    for sampling in (
        Sampling(temperature=least),
        Sampling(temperature=1.0, top_p=least),
        Sampling(temperature=least, top_p=least, min_p=least, top_k=3),
    ):
        for seed in range(5):
            (token,) = Sampler(SingleRank(), sampling, seed).sample(values, 0).tolist()
            assert float(values[0, token]) == best, sampling


@pytest.mark.parametrize("least", [1e-5, 1e-38, 5e-324])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_least_penalty_leaves_numbers(dtype: mx.Dtype, least: float) -> None:
    logits = (logprobs() * 10 + 100).astype(dtype)
    for process in make_processors(Sampling(repetition_penalty=least)):
        logits = process(mx.array([3, 4, 4]), logits)
    assert bool(mx.all(mx.isfinite(logits)))
    assert int(mx.argmax(logits)) in (3, 4)


@pytest.mark.parametrize(
    "fields", [{"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 7}, {"top_p": 0.9, "top_k": 4}]
)
def test_unlikely_tokens_are_left_out(fields: dict[str, Any]) -> None:
    for seed in range(5):
        values = logprobs(seed)
        kept = np.isfinite(np.asarray(mask_unlikely(values, Sampling(1.0, **fields)))[0])
        probabilities = np.exp(np.asarray(values)[0].astype(np.float64))
        order = np.argsort(-probabilities)
        better = np.cumsum(probabilities[order]) - probabilities[order]
        expected = np.zeros(VOCABULARY, bool)
        expected[order[better < fields.get("top_p", 1.0)]] = True
        expected[order[fields.get("top_k", VOCABULARY) :]] = False
        expected &= probabilities >= fields.get("min_p", 0.0) * probabilities.max()
        np.testing.assert_array_equal(kept, expected)
