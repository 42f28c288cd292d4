"""Drafts change nothing but the time: one process, against plain decoding.

`Alone` is driven by a model of a few lines whose logits are known, so that distributions can be
compared with what they must be; tests/ranks/test_decoding.py has real models on real ranks.
"""

from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from cenacle.collective.single import SingleRank as OneRank
from cenacle.core.request import Request, Sampling
from cenacle.core.step import PromptChunk, Step
from cenacle.engine.cache.kv_cache import can_go_back
from cenacle.engine.engine import Engine
from cenacle.engine.options import EngineOptions
from cenacle.engine.sampling.sampler import Sampler, SamplingState
from cenacle.model.step_timer import StepTimer

WORDS = 6


class Chain(nn.Module):
    """What follows depends on the last token, and a little on the sum of all, which only a cache
    that holds these tokens and no others knows."""

    def __init__(self, sharp: float = 1.0):
        super().__init__()
        self.layers = [self]
        self.table = sharp * mx.random.normal((WORDS, WORDS), key=mx.random.key(3))
        self.sums = 0.3 * sharp * mx.random.normal((3, WORDS), key=mx.random.key(4))

    def make_cache(self):
        return [KVCache()]

    def __call__(self, tokens, cache=None):
        column = tokens.astype(mx.float32)[:, None, :, None]
        seen, _ = cache[0].update_and_fetch(column, column)
        sums = mx.cumsum(seen[:, 0, :, 0], axis=-1)[:, -tokens.shape[1] :].astype(mx.int32)
        return self.table[tokens] + self.sums[sums % 3]


def answer(way, tokens=(0, 1, 2, 3, 0, 1, 2, 3), limit=40, sharp=1.0, stop=(), drafter=None, **how):
    model = Chain(sharp)
    engine = Engine(model, OneRank(), StepTimer(), EngineOptions(speculative=way), drafter=drafter)
    sampling = Sampling(**{"seed": 0, **how})
    request = Request("a", tokens, limit, stop, sampling, logprobs=2)
    events = [
        *engine.step(Step(0, (request,), final_chunks=(PromptChunk("a", 0, len(tokens)),)))[0]
    ]
    number = 1
    while not events or events[-1].finish is None:
        events += engine.step(Step(number))[0]
        number += 1
    assert engine.step(Step(number))[0] == []
    drafts = engine.take_drafts()
    engine.close()
    return events, drafts, number


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"repetition_penalty": 1.2},
        {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"temperature": 2.0, "logit_bias": {1: 1.5}},
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_the_same_answer_with_drafts_and_without(how, seed):
    plain, none, steps = answer("off", seed=seed, sharp=2.0, **how)
    drafted, drafts, fewer = answer("always", seed=seed, sharp=2.0, **how)
    assert [(e.token, e.finish) for e in drafted] == [(e.token, e.finish) for e in plain]
    for a, b in zip(drafted, plain, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
        assert dict(a.top) == pytest.approx(dict(b.top), abs=1e-5)
    assert drafts.drafted >= drafts.accepted
    assert none.drafted == 0
    if drafts.accepted:
        assert fewer < steps


def test_a_loop_takes_few_passes():
    events, drafts, steps = answer("always", sharp=9.0, limit=90)
    assert len(events) == 90
    assert events[-1].finish == "length"
    assert drafts.accepted > 60
    assert steps < 35


def test_a_stop_token_inside_a_draft_ends_the_answer():
    loop = [e.token for e in answer("off", sharp=9.0, limit=30)[0]]
    for stop in set(loop):
        plain = answer("off", sharp=9.0, limit=30, stop=(stop,))[0]
        drafted = answer("always", sharp=9.0, limit=30, stop=(stop,), tokens=(*loop, *loop))[0]
        again = answer("off", sharp=9.0, limit=30, stop=(stop,), tokens=(*loop, *loop))[0]
        assert [e.token for e in drafted] == [e.token for e in again]
        assert plain[-1].finish == drafted[-1].finish == "stop"


@pytest.mark.parametrize("limit", range(1, 14))
def test_max_tokens_inside_a_draft(limit):
    plain, drafted = (answer(w, sharp=9.0, limit=limit)[0] for w in ("off", "always"))
    assert [(e.token, e.finish) for e in drafted] == [(e.token, e.finish) for e in plain]


def test_drafted_positions_are_distributed_as_the_model_says():
    """Rejection sampling, seen from outside: a draft is kept with the probability that the model
    gives it, and what comes instead is distributed as the rest."""
    logits = mx.array([[0.5, 1.0, -1.0, 0.0, 2.0, 0.3]])
    logprobs = logits - mx.logsumexp(logits)
    want = np.exp(np.array(logprobs, dtype=np.float64)[0])
    rows = mx.repeat(logprobs, 8, axis=0)
    times, drafted = 6000, 1
    drawn = []
    for seed in range(times // 8):
        choice = Sampler(OneRank(), Sampling(temperature=1.0), seed)
        drawn += SamplingState(choice).draw(None, rows, 3).tolist()
    seen = Counter(drawn)
    kept = seen[drafted] / times
    assert kept == pytest.approx(want[drafted], abs=4 * float(want[drafted] / times) ** 0.5)
    rest = {t: n for t, n in seen.items() if t != drafted}
    share = want / (1 - want[drafted])
    expected = {t: share[t] * sum(rest.values()) for t in range(WORDS) if t != drafted}
    chi = sum((rest.get(t, 0) - n) ** 2 / n for t, n in expected.items())
    assert chi < 18.5, "four degrees of freedom: one in a thousand"


def test_rows_at_once_are_drawn_as_one_after_another():
    rows = mx.random.normal((5, 40), key=mx.random.key(1))
    for how in ({}, {"temperature": 1.3, "top_p": 0.7, "min_p": 0.05, "top_k": 9}):
        choice = Sampler(OneRank(), Sampling(**how), 7)
        at_once = choice.draw(rows, 11).tolist()
        assert at_once == [choice.draw(rows[i : i + 1], 11 + i).item() for i in range(5)]


class Kept(nn.Module):
    def __init__(self, *caches):
        super().__init__()
        self._kept = caches

    def make_cache(self):
        return list(self._kept)


def test_only_caches_that_can_go_back_are_drafted_for():
    assert can_go_back(Kept(KVCache(), CacheList(KVCache(), KVCache())))
    assert not can_go_back(Kept(KVCache(), RotatingKVCache(8)))
    assert not can_go_back(Kept(CacheList(KVCache(), ArraysCache(2))))
