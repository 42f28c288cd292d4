"""Speculative decoding changes nothing but the time: one process, against plain decoding.

The decoder is driven by a model of a few lines with known logits, so that distributions can be
compared with the expected ones; tests/ranks/test_decoding.py has real models on real ranks.
"""

from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from cenacle.collective.single import SingleRank
from cenacle.core.request import Request, Sampling
from cenacle.core.step import PromptChunk, Step
from cenacle.engine.cache.kv_cache import can_trim
from cenacle.engine.engine import Engine
from cenacle.engine.options import EngineOptions
from cenacle.engine.sampling.sampler import Sampler, SamplingState
from cenacle.model.step_timer import StepTimer

VOCAB_SIZE = 6


class Chain(nn.Module):
    """The next token depends on the last one and, a little, on the sum of all, which only a cache
    with exactly these tokens gives."""

    def __init__(self, sharp: float = 1.0):
        super().__init__()
        self.layers = [self]
        self.table = sharp * mx.random.normal((VOCAB_SIZE, VOCAB_SIZE), key=mx.random.key(3))
        self.sums = 0.3 * sharp * mx.random.normal((3, VOCAB_SIZE), key=mx.random.key(4))

    def make_cache(self):
        return [KVCache()]

    def __call__(self, tokens, cache=None):
        column = tokens.astype(mx.float32)[:, None, :, None]
        seen, _ = cache[0].update_and_fetch(column, column)
        sums = mx.cumsum(seen[:, 0, :, 0], axis=-1)[:, -tokens.shape[1] :].astype(mx.int32)
        return self.table[tokens] + self.sums[sums % 3]


def generate(
    mode,
    tokens=(0, 1, 2, 3, 0, 1, 2, 3),
    limit=40,
    sharp=1.0,
    stop=(),
    draft_model=None,
    **sampling_options,
):
    model = Chain(sharp)
    engine = Engine(
        model, SingleRank(), StepTimer(), EngineOptions(speculative=mode), draft_model=draft_model
    )
    sampling = Sampling(**{"seed": 0, **sampling_options})
    request = Request("a", tokens, limit, stop, sampling, logprobs=2)
    events = [
        *engine.step(Step(0, (request,), final_chunks=(PromptChunk("a", 0, len(tokens)),)))[0]
    ]
    number = 1
    while not events or events[-1].finish is None:
        events += engine.step(Step(number))[0]
        number += 1
    assert engine.step(Step(number))[0] == []
    drafts = engine.take_draft_stats()
    engine.close()
    return events, drafts, number


@pytest.mark.parametrize(
    "sampling_options",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"repetition_penalty": 1.2},
        {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"temperature": 2.0, "logit_bias": {1: 1.5}},
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_the_output_is_the_same_with_and_without_drafts(sampling_options, seed):
    plain, no_drafts, steps = generate("off", seed=seed, sharp=2.0, **sampling_options)
    drafted, drafts, fewer = generate("always", seed=seed, sharp=2.0, **sampling_options)
    assert [(e.token, e.finish) for e in drafted] == [(e.token, e.finish) for e in plain]
    for a, b in zip(drafted, plain, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
        assert dict(a.top) == pytest.approx(dict(b.top), abs=1e-5)
    assert drafts.drafted >= drafts.accepted
    assert no_drafts.drafted == 0
    if drafts.accepted:
        assert fewer < steps


def test_a_repetition_takes_few_passes():
    events, drafts, steps = generate("always", sharp=9.0, limit=90)
    assert len(events) == 90
    assert events[-1].finish == "length"
    assert drafts.accepted > 60
    assert steps < 35


def test_a_stop_token_inside_a_draft_ends_the_output():
    loop = [e.token for e in generate("off", sharp=9.0, limit=30)[0]]
    for stop in set(loop):
        plain = generate("off", sharp=9.0, limit=30, stop=(stop,))[0]
        drafted = generate("always", sharp=9.0, limit=30, stop=(stop,), tokens=(*loop, *loop))[0]
        again = generate("off", sharp=9.0, limit=30, stop=(stop,), tokens=(*loop, *loop))[0]
        assert [e.token for e in drafted] == [e.token for e in again]
        assert plain[-1].finish == drafted[-1].finish == "stop"


LIMITS = range(1, 14)


@pytest.fixture(scope="module")
def longest():
    """Without drafts; a lower limit only ends it sooner."""
    return [e.token for e in generate("off", sharp=9.0, limit=LIMITS[-1])[0]]


@pytest.mark.parametrize("limit", LIMITS)
def test_max_tokens_inside_a_draft(longest, limit):
    drafted = generate("always", sharp=9.0, limit=limit)[0]
    assert [e.token for e in drafted] == longest[:limit]
    assert [e.finish for e in drafted] == [None] * (limit - 1) + ["length"]


def test_drafted_positions_have_the_distribution_of_the_model():
    """Rejection sampling: a draft is accepted with the probability that the model gives it, and
    what replaces it has the distribution of the rest."""
    logits = mx.array([[0.5, 1.0, -1.0, 0.0, 2.0, 0.3]])
    logprobs = logits - mx.logsumexp(logits)
    expected_p = np.exp(np.array(logprobs, dtype=np.float64)[0])
    rows = mx.repeat(logprobs, 8, axis=0)
    times, drafted = 6000, 1
    samples = []
    for seed in range(times // 8):
        sampler = Sampler(SingleRank(), Sampling(temperature=1.0), seed)
        samples += SamplingState(sampler).sample(None, rows, 3).tolist()
    counts = Counter(samples)
    accepted_p = counts[drafted] / times
    assert accepted_p == pytest.approx(
        expected_p[drafted], abs=4 * float(expected_p[drafted] / times) ** 0.5
    )
    rest = {t: n for t, n in counts.items() if t != drafted}
    share = expected_p / (1 - expected_p[drafted])
    expected = {t: share[t] * sum(rest.values()) for t in range(VOCAB_SIZE) if t != drafted}
    chi = sum((rest.get(t, 0) - n) ** 2 / n for t, n in expected.items())
    assert chi < 18.5, "four degrees of freedom: one in a thousand"


def test_several_rows_are_sampled_like_single_rows():
    rows = mx.random.normal((5, 40), key=mx.random.key(1))
    for sampling_options in ({}, {"temperature": 1.3, "top_p": 0.7, "min_p": 0.05, "top_k": 9}):
        sampler = Sampler(SingleRank(), Sampling(**sampling_options), 7)
        at_once = sampler.sample(rows, 11).tolist()
        assert at_once == [sampler.sample(rows[i : i + 1], 11 + i).item() for i in range(5)]


class ModelWithCaches(nn.Module):
    def __init__(self, *caches):
        super().__init__()
        self._caches = caches

    def make_cache(self):
        return list(self._caches)


def test_only_caches_that_can_trim_are_drafted_for():
    assert can_trim(ModelWithCaches(KVCache(), CacheList(KVCache(), KVCache())))
    assert not can_trim(ModelWithCaches(KVCache(), RotatingKVCache(8)))
    assert not can_trim(ModelWithCaches(CacheList(KVCache(), ArraysCache(2))))
