"""Sampling, log-probabilities, grammars and speculative decoding, the same on 1 and 2 nodes.

The references are mlx-lm's own model, which computes the logits of the complete text at once, and
Python's `re` and `json`.
"""

import json
import queue
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from llguidance import LLMatcher
from mlx_lm.utils import load_model

import cenacle
from cenacle import InputError
from cenacle.core.request import Sampling, TokenEvent
from cenacle.engine.options import EngineOptions

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
QUESTION = "What is 12 + 30?"
DICE = {"temperature": 1.2, "seed": 5, "top_p": 0.9}
NOISE = list(range(60, 90))  # unlike its training data: flat distributions
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
# Else a model without knowledge of JSON may add spaces without end.
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

    @cache
    def logprobs(tokens: tuple[int, ...]) -> np.ndarray:
        logits = model(mx.array([tokens]))[0].astype(mx.float32)
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    return lambda tokens: logprobs(tuple(tokens))


def on_both(models, ask):
    """`ask(model)` on one node, after checking that two nodes give the same."""
    one, two = ask(models[1]), ask(models[2])
    assert one == two
    return one


@pytest.mark.parametrize(
    "options", [{}, DICE, {"logit_bias": {100: 9.0}, "repetition_penalty": 1.5}]
)
@pytest.mark.parametrize("nodes", [1, 2])
def test_logprobs_are_those_of_the_model(models, reference, nodes, options):
    model = models[nodes]
    prompt = model.tokens_of(QUESTION)
    chunks = list(model.stream(prompt, 12, logprobs=4, **options))
    assert [c.token for c in chunks] == model.generate(prompt, 12, **options).tokens
    text = [*prompt, *(c.token for c in chunks)]
    expected = reference(text)[len(prompt) - 1 :]
    for chunk, row in zip(chunks, expected, strict=False):
        assert chunk.logprob == pytest.approx(row[chunk.token], abs=1e-3)
        assert [p for _, p in chunk.top] == pytest.approx(sorted(row)[: -4 - 1 : -1], abs=1e-3)
        assert [row[i] for i, _ in chunk.top] == pytest.approx([p for _, p in chunk.top], abs=1e-3)


def test_no_alternatives_and_no_logprobs(models):
    for model in models.values():
        chunks = list(model.stream(QUESTION, 3, logprobs=0))
        assert all(c.logprob is not None and c.top == () for c in chunks)
        assert all(c.logprob is None and c.top == () for c in model.stream(QUESTION, 3))


def generate_concurrently(model, requests) -> list[list[int]]:
    """The outputs of several requests that start at once."""
    outputs: dict[int, list[int]] = {}
    begin = threading.Barrier(len(requests))

    def ask(index: int) -> None:
        prompt, limit, options = requests[index]
        begin.wait(120)
        outputs[index] = model.generate(prompt, limit, **options).tokens

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    return [outputs[i] for i in range(len(requests))]


def test_outputs_are_the_same_alone_and_concurrently_on_any_number_of_nodes(models):
    requests = [
        (NOISE, 12, WILD),
        (NOISE, 12, WILD | {"seed": 6}),
        (NOISE, 12, WILD | {"presence_penalty": 2.0, "frequency_penalty": 2.0}),
        (NOISE, 12, WILD | {"logit_bias": {81: -100.0}, "min_p": 0.01, "top_k": 50}),
        (NOISE, 40, WILD | {"grammar": OBJECT}),
        (NOISE, 20, {"grammar": NUMBER}),
        (NOISE, 12, {"repetition_penalty": 1.3}),
    ]
    alone = on_both(
        models, lambda m: [m.generate(p, n, **options).tokens for p, n, options in requests]
    )
    assert len({tuple(a) for a in alone}) == len(alone)
    assert on_both(models, lambda m: generate_concurrently(m, requests)) == alone


def test_a_seeded_output_can_be_resumed(models):
    """As after a failure: earlier output is part of the prompt."""
    for options in (WILD, WILD | {"grammar": OBJECT}, {"grammar": OBJECT, "presence_penalty": 1.0}):
        for model in models.values():
            complete = model.generate(NOISE, 24, **options).tokens
            assert len(complete) > 8
            sampling = {k: v for k, v in options.items() if k != "grammar"}
            request = model.request(NOISE, 24, Sampling(**sampling))
            rest = replace(request, grammar=options.get("grammar")).resumed_with(complete[:5])
            assert [c.token for c in model._stream(rest, ())] == complete[5:]


