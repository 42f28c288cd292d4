"""How tokens are chosen: log-probabilities, seeds, penalties, grammars, the same on 1 and 2 nodes.

The references are mlx-lm's own model, asked for the logits of the whole text at once, and Python's
`re` and `json`.
"""

import json
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from llguidance import LLMatcher
from mlx_lm.utils import load_model

import cenacle
from cenacle import InputError
from cenacle.core.request import Sampling
from cenacle.engine.options import EngineOptions

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
ASKED = "What is 12 + 30?"
DICE = {"temperature": 1.2, "seed": 5, "top_p": 0.9}
NOISE = list(range(60, 90))  # no text that the model knows: it is sure of nothing
WILD = {"temperature": 1.5, "seed": 5, "top_p": 0.95}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "sum": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["small", "large"]},
    },
    "required": ["name", "sum", "kind"],
    "additionalProperties": False,
}
NUMBER = LLMatcher.grammar_from_regex("[1-9][0-9]{2}(\\.[0-9]{3})*")
# Else a model that knows no JSON may put spaces into it without end.
COMPACT = {"whitespace_flexible": False}
OBJECT = LLMatcher.grammar_from_json_schema(SCHEMA, overrides=COMPACT)
LISTS = LLMatcher.grammar_from_lark(
    'start: "[" (item ("," item)*)? "]"\nitem: /[a-c]{1,3}/ | start'
)


@pytest.fixture(scope="module")
def models():
    """Without drafts."""
    with (
        cenacle.load(str(DEMO), 1, speculative="off") as one,
        cenacle.load(str(DEMO), 2, speculative="off") as two,
    ):
        yield {1: one, 2: two}


@pytest.fixture(scope="module")
def drafting():
    """With drafts wherever there is one."""
    with (
        cenacle.load(str(DEMO), 1, speculative="always") as one,
        cenacle.load(str(DEMO), 2, speculative="always", trunk="sharded") as two,
    ):
        yield {1: one, 2: two}


@pytest.fixture(scope="module")
def reference():
    """Log-probabilities of what follows each token of a text, by mlx-lm's own model."""
    model, _ = load_model(DEMO)

    def logprobs(tokens) -> np.ndarray:
        logits = model(mx.array([tokens]))[0].astype(mx.float32)
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    return logprobs


def both(models, ask):
    """What `ask(model)` gives on one node, after a look that two nodes give the same."""
    one, two = ask(models[1]), ask(models[2])
    assert one == two
    return one


@pytest.mark.parametrize("how", [{}, DICE, {"logit_bias": {100: 9.0}, "repetition_penalty": 1.5}])
@pytest.mark.parametrize("nodes", [1, 2])
def test_logprobs_are_those_of_the_model(models, reference, nodes, how):
    model = models[nodes]
    prompt = model.tokens_of(ASKED)
    chunks = list(model.stream(prompt, 12, logprobs=4, **how))
    assert [c.token for c in chunks] == model.generate(prompt, 12, **how).tokens
    text = [*prompt, *(c.token for c in chunks)]
    truth = reference(text)[len(prompt) - 1 :]
    for chunk, row in zip(chunks, truth, strict=False):
        assert chunk.logprob == pytest.approx(row[chunk.token], abs=1e-3)
        assert [p for _, p in chunk.top] == pytest.approx(sorted(row)[: -4 - 1 : -1], abs=1e-3)
        assert [row[i] for i, _ in chunk.top] == pytest.approx([p for _, p in chunk.top], abs=1e-3)


def test_no_alternatives_and_no_logprobs(models):
    for model in models.values():
        chunks = list(model.stream(ASKED, 3, logprobs=0))
        assert all(c.logprob is not None and c.top == () for c in chunks)
        assert all(c.logprob is None and c.top == () for c in model.stream(ASKED, 3))


def crowd(model, asked) -> list[list[int]]:
    """The answers to several requests at once, which wait for one another to begin."""
    got: dict[int, list[int]] = {}
    begin = threading.Barrier(len(asked))

    def ask(index: int) -> None:
        prompt, limit, how = asked[index]
        begin.wait(10)
        got[index] = model.generate(prompt, limit, **how).tokens

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [got[i] for i in range(len(asked))]


def test_what_is_asked_for_is_the_same_alone_and_in_a_crowd_on_any_number_of_nodes(models):
    asked = [
        (NOISE, 12, WILD),
        (NOISE, 12, WILD | {"seed": 6}),
        (NOISE, 12, WILD | {"presence_penalty": 2.0, "frequency_penalty": 2.0}),
        (NOISE, 12, WILD | {"logit_bias": {81: -100.0}, "min_p": 0.01, "top_k": 50}),
        (NOISE, 40, WILD | {"grammar": OBJECT}),
        (NOISE, 20, {"grammar": NUMBER}),
        (NOISE, 12, {"repetition_penalty": 1.3}),
    ]
    alone = both(models, lambda m: [m.generate(p, n, **how).tokens for p, n, how in asked])
    assert len({tuple(a) for a in alone}) == len(alone)
    assert both(models, lambda m: crowd(m, asked)) == alone


