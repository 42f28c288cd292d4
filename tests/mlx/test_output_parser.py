"""From tokens to the parts of an answer, and from messages to tokens, with mlx-lm's own parsers."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cenacle
from cenacle.core.chat import OutputPart, Tool, join_text
from cenacle.core.request import Request, Sampling, TokenEvent
from cenacle.errors import InputError
from cenacle.server.api import structured_output
from cenacle.server.generation import InFlightChoice
from cenacle.text.tokenizer import ChatTokenizer

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
WEATHER = Tool("weather", "Look outside", {"type": "object"})
# As Qwen's: tools in the system's turn, calls between marks, reasoning where it is wanted.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}"
    "{% for tool_call in m.tool_calls or [] %}{% set tool_call = tool_call.function %}"
    '<tool_call>{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking %}<think>{% endif %}{% if shout %}!{% endif %}{% endif %}"
)


def text_of(folder: Path, template: str, marks: tuple[str, ...] = ()) -> ChatTokenizer:
    """The demo's tokenizer with another template and with marks as tokens of their own."""
    config = json.loads((DEMO / "config.json").read_text())
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    first = max(tokenizer["model"]["vocab"].values()) + 100
    tokenizer["added_tokens"] += [
        {
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False),
            "id": first + at,
            "content": mark,
        }
        for at, mark in enumerate(marks)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(template)
    shutil.copy(DEMO / "tokenizer_config.json", folder)
    return ChatTokenizer(folder, config)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory) -> ChatTokenizer:
    """A model that thinks and calls tools as Qwen's do."""
    return text_of(tmp_path_factory.mktemp("thinker"), TEMPLATE, ("<think>", "</think>"))


@pytest.fixture(scope="module")
def plain() -> ChatTokenizer:
    """The demo itself."""
    return ChatTokenizer(DEMO, json.loads((DEMO / "config.json").read_text()))


def parts_of(
    text: ChatTokenizer, output: str, tools=(WEATHER,), stop=(), prompt=()
) -> list[OutputPart]:
    stream = text.chat_parser(stop, tools, prompt)
    parts = [part for token in text.encode(output) for part in stream.add(token)]
    return join_text(parts + ([] if stream.stop_string else stream.finish()))


CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Oslo"}}\n</tool_call>'
CALLED = OutputPart("call", '{"place": "Oslo"}', "weather")


@pytest.mark.parametrize(
    ("output", "parts"),
    [
        ("It rains.", [OutputPart("text", "It rains.")]),
        (CALL, [CALLED]),
        (f"Let me look.\n{CALL}", [OutputPart("text", "Let me look.\n"), CALLED]),
        (f"{CALL}\n{CALL}", [CALLED, CALLED]),
        (
            f"<think>\nHm.\n</think>\n\nYes.{CALL}",
            [OutputPart("reasoning", "Hm.\n"), OutputPart("text", "Yes."), CALLED],
        ),
        ("a <tool_ b </think>", [OutputPart("text", "a <tool_ b </think>")]),
        ("<think>never ends", [OutputPart("reasoning", "never ends")]),
        ("1 < 2 <tool", [OutputPart("text", "1 < 2 <tool")]),
        ("\n\nfirst lines stay", [OutputPart("text", "\n\nfirst lines stay")]),
        # What cannot be read as a call is not lost.
        ("<tool_call>{</tool_call>", [OutputPart("text", "<tool_call>{</tool_call>")]),
        ("<tool_call>[1]</tool_call>", [OutputPart("text", "<tool_call>[1]</tool_call>")]),
        (
            '<tool_call>{"name": "weather"',
            [OutputPart("text", '<tool_call>{"name": "weather"')],
        ),
    ],
)
def test_an_output_is_split_into_parts(thinker, output, parts):
    assert parts_of(thinker, output) == parts


def test_calls_are_text_without_tools(thinker):
    assert parts_of(thinker, CALL, tools=()) == [OutputPart("text", CALL)]


