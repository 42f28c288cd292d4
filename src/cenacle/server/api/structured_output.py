"""What an answer is made to match: grammars for llguidance, from schemas, patterns and tools.

Owns: the grammars' text; the form in which a model that must call tools calls them, and how that
is read back.
Does not know: tokens, any API.
Invariant: a grammar that was made here is one that llguidance reads; what matches `calls` is read
by `read_calls`.
Sources: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
Next: `engine/grammar.py` holds answers to it, token by token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher

from ...core.chat import Message, OutputPart, Tool
from .validation import RequestError

MAX_CALLS = 8  # in one answer that must be calls: it must end some day
# JSON as it is mostly written, on one line: white space without end would match too.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_schema_grammar(schema: dict[str, Any], name: str) -> str:
    """Any JSON value that a schema describes.

    Raises:
        Refused: it is no schema, or has what cannot be enforced; `name` is the parameter's.
    """
    return _checked({"json_schema": _compact(schema)}, name)


def regex_grammar(pattern: str, name: str) -> str:
    """Text that a regular expression (Rust's syntax, without look-around) matches as a whole."""
    return _checked(json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"][0], name)


def lark_grammar(grammar: str, name: str) -> str:
    """Text that a context-free grammar in llguidance's variant of Lark derives."""
    return _checked({"lark_grammar": grammar}, name)


def tool_call_grammar(tools: Sequence[Tool], only: str | None, parallel: bool, name: str) -> str:
    """A JSON list of calls, `[{"name": ..., "arguments": {...}}]`, of at least one.

    Args:
        tools: what may be called.
        only: the one that must be called; None: any.
        parallel: several calls are allowed.
        name: the parameter that the tools came in.

    Raises:
        Refused: a tool's schema cannot be enforced.
    """
    usable = [(at, tool) for at, tool in enumerate(tools) if only in (None, tool.name)]
    more = f'(", " call){{0,{MAX_CALLS - 1}}}' if parallel and only is None else ""
    rules = [f'start: "[" call {more} "]"', f"call: {' | '.join(f'call_{at}' for at, _ in usable)}"]
    for at, tool in usable:
        # Each in a grammar of its own: references within a schema begin at its root.
        schema = _compact({"type": "object", **tool.parameters})
        json_schema_grammar(schema, f"{name}[{at}]")
        head = json.dumps(f'{{"name": {json.dumps(tool.name)}, "arguments": ')
        rules += [f'call_{at}: {head} arguments_{at} "}}"']
        rules += [f"arguments_{at}: %json {json.dumps(schema)}"]
    return lark_grammar("\n".join(rules), name)


def parse_tool_calls(text: str) -> list[OutputPart]:
    """The calls that an answer which matches `calls` has; of one that was cut short its text."""
    try:
        made = json.loads(text)
    except json.JSONDecodeError:
        return [OutputPart("text", text)]
    return [
        OutputPart("call", json.dumps(c["arguments"], ensure_ascii=False), name=c["name"])
        for c in made
    ]


def describe_tools_in_chat(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """A chat with tools in plain messages, for a model whose template has no words for them."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    listed = json.dumps([tool.to_json()["function"] for tool in tools], ensure_ascii=False)
    text = (
        f"You can call these functions: {listed}\n"
        'Calls are written [{"name": ..., "arguments": {...}}].'
    )
    if plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{text}"}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _plain(message: Message) -> Message:
    content = message["content"] or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"Result of the call: {content}"}
    if made := message.get("tool_calls"):
        listed = json.dumps([call["function"] for call in made], ensure_ascii=False)
        content = f"{content}\n{listed}" if content else listed
    return {"role": message["role"], "content": content}


def _compact(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "x-guidance": _JSON}


def _checked(grammar: dict[str, Any], name: str) -> str:
    text = json.dumps({"grammars": [grammar]})
    if wrong := LLMatcher.validate_grammar(text):
        reason = " ".join(wrong.split())[:300]
        raise RequestError(f"{name}: cannot be enforced: {reason}", name)
    return text
