"""From the URIs of a request's images to their pixels.

Owns: when images are fetched and decoded, and how many a request may have.
Does not know: HTTP, APIs, models.
Invariant: nothing is fetched or decoded in the event loop or in the tokenizer's thread; keys take
turns at decoding. A bad image is one sentence, and nothing of it is kept.
Next: `images/`; `preparation.py` puts the images into the prompt.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from ..errors import InputError
from ..images.decode_process import DecodedImage, DecodeProcess
from ..images.fetch import MAX_THREADS, ImageFetcher
from ..images.sources import is_remote, read_data_uri
from ..model.image_settings import ImageSettings
from .api.validation import RequestError
from .preparation_queue import PreparationQueue

MAX_REQUEST_PIXELS = 16_000_000  # of all images of a request, as the model sees them
KEPT_BYTES = 64_000_000  # of images that were decoded last: a chat sends them again and again


class ImageLoader:
    """Loads the images of requests; of an event loop.

    Args:
        settings: of the model.
        fetcher: of images that are elsewhere.
    """

    def __init__(self, settings: ImageSettings, fetcher: ImageFetcher) -> None:
        self._process = DecodeProcess(
            settings.token_side,
            settings.min_pixels,
            settings.max_pixels,
            enlarges=settings.enlarges,
        )
        self._process.start()
        self._fetcher, self._decodes = fetcher, PreparationQueue()
        self._fetches = ThreadPoolExecutor(MAX_THREADS, "images")
        self._kept: OrderedDict[tuple[str, str], DecodedImage] = OrderedDict()
        self._kept_bytes = 0

    async def load(
        self, sources: tuple[str, ...], key: str, field: str
    ) -> tuple[DecodedImage, ...]:
        """The images at checked URIs.

        Args:
            key: whose turn it is.
            field: the parameter of the request that has them.

        Raises:
            RequestError: one is bad, or together they are too large; names it.
        """
        images: list[DecodedImage] = []
        pixels = 0
        for number, source in enumerate(sources, 1):
            try:
                image = await self._load(source, key)
            except (InputError, ValueError) as error:
                raise RequestError(field, f"image {number} of {len(sources)}: {error}") from None
            images.append(image)
            pixels += len(image.pixels) // 3
            if pixels > MAX_REQUEST_PIXELS:
                raise RequestError(
                    field,
                    f"image {number} of {len(sources)}: expected at most "
                    f"{MAX_REQUEST_PIXELS // 1_000_000} million pixels in all images, got more; "
                    "send fewer or smaller ones",
                )
        return tuple(images)

    async def _load(self, source: str, key: str) -> DecodedImage:
        if is_remote(source):
            loop = asyncio.get_running_loop()
            data = await loop.run_in_executor(self._fetches, self._fetcher.fetch, source)
            return await self._decodes.run(key, self._decode, key, data)
        return await self._decodes.run(key, self._decode_uri, key, source)

    def _decode_uri(self, key: str, source: str) -> DecodedImage:
        return self._decode(key, read_data_uri(source))

    def _decode(self, key: str, data: bytes) -> DecodedImage:
        """In the thread of the decodes. Kept for a key: how long it takes tells of what is kept."""
        name = key, hashlib.sha256(data).hexdigest()
        image = self._kept.pop(name, None)
        if image is None:
            image = self._process.decode(data)
            self._kept_bytes += len(image.pixels)
        self._kept[name] = image
        while self._kept_bytes > KEPT_BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= len(oldest.pixels)
        return image

    def close(self) -> None:
        """End the threads and the process."""
        self._decodes.close()
        self._fetches.shutdown(wait=False, cancel_futures=True)
        self._process.close()
