"""What becomes of a request that depends on the model's chat template."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cenacle.core.request import Request
from cenacle.errors import InputError
from cenacle.server.api.openai import ChatCompletionsAdapter
from cenacle.server.api.openai_responses import ResponsesAdapter
from cenacle.server.api.protocol import ServedModel
from cenacle.server.preparation import RequestPreparer
from cenacle.text.tokenizer import ChatTokenizer

DEMO = Path(__file__).parents[2] / "src/cenacle/demo/demo_model"
SWITCH = "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
THINKING = "{{ messages[-1].content }}" + SWITCH
PLAIN = "{{ messages[-1].content }}"


def preparer(folder: Path, template: str, *, reasons: bool) -> RequestPreparer:
    """Of a model that has this template, and marks of reasoning or not."""
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").write_text(template)
    words = (folder / "tokenizer.json").read_text()
    if reasons:
        for spare, mark in (("<|reserved_0|>", "<think>"), ("<|reserved_1|>", "</think>")):
            words = words.replace(json.dumps(spare), json.dumps(mark))
    (folder / "tokenizer.json").write_text(words)

    def request(tokens: tuple[int, ...], max_tokens: int | None, *_: Any, **__: Any) -> Request:
        return Request("a", tokens, max_tokens or 1)

    model: Any = SimpleNamespace(text=ChatTokenizer(folder, {}), request=request)
    return RequestPreparer(model, ServedModel("house", 1000, 400), 10)


@pytest.mark.parametrize(
    ("effort", "switched", "budget"),
    [(None, "True", None), ("none", "False", None), ("low", "True", 2048), ("high", "True", None)],
)
def test_an_effort_is_what_the_template_has(
    tmp_path: Path, effort: str | None, switched: str, budget: int | None
) -> None:
    prepare = preparer(tmp_path / "model", THINKING, reasons=True)
    chat = {"messages": [{"role": "user", "content": "hello"}], "reasoning_effort": effort}
    response = {"input": "hello", "reasoning": {"effort": effort}}
    for adapter, body in ((ChatCompletionsAdapter(), chat), (ResponsesAdapter(), response)):
        _, (choice,) = prepare.prepare(adapter, json.dumps(body).encode(), "")
        assert prepare._tokenizer.decode(choice.request.tokens).endswith("hello" + switched)
        assert choice.thinking_budget == budget


def test_what_the_client_says_of_the_template_comes_before_its_effort(tmp_path: Path) -> None:
    prepare = preparer(tmp_path / "model", THINKING, reasons=True)
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "reasoning_effort": "high",
        "chat_template_kwargs": {"enable_thinking": False},
    }
    _, (choice,) = prepare.prepare(ChatCompletionsAdapter(), json.dumps(body).encode(), "")
    assert prepare._tokenizer.decode(choice.request.tokens).endswith("helloFalse")


def test_an_effort_has_no_effect_on_a_model_that_does_not_reason(tmp_path: Path) -> None:
    prepare = preparer(tmp_path / "model", PLAIN, reasons=False)
    body = {"messages": [{"role": "user", "content": "hello"}], "reasoning_effort": "high"}
    prepare.prepare(ChatCompletionsAdapter(), json.dumps(body).encode(), "")


@pytest.mark.parametrize("reasons", [False, True])
@pytest.mark.parametrize("name", ["enable_thinking", "thinking", "unknown", "self", "a b"])
def test_variables_that_a_template_does_not_use_have_no_effect(
    tmp_path: Path, name: str, reasons: bool
) -> None:
    prepare = preparer(tmp_path / "model", PLAIN, reasons=reasons)
    body = {
        "messages": [{"role": "user", "content": "hello<think>" if reasons else "hello"}],
        "chat_template_kwargs": {name: False},
    }
    request, (choice,) = prepare.prepare(ChatCompletionsAdapter(), json.dumps(body).encode(), "")
    assert request.warnings == (f"chat_template_kwargs: not used by the template: {name}",)
    switched_off = reasons and "thinking" in name
    text = prepare._tokenizer.decode(choice.request.tokens)
    assert text.endswith("</think>") is switched_off


@pytest.mark.parametrize("name", ["messages", "chat_template", "tokenize", "tools"])
def test_variables_of_the_server_are_refused(tmp_path: Path, name: str) -> None:
    prepare = preparer(tmp_path / "model", PLAIN, reasons=False)
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "chat_template_kwargs": {name: []},
    }
    with pytest.raises(InputError, match=name):
        prepare.prepare(ChatCompletionsAdapter(), json.dumps(body).encode(), "")


@pytest.mark.parametrize("levels", range(880, 1000, 6))
def test_deep_arguments_cost_their_request(tmp_path: Path, levels: int) -> None:
    prepare = preparer(tmp_path / "model", PLAIN, reasons=False)
    arguments = '{"a":' * levels + "1" + "}" * levels
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "x"},
    ]
    with contextlib.suppress(InputError):
        prepare.prepare(ChatCompletionsAdapter(), json.dumps({"messages": messages}).encode(), "")