@pytest.mark.parametrize("options", [{}, DICE, {"temperature": 2.0, "seed": 1}])
def test_outputs_match_their_grammar_and_end(models, options):
    def ask(grammar, limit=120):
        def one(model):
            done = model.generate(QUESTION, limit, grammar=grammar, **options)
            return done.text, done.finish

        return on_both(models, one)

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
    if sys.platform == "linux":  # they had the vocabulary from the front
        for pid in models[2].ranks.pids:
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert "llguidance" in maps
            assert "/tokenizers" not in maps


def test_a_truncated_output_matches_its_grammar_so_far(models):
    text, finish = on_both(
        models,
        lambda m: (lambda d: (d.text, d.finish))(m.generate(QUESTION, 6, grammar=OBJECT, **DICE)),
    )
    assert finish == "length"
    assert text.startswith('{"name"')


def scores_of(model, tokens, top):
    """Position -> log-probability, rank and alternatives of a prompt's tokens, and the output."""
    events = queue.Queue()
    request = model.request(tokens, 3, logprobs=top, prompt_logprobs=top)
    model.group.submit(request, events.put)
    scores, output = {}, []
    while not output or output[-1].finish is None:
        event = events.get(timeout=300)
        if isinstance(event, TokenEvent):
            output.append(event)
            continue
        assert not output, "they come before the output"
        rows = zip(event.logprobs, event.ranks, event.top, strict=True)
        for position, row in enumerate(rows, event.begin):
            assert position == len(scores) + 1
            scores[position] = row
    return scores, output


LONG = [60 + (i * i) % 31 for i in range(300)]  # several parts


def check_scores(scores, tokens, expected, top):
    assert list(scores) == list(range(1, len(tokens)))
    rows = expected[:-1]  # all at once: there are thousands
    of_tokens = rows[np.arange(len(rows)), tokens[1:]]
    logprobs, ranks, alternatives = zip(*scores.values(), strict=True)
    np.testing.assert_allclose(logprobs, of_tokens, rtol=0, atol=2e-3)
    better = (rows > of_tokens[:, None]).sum(axis=1)
    assert np.abs(np.array(ranks) - 1 - better).max() <= 1
    best = np.array([[p for _, p in row] for row in alternatives]).reshape(len(rows), -1)
    highest = np.sort(rows, axis=1)[:, : -top - 1 : -1]
    np.testing.assert_allclose(best, highest, rtol=0, atol=2e-3)
    for logprob, rank, row in scores.values():
        if rank == 1 and top:
            assert logprob == row[0][1], "exactly: clients compare them"


@pytest.mark.parametrize("top", [0, 3])
def test_logprobs_of_prompts_are_those_of_the_model(models, drafting, reference, top):
    for model in [*models.values(), *drafting.values()]:
        for tokens in (LONG, [*model.tokens_of(QUESTION)], LONG[:2], LONG[:65], LONG):
            scores, output = scores_of(model, tokens, top)
            check_scores(scores, tokens, reference(tokens), top)
            expected = [chunk.token for chunk in model.stream(tokens, 3)]
            assert [event.token for event in output] == expected
        assert scores_of(model, [5], top)[0] == {}


def test_logprobs_of_prompts_beside_each_other(models, reference):
    for model in models.values():
        prompts = [LONG[i : i + 40 + 30 * i] for i in range(5)]
        with ThreadPoolExecutor() as pool:
            answers = list(pool.map(lambda tokens, m=model: scores_of(m, tokens, 1)[0], prompts))
        for tokens, scores in zip(prompts, answers, strict=True):
            check_scores(scores, tokens, reference(tokens), 1)


def test_logprobs_of_prompts_where_requests_take_turns(reference):
    with cenacle.load(str(DEMO), 1, max_kv_size=512, prefill_chunk_size=50) as model:
        scores, _ = scores_of(model, LONG, 2)
        check_scores(scores, LONG, reference(LONG), 2)


def answer_of(model, prompt=QUESTION, max_tokens=40, sampling=None, stop=(), **limits):
    """Tokens and the reason for the end."""
    request = model.request(prompt, max_tokens, sampling, **limits)
    chunks = list(model._stream(request, stop))
    return [chunk.token for chunk in chunks], chunks[-1].finish


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(**DICE)])
def test_min_tokens_come_before_the_end(models, drafting, sampling):
    end = models[1].text.stop_tokens
    plain, _ = answer_of(models[1], sampling=sampling)
    assert len(plain) < 12, "ends by itself, and before min_tokens"
    every = [*models.values(), *drafting.values()]
    answers = [answer_of(m, sampling=sampling, min_tokens=12) for m in every]
    tokens, finish = answers[0]
    assert all(answer == answers[0] for answer in answers)
    assert len(tokens) > 12 or finish == "length"
    assert not set(tokens[:12]) & set(end)
    assert tokens[: len(plain) - 1] == plain[:-1]
    for model in every:  # a restart of the group does not begin to count again
        request = model.request(QUESTION, 40, sampling, min_tokens=12)
        rest = list(model._stream(request.resumed_with(tokens[:5]), ()))
        assert [chunk.token for chunk in rest] == tokens[5:]


