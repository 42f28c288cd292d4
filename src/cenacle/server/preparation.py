"""From a request's body to the requests of the group.

Owns: parsing by an API's adapter, tokenizing prompts, checks against the model.
Does not know: HTTP, how answers are generated and shaped.
Invariant: a prepared choice fits the model's context and has a grammar that can be enforced.
Next: `generation.py` submits the choices.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..core.chat import Message
from ..core.image import PromptImage
from ..core.request import Request
from ..errors import InputError
from ..images.decode_process import DecodedImage
from ..images.placement import ImagePlaces
from ..text.output_parser import OutputParser
from ..text.reasoning import SWITCHES, nearest_effort
from .api import structured_output
from .api.protocol import ApiAdapter, GenerationRequest, Prompt, ServedModel
from .api.tokenization import MAX_CHARACTERS, DetokenizeRequest, TokenizeRequest
from .api.validation import UNSUPPORTED, JsonObject, RequestError, describe, parse_request
from .generation import InFlightChoice

if TYPE_CHECKING:
    from ..api import Model


class ImagesWantedError(Exception):
    """A request has images, which are to be loaded first.

    Args:
        sources: their URIs.
        field: the parameter that has them.
    """

    def __init__(self, sources: tuple[str, ...], field: str) -> None:
        super().__init__("the images of the request")
        self.sources, self.field = sources, field


CHARACTERS_PER_TOKEN = 8  # more than usual text has
LENGTH_SLACK_TOKENS = 64  # by which the beginning of a text may differ when it is cut


class RequestPreparer:
    """Prepares the choices of requests. Slow, because it tokenizes; not safe for several threads.

    Args:
        model: loaded.
        served: what clients are told of it.
        max_messages: of a chat.

    Raises:
        CheckpointError: the model has no tokenizer.
    """

    def __init__(self, model: Model, served: ServedModel, max_messages: int) -> None:
        self._model, self._served, self._max_messages = model, served, max_messages
        self._tokenizer = model.text

    def prepare(
        self, adapter: ApiAdapter, body: bytes, key: str, images: Sequence[DecodedImage] = ()
    ) -> tuple[GenerationRequest, list[InFlightChoice]]:
        """The request of a body, and its choices.

        Args:
            adapter: the API.
            body: as the client sent it.
            key: name of the API key; "": none.
            images: of the request.

        Raises:
            InputError: the request is refused.
            ImagesWantedError: it has images, which were not given.
        """
        request = _with_images(adapter.parse(body, self._served, key), images)
        request = self._apply_effort(request)
        unenforced = structured_output.find_unenforced(request.grammar)
        request = self._use_native_calls(request)
        choices: list[InFlightChoice] = []
        for prompt in request.prompts:
            self._check_length(request, prompt)
            tokens, placed = self._tokenize(request, prompt, partial(self._check_text, request))
            free = self._served.free_context(len(tokens), request.prompt_field)
            limits = [n for n in (request.max_tokens, free) if n is not None]
            max_tokens = min(limits, default=None)
            if max_tokens == 0:
                max_tokens = 1  # the group generates at least one
            alternatives = prompt_alternatives(request)
            echo = self._tokenizer.decode(tokens) if request.echo and alternatives is None else ""
            for index in range(request.n):
                parser = self._output_parser(request, tokens)
                parser.min_tokens = request.min_tokens
                choice = InFlightChoice(
                    len(choices),
                    replace(
                        self._group_request(request, tokens, placed, max_tokens, index), key=key
                    ),
                    len(tokens) if index == 0 else 0,
                    parser,
                    self._tokenizer,
                    echo,
                    request.thinking_budget,
                    is_forced_call=request.forced_call is not None,
                    prompt=() if alternatives is None else tokens,
                    echo_prompt=request.echo and alternatives is not None,
                    is_empty=request.max_tokens == 0,
                )
                if request.is_chat and request.grammar is not None:
                    self._precede_grammar(request, choice)
                choices.append(choice)
        warnings = tuple(f"{request.grammar_field}: not enforced: {part}" for part in unenforced)
        request = replace(request, warnings=request.warnings + warnings)
        return replace(request, image_sources=(), images=()), choices  # the choices have them

    def _use_native_calls(self, request: GenerationRequest) -> GenerationRequest:
        """A forced call in gpt-oss's own format, in which it continues and remembers it."""
        if request.forced_call is None or not self._tokenizer.forces_harmony_calls:
            return request
        tools = {t.name: t for t in request.tools if request.forced_call in (t.name, "required")}
        grammar = structured_output.tool_call_grammar(tools, several=False, is_harmony=True)
        return replace(request, grammar=grammar)

    def _precede_grammar(self, request: GenerationRequest, choice: InFlightChoice) -> None:
        tokens, may_call = choice.request.tokens, request.may_call
        if may_call or self._tokenizer.ends_in_reasoning(tokens):
            tools = request.tools if may_call else ()
            parallel = request.parallel_tool_calls
            parser = self._tokenizer.chat_parser((), tools, tokens, parallel=parallel)
            choice.precede_grammar(parser, may_call=may_call)

    def count_tokens(
        self, adapter: ApiAdapter, body: bytes, images: Sequence[DecodedImage] = ()
    ) -> tuple[JsonObject, int]:
        """The number of tokens of a body's prompt, as Anthropic's API tells it, and as it is.

        Raises:
            InputError, ImagesWantedError: see `prepare`.
        """
        request = _with_images(adapter.parse(body, self._served), images)
        request = self._apply_effort(request)
        count = len(self._tokenize(request, request.prompts[0], self._check_countable)[0])
        return {"input_tokens": count}, count

    def tokenize(self, body: bytes, images: Sequence[DecodedImage] = ()) -> tuple[JsonObject, int]:
        """The response to POST /tokenize, and its number of tokens.

        Raises:
            InputError, ImagesWantedError: see `prepare`.
        """
        tokenizer, request = self._tokenizer, parse_request(TokenizeRequest, body)
        self._served.check_name(request.model)
        if request.text is not None:
            tokens = tokenizer.encode(request.text, add_special=request.adds_special_tokens)
        else:
            chat = _with_images(request.to_generation_request(self._served), images)
            chat = self._apply_effort(chat)
            tokens, _ = self._tokenize(
                chat, chat.prompts[0], self._check_countable, request.add_generation_prompt
            )
            if request.adds_special_tokens:
                tokens = (*tokenizer.encode(""), *tokens)
        pieces = [tokenizer.token_bytes(token) for token in tokens] if request.with_pieces else []
        names = tokenizer.token_names(tokens) if request.return_token_strs else []
        return request.response(tokens, pieces, names, self._served.context_length), len(tokens)

    def detokenize(self, body: bytes) -> tuple[JsonObject, int]:
        """The response to POST /detokenize, and its number of tokens.

        Raises:
            InputError: the request is refused.
        """
        request = parse_request(DetokenizeRequest, body)
        self._served.check_name(request.model)
        last = self._served.vocab_size - 1
        for at, token in enumerate(request.tokens):
            if not 0 <= token <= last:
                reason = f"expected a token id from 0 to {last}, got {describe(token)}"
                raise RequestError(f"tokens[{at}]", reason)
        text = self._tokenizer.decode(request.tokens)
        return {"prompt": text, "content": text}, len(request.tokens)

    def _apply_effort(self, request: GenerationRequest) -> GenerationRequest:
        if not request.is_chat:
            return request
        word = request.reasoning_effort
        effort = nearest_effort(word) if word is not None else None
        settings = self._tokenizer.map_reasoning_effort(effort)
        explicit = dict(request.template_kwargs)
        unused = [name for name in explicit if not self._tokenizer.takes_option(name)]
        warnings = request.warnings
        if unused:
            names = ", ".join(name[:80] for name in unused)
            warnings = (*warnings, f"chat_template_kwargs: not used by the template: {names}")
        enabled, budget = request.enable_thinking, request.thinking_budget
        for name in unused:
            value = explicit.pop(name)
            if enabled is None and name in SWITCHES and isinstance(value, bool):
                enabled = value
        if enabled is None and not any(name in explicit for name in SWITCHES):
            enabled = settings.enabled
        if word is not None and effort != word:
            warnings = (*warnings, f"effort {describe(word)}: taken as {effort or 'the default'}")
        if request.enable_thinking and not self._tokenizer.has_reasoning:
            warnings = (*warnings, "thinking: no effect, the model does not reason")
        return replace(
            request,
            warnings=warnings,
            template_kwargs={**settings.variables, **explicit},
            enable_thinking=enabled,
            thinking_budget=settings.budget if budget is None else budget,
        )

    def _group_request(
        self,
        request: GenerationRequest,
        tokens: tuple[int, ...],
        images: Sequence[PromptImage],
        max_tokens: int | None,
        index: int,
    ) -> Request:
        try:
            return self._model.request(
                tokens,
                max_tokens,
                request.sampling_of(index),
                logprobs=request.logprobs,
                grammar=request.grammar,
                min_tokens=request.min_tokens,
                ignore_eos=request.ignore_eos,
                prompt_logprobs=prompt_alternatives(request),
                images=images,
            )
        except InputError as error:
            if error.field != "grammar":
                raise
            # Named as the client named it.
            raise RequestError(request.grammar_field, f"cannot be enforced: {error}") from error

    def _check_length(self, request: GenerationRequest, prompt: Prompt) -> None:
        """Refuse a prompt that cannot fit, without tokenizing all of it.

        The beginning of a text has about as many tokens as it has in the whole.
        """
        if request.is_chat and len(prompt) > self._max_messages:
            return
        if isinstance(prompt, str):
            text = prompt
        else:
            contents = [m.get("content") for m in prompt if isinstance(m, dict)]
            text = "\n".join(c for c in contents if isinstance(c, str))
        self._check_text(request, text)

    def _check_text(self, request: GenerationRequest, text: str) -> None:
        limit = self._served.context_length
        if limit is None:
            return
        length = CHARACTERS_PER_TOKEN * limit
        while length < len(text):
            tokens = len(self._tokenizer.encode(text[:length]))
            if tokens > limit + LENGTH_SLACK_TOKENS:
                reason = (
                    f"this model's maximum context length is {limit} tokens; the first {length:,} "
                    f"of {len(text):,} characters are {tokens} already"
                )
                raise RequestError(request.prompt_field, reason, "context_length_exceeded")
            length *= 2

    def _check_countable(self, text: str) -> None:
        """Refuse a chat that would keep the tokenizer from others for long."""
        limit = max(MAX_CHARACTERS, 2 * CHARACTERS_PER_TOKEN * (self._served.context_length or 0))
        if len(text) > limit:
            reason = f"expected at most {limit:,} characters, with tools, got {len(text):,}"
            raise RequestError("messages", reason, "context_length_exceeded")

    def _tokenize(
        self,
        request: GenerationRequest,
        prompt: Prompt,
        check_text: Callable[[str], None],
        add_generation_prompt: bool = True,
    ) -> tuple[tuple[int, ...], tuple[PromptImage, ...]]:
        """A prompt's tokens, and its images in their places."""
        if isinstance(prompt, str):
            # Not rendered as a chat, as `Model.request` would.
            return self._tokenizer.encode(prompt, add_special=request.add_special_tokens), ()
        if not request.is_chat:
            return self._model.tokens_of(prompt), ()
        self._check_chat(request, prompt)
        self._check_countable(_chat_json(request, prompt))  # rendering takes long, too
        messages: list[Message] = [m for m in prompt if isinstance(m, dict)]
        tools = request.tools
        if not self._tokenizer.renders_tools:
            form = self._tokenizer.call_form if request.forced_call is None else None
            example = form.example if form is not None else None
            described = structured_output.describe_tools_in_chat(messages, tools, example)
            messages, tools = described, ()
        continued = request.continue_final_message
        think = False if continued else request.enable_thinking
        places = self._image_places(request)
        tokens = self._tokenizer.render(
            messages,
            tools,
            request.template_kwargs,
            reasoning=think,
            continue_final_message=continued,
            add_generation_prompt=add_generation_prompt,
            check_text=check_text,
            edit_text=places.edit_text if places is not None else None,
        )
        placed: tuple[PromptImage, ...] = ()
        if places is not None:
            tokens, placed = places.expand(tokens)
        if request.grammar is None or request.may_call:
            return tokens, placed
        is_call = request.forced_call is not None
        return self._tokenizer.start_reasoning(tokens, think, is_call=is_call), placed

    def _image_places(self, request: GenerationRequest) -> ImagePlaces | None:
        settings = self._model.image_settings if request.images else None
        if settings is None:
            return None
        names = [
            self._tokenizer.token_text(token)
            for token in (settings.start_token, settings.image_token, settings.end_token)
        ]
        return ImagePlaces(request.images, settings.image_token, names, request.prompt_field)

    def _check_chat(self, request: GenerationRequest, prompt: Prompt) -> None:
        tokenizer = self._tokenizer
        if len(prompt) > self._max_messages:
            reason = f"expected at most {self._max_messages} messages, got {len(prompt)}"
            raise RequestError(request.prompt_field, reason)
        readable = tokenizer.renders_tools or tokenizer.call_form is not None
        if request.may_call and not (tokenizer.parses_tool_calls and readable):
            reason = (
                "not supported where the model decides, since the format of this model's calls is "
                "not known; force a call with tool_choice"
            )
            raise RequestError("tools", reason, UNSUPPORTED)

    def _output_parser(
        self, request: GenerationRequest, prompt_tokens: tuple[int, ...]
    ) -> OutputParser:
        if request.forced_call is not None and self._tokenizer.forces_harmony_calls:
            return self._tokenizer.forced_call_parser(request.tools)
        if request.forced_call is not None:
            return self._tokenizer.tool_call_parser(structured_output.parse_tool_calls)
        if request.is_chat and request.grammar is None:
            return self._tokenizer.chat_parser(
                request.stop, request.tools, prompt_tokens, parallel=request.parallel_tool_calls
            )
        return self._tokenizer.text_parser(request.stop)


def _with_images(request: GenerationRequest, images: Sequence[DecodedImage]) -> GenerationRequest:
    if request.image_sources and not images:
        raise ImagesWantedError(request.image_sources, request.prompt_field)
    return replace(request, images=tuple(images))


def _chat_json(request: GenerationRequest, prompt: Prompt) -> str:
    try:
        parts = [prompt, [tool.to_json() for tool in request.tools]]
        return json.dumps(parts, ensure_ascii=False)
    except RecursionError:
        reason = "expected arguments and schemas of a few hundred nested levels, got more"
        raise RequestError(request.prompt_field, reason) from None


def prompt_alternatives(request: GenerationRequest) -> int | None:
    """How many alternatives to report with each token of the prompts; None: nothing about them."""
    counts = [request.prompt_logprobs, request.logprobs if request.echo else None]
    return max((count for count in counts if count is not None), default=None)
