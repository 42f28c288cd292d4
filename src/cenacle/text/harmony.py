"""gpt-oss's output format: messages in channels.

Owns: its markers, as transitions of mlx-lm's `TextStateMachine`; its calls.
Does not know: tokenizers, chat templates, APIs.
Invariant: analysis is reasoning; commentary for a function is a call; the final channel and
commentary for the user are text.
Source: https://cookbook.openai.com/articles/openai-harmony
Next: `output_parser.py` follows the states.
"""

from __future__ import annotations

import re

TOKENS = frozenset(("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"))
STOP_TOKENS = ("<|call|>", "<|return|>")
CALL_START = "to="
REASONING_START = "<|channel|>analysis<|message|>"
ANSWER_HEADER = "<|channel|>final<|message|>"
CALL_HEADER = "<|channel|>commentary to=functions."  # then the name
NEXT_MESSAGE = "<|start|>assistant"
MESSAGE_END = "<|end|>"

_ENDS = [(mark, "header") for mark in ("<|end|>", "<|return|>", "<|call|>")]
TRANSITIONS = {
    # "header" is what comes before a message; its text says where the message goes.
    "header": [
        ("<|channel|>analysis", "header_reasoning"),
        ("<|channel|>final", "header_text"),
        ("<|channel|>commentary", "header_text"),
        (CALL_START, "tool"),
        ("<|message|>", "normal"),
    ],
    "header_reasoning": [("<|message|>", "reasoning"), (CALL_START, "tool"), *_ENDS],
    "header_text": [("<|message|>", "normal"), (CALL_START, "tool"), *_ENDS],
    "reasoning": [*_ENDS, ("<|start|>", "header")],
    "normal": [*_ENDS, ("<|start|>", "header")],
    "tool": [*_ENDS, ("<|start|>", "header")],
}
_CALL = re.compile(
    r"\s*functions\.(?P<name>[^\s<]+)(?P<header>(?:(?!<\|message\|>).)*)<\|message\|>(?P<body>.*)",
    re.DOTALL,
)


def initial_state(prompt_end: str) -> str:
    """The state in which an output begins, from the end of its prompt."""
    header, is_open, _ = prompt_end.rpartition("<|start|>")[2].partition("<|message|>")
    if not is_open or "<|end|>" in prompt_end.rpartition("<|message|>")[2]:
        return "header"
    return "reasoning" if "<|channel|>analysis" in header else "normal"


def split_call(text: str) -> tuple[str, str]:
    """The function and the arguments of a call; "": it is not one."""
    match = _CALL.fullmatch(text)
    return (match["name"], match["body"]) if match is not None else ("", "")
