"""Rendering and tokenizing by what a checkpoint brings: programs from a stranger.

Owns: loading them, and running them with limits, here or in a process of their own.
Does not know: what a chat template means, messages.
Invariant: what takes too long or too much memory raises an error. In this process only Python code
can be ended, and memory has no limit; `isolate` is for servers.
Next: `text_process.py`; `tokenizer.py` gives chats to it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

from .. import deferred_transformers
from ..core.chat import Message
from ..errors import CheckpointError, InputError
from . import tiktoken_files
from .text_process import CPU_S, TextProcess
from .time_limit import LimitReached, time_limit

MAX_TOKENIZER_BYTES = 256 << 20  # the largest known has 33 MB
MAX_TEMPLATE_BYTES = 1 << 20
MAX_ADDED_TOKENS = 70_000  # transformers takes 0.2 ms for each
LIMITS = f"{CPU_S} s or 2 GB"
_ADDED_TOKEN_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
_ADDED_TOKEN_KEYS = (
    "added_tokens",
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
)
_SAMPLE = "Hello, world! 1234  \n\t\u00e4\u4f60\U0001f642 x=y;"


def load_limited(folder: Path, stop_tokens: Any) -> Any:
    """The tokenizer of a checkpoint, as mlx-lm loads it.

    Args:
        stop_tokens: ids that end an output; None: as the checkpoint says.

    Raises:
        CheckpointError: there is no tokenizer, or it cannot be loaded.
    """
    from mlx_lm.utils import load_tokenizer

    deferred_transformers.load()
    for pattern, limit in (("tokenizer*", MAX_TOKENIZER_BYTES), ("*.jinja", MAX_TEMPLATE_BYTES)):
        for file in folder.glob(pattern):
            try:
                size = file.stat().st_size
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
            if size > limit:
                raise CheckpointError(f"{file}: expected at most {limit:,} bytes, got {size:,}")
    _check_added_tokens(folder)
    if tiktoken_files.is_tiktoken(folder):
        folder = tiktoken_files.prepare_folder(folder)
    try:
        # Else transformers asks on the terminal whether to run a checkpoint's Python code.
        return load_tokenizer(folder, {"trust_remote_code": False}, eos_token_ids=stop_tokens)
    except BaseException as error:  # transformers raises many classes
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{folder}: its tokenizer needs Python code from the checkpoint, which Cenacle "
                "does not run: such code has all your permissions. Use a checkpoint with a "
                "tokenizer.json"
            ) from error
        reason = str(error).strip() or repr(error)
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {reason:.300}") from error


def _check_added_tokens(folder: Path) -> None:
    for name in _ADDED_TOKEN_FILES:
        file = folder / name
        if not file.is_file() or file.stat().st_size < MAX_ADDED_TOKENS * 10:
            continue
        try:
            if file.stat().st_size > MAX_TOKENIZER_BYTES:
                raise ValueError(f"{file.stat().st_size:,} bytes")
            members = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: expected JSON, got {error!r:.200}") from error
        if not isinstance(members, dict):
            raise CheckpointError(f"{file}: expected a JSON object")
        lists = [members] if name == "added_tokens.json" else map(members.get, _ADDED_TOKEN_KEYS)
        count = max((len(v) for v in lists if isinstance(v, list | dict)), default=0)
        if count > MAX_ADDED_TOKENS:
            raise CheckpointError(
                f"{file}: expected at most {MAX_ADDED_TOKENS:,} added tokens, got {count:,}; "
                f"move the vocabulary into the tokenizer's model"
            )


class TextBackend:
    """Renders chats and tokenizes.

    Args:
        tokenizer: mlx-lm's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._process: TextProcess | None = None
        self._started: TextProcess | None = None  # not used before `isolate`
        self._encodes_there = False

    def start_process(self) -> None:
        """Start the process of `isolate`, which may follow later."""
        self._started = self._make_process()
        self._started.start()

    def isolate(self) -> None:
        """From now on do it in a process of its own, where a template or a tokenizer that needs too
        much time or memory costs one request. Tokenizers in Python, and templates that are Python
        of mlx-lm's, stay here.

        Raises:
            CheckpointError: a short text needs too much.
        """
        inner = self._tokenizer._tokenizer
        self._process = self._started or self._make_process()
        try:
            if getattr(inner, "backend_tokenizer", None) is not None:
                self._encodes_there = True
                ids = self.encode(_SAMPLE, special=True)
                self._encodes_there = ids == self._encode_here(_SAMPLE, special=True)
            if inner.chat_template is not None:
                with contextlib.suppress(Exception):  # it may refuse so short a chat
                    self.render([{"role": "user", "content": _SAMPLE}])
        except (LimitReached, InputError) as error:
            self.close()
            reason = str(error) or f"they need more than {LIMITS}"
            raise CheckpointError(
                "the model's tokenizer and chat template: expected them to render a short message, "
                f"but: {reason}; use another copy of the model"
            ) from None

    def _make_process(self) -> TextProcess:
        backend = copy(getattr(self._tokenizer._tokenizer, "backend_tokenizer", None))
        if backend is None:
            return TextProcess(None)
        backend.no_padding()
        backend.no_truncation()
        return TextProcess(backend.to_str())

    def close(self) -> None:
        """End the process; it would be started again."""
        for process in (self._process, self._started):
            if process is not None:
                process.close()

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """A chat as text.

        Args:
            variables: of the template, and options of transformers' `apply_chat_template`.

        Raises:
            LimitReached: it takes too long, or too much memory.
            Exception: the template refuses the messages; templates are programs and raise anything.
        """
        variables["add_generation_prompt"] = add_generation_prompt
        if self._process is None or not self._has_jinja_template:
            with time_limit(CPU_S):
                text = self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, **variables
                )
            return str(text)
        inner = self._tokenizer._tokenizer
        conversation = [{k: v for k, v in m.items() if v is not None} for m in messages]
        return self._process.render(
            {
                **inner.special_tokens_map,
                "enable_thinking": self._tokenizer.has_thinking,
                **variables,
                "conversations": [conversation],
                "chat_template": inner.get_chat_template(None, variables.get("tools")),
            }
        )

    @property
    def _has_jinja_template(self) -> bool:
        from transformers import PreTrainedTokenizerBase

        method = type(self._tokenizer._tokenizer).apply_chat_template
        is_inherited = method is PreTrainedTokenizerBase.apply_chat_template
        return is_inherited and self._tokenizer._chat_template is None

    def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        """Text to ids; `special`: with the tokens that the tokenizer adds.

        Raises:
            InputError: the tokenizer fails, or needs too much for this text.
        """
        try:
            if self._process is not None and self._encodes_there:
                return self._process.encode(text, special=special)
            return self._encode_here(text, special=special)
        except LimitReached:
            reason = f"the model's tokenizer needs more than {LIMITS} for it; send less"
        except BaseException as error:
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            reason = f"the model's tokenizer fails: {str(error)[:200]}"
        raise InputError(f"prompt: {reason}", "prompt")

    def _encode_here(self, text: str, *, special: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=special, verbose=False))


def _is_panic(error: BaseException) -> bool:
    """Whether it is of the tokenizers library, whose panics are no `Exception`."""
    return type(error).__name__ == "PanicException"
