"""Log-probabilities of a prompt, part by part, as one choice gets them."""

from typing import Any

import pytest

from cenacle.core.chat import TokenLogprob
from cenacle.core.request import PromptLogprobs, Request, TokenEvent
from cenacle.errors import InputError
from cenacle.message import MessageError
from cenacle.ranks.messages import StepResult
from cenacle.server.generation import InFlightChoice

PROMPT = (1, 2, 3, 4, 5)
WORDS = {1: b" a", 2: b"b", 3: "€".encode()[:2], 4: "€".encode()[2:], 5: b" d", 6: b"e"}


class Words:
    """A tokenizer of few tokens."""

    def token_bytes(self, token: int) -> bytes:
        return WORDS[token]

    def decode(self, tokens: tuple[int, ...]) -> str:
        return b"".join(WORDS[token] for token in tokens).decode(errors="replace").lstrip()

    def prompt_logprobs(self, tokens: Any, scores: PromptLogprobs) -> list[TokenLogprob]:
        values = zip(tokens[scores.begin : scores.end], scores.logprobs, strict=True)
        return [TokenLogprob(WORDS[token], value, (), token) for token, value in values]

    def token_logprob(self, event: TokenEvent) -> TokenLogprob:
        return TokenLogprob(WORDS[event.token], event.logprob)


class Parser:
    """Of outputs without text."""

    in_reasoning, stop_string, finished = False, None, False

    def add(self, _: int) -> list[Any]:
        return []

    def finish(self, **_: Any) -> list[Any]:
        return []


def scores(begin: int, *logprobs: float) -> PromptLogprobs:
    ranks = (1,) * len(logprobs)
    return PromptLogprobs("a", begin, logprobs, ranks, ((),) * len(logprobs))


def choice(prompt: tuple[int, ...] = PROMPT, **fields: Any) -> InFlightChoice:
    tools: Any = (Parser(), Words())
    request = Request("a", prompt, 2)
    return InFlightChoice(0, request, 5, *tools, prompt=prompt, echo_prompt=True, **fields)


def test_parts_that_come_again_after_a_restart_count_once() -> None:
    one = choice()
    parts = one.add_prompt_logprobs(scores(1, -1.0, -2.0))
    parts += one.add_prompt_logprobs(scores(1, -1.5, -2.5, -3.0))  # the group has started again
    parts += one.add_prompt_logprobs(scores(1, -1.5))
    assert one.add_prompt_logprobs(scores(9, -1.0)) == [], "a gap"
    parts += one.add_prompt_logprobs(scores(4, -4.0))
    parts += one.add_token(TokenEvent("a", 6, "stop", -5.0))
    tokens = [token for part in parts for token in part.logprobs]
    assert [token.logprob for token in tokens] == [None, -1.0, -2.0, -3.0, -4.0, -5.0]
    assert "".join(part.text for part in parts) == "ab€ d"  # without the tokenizer's first space
    assert b"".join(token.data for token in tokens[:5]).decode() == "ab€ d"


def test_a_prompt_of_one_token_has_none() -> None:
    one = choice((2,), is_empty=True)
    (part,) = one.add_token(TokenEvent("a", 6, None, -5.0))
    assert (part.text, [token.logprob for token in part.logprobs]) == ("b", [None])
    assert one.finish is not None
    assert one.finish.reason == "length"
    assert one.generated_tokens == 0


def test_they_are_not_wanted_again_after_the_first_token() -> None:
    request = Request("a", PROMPT, 9, prompt_logprobs=2)
    assert request.resumed_with([]).prompt_logprobs == 2
    assert request.resumed_with([6]).prompt_logprobs is None
    assert Request.from_json(request.to_json()) == request
    with pytest.raises(InputError, match="prompt_logprobs: expected"):
        Request("a", PROMPT, 9, prompt_logprobs=21)


@pytest.mark.parametrize(
    "damage", [{"begin": -1}, {"begin": "1"}, {"logprobs": ["a"]}, {"ranks": [1.5]}, {"top": 3}]
)
def test_damaged_ones_of_a_rank_are_refused(damage: dict[str, Any]) -> None:
    result = StepResult(0, 0, (), prompt_logprobs=(scores(1, -1.0),))
    data = result.to_json()
    assert StepResult.from_json(data) == result
    data["prompt_logprobs"][0] |= damage
    with pytest.raises(MessageError, match="prompt_logprobs"):
        StepResult.from_json(data)


def test_those_of_different_lengths_are_refused() -> None:
    data = StepResult(0, 0, (), prompt_logprobs=(scores(1, -1.0),)).to_json()
    data["prompt_logprobs"][0]["ranks"] = [1, 2]
    with pytest.raises(MessageError, match="prompt_logprobs"):
        StepResult.from_json(data)
