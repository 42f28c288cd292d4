"""Messages between machines with one to three faults: made from the classes that decode them.

Owns: values of a message's fields, faults in values and in bytes.
Does not know: connections, what must come of a message (`fuzz_cluster.py`).
"""

from __future__ import annotations

import copy
import json
import random
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cenacle import net
from cenacle.cluster import messages, node_info
from cenacle.core.request import Request, Sampling, TokenEvent
from cenacle.core.step import PromptChunk, Step
from cenacle.message import Message
from cenacle.ranks import messages as rank_messages

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 2**31, 2**63, 10**400, float("nan"), float("inf"), "", "x", "\x1b[2Jx",
    "\ud800", "a\x00b", "a" * 5000, [], [[]], [None], {}, {"type": "agent"}, [[[[]]]] * 3,
    "../../x", 1e300,
)  # fmt: skip
WORDS: dict[str, tuple[Any, ...]] = {
    "address": ("127.0.0.1", "localhost", "::1", "a" * 70 + ".x"),
    "addresses": (["127.0.0.1:1", "127.0.0.1:2"], []),
    "model": ("demo", "../x", "org/model"),
    "file": ("config.json", "model.safetensors", "tokenizer.json"),
    "byte_range": ([0, 100], [0, 1 << 20], [100, 5], [0, 512, 64, [[0, 8]]]),
    "secret": ("c2VjcmV0", "x"),
}


def message_types(module: Any) -> list[type[Message]]:
    """The messages that a module declares."""
    found = [value for value in vars(module).values() if isinstance(value, type)]
    mine = [
        kind for kind in found if issubclass(kind, Message) and kind.__module__ == module.__name__
    ]
    return [kind for kind in mine if is_dataclass(kind)]


def odd(dice: random.Random) -> Any:
    return copy.deepcopy(dice.choice(ODD))


def sample(annotation: Any, dice: random.Random) -> Any:
    """A JSON value of a field's type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return dice.choice(arguments)
    if hasattr(annotation, "__metadata__"):
        limits = annotation.__metadata__[0]
        if not hasattr(limits, "minimum"):
            return "word"
        return max(limits.minimum if limits.minimum > -1e9 else 0, min(limits.maximum, 3))
    if origin in (Union, type(int | None)):
        return sample(dice.choice(arguments), dice)
    if origin in (list, tuple):
        return [sample(arguments[0], dice) for _ in range(dice.randint(0, 2))]
    if origin is not None:  # Mapping
        return {str(n): sample(arguments[1], dice) for n in range(dice.randint(0, 2))}
    if annotation is TokenEvent:
        return TokenEvent("r1", 3).to_json()
    if annotation is Step:
        return sample_step(dice)
    if isinstance(annotation, type) and is_dataclass(annotation):
        return sample_fields(annotation, dice)
    plain = {int: 3, float: 0.5, str: "word", bool: True, type(None): None}
    return plain.get(annotation, {})


def sample_fields(kind: Any, dice: random.Random) -> dict[str, Any]:
    """A JSON object with a dataclass's fields."""
    hints, made = get_type_hints(kind, include_extras=True), {}
    for field in fields(kind):
        has_default = field.default is not MISSING or field.default_factory is not MISSING
        if has_default and dice.random() < 0.5:
            continue
        usual = WORDS.get(field.name)
        value = copy.deepcopy(dice.choice(usual)) if usual else sample(hints[field.name], dice)
        made[field.name] = value
    return made


def sample_message(kind: type[Message], dice: random.Random) -> dict[str, Any]:
    """A message as JSON, mostly a good one."""
    if kind is messages.AgentHello:
        info = messages.UNKNOWN_NODE.to_json()
        return messages.AgentHello(node_info.versions(), 0, info).to_json()
    made = sample_fields(kind, dice)
    if kind is messages.OrderRequest:
        made["order"] = sample_message(dice.choice(messages.ORDERS), dice)
    elif kind is messages.OrderResult:
        results = [order.result_type() for order in messages.ORDERS]
        made["result"] = sample_message(dice.choice(results), dice)
    return {"type": kind.type, **made} if kind.type else made


def sample_step(dice: random.Random, number: int = 0) -> dict[str, Any]:
    """A step that admits a request and computes its prompt."""
    tokens = tuple(dice.randrange(300) for _ in range(dice.randint(1, 6)))
    request = Request(
        f"r{dice.randrange(10**9)}", tokens, dice.randint(1, 3), sampling=Sampling(seed=1)
    )
    chunk = PromptChunk(request.id, 0, len(tokens))
    step = Step(number, admitted=(request,), final_chunks=(chunk,))
    made: dict[str, Any] = json.loads(json.dumps(step.to_json()))
    return made


def damage(message: Any, dice: random.Random) -> Any:
    """One to three faults in a copy of a JSON value."""
    message = copy.deepcopy(message)
    for _ in range(dice.randint(1, 3)):
        places = []
        rest = [message]
        while rest:
            value = rest.pop()
            keys = list(value) if isinstance(value, dict) else range(len(value))
            places += [(value, key) for key in keys]
            rest += [value[key] for key in keys if isinstance(value[key], dict | list)]
        if not places:
            return odd(dice)
        parent, key = dice.choice(places)
        kind = dice.random()
        if kind < 0.2 and isinstance(parent, dict):
            del parent[key]
        elif kind < 0.3 and isinstance(parent, dict):
            parent[dice.choice(("", "more", "type", "\x00", "group_id"))] = odd(dice)
        elif kind < 0.5 and isinstance(parent[key], int) and not isinstance(parent[key], bool):
            parent[key] += dice.choice((-1, 1, 7, 10**6))
        else:
            parent[key] = odd(dice)
    return message


def frame(message: Any, dice: random.Random) -> bytes:
    """The message with its length; some are damaged as bytes."""
    data = json.dumps(message).encode()
    kind = dice.randrange(25)
    if kind == 0:
        data = b"[" * 5000
    elif kind == 1:
        data = data[: dice.randrange(len(data) + 1)]
        return net.FRAME_HEADER.pack(len(data) + 1) + data  # the rest never comes
    elif kind == 2:
        return net.FRAME_HEADER.pack(2**32 - 1) + data
    elif kind == 3:
        data = data.replace(b'"', dice.choice((b"'", b"\xff", b"")), dice.randint(1, 3))
    return net.FRAME_HEADER.pack(len(data)) + data


RANK_REPLIES = (
    *(rank_messages.Heartbeat, rank_messages.StepResult, rank_messages.PageUpdate),
    *(rank_messages.RankFailure, rank_messages.Ready, rank_messages.LoadProgress),
    rank_messages.Hello,
)
