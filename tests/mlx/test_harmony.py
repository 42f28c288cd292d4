"""gpt-oss's channels, as parts of an output and as earlier messages."""

import json
import shutil
from pathlib import Path

import pytest

import cenacle
from cenacle.core.chat import OutputPart, Tool, join_text
from cenacle.core.request import Request, TokenEvent
from cenacle.server.generation import InFlightChoice
from cenacle.text.tokenizer import ChatTokenizer
from support.harmony_model import MARKS, TEMPLATE

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
WEATHER = Tool("weather", "Look outside", {"type": "object"})


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("harmony")
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    first = max(tokenizer["model"]["vocab"].values()) + 100
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] += [
        {**plain, "special": True, "id": first + at, "content": mark}
        for at, mark in enumerate(MARKS)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    shutil.copy(DEMO / "tokenizer_config.json", folder)
    return ChatTokenizer(folder, json.loads((DEMO / "config.json").read_text()))


def parts_of(text: ChatTokenizer, output: str, tools=(WEATHER,), prompt=()) -> list[OutputPart]:
    stream = text.chat_parser((), tools, prompt)
    parts = [part for token in text.encode(output) for part in stream.add(token)]
    return join_text(parts + stream.finish())


THOUGHT = "<|channel|>analysis<|message|>Hm.<|end|>"
CALL = (
    '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"place": "Oslo"}'
    "<|call|>"
)
CALLED = OutputPart("call", '{"place": "Oslo"}', "weather")
REASONING = OutputPart("reasoning", "Hm.")


@pytest.mark.parametrize(
    ("output", "parts"),
    [
        (
            f"{THOUGHT}<|start|>assistant<|channel|>final<|message|>Rain.<|return|>",
            [REASONING, OutputPart("text", "Rain.")],
        ),
        ("<|channel|>final<|message|>Rain", [OutputPart("text", "Rain")]),
        (f"{THOUGHT}<|start|>assistant{CALL}", [REASONING, CALLED]),
        (
            f"{THOUGHT}<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>"
            '{"place": "Oslo"}<|call|>',
            [REASONING, CALLED],
        ),
        (
            f"<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{CALL}",
            [OutputPart("text", "I look."), CALLED],
        ),
        (
            CALL.replace('"Oslo"}', "NaN}").removesuffix("<|call|>"),
            [
                OutputPart(
                    "text",
                    'to=functions.weather <|constrain|>json<|message|>{"place": NaN}',
                )
            ],
        ),
        ("Rain.", [OutputPart("text", "Rain.")]),
    ],
)
def test_channels_are_parts(text, output, parts):
    assert parts_of(text, output) == parts


def test_a_prompt_may_have_begun_a_message(text):
    ask = [{"role": "user", "content": "Why?"}]
    begun = text.start_reasoning(text.render(ask), None)
    assert text.decode(begun).endswith("<|start|>assistant<|channel|>analysis<|message|>")
    assert text.ends_in_reasoning(begun)
    assert parts_of(text, "Hm.<|end|>", prompt=begun) == [REASONING]
    answer = text.start_reasoning(text.render(ask), False)
    assert parts_of(text, "Yes.", prompt=answer) == [OutputPart("text", "Yes.")]


def test_a_grammar_applies_to_the_final_channel(text):
    prompt = text.start_reasoning(text.render([{"role": "user", "content": "Why?"}]), None)
    request = Request("1", prompt, 50, text.stop_tokens, grammar="g")
    choice = InFlightChoice(0, request, 1, text.text_parser(()), text)
    choice.precede_grammar(text.chat_parser((), (), prompt), may_call=False)
    for token in text.encode("Hm.<|end|>"):
        parts = choice.add_token(TokenEvent("1", token))
        choice.change_phase(parts)
    ending = "Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
    assert text.decode(choice.request.tokens).endswith(ending)
    assert choice.request.grammar == "g"


def test_the_model_reasons_calls_and_ends_as_gpt_oss(text):
    assert (text.has_reasoning, text.parses_tool_calls, text.renders_tools) == (True, True, True)
    ends = {text.vocabulary["<|call|>"], text.vocabulary["<|return|>"]}
    assert ends <= set(text.stop_tokens)
    settings = text.map_reasoning_effort("xhigh")
    rendered = text.decode(
        text.render([{"role": "user", "content": "Why?"}], options=settings.variables)
    )
    assert "Reasoning: high" in rendered


def test_earlier_calls_are_rendered_one_by_one(text):
    def call(at: int, place: str):
        function = {"name": "weather", "arguments": {"place": place}}
        return {"id": f"c{at}", "type": "function", "function": function}

    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Hm.",
            "tool_calls": [call(1, "Oslo"), call(2, "Rome")],
        },
        {"role": "tool", "content": "sun", "tool_call_id": "c2"},
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
        {"role": "system", "content": "Be brief."},
    ]
    rendered = text.decode(text.render(messages, [WEATHER]))
    order = ["Be brief.", "Hm.", "Oslo", "rain", "Rome", "sun"]
    assert sorted(order, key=rendered.index) == order
