"""Matchers of the demo model's vocabulary, against Python's `re` and `json`."""

import json
import random
import re
from pathlib import Path

import pytest
from llguidance import LLMatcher, LLParserLimits

from cenacle import InputError
from cenacle.engine.sampling.grammar import Vocabulary, check_grammar
from cenacle.engine.sampling.grammar_process import SerializedTokenizer
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


def walk(matcher, dice, limit=200) -> list[int]:
    """Random allowed tokens until one ends the output."""
    tokens: list[int] = []
    new_tokens: list[int] = []
    while len(tokens) < limit:
        allowed = [int(i) for i in matcher.allowed(new_tokens).nonzero()[0]]
        assert allowed, "something is always allowed"
        new_tokens = [dice.choice(allowed)]
        tokens += new_tokens
        if new_tokens == [362]:
            break
    return tokens


def test_every_allowed_output_matches(text, vocabulary):
    ended = 0
    for seed in range(30):
        tokens = walk(vocabulary.matcher(PATTERN, 0), random.Random(seed))
        if tokens[-1] == 362:
            ended += 1
            assert re.fullmatch(SHAPE, text.decode(tokens[:-1]))
    assert ended > 20


def test_after_the_end_only_the_end_is_allowed(vocabulary):
    matcher = vocabulary.matcher(LLMatcher.grammar_from_regex("a"), 3)
    (first,) = matcher.allowed([]).nonzero()[0]
    for new_tokens in ([first], [362], [362]):
        assert list(matcher.allowed([int(t) for t in new_tokens]).nonzero()[0]) == [362]
    assert matcher.length == 6
    assert not matcher.error


def test_rewinding_restores_the_state(text, vocabulary):
    tokens = text.encode('{"a": [1, {"b": null}], "c": true}')
    for keep in range(len(tokens)):
        rewound, fresh = vocabulary.matcher(OBJECT, 5), vocabulary.matcher(OBJECT, 5)
        for token in (*tokens, 362):
            rewound.allowed([token])
        rewound.rewind(5 + keep)
        assert (rewound.allowed([]) == fresh.allowed(tokens[:keep])).all()
        assert rewound.length == fresh.length == 5 + keep
        assert rewound.allowed_prefix([*tokens[keep:], 362, 362]) == len(tokens) - keep + 1
        assert rewound.allowed_prefix([*tokens[keep:-1], 1, 1, 1]) >= len(tokens) - keep - 1
        json.loads(text.decode(tokens))


def test_limits_are_reported(vocabulary):
    matcher = vocabulary.matcher(OBJECT, 0, LLParserLimits(max_items_in_row=1))
    matcher.allowed([90])
    assert matcher.error.startswith("Parser Error: Current row has")
    assert list(matcher.allowed([]).nonzero()[0]) == [362]


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("", "Empty grammar"),
        ('{"json": 1}', "missing field `grammars`"),
        (LLMatcher.grammar_from_json_schema('{"type": "color"}'), "Invalid type: color"),
        (LLMatcher.grammar_from_json_schema('{"not": {}}'), 'Unimplemented keys: ["not"]'),
        (LLMatcher.grammar_from_regex("(?=a)b"), "look-around"),
    ],
)
def test_invalid_grammars_are_refused_without_a_model(grammar, reason):
    with pytest.raises(InputError, match=re.escape(reason)) as refused:
        check_grammar(grammar)
    assert refused.value.field == "grammar"
    assert "\n" not in str(refused.value)


def test_grammars_are_checked_against_the_vocabulary(vocabulary):
    unmatchable = LLMatcher.grammar_from_regex("[^\\x00-\\U0010ffff]")
    with pytest.raises(InputError, match="no text matches it"):
        check_grammar(unmatchable, vocabulary)
    check_grammar(PATTERN, vocabulary)

    class Slow:
        inner, stop_tokens = object(), (1,)

    with pytest.raises(
        InputError,
        match=r"only those of the tokenizers library .*send the request without a grammar",
    ):
        check_grammar(PATTERN, Vocabulary(Slow))


def test_a_vocabulary_that_llguidance_cannot_read_is_named(vocabulary):
    class Damaged:
        serialized = SerializedTokenizer('{"model": 3}', (1,))

    with pytest.raises(InputError, match="a tokenizer that llguidance can read"):
        check_grammar(PATTERN, Damaged())
    check_grammar(PATTERN, vocabulary)  # the next one is read again
