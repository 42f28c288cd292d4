"""Matchers of the demo model's vocabulary, against Python's `re` and `json`."""

import json
import random
import re
from pathlib import Path

import pytest
from llguidance import LLMatcher, LLParserLimits

from cenacle import InputError
from cenacle.engine.sampling.grammar import Vocabulary, check
from cenacle.text.tokenizer import ChatTokenizer

DEMO = Path(__file__).parents[2] / "src/cenacle/demo/demo_model"
SHAPE = "(ab|a[0-9]{1,3})+z"
PATTERN = LLMatcher.grammar_from_regex(SHAPE)
OBJECT = LLMatcher.grammar_from_json_schema('{"type": "object"}')


@pytest.fixture(scope="module")
def text():
    return ChatTokenizer(DEMO, {"eos_token_id": 362})


@pytest.fixture(scope="module")
def vocabulary(text):
    return Vocabulary(lambda: text)


def walk(matcher, draw, most=200) -> list[int]:
    """Any allowed token after another until an end is drawn."""
    tokens: list[int] = []
    fresh: list[int] = []
    while len(tokens) < most:
        allowed = [int(i) for i in matcher.allowed(fresh).nonzero()[0]]
        assert allowed, "something is always allowed"
        fresh = [draw.choice(allowed)]
        tokens += fresh
        if fresh == [362]:
            break
    return tokens


def test_whatever_is_drawn_matches(text, vocabulary):
    ended = 0
    for seed in range(30):
        tokens = walk(vocabulary.matcher(PATTERN, 0), random.Random(seed))
        if tokens[-1] == 362:
            ended += 1
            assert re.fullmatch(SHAPE, text.decode(tokens[:-1]))
    assert ended > 20


def test_behind_the_end_there_is_only_the_end(vocabulary):
    matcher = vocabulary.matcher(LLMatcher.grammar_from_regex("a"), 3)
    (first,) = matcher.allowed([]).nonzero()[0]
    for fresh in ([first], [362], [362]):
        assert list(matcher.allowed([int(t) for t in fresh]).nonzero()[0]) == [362]
    assert matcher.length == 6
    assert not matcher.failed


def test_a_matcher_that_went_back_allows_what_one_that_did_not_go_does(text, vocabulary):
    tokens = text.encode('{"a": [1, {"b": null}], "c": true}')
    for keep in range(len(tokens)):
        gone, stayed = vocabulary.matcher(OBJECT, 5), vocabulary.matcher(OBJECT, 5)
        for token in (*tokens, 362):
            gone.allowed([token])
        gone.rewind(5 + keep)
        assert (gone.allowed([]) == stayed.allowed(tokens[:keep])).all()
        assert gone.length == stayed.length == 5 + keep
        assert gone.possible([*tokens[keep:], 362, 362]) == len(tokens) - keep + 1
        assert gone.possible([*tokens[keep:-1], 1, 1, 1]) >= len(tokens) - keep - 1
        json.loads(text.decode(tokens))


def test_limits_are_told(vocabulary):
    matcher = vocabulary.matcher(OBJECT, 0, LLParserLimits(max_items_in_row=1))
    matcher.allowed([90])
    assert matcher.failed.startswith("Parser Error: Current row has")
    assert list(matcher.allowed([]).nonzero()[0]) == [362]


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("", "Empty grammar"),
        ('{"json": 1}', "missing field `grammars`"),
        (LLMatcher.grammar_from_json_schema('{"type": "colour"}'), "Invalid type: colour"),
        (LLMatcher.grammar_from_json_schema('{"not": {}}'), 'Unimplemented keys: ["not"]'),
        (LLMatcher.grammar_from_regex("(?=a)b"), "look-around"),
    ],
)
def test_wrong_grammars_are_refused_without_a_model(grammar, reason):
    with pytest.raises(InputError, match=re.escape(reason)) as refused:
        check(grammar)
    assert refused.value.field == "grammar"
    assert "\n" not in str(refused.value)


def test_what_only_a_model_can_tell(vocabulary):
    nothing = LLMatcher.grammar_from_regex("[^\\x00-\\U0010ffff]")
    check(nothing)
    with pytest.raises(InputError, match="no text matches it"):
        check(nothing, vocabulary)
    check(PATTERN, vocabulary)

    class Slow:
        inner, stop_tokens = object(), (1,)

    with pytest.raises(InputError, match=r"Only fast tokenizers .*ask without a grammar"):
        check(PATTERN, Vocabulary(Slow))
