"""Images in a rendered chat: placeholders in its text and its ids.

Owns: messages with parts, as OpenAI's API has them, for a chat template that renders text; where
the tokens of images are.
Does not know: the tokenizer, how images were decoded.
Invariant: every image of the messages is in the prompt once.
Next: `server/preparation.py` and `api.py` use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.chat import Message
from ..core.image import PromptImage
from ..errors import InputError
from .decode_process import DecodedImage
from .sources import check_source, mark, replace_marks


def mark_parts(messages: Sequence[Message]) -> list[Message]:
    """Messages whose contents are texts, with marks for images.

    Args:
        messages: contents are texts or lists of parts, "text" and "image_url".

    Raises:
        InputError: a part of another kind, or an image that is none.
    """
    marked: list[Message] = []
    for at, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, list):
            marked.append(message)
            continue
        texts = []
        for index, part in enumerate(content):
            field = f"messages[{at}].content[{index}]"
            texts.append(_part_text(part, field))
        marked.append({**message, "content": "".join(texts)})
    return marked


def _part_text(part: Any, field: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    address = part.get("image_url") if kind == "image_url" else None
    url = address.get("url") if isinstance(address, dict) else address
    if not isinstance(url, str):
        raise InputError(
            f"{field}: expected a text or an image, such as {{'type': 'image_url', 'image_url': "
            f"{{'url': 'data:image/png;base64,...'}}}}, got {part!r:.80}",
            field,
        )
    try:
        return mark(check_source(url))
    except ValueError as error:
        raise InputError(f"{field}: {error}", field) from None


class ImagePlaces:
    """Puts images into a chat: placeholders into its text, and as many as there are into its ids.

    Args:
        images: by the numbers of their marks.
        token: id of the placeholder.
        names: of the tokens before it, of it, and behind it.
        field: the parameter that has the chat.
    """

    def __init__(
        self, images: Sequence[DecodedImage], token: int, names: Sequence[str], field: str
    ) -> None:
        self._images, self._token, self._names, self._field = images, token, names, field
        self._order: list[int] = []

    def edit_text(self, text: str) -> str:
        """The chat's text with placeholders in the place of marks.

        Raises:
            InputError: the template has lost or repeated an image.
        """
        text, self._order = replace_marks(text, "".join(self._names))
        if sorted(self._order) != list(range(len(self._images))):
            raise InputError(
                f"{self._field}: the model's chat template shows {len(set(self._order))} of its "
                f"{len(self._images)} images; put all images into user messages",
                self._field,
            )
        return text

    def expand(self, tokens: Sequence[int]) -> tuple[tuple[int, ...], tuple[PromptImage, ...]]:
        """The chat's ids with a placeholder for each token of an image, and where they are.

        Raises:
            InputError: a text has placeholders of its own.
        """
        expanded: list[int] = []
        placed: list[PromptImage] = []
        if tokens.count(self._token) != len(self._order):
            raise InputError(
                f"{self._field}: a text contains {self._names[1]}, which the model takes for an "
                f"image; remove it or write it differently",
                self._field,
            )
        rest = iter(self._order)
        for token in tokens:
            if token != self._token:
                expanded.append(token)
                continue
            image = self._images[next(rest)]
            place = PromptImage(
                len(expanded), image.rows, image.columns, image.digest, image.pixels
            )
            placed.append(place)
            expanded += [token] * place.tokens
        return tuple(expanded), tuple(placed)