def test_a_call_that_breaks_a_strict_schema_is_text(thinker):
    schema = {"type": "object", "properties": {"place": {"type": "integer"}}}
    strict = Tool("weather", "", schema, strict=True)
    assert parts_of(thinker, CALL, [strict]) == [OutputPart("text", CALL)]
    assert parts_of(thinker, CALL, [replace(strict, parameters={})]) == [CALLED]
    assert parts_of(thinker, CALL, [replace(strict, strict=False)]) == [CALLED]


def test_a_strict_pattern_has_a_timeout(thinker):
    place = {"type": "string", "pattern": "^(s+)+$"}
    slow = Tool("weather", "", {"properties": {"place": place}}, strict=True)
    call = CALL.replace("Oslo", "s" * 40 + "!")
    began = time.monotonic()
    assert parts_of(thinker, call, [slow]) == [OutputPart("text", call)]
    assert time.monotonic() - began < 60
    assert parts_of(thinker, CALL.replace("Oslo", "ss"), [slow])[0].kind == "call"


def test_one_call_ends_the_output_without_parallel_calls(thinker):
    stream = thinker.chat_parser((), [WEATHER], (), parallel=False)
    tokens = thinker.encode(f"Hm.{CALL}{CALL}And more.")
    parts = join_text([part for token in tokens for part in stream.add(token)] + stream.finish())
    assert parts == [OutputPart("text", "Hm."), CALLED]
    assert (stream.finished, stream.stop_string) == (True, None)


def start_choice(text: ChatTokenizer, prompt: tuple[int, ...], **options) -> InFlightChoice:
    request = Request("1", prompt, 20, text.stop_tokens)
    return InFlightChoice(0, request, 1, text.chat_parser((), (), prompt), text, **options)


def test_reasoning_is_closed_after_its_budget(thinker):
    prompt = thinker.render([{"role": "user", "content": "Why?"}], reasoning=True)
    choice = start_choice(thinker, prompt, thinking_budget=4)
    thoughts = thinker.encode("abcdefgh")[:4]
    for token in thoughts:
        parts = choice.add_token(TokenEvent("1", token, cached_tokens=2))
        assert choice.request.id == "1"
    assert choice.change_phase(parts) == parts  # a mark has no text
    resumed = choice.request
    assert resumed.id != "1"
    assert resumed.tokens == (*prompt, *thoughts, *thinker.reasoning_end)
    assert (resumed.max_tokens, resumed.resumed_tokens) == (15, 5)
    choice.change_phase([])
    assert choice.request is resumed
    (part,) = choice.add_token(TokenEvent(resumed.id, thinker.encode("x")[0], cached_tokens=9))
    assert (part.kind, part.text, choice.cached_tokens) == ("text", "x", 2)
    assert (choice.generated_tokens, choice.reasoning_tokens) == (5, 4)


def test_a_grammar_starts_after_reasoning(thinker):
    prompt = thinker.render([{"role": "user", "content": "Why?"}], reasoning=True)
    choice = start_choice(thinker, prompt)
    choice.request = replace(choice.request, grammar="g", sampling=Sampling(logit_bias={5: 1.0}))
    choice.parser = thinker.text_parser(())
    choice.precede_grammar(thinker.chat_parser((), (), prompt), may_call=False)
    (end,) = thinker.stop_tokens
    assert (choice.request.grammar, choice.request.sampling.logit_bias) == (
        None,
        {5: 1.0, end: -100},
    )
    parts = []
    thoughts = thinker.encode("Hm.</think>")
    for token in thoughts:
        parts += choice.change_phase(choice.add_token(TokenEvent("1", token)))
    assert join_text(parts) == [OutputPart("reasoning", "Hm.")]
    resumed = choice.request
    assert (resumed.tokens, resumed.grammar, resumed.resumed_tokens) == (
        (*prompt, *thoughts),
        "g",
        0,
    )
    assert (resumed.max_tokens, resumed.sampling.logit_bias) == (20 - len(thoughts), {5: 1.0})
    for token in thinker.encode("<think>1"):  # from here on everything is text
        parts += choice.add_token(TokenEvent(resumed.id, token))
    assert join_text(parts)[1:] == [OutputPart("text", "<think>1")]
    assert choice.reasoning_tokens == len(thoughts)


