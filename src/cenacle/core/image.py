"""Images in prompts: where their tokens are, and which positions these have.

Owns: `PromptImage` and the positions of a prompt with images; plain data and arithmetic.
Does not know: files, formats, MLX.
Invariant: two images with different pixels have different tokens in `cache_tokens`, so that no
cache of one is taken for the other's.
Next: `request.py`; `model/vision.py` embeds the pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

IMAGE_TOKEN_BIT = 1 << 31  # no id of a vocabulary has it
MIN_SHARED_TOKENS = 4  # fewer say too little about which image it is
_WORD_BYTES = 4


@dataclass(frozen=True)
class PromptImage:
    """An image whose tokens are a part of a prompt.

    Args:
        begin: position of its first token.
        rows, columns: of its tokens.
        digest: SHA-256 of size and pixels, in hexadecimal.
        pixels: RGB, a byte each, row by row; a token is a square of them. Empty where nobody
            embeds them.
    """

    begin: int
    rows: int
    columns: int
    digest: str
    pixels: bytes = b""

    @property
    def tokens(self) -> int:
        """Number of its tokens."""
        return self.rows * self.columns

    @property
    def end(self) -> int:
        """Position behind its last token."""
        return self.begin + self.tokens

    @property
    def extent(self) -> int:
        """By how much the positions behind it are further than those before it."""
        return max(self.rows, self.columns)

    def to_json(self) -> list[Any]:
        """All but the pixels."""
        return [self.begin, self.rows, self.columns, self.digest]


def pixel_digest(width: int, height: int, pixels: bytes) -> str:
    """The digest of an image."""
    return hashlib.sha256(b"%d %d " % (width, height) + pixels).hexdigest()


def position_shift(images: Sequence[PromptImage], position: int) -> int:
    """What to add to a position outside of images for rotary embedding; at most 0."""
    return sum(i.extent - i.tokens for i in images if i.end <= position)


def rotary_positions(
    images: Sequence[PromptImage], begin: int, end: int
) -> tuple[list[int], list[int], list[int]]:
    """Time, row and column of the tokens [begin, end) of a prompt, for rotary embedding.

    Args:
        images: of the prompt, in order.
    """
    times: list[int] = []
    rows: list[int] = []
    columns: list[int] = []
    for time, row, column in _positions(images, begin, end):
        times.append(time)
        rows.append(row)
        columns.append(column)
    return times, rows, columns


def _positions(
    images: Sequence[PromptImage], begin: int, end: int
) -> Iterator[tuple[int, int, int]]:
    inside = {p: i for i in images for p in range(max(begin, i.begin), min(end, i.end))}
    for position in range(begin, end):
        image = inside.get(position)
        if image is None:
            at = position + position_shift(images, position)
            yield at, at, at
            continue
        first = image.begin + position_shift(images, image.begin)
        row, column = divmod(position - image.begin, image.columns)
        yield first, first + row, first + column


def cache_tokens(
    tokens: Sequence[int], images: Sequence[PromptImage], request_id: str
) -> tuple[int, ...]:
    """The tokens of a prompt with others in the place of its images' that tell what these show.

    Args:
        request_id: whose prompt; images of fewer than `MIN_SHARED_TOKENS` are its own.
    """
    if not images:
        return tuple(tokens)
    marked = list(tokens)
    for image in images:
        name = image.digest if image.tokens >= MIN_SHARED_TOKENS else request_id
        stream = hashlib.shake_256(f"{name} {image.rows} {image.columns}".encode())
        data = stream.digest(_WORD_BYTES * image.tokens)
        marked[image.begin : image.end] = (
            int.from_bytes(data[i : i + _WORD_BYTES], "little") | IMAGE_TOKEN_BIT
            for i in range(0, len(data), _WORD_BYTES)
        )
    return tuple(marked)
