"""Decodes images in a process of its own.

Owns: the process, what is sent to it, how much work an image may need.
Does not know: formats.
Invariant: a file from a stranger costs one request at worst, never this process.
Next: `decode_worker.py` is the process.
"""

from __future__ import annotations

import base64
import contextlib
import threading
from dataclasses import dataclass

from ..core.image import pixel_digest
from ..errors import InputError
from ..worker_process import WorkerFailed, WorkerProcess, work_again_if_killed

CPU_S, MEMORY_BYTES = 20, 2 << 30


@dataclass(frozen=True)
class DecodedImage:
    """An image of the size that a model takes.

    Args:
        rows, columns: of its tokens.
        pixels: RGB, a byte each, row by row.
        digest: see `pixel_digest`.
    """

    rows: int
    columns: int
    pixels: bytes
    digest: str


class DecodeProcess:
    """Safe for several threads, which wait for each other.

    Args:
        side: pixels of a token's side.
        min_pixels, max_pixels: of an image.
        enlarges: see `decode_worker.fit_size`.
    """

    def __init__(
        self, side: int, min_pixels: int, max_pixels: int, *, enlarges: bool = False
    ) -> None:
        self._side, self._min_pixels, self._max_pixels, self._enlarges = (
            side,
            min_pixels,
            max_pixels,
            enlarges,
        )
        self._worker = WorkerProcess("cenacle.images.decode_worker")
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the process, which takes a moment; else the first image waits for it."""
        with self._lock, contextlib.suppress(OSError):  # then the first image tells
            self._worker.start()

    def decode(self, data: bytes) -> DecodedImage:
        """What a file shows.

        Raises:
            InputError: it is no image, or needs too much; the end of a sentence.
        """
        message = {
            "image": base64.b64encode(data).decode(),
            **{"side": self._side, "min_pixels": self._min_pixels, "max_pixels": self._max_pixels},
            "enlarges": self._enlarges,
            **{"cpu_s": CPU_S, "memory_bytes": MEMORY_BYTES},
        }
        with self._lock:
            try:
                answer = work_again_if_killed(lambda: self._worker.ask(message))
            except WorkerFailed:
                raise InputError(
                    f"decoding it needs more than {CPU_S} s or {MEMORY_BYTES >> 30} GB; send a "
                    "simpler one",
                    "images",
                ) from None
        if "error" in answer:
            raise InputError(answer["error"], "images")
        width, height = answer["width"], answer["height"]
        pixels = base64.b64decode(answer["pixels"])
        digest = pixel_digest(width, height, pixels)
        return DecodedImage(height // self._side, width // self._side, pixels, digest)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._worker.close()