def test_reasoning_is_started_before_an_output_with_a_grammar(tmp_path, thinker, plain):
    question = [{"role": "user", "content": "Why?"}]
    opened = thinker.render(question, reasoning=True)
    assert thinker.start_reasoning(opened, None) == opened
    closed = thinker.render(question, reasoning=False)
    assert thinker.start_reasoning(closed, False) == closed
    assert thinker.decode(thinker.start_reasoning(closed, True)).endswith("<think>")
    assert plain.start_reasoning(plain.render(question), None) == plain.render(question)
    able = text_of(tmp_path, "{{ messages[0].content }}", ("<think>", "</think>"))
    # It has the marks, and nothing says that it thinks.
    assert able.start_reasoning(able.render(question), None) == able.render(question)


def test_reasoning_started_by_the_prompt(thinker):
    question = [{"role": "user", "content": "Why?"}]
    prompt = thinker.render(question, reasoning=True)
    assert parts_of(thinker, "Hm.</think>So.", prompt=prompt) == [
        OutputPart("reasoning", "Hm."),
        OutputPart("text", "So."),
    ]
    assert parts_of(thinker, "So.", prompt=thinker.render(question, reasoning=False)) == [
        OutputPart("text", "So.")
    ]


def test_stop_strings_apply_to_text_only(thinker):
    output = "<think>stop?</think>Go, stop, go"
    assert parts_of(thinker, output, stop=["stop"]) == [
        OutputPart("reasoning", "stop?"),
        OutputPart("text", "Go, "),
    ]


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", "x", "\n", "é"]), max_size=8)
)
def test_no_text_is_lost(thinker, words):
    """Joined, with marks and the lines beside them aside, the parts are what was said."""

    def bare(output: str) -> str:
        for mark in ("<think>", "</think>", "<tool_call>", "</tool_call>", "\n"):
            output = output.replace(mark, "")
        return output

    output = "".join(words)
    assert bare("".join(part.text for part in parts_of(thinker, output))) == bare(output)


# What each of mlx-lm's parsers reads; the templates name the marks by which mlx-lm knows them.
SCRIPTS = {
    "qwen3_coder": (
        "<tool_call>\n<function=",
        "<tool_call>\n<function=weather>\n<parameter=place>\nOslo\n</parameter>\n</function>\n"
        "</tool_call>",
    ),
    "mistral": ("[TOOL_CALLS]", '[TOOL_CALLS]weather[ARGS]{"place": "Oslo"}'),
    "glm47": (
        "<arg_key>",
        "<tool_call>weather<arg_key>place</arg_key><arg_value>Oslo</arg_value></tool_call>",
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
        '<|tool_call_argument_begin|>{"place": "Oslo"}<|tool_call_end|><|tool_calls_section_end|>',
    ),
    "minimax_m2": (
        "<minimax:tool_call>",
        '<minimax:tool_call><invoke name="weather"><parameter name="place">Oslo</parameter>'
        "</invoke></minimax:tool_call>",
    ),
    "pythonic": (
        "<|tool_call_start|>",
        '<|tool_call_start|>[weather(place="Oslo")]<|tool_call_end|>',
    ),
    "gemma4": (
        "<|tool_call><tool_call|>",
        '<|tool_call>call:weather{place:<|"|>Oslo<|"|>}<tool_call|>',
    ),
    "function_gemma": (
        "<start_function_call>",
        "<start_function_call>call:weather{place:<escape>Oslo<escape>}<end_function_call>",
    ),
    "longcat": (
        "<longcat_tool_call>",
        "<longcat_tool_call>weather<longcat_arg_key>place</longcat_arg_key>"
        "<longcat_arg_value>Oslo</longcat_arg_value></longcat_tool_call>",
    ),
    "minicpm5": (
        '<function name="x"><param name="y">',
        '<function name="weather"><param name="place">Oslo</param></function>',
    ),
    "muse_spark": (
        "<atem:function_calls>",
        '<atem:function_calls><atem:invoke name="weather"><atem:parameter name="place">Oslo'
        "</atem:parameter></atem:invoke></atem:function_calls>",
    ),
    "kimi_k3": (
        "",  # its marks are in the vocabulary
        '<|open|>tools<|sep|><|open|>call tool="weather" index="1"<|sep|>'
        '<|open|>argument key="place" type="string"<|sep|>Oslo<|close|>argument<|sep|>'
        "<|close|>call<|sep|><|close|>tools<|sep|>",
    ),
}
XTML = ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")
WRAPPERS = {
    "qwen3_coder": ("<tool_call>\n", "\n</tool_call>"),
    "kimi_k2": ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    "minimax_m2": ("<minimax:tool_call>", "</minimax:tool_call>"),
    "muse_spark": ("<atem:function_calls>", "</atem:function_calls>"),
    "kimi_k3": ("<|open|>tools<|sep|>", "<|close|>tools<|sep|>"),
}


