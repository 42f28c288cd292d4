"""Drafts for several requests at once change nothing but the time: one process, against the same
requests without drafts. Layers of real families, one process too; on two nodes:
tests/ranks/test_mtp_layers.py."""

import random
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import CacheList, KVCache
from test_speculative_decoder import VOCAB_SIZE, Chain

from cenacle.collective.single import SingleRank
from cenacle.core.model_config import text_config
from cenacle.core.plan import Plan
from cenacle.core.request import Request, Sampling
from cenacle.core.step import PrefixReuse, PromptChunk, Step
from cenacle.engine.cache.ragged_cache import (
    RaggedKVCache,
    can_be_ragged,
    extract_sequence,
    merge_ragged,
)
from cenacle.engine.cache.state_rewinder import drop_tokens
from cenacle.engine.engine import Engine
from cenacle.engine.options import EngineOptions
from cenacle.engine.speculative.decoder import Generation
from cenacle.engine.speculative.draft_model import (
    DraftModelConfig,
    DraftModelProposer,
    load_mtp,
)
from cenacle.engine.speculative.mtp import HiddenStates, MtpProposer
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.expert_parallel import parallelize
from cenacle.model.loader import load_rank_model
from cenacle.model.mtp import MTP_FAMILIES, record_hidden_states
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.step_timer import StepTimer
from support.mtp_checkpoint import write_mtp

SAMPLINGS = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.2},
    {"temperature": 1.0, "presence_penalty": 0.5},
)


class MaskedChain(Chain):
    """A `Chain` that finds its tokens by a mask, wherever they are in a cache."""

    def __call__(self, tokens, cache=None):
        column = tokens.astype(mx.float32)[:, None, :, None]
        mask = create_attention_mask(tokens[..., None], cache[0], return_array=True)
        seen, _ = cache[0].update_and_fetch(column, column)
        seen = seen[:, 0, None, :, 0]
        if mask is not None:
            seen = mx.where(mask if mask.ndim == 2 else mask[:, 0], seen, 0)
        return self.table[tokens] + self.sums[seen.sum(-1).astype(mx.int32) % 3]


def chain(key=3):
    model = MaskedChain(2.0)
    model.table = 2.0 * mx.random.normal((VOCAB_SIZE, VOCAB_SIZE), key=mx.random.key(key))
    return model


def make_proposer(model, context=None):
    config = DraftModelConfig("", VOCAB_SIZE, context, 0, 0)
    return DraftModelProposer(config, SingleRank(), model, VOCAB_SIZE)


def make_requests(samplings=SAMPLINGS, limit=40, **options):
    rng = random.Random(1)
    return [
        Request(
            f"r{i}",
            tuple(rng.randrange(5) for _ in range(2 + 3 * i)),
            limit + 7 * i,
            (),
            Sampling(seed=i, **sampling),
            logprobs=2,
            **options,
        )
        for i, sampling in enumerate(samplings)
    ]


def answer(model, requests, mode, draft_model=None, begins=None):
    """The events of each request, and the drafts.

    Args:
        begins: the step at which each request comes; None: all with the first.
    """
    engine = Engine(
        model, SingleRank(), StepTimer(), EngineOptions(speculative=mode), draft_model=draft_model
    )
    events, number = {r.id: [] for r in requests}, 0
    begins = begins or [0] * len(requests)
    while any(not e or e[-1].finish is None for e in events.values()):
        new = tuple(r for r, begin in zip(requests, begins, strict=True) if begin == number)
        chunks = tuple(PromptChunk(r.id, 0, len(r.tokens)) for r in new)
        for event in engine.step(Step(number, new, final_chunks=chunks))[0]:
            events[event.request_id].append(event)
        number += 1
    drafts = engine.take_draft_stats()
    engine.close()
    return events, drafts, number


def require_same(got, expected):
    for name, events in expected.items():
        assert [(e.token, e.finish) for e in got[name]] == [(e.token, e.finish) for e in events]
        for a, b in zip(got[name], events, strict=True):
            if b.logprob is not None:
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
                assert dict(a.top) == pytest.approx(dict(b.top), abs=1e-4)


