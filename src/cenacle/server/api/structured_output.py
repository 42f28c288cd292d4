"""What a response must match: grammars for llguidance, from schemas, patterns and tools.

Owns: the text of grammars; which tools are offered; the form of tool calls that are forced, and how
they are parsed.
Does not know: tokens, any API.
Invariant: llguidance accepts a grammar that was made here; `parse_tool_calls` reads what matches
`tool_call_grammar`.
Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
Next: `engine/sampling/grammar.py` applies it, token by token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from llguidance import LLMatcher

from ...core.chat import Message, OutputPart, Tool
from ...engine.sampling.grammar import check_grammar
from ...errors import InputError
from .protocol import GenerationRequest
from .validation import RequestError, describe

MAX_CALLS = 8  # in one response that must be calls, so that it ends
REGEX_ERROR = "regex parse error"  # llguidance's
MAX_PATTERNS = 100  # of a schema that are compiled one by one
BLAME_S = 5.0  # to find the tool whose schema does not compile
# JSON as it is mostly written, on one line: unbounded white space would match too. Lenient: what
# llguidance cannot enforce becomes a warning.
_JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": True,
}

Mode = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class ToolChoice:
    """How the model may use tools.

    Args:
        mode: whether it decides, must not call, or must call.
        function: the one that must be called.
        allowed: the others are not offered; None: all are.
        is_hosted: it names a tool that this server cannot run.
    """

    mode: Mode = "auto"
    function: str | None = None
    allowed: tuple[str, ...] | None = None
    is_hosted: bool = False


def restrict_output(
    request: GenerationRequest, tools: Sequence[Tool | None], choice: ToolChoice
) -> GenerationRequest:
    """The request with tools: those that are offered, and the calls that are forced.

    Args:
        request: with the grammar of the format that it asks for.
        tools: all that it has; None: one that this server cannot run, so it is not offered.
        choice: among them.

    Raises:
        RequestError: a chosen tool is missing, or the schema of a strict one does not compile.
    """
    offered = _offered_tools(tools, choice)
    callable_tools = {
        path: tool for path, tool in offered.items() if choice.function in (None, tool.name)
    }
    warnings = []
    if left_out := [str(at) for at, tool in enumerate(tools) if tool is None]:
        warnings.append(f"tools[{', '.join(left_out)}]: not offered, this server cannot run them")
    if choice.is_hosted or (choice.mode == "required" and not callable_tools):
        warnings.append("tool_choice: no effect, it names a tool that is not offered")
    warned = (*request.warnings, *warnings)
    request = replace(request, tools=tuple(offered.values()), warnings=warned)
    if choice.mode != "required" or not callable_tools:
        return request
    several = request.parallel_tool_calls and choice.function is None
    return replace(
        request,
        forced_call=choice.function or "required",
        grammar=tool_call_grammar(callable_tools, several),
        grammar_field="tools",
    )


def _offered_tools(tools: Sequence[Tool | None], choice: ToolChoice) -> dict[str, Tool]:
    """The tools that the model is told of, by their paths in the request."""
    known = {f"tools[{at}]": tool for at, tool in enumerate(tools) if tool is not None}
    paths: dict[str, str] = {}
    for path, tool in known.items():
        if paths.setdefault(tool.name, path) != path:
            raise RequestError(path, f"expected another name, {tool.name!r} is taken")
    chosen = choice.allowed if choice.function is None else (choice.function,)
    if choice.mode == "required" and not tools:
        raise RequestError("tool_choice", "expected tools with it, got none")
    for name in chosen or ():
        if name not in paths and len(known) == len(tools):
            reason = f"expected the name of one of tools, got {describe(name)}"
            raise RequestError("tool_choice", reason)
    if choice.mode == "none":
        return {}
    offered = {
        path: tool
        for path, tool in known.items()
        if choice.allowed is None or tool.name in choice.allowed
    }
    if strict := {path: tool for path, tool in offered.items() if tool.strict}:
        tool_call_grammar(strict, several=False)
    return offered


def json_schema_grammar(schema: dict[str, Any], field: str) -> str:
    """A grammar of the JSON values that a schema describes, as far as it can be enforced.

    Args:
        schema: a JSON schema.
        field: the parameter that it came in.

    Raises:
        RequestError: it is not a schema, or nothing matches it.
    """
    try:
        return _checked({"json_schema": _with_style(schema)}, field)
    except RequestError as error:
        if REGEX_ERROR not in str(error):
            raise
        return _checked({"json_schema": _with_style(_drop_unreadable_patterns(schema))}, field)


def regex_grammar(pattern: str, field: str) -> str:
    """A grammar of the text that a regular expression (Rust's syntax, no look-around) matches as a
    whole."""
    return _checked(_regex(pattern), field)


def choice_grammar(choices: Sequence[str], field: str) -> str:
    """A grammar of some texts, at least one."""
    return _checked({"lark_grammar": f"start: {' | '.join(map(json.dumps, choices))}"}, field)


def lark_grammar(grammar: str, field: str) -> str:
    """A grammar in llguidance's variant of Lark."""
    return _checked({"lark_grammar": grammar}, field)


def find_unenforced(grammar: str | None) -> list[str]:
    """The parts of a grammar made here that are not enforced, in llguidance's words."""
    return check_grammar(grammar) if grammar is not None else []


def tool_call_grammar(tools: Mapping[str, Tool], several: bool, *, is_harmony: bool = False) -> str:
    """A grammar of a JSON list of calls, `[{"name": ..., "arguments": {...}}]`, at least one.

    Args:
        tools: those that may be called, by their paths in the request; at least one.
        several: more than one call is allowed.
        is_harmony: of one call in gpt-oss's format, after `harmony.CALL_HEADER`.

    Raises:
        RequestError: a tool's schema does not compile.
    """
    schemas = {path: {"type": "object", **tool.parameters} for path, tool in tools.items()}
    try:
        grammar = _list_grammar(tools, schemas, several)
    except RequestError as error:
        if REGEX_ERROR not in str(error):
            _raise_for_schema(schemas)
            raise
        schemas = {path: _drop_unreadable_patterns(s) for path, s in schemas.items()}
        grammar = _list_grammar(tools, schemas, several)
    return _harmony_grammar(tools, schemas) if is_harmony else grammar


def _raise_for_schema(schemas: Mapping[str, dict[str, Any]]) -> None:
    """Raise the error of the schema that is at fault."""
    ends = time.monotonic() + BLAME_S
    for path, schema in schemas.items():
        if time.monotonic() < ends:
            json_schema_grammar(schema, path)


def _list_grammar(
    tools: Mapping[str, Tool], schemas: Mapping[str, dict[str, Any]], several: bool
) -> str:
    further_calls = f'(", " call){{0,{MAX_CALLS - 1}}}' if several else ""
    heads = [f'{{"name": {json.dumps(tool.name)}, "arguments": ' for tool in tools.values()]
    rules = [
        f'start: "[" call {further_calls} "]"',
        *_call_rules([json.dumps(head) for head in heads], '"}"', schemas),
    ]
    return lark_grammar("\n".join(rules), "tools")


def _harmony_grammar(tools: Mapping[str, Tool], schemas: Mapping[str, dict[str, Any]]) -> str:
    """Not checked here: only the model's vocabulary has these marks."""
    heads = [f'"{tool.name} " <|constrain|> "json" <|message|>' for tool in tools.values()]
    rules = ["start: call", *_call_rules(heads, "", schemas)]
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(rules)}]})


