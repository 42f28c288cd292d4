"""Dropping tokens of a pass from layers that keep a state, a window or pools: what follows is as if
they never were.

The reference reads the kept tokens with caches of its own.
"""

import itertools

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from test_group_drafts import answer, require_same

from cenacle.collective.single import SingleRank
from cenacle.core.request import Request, Sampling
from cenacle.core.step import PrefixReuse, PromptChunk, Step
from cenacle.engine.cache.kv_cache import can_trim
from cenacle.engine.cache.ragged_cache import can_be_ragged, extract_sequence, merge_ragged
from cenacle.engine.cache.state_rewinder import can_drop, make_rewinder
from cenacle.engine.engine import Engine
from cenacle.engine.options import EngineOptions
from cenacle.model import architecture
from cenacle.model.config_catalog import tiny_config
from cenacle.model.families import family_of
from cenacle.model.request_caches import install_request_attention
from cenacle.model.step_timer import StepTimer

STATES = ("qwen3_next", "qwen3_5_moe", "nemotron_h")
GROUPS = (*STATES, "granitemoehybrid", "deepseek_v4", "qwen4_exp")
FAMILIES = (*GROUPS, "glm5_next", "inkling", "gpt_oss")
TEXT = [(37 * i * i + 11 * i + 5) % 500 for i in range(24)]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    mx.random.seed(7)
    config = tiny_config(request.param)
    model_class, arguments = architecture.model_classes(config)
    model = model_class(arguments.from_dict(config))
    mx.eval(model.parameters())
    if name := family_of(request.param).request_attention:
        install_request_attention(model, name)
    return model


def logits_after(model, tokens):
    return model(mx.array([tokens]), cache=make_prompt_cache(model))[0, -1]


@pytest.mark.parametrize("dropped", [0, 1, 3, 5])
def test_one_sequence(model, dropped):
    assert can_drop(model)
    assert not can_trim(model)
    rewinder, caches = make_rewinder(model), make_prompt_cache(model)
    for begin, end in ((0, 17), (17, 22)):
        kept = end - dropped if begin else end
        with rewinder.recording(caches, end - begin):
            model(mx.array([TEXT[begin:end]]), cache=caches)
        rewinder.drop(caches, [end - kept])
    got = model(mx.array([[77]]), cache=caches)[0, -1]
    assert mx.allclose(got, logits_after(model, [*TEXT[:kept], 77]), atol=1e-4)


@pytest.mark.parametrize("model", GROUPS, indirect=True)
def test_several_sequences_that_keep_different_numbers(model):
    assert can_be_ragged(model)
    rewinder, texts, sequences = make_rewinder(model), (TEXT, TEXT[::-1], TEXT[3:]), []
    for text in texts:
        sequences.append(make_prompt_cache(model))
        model(mx.array([text[:9]]), cache=sequences[-1])
    caches, kept = merge_ragged(sequences), (1, 4, 2)
    with rewinder.recording(caches, 4):
        model(mx.array([text[9:13] for text in texts]), cache=caches)
    rewinder.drop(caches, [4 - n for n in kept])
    together = model(mx.array([[77]] * 3), cache=caches)[:, -1]
    for row, (text, n) in enumerate(zip(texts, kept, strict=True)):
        expected = [*text[: 9 + n], 77]
        assert mx.allclose(together[row], logits_after(model, expected), atol=1e-4)
        alone = model(mx.array([[8]]), cache=extract_sequence(caches, row))[0, -1]
        assert mx.allclose(alone, logits_after(model, [*expected, 8]), atol=1e-4)


@pytest.mark.parametrize(
    ("model", "count"),
    [*itertools.product(STATES, (1, 3)), ("gpt_oss", 1)],
    indirect=["model"],
)
def test_answers_are_the_same_with_and_without_drafts(model, count):
    """Texts of two words, so that the model often agrees with what came before, and often not.

    Other families' answers: test_mtp.py, test_group_drafts.py.
    """
    words = {40: 50.0, 41: 50.0}
    requests = [
        Request(f"r{i}", (40, 41, 40), 24, (), Sampling(seed=i, temperature=1.0, logit_bias=words))
        for i in range(count)
    ]
    expected, _, steps = answer(model, requests, "off")
    got, drafts, fewer = answer(model, requests, "always")
    require_same(got, expected)
    assert drafts.drafted > drafts.accepted > 0
    assert fewer < steps


@pytest.mark.parametrize("model", [*STATES, "gpt_oss"], indirect=True)
def test_an_answer_with_drafts_is_kept_to_its_last_token(model):
    """States can be used again only as they are at its end."""
    repeating = Sampling(seed=1, logit_bias={7: 100.0})
    first = Request("a", (1, 2, 3, 4, 1, 2, 3, 4), 21, (), repeating)
    text = tuple(e.token for e in answer(model, [first], "off")[0]["a"])
    second = Request("b", (*first.tokens, *text, 9, 8), 12, (), Sampling(seed=2, temperature=0.5))
    expected = [e.token for e in answer(model, [second], "off")[0]["b"]]
    engine = Engine(model, SingleRank(), StepTimer(), EngineOptions(speculative="always"))
    number = 0

    def finish(request, begin, **options):
        nonlocal number
        chunk = PromptChunk(request.id, begin, len(request.tokens))
        step, events = Step(number, (request,), final_chunks=(chunk,), **options), []
        while not events or events[-1].finish is None:
            events += engine.step(step)[0]
            number += 1
            step = Step(number)
        return [e.token for e in events]

    assert tuple(finish(first, 0)) == text
    assert engine.take_draft_stats().accepted > 0
    length = len(second.tokens) - 2
    assert finish(second, length, reused=(PrefixReuse("b", "a", length),)) == expected
    engine.close()