def test_an_ignored_end_does_not_end(models, drafting):
    for model in [*models.values(), *drafting.values()]:
        tokens, finish = answer_of(model, max_tokens=30, ignore_eos=True)
        assert (len(tokens), finish) == (30, "length")
        assert set(tokens) & set(model.text.stop_tokens), "as the model would have ended"


def test_requests_beside_each_other_end_by_their_own_min_tokens(models, drafting):
    limits = [{}, {"min_tokens": 7}, {"min_tokens": 20}, {"ignore_eos": True}]
    for model in [*models.values(), *drafting.values()]:
        alone = [answer_of(model, **limit) for limit in limits]
        together = [None] * len(limits)

        def run(at, model=model, together=together):
            together[at] = answer_of(model, **limits[at])

        threads = [threading.Thread(target=run, args=(at,)) for at in range(len(limits))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert together == alone


def test_a_grammar_that_has_ended_ends_before_min_tokens(models, drafting):
    digits = LLMatcher.grammar_from_regex("[0-9]{3}")
    list_ = LLMatcher.grammar_from_regex("[a-c]+")  # may end, and may go on
    for model in [*models.values(), *drafting.values()]:
        tokens, finish = answer_of(model, grammar=digits, min_tokens=12)
        assert (len(model.text.decode(tokens[:-1])), finish) == (3, "stop")
        tokens, _ = answer_of(model, grammar=list_, min_tokens=12)
        assert len(tokens) > 12
        tokens, finish = answer_of(model, grammar=digits, max_tokens=12, ignore_eos=True)
        assert (len(tokens), finish) == (12, "length")


def test_invalid_grammars_are_refused(models):
    for grammar, reason in [
        ("", "Empty grammar"),
        ("{}", "missing field `grammars`"),
        ("start: /[/", "unclosed character class"),
        (LLMatcher.grammar_from_json_schema('{"type": "color"}'), "Invalid type: color"),
        (LLMatcher.grammar_from_regex("[^\\x00-\\U0010ffff]"), "no text matches it"),
    ]:
        with pytest.raises(InputError, match=f"grammar: expected one that .*{re.escape(reason)}"):
            models[2].generate(QUESTION, 3, grammar=grammar)
    assert models[2].generate(QUESTION).text == "42"


ENDLESS = {"logit_bias": {362: -100.0}}  # no end token
REPETITION = [81, 82, 83, 84] * 6
DRAFTED = [
    (REPETITION, 40, {}),
    (NOISE, 50, ENDLESS),
    (NOISE, 40, ENDLESS | WILD),
    (NOISE, 40, ENDLESS | {"repetition_penalty": 1.1, "temperature": 0.7, "seed": 3}),
    (QUESTION, 30, {}),
    (NOISE, 40, WILD | {"grammar": OBJECT}),
    (REPETITION, 40, {"grammar": LISTS, "temperature": 0.5, "seed": 2}),
]


@pytest.mark.parametrize("nodes", [1, 2])
def test_drafts_change_nothing(models, drafting, nodes):
    before = drafting[nodes].group.draft_stats
    for prompt, limit, options in DRAFTED:
        plain = list(models[nodes].stream(prompt, limit, logprobs=2, **options))
        drafted = list(drafting[nodes].stream(prompt, limit, logprobs=2, **options))
        assert [(c.token, c.finish) for c in drafted] == [(c.token, c.finish) for c in plain]
        for a, b in zip(drafted, plain, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=2e-3)
    done = drafting[nodes].group.draft_stats - before
    assert done.drafted > done.accepted > 30
    assert models[nodes].group.draft_stats.drafted == 0


@pytest.mark.parametrize("nodes", [1, 2])
def test_other_requests_join_and_leave_beside_drafts(models, drafting, nodes):
    """Each time the drafting request returns to the batch and leaves it again."""
    for prompt, limit, options in (DRAFTED[2], DRAFTED[5]):
        check_joining_requests(models[nodes], drafting[nodes], prompt, limit, options)


def check_joining_requests(plain, drafting, prompt, limit, options) -> None:
    limit *= 3
    expected_tokens = plain.generate(prompt, limit, logprobs=1, **options).tokens
    other = plain.generate(QUESTION).tokens
    tokens, joined = [], 0
    for chunk in drafting.stream(prompt, limit, logprobs=1, **options):
        tokens.append(chunk.token)
        if len(tokens) % 12 == 5 and joined < 6:
            joined += 1
            if joined % 2:
                assert drafting.generate(QUESTION).tokens == other
            else:  # a request that is cancelled
                next(drafting.stream(NOISE, 100, **ENDLESS))
    assert tokens == expected_tokens
    assert joined >= 2


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_drafting_request_can_be_cancelled(drafting, nodes):
    model = drafting[nodes]
    stream = model.stream(NOISE, 800, **ENDLESS)
    for _ in range(40):
        next(stream)
    stream.close()
    assert model.generate(QUESTION).text == "42"
    assert model.group.load == {"running": 0, "waiting": 0}


def test_measured_steps_of_drafts_are_divided_by_their_tokens(drafting):
    model = drafting[2]
    done = model.generate(REPETITION, 120, **ENDLESS)
    terms = model.group.step_timings
    assert terms.tokens > terms.steps > 0
    parts = sum(v for k, v in done.step_timings_ms.items() if k != "total")
    assert parts == pytest.approx(done.step_timings_ms["total"])


# A draft model


@pytest.fixture(scope="module")
def opposite(tmp_path_factory) -> Path:
    """The demo model with negated logits: its most probable token is the least probable."""
    folder = tmp_path_factory.mktemp("draft") / "opposite"
    shutil.copytree(DEMO, folder)
    weights = mx.load(str(DEMO / "model.safetensors"))
    weights["lm_head.weight"] = -weights["lm_head.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The first three of four layers: it agrees now and then."""
    folder = tmp_path_factory.mktemp("draft") / "small"
    shutil.copytree(DEMO, folder)
    config = json.loads((DEMO / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layers": 3}))
    weights = mx.load(str(DEMO / "model.safetensors"))
    tensors = {k: v for k, v in weights.items() if ".blocks.3." not in k}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


PROMPTED = [
    ([60 + (7 * i * i) % 30 for i in range(25)], 60, ENDLESS | WILD),
    *(DRAFTED[i] for i in (0, 3, 5, 6)),
]


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_draft_model_changes_nothing(models, small, nodes):
    """With two nodes, each has half of every expert, and the first the whole draft model."""
    with cenacle.load(str(DEMO), nodes, speculative="always", draft_model=str(small)) as drafting:
        for prompt, limit, options in PROMPTED:
            plain = list(models[nodes].stream(prompt, limit, logprobs=2, **options))
            drafted = list(drafting.stream(prompt, limit, logprobs=2, **options))
            assert [(c.token, c.finish) for c in drafted] == [(c.token, c.finish) for c in plain]
            for a, b in zip(drafted, plain, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=2e-3)
        done = drafting.group.draft_stats
        assert done.by_model > done.by_model_accepted > 10
        assert done.drafted - done.by_model > 50  # from the text
        check_joining_requests(models[nodes], drafting, *DRAFTED[2])


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_draft_model_that_is_never_right_is_abandoned(models, opposite, nodes):
    expected_tokens = models[nodes].generate(NOISE, 200, **ENDLESS | WILD).tokens
    with cenacle.load(str(DEMO), nodes, draft_model=str(opposite)) as model:
        assert model.generate(NOISE, 200, **ENDLESS | WILD).tokens == expected_tokens
        done = model.group.draft_stats
        assert 0 < done.by_model < 100, "drafting stops"
        assert done.by_model_accepted < done.by_model / 4


def test_a_draft_model_that_is_always_right(models):
    """Of one rank: tests/mlx/test_draft_model.py."""
    with cenacle.load(str(DEMO), 2, draft_model=str(DEMO), speculative="always") as model:
        for options in (WILD, {}):
            first = model.generate(NOISE, 40, **options).tokens
            assert first == models[2].generate(NOISE, 40, **options).tokens
        assert model.group.draft_stats.by_model == model.group.draft_stats.by_model_accepted > 0
        # A text with a common prefix, as the next question of a chat.
        again = [*NOISE, *first[:20], 65, 70, 61]
        assert model.generate(again, 9).tokens == models[2].generate(again, 9).tokens
        stream = model.stream(NOISE, 800, **ENDLESS)
        for _ in range(40):
            next(stream)
        stream.close()
        assert model.generate(QUESTION).text == "42"


def test_an_unknown_speculative_mode_is_refused():
    with pytest.raises(
        InputError, match="speculative: expected one of auto, off, always, got 'no'"
    ):
        EngineOptions(speculative="no")