@pytest.mark.parametrize("parser", SCRIPTS)
def test_every_format_of_tool_calls(tmp_path, parser):
    mark, output = SCRIPTS[parser]
    text = text_of(tmp_path, f"{{# {mark} #}}{{{{ tools }}}}", XTML if parser == "kimi_k3" else ())
    start, end = WRAPPERS.get(parser, ("", ""))
    bare = output.removeprefix(start).removesuffix(end)
    for written in (output, bare):
        before, call = parts_of(text, f"I look.{written}")
        assert before == OutputPart("text", "I look.")
        assert (call.kind, call.name) == ("call", "weather")
        assert json.loads(call.text) == {"place": "Oslo"}
        assert call.id == ("functions.weather:0" if parser == "kimi_k2" else "")
        assert parts_of(text, written, tools=()) == [OutputPart("text", written)]
    for fault in (output[:-25], output.replace("weather", ""), output.replace("Oslo", "\0")):
        joined = "".join(part.text for part in parts_of(text, fault))
        assert joined == fault or '"place"' in joined


LLAMA = (
    "{{ tools }}{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call only') }}{% endif %}"
    "<|im_start|>assistant\n{{ m.content }}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)


def test_a_model_whose_calls_have_no_marks(tmp_path):
    text = text_of(tmp_path, LLAMA)
    assert (text.renders_tools, text.parses_tool_calls) == (True, True)
    called = '{"name": "weather", "parameters": {"place": "Oslo"}}'
    assert parts_of(text, called) == [CALLED]
    assert parts_of(text, f"{called}; {called}") == [CALLED, CALLED]
    assert parts_of(text, called, tools=()) == [OutputPart("text", called)]
    assert parts_of(text, called, stop=["Oslo"]) == [CALLED]
    for other in (f"{called} It rains.", "{}", '{"name": "wea', "[1]", "Well."):
        assert parts_of(text, other) == [OutputPart("text", other)]
    stream = text.chat_parser((), [WEATHER], (), parallel=False)
    tokens = text.encode(f"{called}\n{called}")
    parts = [part for token in tokens for part in stream.add(token)]
    assert parts + stream.finish() == [CALLED]
    function = {"name": "weather", "arguments": {"place": "Oslo"}}
    calls = [{"id": name, "type": "function", "function": function} for name in "ab"]
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *({"role": "tool", "content": "rain", "tool_call_id": name} for name in "ab"),
    ]
    assert text.decode(text.render(messages, [WEATHER])).count('"parameters": {"place"') == 2


