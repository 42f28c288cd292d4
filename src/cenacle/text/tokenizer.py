"""The tokenizer and chat template of one model.

Owns: encoding and decoding, rendering of chats, the parsers for this model's outputs.
Does not know: ranks, HTTP, APIs.
Invariant: `render` gives the prompt that the chat template defines; a client can set only variables
that the template uses and Cenacle does not.
Next: `output_parser.py`; mlx-lm's `tokenizer_utils.py` and `tool_parsers` know the markers of each
family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..core.chat import Message, OutputPart, TokenLogprob, Tool
from ..core.request import PromptLogprobs, TokenEvent
from ..errors import InputError
from . import harmony
from .call_form import CallForm, find_call_form
from .call_formats import BARE_MARKS, BareMarks
from .detokenizer import Detokenizer, TokenBytes
from .messages import TemplateTraits, adapt_messages, probe_template
from .output_parser import CallSyntax, OutputParser, ParseCalls, TextStream
from .reasoning import SWITCHES, ReasoningSettings, map_effort
from .text_backend import LIMITS, TextBackend, load_limited
from .time_limit import LimitReached
from .tool_calls import CallReader

# Template variables, and arguments of the rendering function, that clients cannot set.
_RESERVED_VARIABLES = frozenset(
    (
        *("messages", "conversation", "tools", "documents", "chat_template", "tokenize"),
        *("add_generation_prompt", "continue_final_message", "return_dict", "tokenizer_kwargs"),
    )
)


class ChatTokenizer:
    """A checkpoint's tokenizer, as mlx-lm loads it.

    Args:
        folder: of the checkpoint.
        config: its config.json.

    Raises:
        CheckpointError: there is no tokenizer, or it cannot be loaded.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._tokenizer = load_limited(folder, config.get("eos_token_id"))
        self._backend = TextBackend(self._tokenizer)

    def start_process(self) -> None:
        """Start the process of `isolate`, so that it is ready when that follows."""
        self._backend.start_process()

    def isolate(self) -> None:
        """From now on render and tokenize in a process of its own, see `TextBackend.isolate`.

        Raises:
            CheckpointError: a short text needs too much time or memory.
        """
        self._backend.isolate()

    def close(self) -> None:
        """End the process of `isolate`."""
        self._backend.close()

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self.inner)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end an output."""
        ends = harmony.STOP_TOKENS if self._is_harmony else ()
        ids = {self._tokenizer.convert_tokens_to_ids(token) for token in ends}
        return tuple(sorted(self._tokenizer.eos_token_ids | ids))

    @property
    def forces_harmony_calls(self) -> bool:
        """Whether a forced call is in gpt-oss's format, and not a JSON list."""
        return self._is_harmony

    @cached_property
    def _is_harmony(self) -> bool:
        """Whether this model writes gpt-oss's format."""
        return self._tokenizer.get_vocab().keys() >= harmony.TOKENS

    @cached_property
    def _traits(self) -> TemplateTraits:
        template = str(self._tokenizer.chat_template or "")
        try:
            return probe_template(template, self._render_probe)
        except LimitReached:
            return TemplateTraits()

    def _render_probe(self, messages: Sequence[Message], with_answer: bool = False) -> str:
        return self._backend.render(messages, add_generation_prompt=not with_answer)

    @property
    def inner(self) -> Any:
        """The tokenizer of transformers."""
        return self._tokenizer._tokenizer

    def token_text(self, token: int) -> str:
        """A token as it is written in texts; of special ones, their names."""
        return str(self._tokenizer.convert_ids_to_tokens(token))

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id, including added ones."""
        return dict(self._tokenizer.get_vocab())

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint has a chat template."""
        return bool(self._tokenizer.has_chat_template)

    @property
    def renders_tools(self) -> bool:
        """Whether the chat template can render tools."""
        return self._template_uses("tools")

    @property
    def parses_tool_calls(self) -> bool:
        """Whether the format of this model's tool calls is known."""
        known = self._is_harmony or bool(self._tokenizer.has_tool_calling)
        return known or self.call_form is not None

    @cached_property
    def call_form(self) -> CallForm | None:
        """The form of calls, for models whose format mlx-lm does not know; None: not known."""
        if self._is_harmony or self._tokenizer.has_tool_calling or not self.has_template:
            return None
        try:
            return find_call_form(
                lambda messages: self._render_probe(messages, with_answer=True),
                arguments_as_text=self._traits.arguments_as_text,
                stop=tuple(self._tokenizer.convert_ids_to_tokens(list(self.stop_tokens))),
            )
        except LimitReached:
            return None

    @property
    def has_reasoning(self) -> bool:
        """Whether this model has markers for reasoning."""
        return self._is_harmony or bool(self._tokenizer.has_thinking)

    @property
    def reasoning_end(self) -> tuple[int, ...]:
        """The ids that end reasoning."""
        if self._is_harmony:
            end = harmony.MESSAGE_END + harmony.NEXT_MESSAGE + harmony.ANSWER_HEADER
            return self._encode_markers(end)
        return tuple(self._tokenizer.think_end_tokens or ())

    def answer_start(self, tokens: Sequence[int], *, is_call: bool = False) -> tuple[int, ...]:
        """The ids between a prompt, or the end of reasoning, and an output that must match a
        grammar.

        Args:
            tokens: of the prompt and what was generated; reasoning is ended.
            is_call: the output is a forced call.
        """
        if not self._is_harmony:
            return self.reasoning_end if self.ends_in_reasoning(tokens) else ()
        state, header = self._harmony_state(tokens), harmony.ANSWER_HEADER
        if is_call:
            header = harmony.CALL_HEADER
        if state == "reasoning":
            header = harmony.MESSAGE_END + harmony.NEXT_MESSAGE + header
        elif state != "header":
            return ()
        elif "<|message|>" in self._last_message(tokens):
            header = harmony.NEXT_MESSAGE + header
        return self._encode_markers(header)

    def _encode_markers(self, text: str) -> tuple[int, ...]:
        return self._backend.encode(text, special=False)

    def takes_option(self, name: str) -> bool:
        """Whether a client's variable reaches the chat template, or is refused by `render`."""
        return name in _RESERVED_VARIABLES or self._template_uses(name)

    def _template_uses(self, variable: str) -> bool:
        """Whether the chat template uses a variable; one that is a Python function may use any."""
        template = self._tokenizer.chat_template
        match = re.search(rf"\b{re.escape(variable)}\b", str(template))
        return self.has_template and (template is None or match is not None)

    def map_reasoning_effort(self, effort: str | None) -> ReasoningSettings:
        """What an effort of OpenAI's means to this model, whatever its template knows.

        The template's own word for it, if it has `reasoning_effort`; else its switch for reasoning
        and a limit of tokens; else nothing. Explicit parameters of the client come first:
        `render(options={**settings.variables, **template_kwargs}, reasoning=settings.enabled)`,
        and `settings.budget` limits the reasoning.

        Args:
            effort: one of `reasoning.EFFORTS`: none, minimal, low, medium, high, xhigh, max; None:
                no effect.
        """
        if effort is None:
            return ReasoningSettings()
        template = str(self._tokenizer.chat_template or "") if self.has_template else ""
        return map_effort(effort, template, has_reasoning=self.has_reasoning)

    def encode(self, text: str, *, add_special: bool = True) -> tuple[int, ...]:
        """Text to ids; `add_special`: with the tokenizer's first token unless the text has it."""
        bos = self._tokenizer.bos_token
        special = add_special and (bos is None or not text.startswith(bos))
        return self._backend.encode(text, special=special)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token inside a text."""
        return self._token_bytes[token]

    def token_names(self, tokens: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary has them; "" for ids that it has not."""
        return [name or "" for name in self.inner.convert_ids_to_tokens(list(tokens))]

    def decode(self, tokens: Iterable[int]) -> str:
        """Ids to text."""
        return self._tokenizer.decode(list(tokens))

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        options: dict[str, Any] | None = None,
        *,
        reasoning: bool | None = None,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
        check_text: Callable[[str], None] | None = None,
        edit_text: Callable[[str], str] | None = None,
    ) -> tuple[int, ...]:
        """A chat to ids, ready for the assistant's output.

        Without a chat template the messages are rendered one per line, "role: content".

        Args:
            messages: at least one.
            tools: that the model may call; only if `renders_tools`.
            options: variables of the template.
            reasoning: whether to reason, if the model can; None: the template's default.
            continue_final_message: the output continues the last message, the assistant's.
            add_generation_prompt: False: end with the last message, not ready for an output.
            check_text: called with the chat as text, which may be too long to tokenize; may raise.
            edit_text: gives the text to tokenize for that of the chat.

        Raises:
            InputError: the template refuses the messages, or does not use an option.
        """
        for name in options or {}:
            if name in _RESERVED_VARIABLES or not self._template_uses(name):
                raise InputError(f"{name}: this model's chat template does not use it", name)
        begins_output = add_generation_prompt and not continue_final_message
        if not self.has_template:
            lines = [f"{m['role']}: {m['content']}" for m in messages]
            text = "\n".join([*lines, "assistant:"] if begins_output else lines)
            return self.encode(text if edit_text is None else edit_text(text))
        variables: dict[str, Any] = dict(options or {})
        if tools:
            variables["tools"] = [tool.to_json() for tool in tools]
        if reasoning is not None:
            switches = [name for name in SWITCHES if self._template_uses(name)]
            variables |= dict.fromkeys(switches or SWITCHES[:1], reasoning)
        if continue_final_message:
            variables["continue_final_message"] = True
        adapted = adapt_messages(messages, self._traits)
        try:
            text = self._backend.render(adapted, add_generation_prompt=begins_output, **variables)
        except LimitReached:
            reason = f"the model's chat template needs more than {LIMITS} for them"
            raise InputError(f"messages: {reason}; send less", "messages") from None
        except Exception as error:  # templates are programs and raise anything
            raise InputError(
                f"messages: the model's chat template refuses them: {error}", "messages"
            ) from error
        if check_text is not None:
            check_text(text)
        if edit_text is not None:
            text = edit_text(text)
        ids = self._backend.encode(text, special=False)
        # Some templates start reasoning whatever `enable_thinking` says.
        if reasoning is False and self.ends_in_reasoning(ids):
            return ids + self.reasoning_end
        return ids

    def start_reasoning(
        self, prompt: Sequence[int], reasoning: bool | None, *, is_call: bool = False
    ) -> tuple[int, ...]:
        """A prompt for an output with a grammar: with the marker that starts reasoning, if the
        model would reason first, since reasoning must not match the grammar; else with what begins
        such an output, a forced call if `is_call`."""
        ids = tuple(prompt)
        if self._is_harmony:
            if reasoning is False or self._harmony_state(ids) != "header":
                return ids + self.answer_start(ids, is_call=is_call)
            return ids + self._encode_markers(harmony.REASONING_START)
        if reasoning is False or not self.has_reasoning or self.ends_in_reasoning(ids):
            return ids
        if not (reasoning or self._template_uses("enable_thinking")):
            return ids
        return ids + tuple(self._tokenizer.think_start_tokens)

    def ends_in_reasoning(self, prompt: Sequence[int]) -> bool:
        """Whether the output of a prompt begins inside reasoning."""
        if not self.has_reasoning:
            return False
        if self._is_harmony:
            return self._harmony_state(prompt) == "reasoning"
        tokenizer = self._tokenizer
        return bool(tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt))

    def _harmony_state(self, prompt: Sequence[int]) -> str:
        return harmony.initial_state(self._last_message(prompt))

    def _last_message(self, tokens: Sequence[int]) -> str:
        start = self._tokenizer.convert_tokens_to_ids("<|start|>")
        ids = list(tokens)
        return self.decode(ids[len(ids) - 1 - ids[::-1].index(start) :]) if start in ids else ""

    # Parsers; each is for one output

    def text_stream(self, stop: Sequence[str] = ()) -> TextStream:
        """A stream of text that ends before any of the stop strings."""
        return TextStream(Detokenizer(self._token_bytes), stop, self.stop_tokens)

    def text_parser(self, stop: Sequence[str]) -> OutputParser:
        """A parser of outputs that are text only."""
        return OutputParser(Detokenizer(self._token_bytes), stop, self.stop_tokens)

    def tool_call_parser(self, parse_calls: ParseCalls) -> OutputParser:
        """A parser of outputs that are tool calls only; `parse_calls` gets the whole output."""
        return OutputParser(
            Detokenizer(self._token_bytes),
            (),
            self.stop_tokens,
            calls=CallSyntax(parse_calls),
            state="tool",
        )

    def forced_call_parser(self, tools: Sequence[Tool]) -> OutputParser:
        """A parser of one forced call in gpt-oss's format."""
        reader = CallReader("harmony", tools)

        def parse_call(text: str, cut: bool) -> list[OutputPart]:
            parts = reader.read(f"functions.{text}", cut=cut)
            is_call = any(part.kind == "call" for part in parts)
            return parts if is_call else [OutputPart("text", text)]

        return self.tool_call_parser(parse_call)

    def chat_parser(
        self,
        stop: Sequence[str],
        tools: Sequence[Tool],
        prompt: Sequence[int],
        *,
        parallel: bool = True,
    ) -> OutputParser:
        """A parser of outputs with reasoning, text and tool calls.

        Args:
            stop: text ends before any of these.
            tools: that may be called. Without tools, calls are text; so are calls of a strict tool
                whose arguments do not match its schema.
            prompt: token ids.
            parallel: False: the output ends with its first call.
        """
        state = self._tokenizer.response_initial_state
        if self._is_harmony:
            state = self._harmony_state(prompt)
        elif state is None:
            state = "reasoning" if self.ends_in_reasoning(prompt) else "normal"
        return OutputParser(
            Detokenizer(self._token_bytes),
            stop,
            self.stop_tokens,
            self._state_machine(bool(tools)).make_state(state),
            self._call_syntax(tools),
            state,
            None if parallel else 1,
        )

    @property
    def _call_kind(self) -> str | None:
        """mlx-lm's name of the format of calls, or one of ours; None: only `call_form` knows."""
        if self._is_harmony:
            return "harmony"
        if self.call_form is not None:
            return self.call_form.kind
        return self.inner.init_kwargs.get("tool_parser_type")

    def _call_syntax(self, tools: Sequence[Tool]) -> CallSyntax:
        reader = CallReader(self._call_kind, tools, self.call_form)

        def parse_calls(text: str, cut: bool) -> list[OutputPart]:
            return reader.read(text, cut=cut)

        return CallSyntax(
            parse_calls, *self._call_marks, self._bare_marks, reader if tools else None
        )

    @property
    def _call_marks(self) -> tuple[str, str]:
        if self._is_harmony:
            return harmony.CALL_START, ""
        if self.call_form is not None:
            return self.call_form.marker, self.call_form.end_marker
        return self._tokenizer.tool_call_start or "", self._tokenizer.tool_call_end or ""

    @property
    def _bare_marks(self) -> BareMarks | None:
        if self.call_form is not None:
            return self.call_form.bare
        return BARE_MARKS.get(self._call_kind or "")

    def _state_machine(self, has_tools: bool) -> Any:
        """mlx-lm's, with its formats and others, and with calls that lack their wrapper."""
        from mlx_lm.generate import TextStateMachine, make_text_state_machine

        if self._is_harmony:
            return TextStateMachine(harmony.TRANSITIONS)
        if self._tokenizer.response_transitions:
            return make_text_state_machine(self._tokenizer)
        (start, end), bare = self._call_marks, self._bare_marks if has_tools else None
        starts = [(start, "tool")] if start and (bare is None or bare.start != start) else []
        normal = [*starts, *((mark, "normal") for mark in self._tokenizer.structural_markers)]
        ends = [(end, "normal")] if end else []
        transitions = {"normal": normal, "tool": ends}
        if bare is not None:
            normal.append((bare.start, "bare_tool"))
            transitions["bare_tool"] = [(bare.end, "after_call")] if bare.end else []
            transitions["after_call"] = [*ends, *normal]
        if self._tokenizer.has_thinking:
            normal.append((self._tokenizer.think_start, "reasoning"))
            transitions["reasoning"] = [(self._tokenizer.think_end, "normal"), *starts]
        return TextStateMachine(transitions)

    # Log-probabilities

    def prompt_logprobs(
        self, tokens: Sequence[int], logprobs: PromptLogprobs
    ) -> list[TokenLogprob]:
        """A part of a prompt's log-probabilities, with the bytes of its tokens.

        Args:
            tokens: of the prompt.
            logprobs: of some of them.
        """
        rows = zip(logprobs.logprobs, logprobs.ranks, logprobs.top, strict=True)
        result = []
        for token, (value, rank, top) in zip(
            tokens[logprobs.begin : logprobs.end], rows, strict=False
        ):
            best = tuple(
                TokenLogprob(self._token_bytes[t], logprob, (), t, place)
                for place, (t, logprob) in enumerate(top, 1)
            )
            result.append(TokenLogprob(self._token_bytes[token], value, best, token, rank))
        return result

    def token_logprob(self, event: TokenEvent) -> TokenLogprob:
        """The log-probabilities of an event, with the bytes of its tokens."""
        top = tuple(TokenLogprob(self._token_bytes[t], logprob) for t, logprob in event.top)
        data = (
            b"" if event.token in self._tokenizer.eos_token_ids else self._token_bytes[event.token]
        )
        return TokenLogprob(data, event.logprob or 0.0, top)