# Caches


def test_rows_hold_what_caches_of_their_own_would_hold():
    keys = iter(mx.random.split(mx.random.key(0), 99))
    alone = [CacheList(KVCache(), KVCache()) for _ in range(3)]

    def append(caches, values):
        return [
            cache.update_and_fetch(v, v + 1)[0] for cache, v in zip(caches, values, strict=True)
        ]

    for cache, length in zip(alone, (3, 0, 290), strict=True):
        if length:
            values = [mx.random.normal((1, 2, length, w), key=next(keys)) for w in (4, 6)]
            append(cache.caches, values)
    (joined,) = merge_ragged([[cache] for cache in alone])
    for length, dropped in ((5, (0, 4, 2)), (1, (0, 0, 1)), (300, (299, 0, 150)), (4, (1, 2, 3))):
        values = [mx.random.normal((3, 2, length, w), key=next(keys)) for w in (4, 6)]
        mask = joined[1].make_mask(length)
        seen = append(joined.caches, values)[1]
        for row, cache in enumerate(alone):
            own = append(cache.caches, [v[row : row + 1] for v in values])[1]
            for token in (0, length - 1):
                visible = seen[row][
                    :, mx.array([i for i, m in enumerate(mask[row, 0, token].tolist()) if m])
                ]
                assert mx.array_equal(visible, own[0, :, : own.shape[2] - length + 1 + token])
            cache.trim(dropped[row])
        drop_tokens([joined], dropped)
        assert joined[0].offset.tolist() == [cache[0].offset for cache in alone]
    joined.filter([2, 0])
    for row, cache in enumerate((alone[2], alone[0])):
        (copy,) = extract_sequence([joined], row)
        for got, own in zip(copy.caches, cache.caches, strict=True):
            assert mx.array_equal(got.keys, own.keys[..., : own.offset, :])
            assert mx.array_equal(got.values, own.values[..., : own.offset, :])


def test_a_window_hides_what_is_long_ago():
    cache = RaggedKVCache([2, 5])
    mask = cache.make_mask(2, window_size=3)
    expected = [[[0, 1, 2], [1, 2, 3]], [[3, 4, 5], [4, 5, 6]]]
    assert [
        [[i for i, m in enumerate(q) if m] for q in row[0]] for row in mask.tolist()
    ] == expected


# Requests


BEGINS = (0, 0, 6, 10)


@pytest.fixture(scope="module")
def answers_without_drafts():
    return answer(chain(), make_requests(limit=24), "off", begins=BEGINS)[0]


@pytest.mark.parametrize("small", [None, 3, 9], ids=["text", "right", "wrong"])
@pytest.mark.parametrize("mode", ["always", "auto"])
def test_answers_are_the_same_with_and_without_drafts(answers_without_drafts, mode, small):
    """Requests that come and go meanwhile."""
    proposer = make_proposer(chain(small)) if small is not None else None
    got, drafts, _ = answer(chain(), make_requests(limit=24), mode, proposer, BEGINS)
    require_same(got, answers_without_drafts)
    if mode == "always":
        assert drafts.drafted >= drafts.accepted > 0
        assert (drafts.by_model > 0) == (small is not None)


def test_a_pass_serves_several_requests():
    requests = make_requests(({}, {"temperature": 1.0}, {"temperature": 0.5}))
    steps = answer(chain(), requests, "off")[2]
    _, drafts, fewer = answer(chain(), requests, "always", make_proposer(chain()))
    assert drafts.by_model_accepted > 0.9 * drafts.by_model > 0
    assert fewer < steps / 3


def test_texts_longer_than_one_context_together_get_drafts_from_the_text_only():
    requests = make_requests(({}, {"temperature": 1.0}))
    expected = answer(chain(), requests, "off")[0]
    got, drafts, _ = answer(chain(), requests, "always", make_proposer(chain(), context=60))
    require_same(got, expected)
    assert 0 < drafts.by_model < 120  # each of at most 30 tokens, and those alone at the end


