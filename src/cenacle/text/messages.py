"""Messages in the form that one chat template can render.

Owns: what a template can render, found by rendering probes; the messages that are changed for it.
Does not know: tokenizers, APIs.
Invariant: no text of a message is lost; a message that the template can render stays as it is.
Next: `tokenizer.py` renders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.chat import Message

RenderText = Callable[[Sequence[Message]], str]

# Claude Code's first line changes with every request, and would defeat the prefix cache.
_BILLING_LINE = re.compile(r"\s*x-anthropic-billing-header:[^\n]*(?:\n+|$)")


@dataclass(frozen=True)
class TemplateTraits:
    """What a template can render.

    Args:
        system: a system message before the others.
        several_systems: two of them.
        late_system: one in the middle.
        same_roles: two neighbors of the user's.
        arguments_as_text: the arguments of calls must be JSON text.
        any_arguments: they may be text that is no JSON object.
        one_call: only the first call of a message is rendered.
        thinking: reasoning is the member "thinking".
    """

    system: bool = True
    several_systems: bool = True
    late_system: bool = True
    same_roles: bool = True
    arguments_as_text: bool = False
    any_arguments: bool = False
    one_call: bool = False
    thinking: bool = False


def probe_template(template: str, render: RenderText) -> TemplateTraits:
    """What a template can render; `render` raises if it cannot."""

    def shows(texts: Sequence[str], *messages: Message) -> bool:
        try:
            text = render(messages)
        except Exception:  # templates are programs and raise anything
            return False
        return all(part in text for part in texts)

    def message(role: str, content: str, **rest: Any) -> Message:
        return {"role": role, "content": content, **rest}

    first, late = message("system", "SYSTEM_A"), message("system", "SYSTEM_B")
    user, reply = message("user", "ASK_A"), message("assistant", "ANSWER_A")
    user_b = message("user", "ASK_B")
    if not shows(["ASK_A"], user):
        return TemplateTraits()  # it needs what a probe does not have
    names, sample = ["SYSTEM_A", "SYSTEM_B"], {"a": 1}

    def called(arguments: Any, *names: str) -> list[Message]:
        calls = [
            {"id": f"call{at}", "type": "function", "function": {"name": n, "arguments": arguments}}
            for at, n in enumerate(names)
        ]
        results = [message("tool", "RESULT", tool_call_id=f"call{at}") for at in range(len(names))]
        return [user, message("assistant", "", tool_calls=calls), *results]

    one, two = ("call_a",), ("call_a", "call_b")
    as_objects = shows(one, *called(sample, *one)) and not shows(["{'a"], *called(sample, *one))
    as_text = not as_objects and shows(one, *called(json.dumps(sample), *one))
    arguments = json.dumps(sample) if as_text else sample
    return TemplateTraits(
        system=shows(["SYSTEM_A", "ASK_A"], first, user),
        several_systems=shows([*names, "ASK_A"], first, late, user),
        late_system=shows([*names, "ASK_B"], first, user, reply, late, user_b),
        same_roles=shows(["ASK_A", "ASK_B"], user, user_b),
        arguments_as_text=as_text,
        any_arguments=shows([*one, "WORDS"], *called("WORDS", *one)),
        one_call=shows(one, *called(arguments, *one)) and not shows(two, *called(arguments, *two)),
        thinking="thinking" in re.findall(r"message\.(\w+)", template)
        and "reasoning_content" not in template,
    )


def adapt_messages(messages: Sequence[Message], traits: TemplateTraits) -> list[Message]:
    """The messages for a template."""
    adapted = [_without_billing(message) for message in messages]
    adapted = [m for m in adapted if m["role"] != "system" or m.get("content")] or adapted
    adapted = _place_systems(adapted, traits)
    if traits.one_call:
        adapted = _split_calls(adapted)
    adapted = [_adapt_message(message, traits) for message in adapted]
    return adapted if traits.same_roles else _merge_neighbors(adapted)


def _without_billing(message: Message) -> Message:
    content = message.get("content")
    if message["role"] != "system" or not isinstance(content, str):
        return message
    match = _BILLING_LINE.match(content)
    return {**message, "content": content[match.end() :]} if match else message


def _place_systems(messages: list[Message], traits: TemplateTraits) -> list[Message]:
    """Systems that the template cannot render where they are join the first one."""
    first = next((at for at, m in enumerate(messages) if m["role"] != "system"), len(messages))
    leading, rest = messages[:first], messages[first:]
    if not traits.late_system:
        leading += [m for m in rest if m["role"] == "system"]
        rest = [m for m in rest if m["role"] != "system"]
    if len(leading) > 1 and not traits.several_systems:
        leading = [{"role": "system", "content": "\n\n".join(m["content"] for m in leading)}]
    if leading and not traits.system:
        text = "\n\n".join(m["content"] for m in leading)
        if rest and rest[0]["role"] == "user":
            content = f"{text}\n\n{rest[0]['content']}"
            return [{**rest[0], "content": content}, *rest[1:]]
        return [{"role": "user", "content": text}, *rest]
    return [*leading, *rest]


def _split_calls(messages: list[Message]) -> list[Message]:
    """A message for each call, before its result."""
    adapted: list[Message] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        tool_calls = message.get("tool_calls") or []
        if len(tool_calls) < 2:
            adapted.append(message)
            continue
        results: list[Message] = []
        while at < len(messages) and messages[at]["role"] == "tool":
            results.append(messages[at])
            at += 1
        for number, call in enumerate(tool_calls):
            rest = message if number == 0 else {"role": "assistant", "content": ""}
            adapted.append({**rest, "tool_calls": [call]})
            answers = [r for r in results if r.get("tool_call_id") == call.get("id")]
            answers = answers or (
                [results[0]] if results and "tool_call_id" not in results[0] else []
            )
            adapted += answers
            results = [r for r in results if all(r is not one for one in answers)]
        adapted += results
    return adapted


def _adapt_message(message: Message, traits: TemplateTraits) -> Message:
    message = dict(message)
    calls = message.get("tool_calls")
    if calls:
        message["tool_calls"] = [_adapt_call(call, traits) for call in calls]
    if traits.thinking and (reasoning := message.pop("reasoning_content", "")):
        if calls and message.get("content"):  # gpt-oss takes one of the two
            message["content"] = f"{reasoning}\n\n{message['content']}"
        else:
            message["thinking"] = reasoning
    return message


def _adapt_call(call: dict[str, Any], traits: TemplateTraits) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        if not traits.any_arguments:
            arguments = {"arguments": arguments}
    elif traits.arguments_as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _merge_neighbors(messages: list[Message]) -> list[Message]:
    """Neighbors of the user's, or of the assistant's without calls, as one message."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        plain = message["role"] in ("user", "assistant") and not message.get("tool_calls")
        if plain and last and last["role"] == message["role"] and not last.get("tool_calls"):
            content = f"{last['content']}\n\n{message['content']}"
            merged[-1] = {**last, **message, "content": content}
        else:
            merged.append(message)
    return merged
