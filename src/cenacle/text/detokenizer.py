"""Tokens to text, as bytes that are joined.

Owns: the bytes of each token; `Detokenizer`, which decodes them as they come.
Does not know: stop strings, markers, models.
Invariant: the pieces of a `Detokenizer`, joined, are the joined bytes of its tokens, decoded as
UTF-8; no byte is dropped, also not a first space (mlx-lm's detokenizers drop it, and turn NUL into
another letter).
Next: `output_parser.py` splits the text.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from typing import Any

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_Step = Callable[[str], str | bytes]


def byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones are themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + at): b for at, b in enumerate(others)}


_BYTE_OF = byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[letter] for letter in token)
    except KeyError:
        return token.encode()  # an added token


def _byte_fallback(token: str) -> str | bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token


def _replace(old: str, new: str) -> _Step:
    return lambda token: token.replace(old, new)


def _steps_of(decoder: dict[str, Any] | None) -> list[_Step] | None:
    """What a decoder of `tokenizers` does to each token but the first; None: not known."""
    kind = (decoder or {}).get("type")
    if decoder is None or kind is None:
        return None
    if kind == "Sequence":
        steps: list[_Step] = []
        fused = False
        for inner in decoder["decoders"]:
            if inner["type"] == "Fuse":
                fused = True
            elif fused and inner["type"] == "Strip":
                continue  # of the first token
            elif fused or (found := _steps_of(inner)) is None:
                return None
            else:
                steps += found
        return steps
    if kind == "Replace" and "String" in decoder["pattern"]:
        return [_replace(decoder["pattern"]["String"], decoder["content"])]
    if kind == "Metaspace":
        return [_replace(decoder["replacement"], " ")]
    known: dict[str, list[_Step]] = {"ByteLevel": [_byte_level], "ByteFallback": [_byte_fallback]}
    return known.get(kind)


class TokenBytes:
    """The bytes of each token, inside a text.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[int, bytes] = {}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
        self._steps = _steps_of(decoder)
        # A token before it, since decoders treat the first one in its own way.
        self._context = list(tokenizer.encode("a", add_special_tokens=False))[-1:]
        self._context_text = tokenizer.decode(self._context)
        if self._steps is not None and not self._decodes_alike():
            self._steps = None

    def __getitem__(self, token: int) -> bytes:
        """Its bytes; none for an id that the tokenizer does not have."""
        data = self._cache.get(token)
        if data is None:
            data = self._cache[token] = self._read(token)
        return data

    def _decodes_alike(self) -> bool:
        """Whether the tokenizer's own decoding gives the same."""
        probe = self._tokenizer.encode("a b\nc  d, e.\tÄ中\U0001f600", add_special_tokens=False)
        joined = b"".join(self._read(token) for token in [*self._context, *probe])
        decoded = self._tokenizer.decode([*self._context, *probe])
        return bool(joined.decode(errors="replace").lstrip(" ") == decoded.lstrip(" "))

    def _read(self, token: int) -> bytes:
        name = self._name_of(token)
        if name is None:
            return b""
        if self._steps is None:
            return self._difference(token, name)
        text: str | bytes = name
        for step in self._steps:
            if isinstance(text, bytes):
                break
            text = step(text)
        return text.encode() if isinstance(text, str) else text

    def _name_of(self, token: int) -> str | None:
        try:
            return self._tokenizer.convert_ids_to_tokens(token)
        except (IndexError, KeyError, OverflowError, TypeError, ValueError):
            return None

    def _difference(self, token: int, name: str | bytes) -> bytes:
        """What it adds to a text, for decoders of other kinds."""
        if isinstance(name, bytes):
            return name
        if isinstance(data := _byte_fallback(name), bytes):
            return data
        text = self._tokenizer.decode([*self._context, token])
        text = text.removeprefix(self._context_text)
        if "\ufffd" in text and all(letter in _BYTE_OF for letter in name):
            return _byte_level(name)
        return str(text).encode(errors="replace")


class Detokenizer:
    """The tokens of one output to text.

    Args:
        token_bytes: of the tokenizer.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that is complete with this token; may be empty."""
        return self._decoder.decode(self._token_bytes[token])

    def finish(self) -> str:
        """The rest: a character that was never completed."""
        return self._decoder.decode(b"", final=True)
