"""Templates and tokenizers from strangers: what never ends costs one request, or the start."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cenacle.api import Model
from cenacle.core.chat import Tool
from cenacle.errors import CheckpointError, ClusterError, InputError
from cenacle.load_options import LoadOptions
from cenacle.runtime import Deployment
from cenacle.text import text_backend, text_process
from cenacle.text.tokenizer import ChatTokenizer
from support.harmony_model import TEMPLATE as HARMONY
from support.scripted_app import DEMO, ScriptedServer

HANG = "{% if messages[-1].content == 'hang' %}{{ CODE }}{% endif %}{{ messages[-1].content }}"
MESSAGES = [{"role": "user", "content": "Why?"}]
POWER = "{% set n = messages | length + 8 %}{{ n ** (n ** n) }}"  # holds the interpreter
# Cubic in the length of a text, and each step is below the limit of the library.
SLOW_PATTERN, PANIC_PATTERN = "a.*a.*[bc]", "(?=a)(?:a?a?)*[bc]"


def folder_of(folder: Path, template: str, pattern: str | None = None) -> Path:
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").write_text(template)
    if pattern is not None:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        tokenizer["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [{**split, "invert": False}, tokenizer["pre_tokenizer"]],
        }
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes isolated tokenizers whose work may take three seconds."""
    monkeypatch.setattr(text_process, "CPU_S", 3)
    made = []

    def make(template: str, pattern: str | None = None) -> ChatTokenizer:
        folder = folder_of(tmp_path / f"model-{len(made)}", template, pattern)
        made.append(ChatTokenizer(folder, {"eos_token_id": 362}))
        made[-1].isolate()
        return made[-1]

    yield make
    for tokenizer in made:
        tokenizer.close()


def test_the_process_gives_the_same(isolated, tmp_path):
    call = {"function": {"name": "weather", "arguments": {"place": "Oslo", "é": [1, None]}}}
    messages = [
        {"role": "system", "content": "Be\n\tbrief. 🙂"},
        *MESSAGES,
        {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": None},
        {"role": "assistant", "content": "It is"},
    ]
    template = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}{{ m }}{% endfor %}"
        "{{ tools | tojson }}{{ enable_thinking }}{{ add_generation_prompt }}{{ shout }}"
        "{% generation %}{{ messages[-1].content }}{% endgeneration %}"
    )
    for source in (template, HARMONY):
        in_worker = isolated(source)
        in_process = ChatTokenizer(folder_of(tmp_path / f"here-{len(source)}", source), {})
        tools = [Tool("weather", "", {"type": "object"})]
        for options in (
            {},
            {"tools": tools},
            {"reasoning": True},
            {"continue_final_message": True},
        ):
            assert in_worker.render(messages, **options) == in_process.render(messages, **options)
    for text in ("", " a  b\n", "<|im_start|>user é🙂\0", "x" * 100_000):
        assert in_worker.encode(text) == in_process.encode(text)


@pytest.mark.parametrize(
    "code",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        POWER,
        "{{ 'a' * 10 ** 11 }}",
        "{{ '%1000000000000d' % 1 }}",
        "{{ ('a' * 10 ** 8) | length }}{{ 'a' * 70000000 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_costs_one_request(isolated, code):
    text = isolated(HANG.replace("{{ CODE }}", code))
    with pytest.raises(InputError) as caught:
        text.render([{"role": "user", "content": "hang"}])
    assert caught.value.field == "messages"
    assert len(str(caught.value)) < 2000
    assert text.decode(text.render(MESSAGES)) == "Why?"


@pytest.mark.parametrize(
    ("pattern", "reason"), [(SLOW_PATTERN, "needs more than"), (PANIC_PATTERN, "fails")]
)
def test_a_tokenizer_costs_one_request(isolated, pattern, reason):
    text = isolated("{{ messages[-1].content }}", pattern)
    with pytest.raises(InputError, match=f"tokenizer {reason}"):
        text.encode("a" * 3000)
    assert text.decode(text.encode("Why?")) == "Why?"


def test_a_panic_of_the_tokenizer_is_an_error_in_this_process_too(tmp_path):
    folder = folder_of(tmp_path / "model", "{{ messages[-1].content }}", PANIC_PATTERN)
    text = ChatTokenizer(folder, {})
    with pytest.raises(InputError, match="tokenizer fails"):
        text.encode("a" * 1000)
    assert text.decode(text.encode("Why?")) == "Why?"


def test_what_always_hangs_is_told_at_the_start(isolated):
    with pytest.raises(CheckpointError, match="need more than"):
        isolated(POWER)


def test_sizes_are_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(text_backend, "MAX_TEMPLATE_BYTES", 10)
    with pytest.raises(CheckpointError, match=r"chat_template.jinja: expected at most 10 bytes"):
        ChatTokenizer(folder_of(tmp_path / "a", "{{ messages }}"), {})
    monkeypatch.setattr(text_backend, "MAX_TOKENIZER_BYTES", 100)
    with pytest.raises(CheckpointError, match="tokenizer"):
        ChatTokenizer(DEMO, {})


def test_the_server_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(text_process, "CPU_S", 3)
    template = HANG.replace("{{ CODE }}", POWER)
    folder = folder_of(tmp_path / "house", template, SLOW_PATTERN)
    server = ScriptedServer(folder, tmp_path)

    def ask(content: str) -> tuple[int, str]:
        body = {"messages": [{"role": "user", "content": content}]}
        answer = server.ask("/v1/chat/completions", body, lambda *_: "Yes.")
        return answer.status_code, answer.text

    try:
        for content in ("hang", "a" * 3000):
            began = time.monotonic()
            status, text = ask(content)
            assert (status, "needs more than" in text) == (400, True)
            assert time.monotonic() - began < 60
            assert ask("Why?")[0] == 200
    finally:
        server.close()


def test_a_process_started_early_is_the_one_that_works(tmp_path, monkeypatch):
    started = []
    popen = subprocess.Popen

    def record(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", record)
    text = ChatTokenizer(
        folder_of(tmp_path / "model", "{{ messages[-1].content }}"), {"eos_token_id": 362}
    )
    text.start_process()
    assert len(started) == 1
    try:
        text.isolate()
        assert text.render(MESSAGES) == text.encode(MESSAGES[0]["content"])
        assert len(started) == 1
        assert started[0].poll() is None
    finally:
        text.close()
    assert started[0].poll() is not None


def test_a_model_that_cannot_start_leaves_no_process(monkeypatch):
    closed = []
    monkeypatch.setattr(ChatTokenizer, "start_process", lambda self: None)
    monkeypatch.setattr(ChatTokenizer, "close", lambda self: closed.append(self))

    def fail(*_: Any, **__: Any) -> None:
        raise ClusterError("no ranks")

    monkeypatch.setattr(Deployment, "launch", fail)
    with pytest.raises(ClusterError):
        Model.load(LoadOptions(str(DEMO)), isolate_text=True)
    ends = time.monotonic() + 120
    while not closed:  # by the thread that loads it, if that needs longer
        assert time.monotonic() < ends
        time.sleep(0.01)
    assert len(closed) == 1