def test_a_seed_goes_on_where_an_answer_was_left(models):
    """As after a failure: what was given before is part of the prompt."""
    for how in (WILD, WILD | {"grammar": OBJECT}, {"grammar": OBJECT, "presence_penalty": 1.0}):
        for model in models.values():
            whole = model.generate(NOISE, 24, **how).tokens
            assert len(whole) > 8
            sampling = {k: v for k, v in how.items() if k != "grammar"}
            request = model.request(NOISE, 24, Sampling(**sampling))
            rest = replace(request, grammar=how.get("grammar")).resumed_with(whole[:5])
            assert [c.token for c in model._stream(rest, ())] == whole[5:]


@pytest.mark.parametrize("how", [{}, DICE, {"temperature": 2.0, "seed": 1}])
def test_grammars_hold_and_end_the_answer(models, how):
    def ask(grammar, limit=120):
        def one(model):
            done = model.generate(ASKED, limit, grammar=grammar, **how)
            return done.text, done.finish

        return both(models, one)

    text, finish = ask(OBJECT)
    assert finish == "stop"
    answer = json.loads(text)
    assert list(answer) == ["name", "sum", "kind"]
    assert isinstance(answer["name"], str)
    assert 0 <= answer["sum"] <= 99
    assert answer["kind"] in ("small", "large")
    text, finish = ask(NUMBER, 200)
    shape = "[1-9][0-9]{2}(\\.[0-9]{3})*"
    assert re.fullmatch(shape, text) if finish == "stop" else re.match(shape, text)
    text, finish = ask(LISTS, 200)
    assert finish == "length" or text.count("[") == text.count("]") > 0


def test_an_answer_that_is_cut_keeps_to_its_grammar_so_far(models):
    text, finish = both(
        models,
        lambda m: (lambda d: (d.text, d.finish))(m.generate(ASKED, 6, grammar=OBJECT, **DICE)),
    )
    assert finish == "length"
    assert text.startswith('{"name"')


def test_grammars_that_cannot_be_followed_are_refused(models):
    for grammar, reason in [
        ("", "Empty grammar"),
        ("{}", "missing field `grammars`"),
        ("start: /[/", "unclosed character class"),
        (LLMatcher.grammar_from_json_schema('{"type": "colour"}'), "Invalid type: colour"),
        (LLMatcher.grammar_from_regex("[^\\x00-\\U0010ffff]"), "no text matches it"),
    ]:
        with pytest.raises(InputError, match=f"grammar: expected one that .*{re.escape(reason)}"):
            models[2].generate(ASKED, 3, grammar=grammar)
    assert models[2].generate(ASKED).text == "42"


ENDLESS = {"logit_bias": {362: -100.0}}  # an end that never comes
LOOP = [81, 82, 83, 84] * 6
DRAFTED = [
    (LOOP, 60, {}),
    (NOISE, 80, ENDLESS),
    (NOISE, 60, ENDLESS | WILD),
    (NOISE, 60, ENDLESS | {"repetition_penalty": 1.1, "temperature": 0.7, "seed": 3}),
    (ASKED, 30, {}),
    (NOISE, 60, WILD | {"grammar": OBJECT}),
    (LOOP, 60, {"grammar": LISTS, "temperature": 0.5, "seed": 2}),
]


@pytest.mark.parametrize("nodes", [1, 2])
def test_drafts_change_nothing(models, drafting, nodes):
    before = drafting[nodes].group.draft_stats
    for prompt, limit, how in DRAFTED:
        plain = list(models[nodes].stream(prompt, limit, logprobs=2, **how))
        drafted = list(drafting[nodes].stream(prompt, limit, logprobs=2, **how))
        assert [(c.token, c.finish) for c in drafted] == [(c.token, c.finish) for c in plain]
        for a, b in zip(drafted, plain, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=2e-3)
    done = drafting[nodes].group.draft_stats - before
    assert done.drafted > done.accepted > 50
    assert models[nodes].group.draft_stats.drafted == 0


@pytest.mark.parametrize("nodes", [1, 2])
def test_others_come_and_go_beside_a_draft(models, drafting, nodes):
    """Each time the request that drafts goes back among the others, and comes out again."""
    for prompt, limit, how in (DRAFTED[2], DRAFTED[5]):
        come_and_go(models[nodes], drafting[nodes], prompt, limit, how)