def test_a_request_is_cancelled_and_its_beginning_used_by_another():
    model, requests = chain(), make_requests(({}, {"temperature": 1.0}, {"temperature": 0.5}))
    results = []
    for mode in ("off", "always"):
        options = EngineOptions(speculative=mode)
        engine = Engine(
            model, SingleRank(), StepTimer(), options, draft_model=make_proposer(chain())
        )
        first, last = requests[:2], requests[2]
        chunks = tuple(PromptChunk(r.id, 0, len(r.tokens)) for r in first)
        events = list(engine.step(Step(0, tuple(first), final_chunks=chunks))[0])
        for number in range(1, 6):
            events += engine.step(Step(number))[0]
        stopped = first[1]
        text = [*stopped.tokens, *(e.token for e in events if e.request_id == stopped.id)]
        other = Request("b", (*text[: len(stopped.tokens) + 2], 4), 12, (), last.sampling)
        reuse = PrefixReuse("b", stopped.id, len(stopped.tokens) + 1)
        chunk = PromptChunk("b", len(stopped.tokens) + 1, len(other.tokens))
        step = Step(
            6,
            (other,),
            final_chunks=(chunk,),
            cancelled=(stopped.id,),
            retained=(stopped.id,),
            reused=(reuse,),
        )
        events += engine.step(step)[0]
        for number in range(7, 80):
            events += engine.step(Step(number))[0]
        results.append({n: [e.token for e in events if e.request_id == n] for n in ("r0", "b")})
        assert len(results[-1]["b"]) == 12
        engine.close()
    assert results[0] == results[1]


# Layers of real checkpoints


@pytest.mark.parametrize("family", MTP_FAMILIES)
def test_a_layer_of_the_checkpoint_drafts_for_several(tmp_path, family):
    checkpoint = Checkpoint.open(write_mtp(tmp_path / family, family, "trained"))
    spec, prompts = read_model_spec(checkpoint), ((5, 80, 200, 17, 9), (7, 3), (1, 2, 3, 4, 5, 6))
    plan, results = Plan.whole(spec, 1), []
    requests = [
        Request(f"r{i}", prompt, 24 - 5 * i, (), Sampling(seed=i, temperature=0.4 * i))
        for i, prompt in enumerate(prompts)
    ]
    for mode in ("off", "always"):
        model = load_rank_model(checkpoint, plan, 0, lambda *_: None)
        parallelize(model, spec.family, plan, SingleRank(), StepTimer(), "auto")
        states = HiddenStates()
        record_hidden_states(model, states.record)
        vocab_size = text_config(checkpoint.config)["vocab_size"]
        head = load_mtp(checkpoint, "auto") if mode != "off" else None
        drafter = MtpProposer(SingleRank(), head, states, vocab_size) if head else None
        results.append(answer(model, requests, mode, drafter))
    require_same(results[1][0], results[0][0])
    drafts = results[1][1]
    if can_be_ragged(model):  # else they draft alone
        assert drafts.by_model_accepted > 0.1 * drafts.by_model > 0
        assert results[1][2] < results[0][2]


@pytest.mark.parametrize(
    ("draft", "cut"),
    [([5, 6, 7, 8], [5, 6, 7]), ([5, 9, 6], [5, 9]), ([5, 1, 6], [5]), ([], [])],
)
def test_a_draft_ends_with_what_can_be_accepted(draft, cut):
    """Four tokens may follow, the last of which is not drafted; 9 ends the text, 1 is no word."""

    def allowed_prefix(tokens, draft):
        assert tokens == [2, 3]
        return next((i for i, token in enumerate(draft) if token == 1), len(draft))

    request = Request("a", (2,), 5, (9,))
    sampling = SimpleNamespace(allowed_prefix=allowed_prefix)
    assert Generation(request, sampling, [3]).cut_draft(draft) == cut
