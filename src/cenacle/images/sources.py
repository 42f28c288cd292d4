"""Where the images of a conversation are: in it, or at an address.

Owns: checks of data and http URIs; marks that stand for images in texts, so that all that joins and
orders texts does so with images.
Does not know: APIs, formats of images, the network.
Invariant: nobody outside of this process can write a mark: it has random digits that are never
shown.
Next: `fetch.py` gets what is elsewhere; `decode_process.py` decodes.
"""

from __future__ import annotations

import base64
import binascii
import re
import secrets
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

from ..errors import InputError

MAX_IMAGES = 64  # of one request
MAX_FILE_BYTES = 20_000_000  # of an image
MAX_URL_CHARACTERS = 4096

_SECRET = secrets.token_hex(16)
_BEGIN, _END = f"\ue000{_SECRET}:", "\ue001"
_MARK = re.compile(f"{_BEGIN}([^{_END}]*){_END}")
_DATA_URI = re.compile(
    r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+-]*)*)(;base64)?,", re.ASCII | re.IGNORECASE
)


def check_source(url: str) -> str:
    """An image's URI, without what is around it.

    Raises:
        ValueError: it is none that can name an image; says what was expected.
    """
    url = url.strip()
    if _END in url:
        raise ValueError("expected a URI, got a character for private use")
    scheme = url[:16].partition(":")[0].lower()
    if scheme in ("http", "https"):
        if len(url) > MAX_URL_CHARACTERS:
            raise ValueError(f"expected at most {MAX_URL_CHARACTERS} characters, got {len(url)}")
        return url
    if scheme != "data":
        got = repr(url[:40]) if url else "an empty string"
        raise ValueError(f"expected a data: URI of an image, or an http(s) URL, got {got}")
    match = _DATA_URI.match(url[:1000])
    if match is None:
        raise ValueError(
            f"expected data:image/png;base64,..., got {url[:40]!r}: the data: URI has no comma or "
            "no media type"
        )
    if match[1] is not None and not match[1].lower().startswith(("image/", "application/octet")):
        raise ValueError(f"expected an image, got data of type {match[1][:60]}")
    if not _decode_data(url):
        raise ValueError("expected an image, got a data: URI without data")
    return url


def is_remote(url: str) -> bool:
    """Whether a checked URI is of something elsewhere."""
    return not url[:5].lower().startswith("data:")


def read_data_uri(url: str) -> bytes:
    """The bytes of a checked data: URI."""
    return _decode_data(url)


def _decode_data(url: str) -> bytes:
    head, _, text = url.partition(",")
    if not head.lower().endswith(";base64"):
        data = unquote_to_bytes(text)
    else:
        is_wrapped = any(space in text for space in " \t\r\n")
        compact = "".join(text.split()) if is_wrapped else text
        if "%" in compact:
            compact = unquote_to_bytes(compact).decode("ascii", "replace")
        compact = compact.replace("-", "+").replace("_", "/").rstrip("=")
        try:
            data = base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("expected base64 behind the comma, got other characters") from None
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(
            f"expected an image of at most {MAX_FILE_BYTES:,} bytes, got {len(data):,}"
        )
    return data


def mark(source: str) -> str:
    """A text that stands for an image; the source is checked, or a number."""
    return f"{_BEGIN}{source}{_END}"


def take_sources(messages: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """The messages with short marks, and the URIs of their images by the numbers of these.

    Raises:
        InputError: there are too many.
    """
    sources: list[str] = []

    def number(match: re.Match[str]) -> str:
        sources.append(match[1])
        return mark(str(len(sources) - 1))

    changed: list[Any] = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str) and _SECRET in content:
            message = {**message, "content": _MARK.sub(number, content)}
        changed.append(message)
    if len(sources) > MAX_IMAGES:
        reason = f"expected at most {MAX_IMAGES} images, got {len(sources)}; remove older ones"
        raise InputError(f"images: {reason}", "images")
    return tuple(changed), tuple(sources)


def replace_marks(text: str, placeholder: str) -> tuple[str, list[int]]:
    """A rendered chat with placeholders for images, and the numbers of these in its order."""
    numbers = [int(number) for number in _MARK.findall(text)]
    return _MARK.sub(lambda _: placeholder, text), numbers
