"""The HTTP application over a group that plays scripts in place of a model.

A script says what the model writes after a prompt, with a grammar and without; with a grammar every
token must be allowed by it, as on a rank.
"""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx

import cenacle
from cenacle.api import Model
from cenacle.core.request import Request, TokenEvent
from cenacle.engine.sampling.grammar import Vocabulary
from cenacle.engine.speculative.ngram import DraftStats
from cenacle.load_options import LoadOptions
from cenacle.runtime import resolve
from cenacle.scheduler.recovery import RecoveryState
from cenacle.server.app import Application
from cenacle.server.auth import KeyStore
from cenacle.server.limits import Limits
from cenacle.server.metrics import Metrics
from cenacle.server.plan_info import PlanTracker

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"

Script = Callable[[str, bool], str]
"""From the prompt, as text, and whether there is a grammar, to what the model writes. It ends
with the token of its end, or else runs into the limit of tokens."""


def write_model(
    folder: Path, template: str, marks: tuple[str, ...] = (), special: tuple[str, ...] = ()
) -> Path:
    """The demo with another template, and with marks in place of its spare tokens."""
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    spare = [t for t in tokenizer["added_tokens"] if t["content"].startswith("<|reserved_")]
    for token, mark in zip(spare, (*marks, *special), strict=False):
        vocabulary = tokenizer["model"]["vocab"]
        if token["content"] in vocabulary:
            vocabulary[mark] = vocabulary.pop(token["content"])
        token |= {"content": mark, "special": mark in special}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


class ScriptedGroup:
    """Plays a script; `requests` are those that it got."""

    failure = None
    load: ClassVar = {"running": 0, "waiting": 0}
    counts: ClassVar = {"generated_tokens": 0}
    state = RecoveryState()
    draft_stats = DraftStats()
    heartbeats: ClassVar = []

    def __init__(self, ranks: Any) -> None:
        self.ranks, self.observers, self.requests = ranks, [], []
        self.script: Script = lambda *_: ""
        self.tokenizer: Any = None
        self.vocabulary = Vocabulary(lambda: self.tokenizer)
        self._cached: set[tuple[int, ...]] = set()

    def submit(self, request: Request, sink: Callable[[TokenEvent], None]) -> None:
        self.requests.append(request)
        prompt = self.tokenizer.decode(request.tokens)
        text = self.script(prompt, request.grammar is not None)
        tokens = [*self.tokenizer.encode(text), *self.tokenizer.stop_tokens[:1]]
        if tokens[-2:-1] and tokens[-2] in self.tokenizer.stop_tokens:
            tokens.pop()
        matcher = None
        if request.grammar is not None:
            matcher = self.vocabulary.matcher(request.grammar, 0)
        for at, token in enumerate(tokens[: request.max_tokens]):
            if matcher is not None:
                allowed = matcher.allowed(tokens[at - 1 : at] if at else ())
                assert allowed[token], f"{text!r} does not match at {at}"
            finish = "length" if at + 1 == request.max_tokens else None
            finish = "stop" if token in request.stop_tokens else finish
            sink(
                TokenEvent(
                    request.id, token, finish, -1.0 if request.logprobs is not None else None
                )
            )

    def cancel(self, request_id: str) -> None:
        pass


class ScriptedServer:
    """The application; `ask` sends one request over HTTP."""

    def __init__(self, folder: Path, keys_folder: Path) -> None:
        deployment = resolve(LoadOptions(str(folder), 1), None)
        ranks = SimpleNamespace(plan=deployment.plan, pids=[1], ready=[], links={})
        self.group = ScriptedGroup(ranks)
        self.group.tokenizer = deployment.tokenizer
        model: Any = Model(deployment, self.group)  # type: ignore[arg-type]
        tracker = PlanTracker(model)
        metrics = Metrics.of_server(model, KeyStore(keys_folder / "keys.db"), tracker)
        self.name = model.name
        self.application = Application(model, Limits(), metrics, tracker)

    def ask(self, path: str, body: dict[str, Any], script: Script | None = None) -> httpx.Response:
        if script is not None:
            self.group.script = script
        self.group.requests.clear()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            scope["state"] = {"key": ""}
            await self.application.app(scope, receive, send)

        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                return await http.post(path, json=body)

        return asyncio.run(run())

    def close(self) -> None:
        self.application.close()


