"""Prompts with images: pixels on rank 0, features and positions on every rank.

Owns: the pixels that were sent for requests; the passes of prompts that have images.
Does not know: steps, batches, formats of files.
Invariant: every rank calls `process` with the same arguments in the same order, and gets the same
features to the bit: rank 0 makes them, and a sum shares them.
Next: `model/vision.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream

from ..collective.base import Collective
from ..core.image import PromptImage, position_shift
from ..core.request import Request
from ..errors import ClusterError
from ..model import position_caches
from ..model.vision import ImageEmbedder, ImageModel


class PromptVision:
    """Processes prompts with images, for a batch.

    Args:
        embedder: with the tower on rank 0.
        model: this rank's.
        collective: of the ranks.
    """

    def __init__(self, embedder: ImageEmbedder, model: ImageModel, collective: Collective) -> None:
        self._embedder, self._model, self._collective = embedder, model, collective
        self._pixels: dict[str, dict[int, bytes]] = {}

    def add(self, request_id: str, index: int, pixels: bytes) -> None:
        """Keep the pixels of a request's image until they are embedded; on rank 0."""
        self._pixels.setdefault(request_id, {})[index] = pixels

    def forget(self, request_id: str) -> None:
        """Drop what is left of a request's pixels; unknown ids are ignored."""
        self._pixels.pop(request_id, None)

    def process(
        self,
        request: Request,
        begin: int,
        end: int,
        caches: list[Any],
        features: dict[int, mx.array],
    ) -> mx.array:
        """Logits [1, length, vocabulary] of a part of a prompt.

        Args:
            request: with or without images.
            begin, end: of the part.
            caches: of the tokens before.
            features: of the request's images, by their index; those that the part needs are added,
                those that no later part needs are removed.

        Raises:
            ClusterError: an image was not sent, or has another size.
        """
        images = request.images
        tokens = request.tokens[begin:end]
        needed = [i for i, m in enumerate(images) if m.end > begin and m.begin < end]
        for index in needed:
            if index not in features:
                features[index] = self._share(request.id, index, images[index])
        if needed:
            known = [(images[i], features[i]) for i in needed]
            before = [(m, mx.zeros((0, 1))) for m in images[: needed[0]]]
            logits = self._model(tokens, begin, [*before, *known], caches)
        else:
            position_caches.set_shift(caches, position_shift(images, begin))
            logits = self._model.model(mx.array([tokens]), cache=caches)
        for index in needed:
            if images[index].end <= end:
                del features[index]
        if all(image.end <= end for image in images):
            self.forget(request.id)
        return logits

    def _share(self, request_id: str, index: int, image: PromptImage) -> mx.array:
        """An image's features, on every rank."""
        # What is in progress comes first on every rank, so that all-reduces stay in order.
        mx.synchronize(generation_stream)
        if self._embedder.tower is not None:
            pixels = self._pixels.get(request_id, {}).pop(index, None)
            if pixels is None or len(pixels) != self._pixel_bytes(image):
                raise ClusterError(
                    f"image {index} of a request: expected {self._pixel_bytes(image)} bytes of "
                    f"pixels, got {None if pixels is None else len(pixels)}"
                )
            features = self._embedder.embed(replace(image, pixels=pixels))
        else:
            features = mx.zeros(self._embedder.shape(image))
        mx.eval(features)
        features = self._collective.broadcast_from(0, features)
        mx.eval(features)
        self._collective.raise_if_failed()
        return features

    def _pixel_bytes(self, image: PromptImage) -> int:
        return 3 * image.tokens * self._embedder.settings.token_side**2