def _call_rules(
    heads: Sequence[str], tail: str, schemas: Mapping[str, dict[str, Any]]
) -> list[str]:
    rules = ["call: " + " | ".join(f"call_{at}" for at in range(len(heads)))]
    for at, (head, schema) in enumerate(zip(heads, schemas.values(), strict=True)):
        # Each schema in a grammar of its own: references in it begin at its root.
        rules += [f"call_{at}: {head} arguments_{at} {tail}"]
        rules += [f"arguments_{at}: %json {json.dumps(_with_style(schema))}"]
    return rules


def parse_tool_calls(text: str, _: bool = False) -> list[OutputPart]:
    """The calls in text that matches `tool_call_grammar`; what was cut short stays text."""
    decoder, parts, at = json.JSONDecoder(), [], 1
    while at < len(text) and text[at] == "{":
        try:
            call, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            break
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        parts.append(OutputPart("call", arguments, name=call["name"]))
        at = end + len(", ") if text.startswith(", ", end) else end
    rest = text if not parts else text[at:]
    return parts if rest in ("", "]") else [*parts, OutputPart("text", rest)]


_LISTED_CALL = '[{"name": ..., "arguments": {...}}]'


def describe_tools_in_chat(
    messages: Sequence[Message], tools: Sequence[Tool], call_example: str | None = None
) -> list[Message]:
    """A chat with tools as plain messages, for a model whose template does not render tools; it
    renders calls, if there is an example of one."""
    plain = list(messages) if call_example else [_without_calls(message) for message in messages]
    if not tools:
        return plain
    functions = json.dumps([tool.to_json()["function"] for tool in tools], ensure_ascii=False)
    text = (
        f"You can call these functions: {functions}\n"
        f"Calls are written {call_example or _LISTED_CALL}."
    )
    if plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{text}"}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _without_calls(message: Message) -> Message:
    content = message["content"] or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"Result of the call: {content}"}
    if calls := message.get("tool_calls"):
        functions = json.dumps([call["function"] for call in calls], ensure_ascii=False)
        content = f"{content}\n{functions}" if content else functions
    return {"role": message["role"], "content": content}


def _with_style(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "x-guidance": _JSON_STYLE}


def _drop_unreadable_patterns(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without regular expressions that llguidance cannot read, such as look-around. Each
    becomes an unknown `format` or a `not`, of which llguidance warns."""
    budget = MAX_PATTERNS

    def is_readable(pattern: str) -> bool:
        nonlocal budget
        budget -= 1
        try:
            if budget >= 0:
                _checked(_regex(pattern), "pattern")
        except RequestError as error:
            return REGEX_ERROR not in str(error)
        return budget >= 0

    def copy_of(part: Any) -> Any:
        if isinstance(part, list):
            return [copy_of(item) for item in part]
        if not isinstance(part, dict):
            return part
        result = {key: copy_of(value) for key, value in part.items()}
        pattern = result.get("pattern")
        if isinstance(pattern, str) and not is_readable(pattern):
            del result["pattern"]
            result["format"] = f"{result.get('format', '')} pattern {pattern}".strip()
        named = result.get("patternProperties")
        if isinstance(named, dict) and not all(map(is_readable, named)):
            for key in ("patternProperties", "additionalProperties"):
                result.pop(key, None)
            result["not"] = {}
        return result

    changed: dict[str, Any] = copy_of(schema)
    return changed


def _regex(pattern: str) -> dict[str, Any]:
    grammar: dict[str, Any] = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"][0]
    return grammar


def _checked(grammar: dict[str, Any], field: str) -> str:
    text = json.dumps({"grammars": [grammar]})
    try:
        check_grammar(text)
    except InputError as error:
        raise RequestError(
            field, f"cannot be enforced: {str(error).partition('but: ')[2]}"
        ) from error
    return text