def read_events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The objects of an event stream."""
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


Output = tuple[str, str, list[tuple[str, Any]], str]
"""Reasoning, text, calls (names and arguments), and why it ended."""


def ask_chat(server: ScriptedServer, stream: bool, script: Script, **fields: Any) -> Output:
    body = {"messages": [{"role": "user", "content": "Weather?"}], "stream": stream, **fields}
    answer = server.ask("/v1/chat/completions", body, script)
    assert answer.status_code == 200, answer.text
    if not stream:
        choice = answer.json()["choices"][0]
        message = choice["message"]
        functions = [call["function"] for call in message.get("tool_calls") or []]
        calls = [(f["name"], json.loads(f["arguments"])) for f in functions]
        reasoning = message.get("reasoning_content") or ""
        return reasoning, message["content"] or "", calls, choice["finish_reason"]
    reasoning, text, finish = "", "", ""
    pieces: dict[int, list[str]] = {}
    for event in read_events(answer):
        assert "error" not in event, event
        for choice in event["choices"]:
            delta = choice["delta"]
            reasoning += delta.get("reasoning_content") or ""
            text += delta.get("content") or ""
            finish = choice["finish_reason"] or finish
            for call in delta.get("tool_calls") or []:
                piece = pieces.setdefault(call["index"], ["", ""])
                piece[0] += call["function"].get("name") or ""
                piece[1] += call["function"].get("arguments") or ""
    return reasoning, text, [(n, json.loads(a)) for n, a in pieces.values()], finish


def ask_responses(server: ScriptedServer, stream: bool, script: Script, **fields: Any) -> Output:
    answer = server.ask("/v1/responses", {"input": "Weather?", "stream": stream, **fields}, script)
    assert answer.status_code == 200, answer.text
    if stream:
        events = read_events(answer)
        assert events[-1]["type"] in ("response.completed", "response.incomplete"), events[-1]
        body = events[-1]["response"]
        deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
    else:
        body, deltas = answer.json(), None
    reasoning = text = ""
    calls = []
    for item in body["output"]:
        if item["type"] == "function_call":
            calls.append((item["name"], json.loads(item["arguments"])))
        elif item["type"] == "message":
            text += "".join(part["text"] for part in item["content"])
        else:
            reasoning += "".join(part["text"] for part in item.get("content") or [])
    assert deltas is None or "".join(deltas) == text
    return reasoning, text, calls, body["status"]


def ask_messages(server: ScriptedServer, stream: bool, script: Script, **fields: Any) -> Output:
    body = {
        "model": server.name,
        "max_tokens": 200,
        "messages": [{"role": "user", "content": "Weather?"}],
        "stream": stream,
        **fields,
    }
    answer = server.ask("/v1/messages", body, script)
    assert answer.status_code == 200, answer.text
    if not stream:
        blocks, finish = answer.json()["content"], answer.json()["stop_reason"]
    else:
        blocks, finish = [], ""
        for event in read_events(answer):
            assert event["type"] != "error", event
            if event["type"] == "content_block_start":
                blocks.append({**event["content_block"], "json": ""})
            elif event["type"] == "content_block_delta":
                delta = event["delta"]
                blocks[-1]["json"] += delta.get("partial_json", "")
                for name in ("text", "thinking"):
                    blocks[-1][name] = blocks[-1].get(name, "") + delta.get(name, "")
            elif event["type"] == "message_delta":
                finish = event["delta"]["stop_reason"]
        for block in blocks:
            if block["type"] == "tool_use":
                block["input"] = json.loads(block["json"] or "{}")
    return (
        "".join(b["thinking"] for b in blocks if b["type"] == "thinking"),
        "".join(b["text"] for b in blocks if b["type"] == "text"),
        [(b["name"], b["input"]) for b in blocks if b["type"] == "tool_use"],
        finish,
    )
