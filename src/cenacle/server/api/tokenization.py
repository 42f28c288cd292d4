"""From text to tokens and back, as vLLM's and llama.cpp's servers have it.

Owns: the bodies of POST /tokenize and /detokenize.
Does not know: tokenizers, HTTP.
Invariant: a chat has the tokens that a chat completion of the same body has.
Source: https://docs.vllm.ai (tokenizer API), llama.cpp's tools/server/README.md
Next: `preparation.py` tokenizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from .openai import ChatCompletionRequest
from .protocol import ApiRequest, GenerationRequest, ServedModel
from .validation import (
    MISSING,
    Items,
    JsonObject,
    RequestModel,
    Text,
    fail,
    refuse,
    validate,
)

# More than any context takes; the response must not occupy the server for long.
MAX_CHARACTERS, MAX_TOKENS = 1_000_000, 500_000

# Of a chat completion; they decide its tokens.
_CHAT_PARAMETERS = ("messages", "tools", "tool_choice", "chat_template_kwargs", "reasoning_effort")


class TokenizeRequest(ApiRequest):
    """The body of POST /tokenize: `prompt` (vLLM), `content` (llama.cpp) or a chat."""

    unsupported = refuse("chat_template", parse_special=(True,))
    prompt: Text | None = Field(None, description="A text.")
    content: Text | None = Field(None, description="A text, as llama.cpp names it.")
    messages: Any = Field(None, description="A chat; see /v1/chat/completions.")
    tools: Any = Field(None, description="Of the chat.")
    tool_choice: Any = Field(None, description="Of the chat.")
    chat_template_kwargs: Any = Field(None, description="Of the chat.")
    reasoning_effort: Any = Field(None, description="Of the chat.")
    add_special_tokens: bool | None = Field(
        None, description="Whether to begin with the tokenizer's first token; default: with prompt."
    )
    add_special: bool = Field(False, description="Same as add_special_tokens, for content.")
    add_generation_prompt: bool = Field(True, description="End where the assistant begins.")
    continue_final_message: bool = Field(False, description="End inside the last message.")
    return_token_strs: bool = Field(
        False, description="Also the tokens as the vocabulary has them."
    )
    with_pieces: bool = Field(False, description="Each token with its text.")

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        present = [n for n in ("prompt", "content", "messages") if getattr(self, n) is not None]
        if len(present) > 1:
            fail(f"expected it or {present[0]}, got both", present[1])
        if self.text is not None and len(self.text) > MAX_CHARACTERS:
            got = f"got {len(self.text)}; send it in parts"
            fail(f"expected at most {MAX_CHARACTERS} characters, {got}", present[0])
        if not present:
            fail("required, but missing", "prompt", MISSING)
        if self.continue_final_message and self.add_generation_prompt:
            fail("expected false with continue_final_message", "add_generation_prompt")
        return self

    @property
    def text(self) -> str | None:
        """The text; None: it is a chat."""
        return self.prompt if self.content is None else self.content

    @property
    def adds_special_tokens(self) -> bool:
        """Whether it begins with the tokenizer's first token, beside what a chat template adds."""
        if self.add_special_tokens is not None:
            return self.add_special_tokens
        return self.prompt is not None or self.add_special

    def to_generation_request(self, served: ServedModel) -> GenerationRequest:
        """The chat completion whose prompt is tokenized."""
        chat = {name: getattr(self, name) for name in _CHAT_PARAMETERS}
        request = validate(ChatCompletionRequest, chat).to_generation_request(served)
        request = request.take_images(served)
        return replace(request, continue_final_message=self.continue_final_message)

    def response(
        self,
        tokens: Sequence[int],
        pieces: Sequence[bytes],
        names: Sequence[str],
        length: int | None,
    ) -> JsonObject:
        """The body of the response.

        Args:
            tokens: ids.
            pieces: their bytes.
            names: of them in the vocabulary.
            length: of the model's context.
        """
        items: list[Any] = list(tokens)
        if self.with_pieces:
            ids = zip(tokens, pieces, strict=True)
            items = [{"id": token, "piece": _piece(data)} for token, data in ids]
        strings = list(names) if self.return_token_strs else None
        counts = {"count": len(tokens), "max_model_len": length}
        return {**counts, "tokens": items, "token_strs": strings}


def _piece(data: bytes) -> str | list[int]:
    """The text of a token, or its bytes if they are part of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


class DetokenizeRequest(RequestModel):
    """The body of POST /detokenize."""

    model: Text | None = Field(None, description="The served model, which is also the default.")
    tokens: Annotated[Items[int], Field(max_length=MAX_TOKENS)] = Field(description="Token ids.")