def test_an_answer_can_be_a_call_after_reasoning_and_without_its_marks(thinker):
    bare = CALL.removeprefix("<tool_call>").removesuffix("</tool_call>")
    assert parts_of(thinker, f"<think>Hm.</think>\n{bare}") == [
        OutputPart("reasoning", "Hm."),
        CALLED,
    ]
    assert parts_of(thinker, bare.strip() + CALL) == [OutputPart("text", bare.strip()), CALLED]


def test_text_that_begins_no_call_is_not_held_back(thinker):
    stream = thinker.chat_parser((), [WEATHER], ())
    sent = [stream.add(token) for token in thinker.encode('{"weather": "fine"}')]
    assert "".join(part.text for parts in sent[:6] for part in parts)


@pytest.mark.parametrize(
    "output",
    [
        "<function=weather>\n<parameter=place>\nOslo\n</parameter>\n</function>",
        "<function=weather>\n<parameter=place>\nOslo\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=weather>\n<parameter=place>\nOslo\n</function>\n</tool_call>",
        "<tool_call>\n<function=weather>\n<parameter=place>\nOslo",
    ],
)
def test_a_call_in_qwens_format_needs_no_wrapper_and_no_ends(tmp_path, output):
    text = text_of(tmp_path, "{# <tool_call>\n<function= #}{{ tools }}")
    assert [part for part in parts_of(text, output) if part.text.strip()] == [CALLED]
    assert parts_of(text, output, tools=()) == [OutputPart("text", output)]


def test_forced_calls_are_parsed_at_the_end(plain):
    output = '[{"name": "weather", "arguments": {"place": "Oslo"}}, {"name": "b", "arguments": {}}]'
    stream = plain.tool_call_parser(structured_output.parse_tool_calls)
    tokens = plain.encode(output)
    assert [part for token in tokens for part in stream.add(token)] == []
    assert stream.finish() == [CALLED, OutputPart("call", "{}", "b")]
    cut = plain.tool_call_parser(structured_output.parse_tool_calls)
    for token in tokens[:-5]:
        cut.add(token)
    rest = OutputPart("text", '{"name": "b", "arguments":')
    assert cut.finish(cut=True) == [CALLED, rest]  # complete calls stay calls


def test_a_template_renders_tools_and_calls(thinker):
    call = {"function": {"name": "weather", "arguments": {"place": "Oslo"}}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
    ]
    output = thinker.decode(thinker.render(messages, [WEATHER]))
    assert '"name": "weather"' in output.split("<|im_start|>")[1]
    assert (
        '<think>Hm.</think><tool_call>{"name": "weather", "arguments": {"place": "Oslo"}}' in output
    )
    assert "tool\nrain" in output
    assert (thinker.renders_tools, thinker.parses_tool_calls, thinker.has_reasoning) == (
        True,
        True,
        True,
    )


def test_a_template_without_tools(plain):
    assert (plain.renders_tools, plain.parses_tool_calls, plain.has_reasoning) == (
        False,
        False,
        False,
    )
    call = {"function": {"name": "weather", "arguments": {}}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
    ]
    described = structured_output.describe_tools_in_chat(messages, [WEATHER])
    assert [m["role"] for m in described] == ["system", "user", "assistant", "user"]
    output = plain.decode(plain.render(described))
    assert "Look outside" in output
    assert '[{"name": "weather", "arguments": {}}]' in output
    assert "rain" in output


def test_options_reach_the_template_or_are_refused(thinker):
    question = [{"role": "user", "content": "Why?"}]
    assert thinker.decode(thinker.render(question, options={"shout": True})).endswith("!")
    for name in ("whisper", "tools", "messages", "add_generation_prompt", "chat_template"):
        with pytest.raises(InputError, match=name) as caught:
            thinker.render(question, options={name: True})
        assert caught.value.field == name


def test_the_last_message_can_be_continued(plain):
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It is"}]
    assert plain.decode(plain.render(messages, continue_final_message=True)).endswith(
        "assistant\nIt is"
    )


