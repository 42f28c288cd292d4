"""Between text and tokens, for one model.

Owns: the tokenizer, rendering of chats, turning a stream of tokens into a stream of text, or of an
answer's parts: what a model that thinks says to itself, calls of tools, and text.
Does not know: ranks, HTTP, any API.
Invariant: the pieces of a `TextStream` joined are the text of all its tokens, cut before the first
stop string; no piece ends inside a character. The parts of an `AnswerStream` are the same without
the marks between them; a call that cannot be read is given as text, with its marks.
Next: mlx-lm's `tokenizer_utils.py` and `tool_parsers` know the marks of each family.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import regex
from jsonschema import Draft202012Validator, ValidationError, validators
from referencing import Registry

from ..core.chat import Message, OutputPart, TokenLogprob, Tool
from ..core.request import TokenEvent
from ..errors import CheckpointError, InputError
from .output_parser import OutputParser, Read, TextStream

# Variables of templates, and arguments of what renders them, that are not for clients to set.
_OURS = frozenset(
    (
        *("messages", "conversation", "tools", "documents", "chat_template", "tokenize"),
        *("add_generation_prompt", "continue_final_message", "return_dict", "tokenizer_kwargs"),
    )
)

PATTERN_S = 0.05  # for one pattern of a strict tool; servers answer others meanwhile


class ChatTokenizer:
    """A checkpoint's tokenizer, as mlx-lm loads it.

    Args:
        folder: of the checkpoint.
        config: its config.json.

    Raises:
        CheckpointError: there is no tokenizer or it cannot be loaded.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        from mlx_lm.utils import load_tokenizer

        try:
            self._tokenizer = load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
        except Exception as error:  # transformers raises what its many tokenizers raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {reason}") from error

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return tuple(sorted(self._tokenizer.eos_token_ids))

    @property
    def inner(self) -> Any:
        """The tokenizer as transformers has it."""
        return self._tokenizer._tokenizer

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id, those that were added included."""
        return dict(self._tokenizer.get_vocab())

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint says how a chat is rendered."""
        return bool(self._tokenizer.has_chat_template)

    def encode(self, text: str) -> tuple[int, ...]:
        """Plain text to ids, with the tokenizer's own beginning unless the text has it."""
        bos = self._tokenizer.bos_token
        special = bos is None or not text.startswith(bos)
        return tuple(self._tokenizer.encode(text, add_special_tokens=special, verbose=False))

    @property
    def renders_tools(self) -> bool:
        """Whether the chat template has words for tools."""
        return self._template_has("tools")

    @property
    def calls_tools(self) -> bool:
        """Whether it is known how this model calls tools."""
        return bool(self._tokenizer.has_tool_calling)

    @property
    def thinks(self) -> bool:
        """Whether this model has marks for reasoning."""
        return bool(self._tokenizer.has_thinking)

    def _template_has(self, word: str) -> bool:
        """Whether the chat template uses a variable; one that is a program may use any."""
        template = self._tokenizer.chat_template
        found = re.search(rf"\b{re.escape(word)}\b", str(template))
        return self.has_template and (template is None or found is not None)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        options: dict[str, Any] | None = None,
        *,
        think: bool | None = None,
        continued: bool = False,
    ) -> tuple[int, ...]:
        """A chat to ids, ready for the assistant's answer.

        Without a chat template the messages are rendered one per line, "role: content".

        Args:
            messages: at least one.
            tools: what the model is told it may call; only where `renders_tools`.
            options: variables of the template.
            think: whether a model that can think shall; None: as the template has it.
            continued: the last message, the assistant's, is the answer's beginning.

        Raises:
            InputError: the template refuses the messages, or has no use for an option.
        """
        for name in options or {}:
            if name in _OURS or not self._template_has(name):
                raise InputError(f"{name}: this model's chat template has no use for it", name)
        if not self.has_template:
            lines = [f"{m['role']}: {m['content']}" for m in messages]
            return self.encode("\n".join(lines if continued else [*lines, "assistant:"]))
        variables: dict[str, Any] = dict(options or {})
        if tools:
            variables["tools"] = [tool.to_json() for tool in tools]
        if think is not None:
            variables["enable_thinking"] = think
        if continued:
            variables["continue_final_message"] = True
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=not continued, **variables
            )
        except Exception as error:  # templates are programs of the checkpoint's author
            raise InputError(
                f"messages: the model's chat template refuses them: {error}", "messages"
            ) from error
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))
        # A template may open the reasoning whatever it is told.
        return ids + self.think_end if think is False and self.in_reasoning(ids) else ids

    def thought(self, prompt: Sequence[int], think: bool | None) -> tuple[int, ...]:
        """A prompt whose answer must match something, with the mark that begins reasoning where the
        model would reason first: else that would have to match as well."""
        ids = tuple(prompt)
        hybrid = self.thinks and self._template_has("enable_thinking")
        if think is False or self.in_reasoning(ids) or not (think or hybrid):
            return ids
        return ids + tuple(self._tokenizer.think_start_tokens)

    @property
    def think_end(self) -> tuple[int, ...]:
        """The ids that end reasoning."""
        return tuple(self._tokenizer.think_end_tokens or ())

    def in_reasoning(self, prompt: Sequence[int]) -> bool:
        """Whether an answer to a prompt begins inside reasoning."""
        if not self.thinks:
            return False
        find = self._tokenizer
        return bool(find.rfind_think_start(prompt) > find.rfind_think_end(prompt))

    def decode(self, tokens: Iterable[int]) -> str:
        """Ids to text."""
        return self._tokenizer.decode(list(tokens))

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """A new stream of text that ends before any of the `stop` strings."""
        return TextStream(self._tokenizer.detokenizer, stop, self.stop_tokens)

    def plain(self, stop: Sequence[str]) -> OutputParser:
        """A new stream of an answer that is nothing but text."""
        return OutputParser(self._tokenizer.detokenizer, stop, self.stop_tokens)

    def called(self, read: Read) -> OutputParser:
        """A new stream of an answer that is nothing but calls; `read` is given all of it."""
        return OutputParser(self._tokenizer.detokenizer, (), self.stop_tokens, None, read, "tool")

    def chat(
        self,
        stop: Sequence[str],
        tools: Sequence[Tool],
        prompt: Sequence[int],
        *,
        parallel: bool = True,
    ) -> OutputParser:
        """A new stream of an answer that may have reasoning, text and calls.

        Args:
            stop: text ends before any of these.
            tools: what may be called; without any, calls are text, and so is a call of a strict
                tool with other arguments than its schema has.
            prompt: the ids that the answer follows.
            parallel: False: the answer ends with its first call.
        """
        from mlx_lm.generate import make_text_state_machine

        begin = self._tokenizer.response_initial_state
        if begin is None:
            begin = "reasoning" if self.in_reasoning(prompt) else "normal"
        state = make_text_state_machine(self._tokenizer).make_state(begin)
        detokenizer = self._tokenizer.detokenizer
        read = self._reader(tools)
        calls = None if parallel else 1
        return OutputParser(detokenizer, stop, self.stop_tokens, state, read, begin, calls)

    def _reader(self, tools: Sequence[Tool]) -> Read:
        """Reads calls in this model's own form, with mlx-lm's parser."""
        tokenizer, described = self._tokenizer, [tool.to_json() for tool in tools]
        strict = {tool.name: tool.parameters for tool in tools if tool.strict}

        def read(text: str) -> list[OutputPart]:
            as_text = f"{tokenizer.tool_call_start}{text}{tokenizer.tool_call_end}"
            if not tools:
                return [OutputPart("text", as_text)]
            try:
                made = tokenizer.tool_parser(text, described)
                listed = made if isinstance(made, list) else [made]
                return [_call(one, strict.get(one["name"])) for one in listed]
            except Exception:  # parsers raise whatever a model's mistakes make them raise
                return [OutputPart("text", as_text)]

        return read

    def logged(self, event: TokenEvent) -> TokenLogprob:
        """What was reported about a token."""
        top = tuple(TokenLogprob(self._bytes(token), logprob) for token, logprob in event.top)
        return TokenLogprob(self._bytes(event.token), event.logprob or 0.0, top)

    def _bytes(self, token: int) -> bytes:
        """A token's bytes, as the streaming detokenizer has them: half a character stays that."""
        from mlx_lm import tokenizer_utils as mlx_lm

        detokenizer = self._tokenizer.detokenizer
        if isinstance(detokenizer, mlx_lm.BPEStreamingDetokenizer):
            if token >= len(detokenizer.tokenmap):
                return b""
            known = mlx_lm._byte_decoder()
            word = detokenizer.tokenmap[token]
            return b"".join(bytes([known[c]]) if c in known else c.encode() for c in word)
        if isinstance(detokenizer, mlx_lm.SPMStreamingDetokenizer):
            return detokenizer.tokenmap[token].replace(detokenizer._sep, b" ")
        return self.decode([token]).encode()


def _call(made: dict[str, Any], schema: dict[str, Any] | None) -> OutputPart:
    """A call as mlx-lm's parsers give it; `schema`: what its arguments must match."""
    arguments = made.get("arguments", {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(made["name"], str) or not isinstance(arguments, dict):
        raise ValueError("no call")
    if schema is not None:
        # The registry: nothing is fetched from where a schema points to.
        _Timed(schema, registry=Registry()).validate(arguments)
    text = json.dumps(arguments, ensure_ascii=False)
    return OutputPart("call", text, made["name"], str(made.get("id") or ""))


def _pattern(_: Any, pattern: str, given: Any, __: Any) -> Iterator[ValidationError]:
    """JSON schema's "pattern", with an end: a client chooses both the pattern and the text."""
    if isinstance(given, str) and not regex.search(pattern, given, timeout=PATTERN_S):
        yield ValidationError("another pattern")


_Timed = validators.extend(Draft202012Validator, {"pattern": _pattern})