def come_and_go(plain, drafting, prompt, limit, how) -> None:
    limit *= 3
    want = plain.generate(prompt, limit, logprobs=1, **how).tokens
    other = plain.generate(ASKED).tokens
    got, guests = [], 0
    for chunk in drafting.stream(prompt, limit, logprobs=1, **how):
        got.append(chunk.token)
        if len(got) % 12 == 5 and guests < 6:
            guests += 1
            if guests % 2:
                assert drafting.generate(ASKED).tokens == other
            else:  # one that leaves in the middle
                next(drafting.stream(NOISE, 100, **ENDLESS))
    assert got == want
    assert guests >= 2


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_request_that_drafts_can_be_cancelled(drafting, nodes):
    model = drafting[nodes]
    stream = model.stream(NOISE, 800, **ENDLESS)
    for _ in range(40):
        next(stream)
    stream.close()
    assert model.generate(ASKED).text == "42"
    assert model.group.load == {"running": 0, "waiting": 0}


def test_measured_steps_of_drafts_are_divided_by_their_tokens(drafting):
    model = drafting[2]
    done = model.generate(LOOP, 400, **ENDLESS)
    terms = model.group.step_timings
    assert terms.tokens > terms.steps > 0
    parts = sum(v for k, v in done.step_timings_ms.items() if k != "total")
    assert parts == pytest.approx(done.step_timings_ms["total"])


# A draft model


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Path:
    """The demo model, turned round: what it thinks likeliest is the least likely."""
    folder = tmp_path_factory.mktemp("draft") / "stranger"
    shutil.copytree(DEMO, folder)
    weights = mx.load(str(DEMO / "model.safetensors"))
    weights["lm_head.weight"] = -weights["lm_head.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Its first three layers of four: it agrees now and then."""
    folder = tmp_path_factory.mktemp("draft") / "small"
    shutil.copytree(DEMO, folder)
    config = json.loads((DEMO / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layers": 3}))
    weights = mx.load(str(DEMO / "model.safetensors"))
    kept = {k: v for k, v in weights.items() if ".blocks.3." not in k}
    mx.save_safetensors(str(folder / "model.safetensors"), kept)
    return folder


SAID = [
    ([60 + (7 * i * i) % 30 for i in range(25)], 60, ENDLESS | WILD),
    *(DRAFTED[at] for at in (0, 3, 5, 6)),
]


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_draft_model_changes_nothing(models, small, nodes):
    """Of two nodes each has half of each expert, and the first the whole draft model."""
    with cenacle.load(str(DEMO), nodes, speculative="always", draft_model=str(small)) as drafting:
        for prompt, limit, how in SAID:
            plain = list(models[nodes].stream(prompt, limit, logprobs=2, **how))
            drafted = list(drafting.stream(prompt, limit, logprobs=2, **how))
            assert [(c.token, c.finish) for c in drafted] == [(c.token, c.finish) for c in plain]
            for a, b in zip(drafted, plain, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=2e-3)
        done = drafting.group.draft_stats
        assert done.by_model > done.by_model_accepted > 20
        assert done.drafted - done.by_model > 50  # from the text
        come_and_go(models[nodes], drafting, *DRAFTED[2])


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_draft_model_that_is_never_right_is_given_up(models, stranger, nodes):
    want = models[nodes].generate(NOISE, 200, **ENDLESS | WILD).tokens
    with cenacle.load(str(DEMO), nodes, draft_model=str(stranger)) as model:
        assert model.generate(NOISE, 200, **ENDLESS | WILD).tokens == want
        done = model.group.draft_stats
        assert 0 < done.by_model < 100, "it gives up"
        assert done.by_model_accepted < done.by_model / 4


def test_a_draft_model_that_is_always_right(models):
    """Of one rank: tests/mlx/test_drafting.py."""
    with cenacle.load(str(DEMO), 2, draft_model=str(DEMO), speculative="always") as model:
        for how in (WILD, {}):
            first = model.generate(NOISE, 40, **how).tokens
            assert first == models[2].generate(NOISE, 40, **how).tokens
        assert model.group.draft_stats.by_model == model.group.draft_stats.by_model_accepted > 0
        # A text that begins alike, as the next question of a chat.
        again = [*NOISE, *first[:20], 65, 70, 61]
        assert model.generate(again, 9).tokens == models[2].generate(again, 9).tokens
        stream = model.stream(NOISE, 800, **ENDLESS)
        for _ in range(40):
            next(stream)
        stream.close()
        assert model.generate(ASKED).text == "42"


def test_ways_to_draft():
    with pytest.raises(
        InputError, match="speculative: expected one of auto, off, always, got 'no'"
    ):
        EngineOptions(speculative="no")
