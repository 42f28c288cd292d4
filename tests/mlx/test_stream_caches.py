"""Streams with caches of their own: nothing is padded, and chunks of prompts share a pass."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from one_process import load_rank, spec_of, tiny_model

from cenacle import native
from cenacle.collective.single import SingleRank
from cenacle.core.plan import Plan
from cenacle.core.request import Request, Sampling
from cenacle.engine.engine import Engine
from cenacle.engine.options import EngineOptions
from cenacle.model.kv_dtype import install_kv_dtype
from cenacle.model.step_timer import StepTimer
from cenacle.model.stream_caches import SharedPass, StreamCaches, into_streams
from cenacle.model.stream_support import has_stream_caches, install_stream_caches
from cenacle.scheduler.scheduler import Scheduler

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.unavailable_reason())
TOLERANCE = 2e-3  # of logits: a pass of several tokens rounds otherwise

# Plain caches as one node of the graph; windows and sinks, by mlx-lm's own attention.
FAMILIES = ["qwen3_moe", "gpt_oss"]


def load_model(family):
    folder = tiny_model(family)
    plan = Plan.whole(spec_of(folder), 1)
    model = load_rank(folder, plan, SingleRank(), StepTimer(), "auto")
    assert install_stream_caches(model)
    install_kv_dtype(model, "bfloat16")
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return load_model(request.param)


def fill(model, tokens):
    caches = make_prompt_cache(model)
    model(mx.array([tokens]), cache=caches)
    return caches


def merge(streams):
    return [layer[0].merge(layer) for layer in zip(*streams, strict=True)]


def own_bytes(caches):
    return sum(cache.nbytes for cache in caches)


LONG, SHORT, PROMPT = [(7 * i + 3) % 250 for i in range(300)], [5, 6, 7], [9] * 150


def test_each_stream_gives_what_it_gives_alone_and_keeps_its_own_length(model):
    alone = [fill(model, LONG), fill(model, SHORT)]
    together = merge([into_streams(fill(model, tokens)) for tokens in (LONG, SHORT)])
    for token in (11, 12, 13):
        expected = [model(mx.array([[token]]), cache=caches) for caches in alone]
        logits = model(mx.array([[token]] * 2), cache=together)
        assert mx.abs(logits - mx.concatenate(expected)).max() < TOLERANCE
    assert [row.offset for row in together[0].rows] == [303, 6]
    for layer, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert isinstance(layer, StreamCaches)
        assert layer.nbytes == own_bytes(parts)
    kept = [row.keys for row in together[0].rows]
    for layer in together:
        layer.filter([1])
    assert together[0].rows[0].keys is kept[1], "nothing is copied when a stream ends"


def test_a_chunk_of_a_prompt_shares_the_pass_of_the_streams(model):
    alone, prompt_alone = [fill(model, LONG), fill(model, SHORT)], fill(model, PROMPT)
    together = merge([into_streams(fill(model, tokens)) for tokens in (LONG, SHORT)])
    prompts = [fill(model, PROMPT), fill(model, PROMPT[:1])]
    shared = SharedPass(model)
    chunk = list(range(20, 25))
    shared.add(chunk, prompts[0])
    shared.add(PROMPT[1:3], prompts[1])
    logits = shared(mx.array([[4], [8]]), cache=together)
    assert logits.shape[:2] == (2, 1)
    assert not shared.has_chunks
    expected = [model(mx.array([[t]]), cache=c) for t, c in zip((4, 8), alone, strict=True)]
    assert mx.abs(logits - mx.concatenate(expected)).max() < TOLERANCE
    model(mx.array([chunk]), cache=prompt_alone)
    after, expected_after = (model(mx.array([[3]]), cache=c) for c in (prompts[0], prompt_alone))
    assert mx.abs(after - expected_after).max() < 5 * TOLERANCE  # caches are of 16 bits
    assert [caches[0].offset for caches in prompts] == [156, 3]


def test_prompts_of_several_lengths_share_a_pass_unpadded(model):
    prompts = (LONG[:40], SHORT, PROMPT[:9])
    alone = [fill(model, tokens) for tokens in prompts]
    together = merge([into_streams(make_prompt_cache(model)) for _ in prompts])
    for layer in together:
        layer.prepare(lengths=[len(p) for p in prompts], right_padding=[0, 37, 31])
    model(mx.array([[*p, *[0] * (40 - len(p))] for p in prompts]), cache=together)
    for layer in together:
        layer.finalize()
    assert [row.offset for row in together[0].rows] == [len(p) for p in prompts]
    expected = [model(mx.array([[1]]), cache=caches) for caches in alone]
    logits = model(mx.array([[1]] * 3), cache=together)
    assert mx.abs(logits - mx.concatenate(expected)).max() < 5 * TOLERANCE


def test_a_prompt_beside_an_answer_has_no_passes_of_its_own(model):
    """As many passes as the answer has tokens, but for the few that begin the requests."""
    passes = []

    class Counted(type(model)):
        def __call__(self, ids, **keywords):
            passes.append(ids.shape)
            return super().__call__(ids, **keywords)

    kind, model.__class__ = type(model), Counted
    try:
        options = EngineOptions(speculative="off", prefix_cache_gb=0)
        engine = Engine(model, SingleRank(), StepTimer(), options)
        scheduler = Scheduler(footprint=engine.footprint())
        sampling = Sampling(temperature=0.0, seed=1)
        scheduler.submit(Request("answer", (1, 2, 3), 14, sampling=sampling))
        scheduler.submit(Request("prompt", (4,) * 5, 1, sampling=sampling))
        passes.clear()
        done = []
        while (step := scheduler.next_step()) is not None:
            done += scheduler.on_tokens(engine.step(step)[0])
            if len(done) == 3:
                scheduler.submit(Request("long", (4,) * 100, 1, sampling=sampling))
        engine.close()
    finally:
        model.__class__ = kind
    shared = [rows for rows, length in passes if length == 1 and rows > 2]
    assert sum(rows - 1 for rows in shared) >= 90, "16 tokens of the prompt beside the answer's"
    assert len(passes) <= 24


def test_what_computes_with_its_cache_keeps_the_batch_caches():
    folder = tiny_model("deepseek_v3")
    model = load_rank(folder, Plan.whole(spec_of(folder), 1), SingleRank(), StepTimer(), "auto")
    assert not install_stream_caches(model)
    assert not has_stream_caches(model)
