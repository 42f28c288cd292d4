"""However a stream is cut into tokens, its reasoning, text and calls are the same; also damaged."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_output_parser import DEEPSEEK, LLAMA, SCRIPTS, TEMPLATE, V3_CALL, V31_CALL, XTML, text_of

from cenacle.core.chat import OutputPart, Tool, join_text
from cenacle.text.tokenizer import ChatTokenizer
from support.harmony_model import MARKS
from support.harmony_model import TEMPLATE as HARMONY

TOOLS = [
    Tool("weather", "", {"type": "object", "properties": {"place": {"type": "string"}}}),
    Tool("time", "", {"type": "object"}),
]


def deepseek(form: str) -> tuple[str, str]:
    written = form.format("{{ c.function.name }}", "{{ '' + c.function.arguments }}")
    call = form.format("weather", '{"place": "Oslo"}') + "<｜tool▁call▁end｜>"
    output = f"<｜tool▁calls▁begin｜>{call}{call}<｜tool▁calls▁end｜>"
    return DEEPSEEK.replace("CALL", written), output


THOUGHT = "<think>\nHm é🙂.\n</think>\n\n"
JSON_CALL = '{"name": "weather", "arguments": {"place": "Oslo é🙂"}}'
HARMONY_CALL = (
    "<|channel|>analysis<|message|>Hm é🙂.<|end|><|start|>assistant<|channel|>commentary<|message|>"
    "I look.<|end|><|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json"
    '<|message|>{"place": "Oslo"}<|end|><|start|>assistant<|channel|>final<|message|>Rain.'
)
# Template, marks in the vocabulary, outputs.
FORMATS = {
    **{
        name: (
            f"{{# {mark} #}}{{{{ tools }}}}",
            XTML if name == "kimi_k3" else (),
            (output, f"I look é🙂.\n{output}"),
        )
        for name, (mark, output) in SCRIPTS.items()
    },
    "json_tools": (
        TEMPLATE,
        ("<think>", "</think>"),
        (
            f"{THOUGHT}Well.<tool_call>{JSON_CALL}</tool_call>\n<tool_call>\n{JSON_CALL}",
            f"{THOUGHT}{JSON_CALL}",
            f"{THOUGHT}[{JSON_CALL}, {JSON_CALL}]",
            '{"name": "nothing"} é',
        ),
    ),
    "harmony": (HARMONY, MARKS, (HARMONY_CALL,)),
    "llama": (LLAMA, (), (JSON_CALL, f"{JSON_CALL}; {JSON_CALL}", '[weather(place="Oslo")]')),
    "deepseek-v3": (deepseek(V3_CALL)[0], (), (deepseek(V3_CALL)[1],)),
    "deepseek-v3.1": (deepseek(V31_CALL)[0], (), (f"I look.{deepseek(V31_CALL)[1]}",)),
}


# Muse Spark's, Kimi K3's and gpt-oss's marks have attributes that mean nothing here.
WITH_ATTRIBUTES = ("<atem:", "<|open|>", "<|channel|>")


@pytest.fixture(scope="module", params=FORMATS)
def reader(request, tmp_path_factory) -> tuple[ChatTokenizer, tuple[str, ...]]:
    template, marks, outputs = FORMATS[request.param]
    return text_of(tmp_path_factory.mktemp("model"), template, marks), outputs


class Pieces:
    """A detokenizer of tokens that are texts of any length, by their number."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def add(self, token: int) -> str:
        return self._pieces[-1 - token]

    def finish(self) -> str:
        return ""


def cut(output: str, seed: int) -> list[str]:
    generator, pieces = random.Random(seed), []
    lengths = generator.choice([(1,), (1, 2, 3), (1, 2, 8, 40), (30, 200)])
    while output:
        length = generator.choice(lengths)
        pieces.append(output[:length])
        output = output[length:]
    return pieces


def parse(text: ChatTokenizer, pieces: list[str], *, parallel: bool = True) -> list[OutputPart]:
    parser = text.chat_parser((), TOOLS, (), parallel=parallel)
    parser._detokenizer = Pieces(pieces)
    parts = []
    for at in range(len(pieces)):
        parts += parser.add(-1 - at)
    return join_text(parts + parser.finish())


def check(text: ChatTokenizer, output: str, seed: int) -> None:
    for parallel in (True, False):
        whole = parse(text, [output], parallel=parallel)
        assert parse(text, cut(output, seed), parallel=parallel) == whole
        for part in whole:
            assert part.text
            if part.kind == "call":
                assert isinstance(json.loads(part.text), dict)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32))
def test_a_stream_may_be_cut_anywhere(reader, seed):
    text, outputs = reader
    for output in outputs:
        assert any(part.kind == "call" for part in parse(text, [output])) or ("nothing" in output)
        check(text, output, seed)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_stream_may_be_cut_anywhere(reader, seed):
    text, outputs = reader
    generator = random.Random(seed)
    output = generator.choice(outputs)
    for _ in range(generator.randint(1, 4)):
        start, end = sorted(generator.choices(range(len(output) + 1), k=2))
        piece = output[start:end][: generator.choice([1, 5, 60])]
        at = generator.randrange(len(output) + 1)
        if generator.random() < 0.5:
            output = output[:start] + output[start + len(piece) :]  # lost
        else:
            output = output[:at] + piece + output[at:]  # said twice
    check(text, output, seed)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_no_letter_is_dropped(reader, seed):
    """A letter that is nowhere else comes out wherever it was put: in text, a name or a value."""
    text, outputs = reader
    if any(mark in output for output in outputs for mark in WITH_ATTRIBUTES):
        return
    generator = random.Random(seed)
    output = generator.choice(outputs)
    at = generator.randrange(len(output) + 1)
    output = f"{output[:at]}§{output[at:]}"
    parts = parse(text, [output])
    assert any("§" in part.text + part.name + part.id for part in parts), output