def test_reasoning_is_closed_if_disabled(tmp_path):
    always = "{{ messages[0].content }}<think>"
    text = text_of(tmp_path, always, ("<think>", "</think>"))
    question = [{"role": "user", "content": "Why?"}]
    assert text.decode(text.render(question)).endswith("<think>")
    assert text.decode(text.render(question, reasoning=False)).endswith("<think></think>")


def test_token_logprobs_have_bytes(plain):
    (first, *_) = tokens = plain.encode("é 4")
    assert (
        b"".join(plain.token_logprob(TokenEvent("", t, None, -1.0)).data for t in tokens)
        == "é 4".encode()
    )
    logged = plain.token_logprob(
        TokenEvent("", first, None, -1.0, ((first, -1.0), (tokens[-1], -2.0)))
    )
    assert [one.logprob for one in logged.top] == [-1.0, -2.0]
    assert logged.top[1].data == b"4"


DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% endif %}"
    "{% if m.tool_calls %}<｜Assistant｜>{{ m.content }}<｜tool▁calls▁begin｜>"
    "{% for c in m.tool_calls %}CALL<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>"
    "{% endif %}{% if m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}"
    "<｜tool▁output▁end｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
V31_CALL = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}"
V3_CALL = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```"


@pytest.mark.parametrize("form", [V31_CALL, V3_CALL])
def test_a_template_states_the_form_of_calls(tmp_path, form):
    written = form.format("{{ c.function.name }}", "{{ '' + c.function.arguments }}")
    text = text_of(tmp_path, DEEPSEEK.replace("CALL", written))
    assert (text.parses_tool_calls, text.renders_tools) == (True, False)
    call = form.format("weather", '{"place": "Oslo"}') + "<｜tool▁call▁end｜>"
    output = f"I look.<｜tool▁calls▁begin｜>{call}{call}<｜tool▁calls▁end｜>"
    assert parts_of(text, output) == [OutputPart("text", "I look."), CALLED, CALLED]
    broken = output.replace('"Oslo"', "Oslo")
    assert "".join(part.text for part in parts_of(text, broken)) == broken
    function = {"name": "weather", "arguments": {"place": "Oslo"}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": function}]},
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
    ]
    example = text.call_form.example
    described = structured_output.describe_tools_in_chat(messages, [WEATHER], example)
    rendered = text.decode(text.render(described))
    assert "Look outside" in rendered
    assert form.format("weather", '{"place": "Oslo"}') in rendered
    assert form.format("NAME", '{"ARGUMENT": "VALUE"}') in rendered


WRAPPED = (
    "{{ tools }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    '{% for c in m.tool_calls or [] %}START{{ \'{\' }}"name": "{{ c.function.name }}", '
    "\"arguments\": {{ c.function.arguments | tojson }}{{ '}' }}END{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("<tool_call>\n", "\n</tool_call>"),
        ("<calls><call>", "</call></calls>"),
        ("[CALL]", "[/CALL]"),
    ],
)
def test_the_marks_of_a_form_that_only_the_template_states_are_no_text(tmp_path, start, end):
    text = text_of(tmp_path, WRAPPED.replace("START", start).replace("END", end))
    assert text.call_form is not None
    call = f'{start}{{"name": "weather", "arguments": {{"place": "Oslo"}}}}{end}'
    assert parts_of(text, call) == [CALLED]
    assert parts_of(text, f"I look.{call}\n{call}\nDone.") == [
        OutputPart("text", "I look."),
        CALLED,
        CALLED,
        OutputPart("text", "Done."),
    ]
    assert parts_of(text, call, tools=()) == [OutputPart("text", call)]
    broken = call.replace('"Oslo"', "Oslo")
    assert parts_of(text, broken) == [OutputPart("text", broken)]


def test_an_endless_template_costs_one_request(tmp_path, monkeypatch):
    monkeypatch.setattr("cenacle.text.text_backend.CPU_S", 0.3)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    text = text_of(tmp_path, loops)
    assert not text.parses_tool_calls
    with pytest.raises(InputError, match="needs more than"):
        text.render([{"role": "user", "content": "Why?"}])
