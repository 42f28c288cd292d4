"""The program that decodes images for another process, with limits.

Owns: from a file's bytes to pixels of the size that a model takes.
Does not know: models, requests.
Invariant: whatever a file is, at worst this process ends. A picture is upright, in RGB, on white
where it is transparent, of its first frame where it moves.
Next: `decode_process.py` starts it.
"""

from __future__ import annotations

import base64
import io
import math
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..worker_process import lift_limits, limit_work, serve

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
Image.MAX_IMAGE_PIXELS = None  # this is checked instead, for a sentence of our own:
MAX_PIXELS = 64_000_000  # of a file: with all that decoding takes, half a gigabyte
MAX_SIDE_RATIO = 200
_ORIENTATION = 0x0112  # the tag of EXIF
_WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class BadImageError(Exception):
    """A file that is not decoded; the end of a sentence."""


def decode(data: bytes) -> Image.Image:
    """The picture of a file, in RGB.

    Raises:
        BadImageError: it is none, or too large.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise BadImageError(_unknown_format(data)) from None
    except Exception as error:  # decoders raise what their code happens to raise
        raise BadImageError(f"the file cannot be read: {_describe(error)}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImageError(
            f"expected at most {MAX_PIXELS // 1_000_000} million pixels, got {width} x {height}; "
            "send a smaller one"
        )
    if max(width, height) > MAX_SIDE_RATIO * max(1, min(width, height)):
        raise BadImageError(
            f"expected sides of at most 1 to {MAX_SIDE_RATIO}, got {width} x {height} pixels"
        )
    try:
        image.load()
        return _to_rgb(_upright(image))
    except MemoryError:
        raise BadImageError("it needs too much memory; send a smaller one") from None
    except Exception as error:
        raise BadImageError(f"the file is damaged: {_describe(error)}") from error


def _unknown_format(data: bytes) -> str:
    start = data[:300].lstrip().lower()
    kind = "another file"
    if start.startswith((b"<svg", b"<?xml")):
        kind = "a drawing (SVG)"
    elif start.startswith((b"<!doctype", b"<html")):
        kind = "a page (HTML)"
    elif start.startswith(b"%pdf"):
        kind = "a document (PDF)"
    elif data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
        kind = "a HEIC file"
    elif data[4:12] in (b"ftypavif", b"ftypavis"):
        kind = "an AVIF file"
    elif data[:4] in (b"II*\0", b"MM\0*"):
        kind = "a TIFF file"
    elif data[4:8] == b"ftyp":
        kind = "a video"
    elif not data.strip(b"\0"):
        kind = "nothing but zeros"
    return f"expected PNG, JPEG, WebP, GIF or BMP, got {kind}"


def _describe(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text[:200]


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
        return image if orientation == 1 else ImageOps.exif_transpose(image)
    except Exception:  # what EXIF says is damaged, not what the picture shows
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _WIDE_MODES:
        values = np.asarray(image).astype(np.int64)
        if image.mode != "I" or values.max(initial=0) > 255:
            values = values >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def fit_size(
    height: int, width: int, side: int, min_pixels: int, max_pixels: int, *, enlarges: bool = False
) -> tuple[int, int]:
    """The height and width to which an image is resized: multiples of `side`, with `min_pixels` to
    `max_pixels`, nearly in proportion. As Qwen's processors have it, and GLM's if it `enlarges`
    those that are shorter than a side."""
    if enlarges and min(height, width) < side:
        scale = max(side / height, side / width)
        height, width = int(height * scale), int(width * scale)
    high, wide = round(height / side) * side, round(width / side) * side
    if high * wide > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        high = max(side, math.floor(height / scale / side) * side)
        wide = max(side, math.floor(width / scale / side) * side)
        # A long thin one: the side that cannot be smaller takes from the other.
        high = min(high, max_pixels // wide // side * side) or side
        wide = min(wide, max_pixels // high // side * side) or side
    elif high * wide < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        high = math.ceil(height * scale / side) * side
        wide = math.ceil(width * scale / side) * side
    return high, wide


def answer(message: dict[str, Any]) -> dict[str, Any]:
    """The answer to one message: width, height and pixels, or why there are none."""
    data = base64.b64decode(message["image"])
    limit_work(message["cpu_s"], message["memory_bytes"])
    try:
        image = decode(data)
        high, wide = fit_size(
            image.height,
            image.width,
            message["side"],
            message["min_pixels"],
            message["max_pixels"],
            enlarges=message["enlarges"],
        )
        if (wide, high) != image.size:
            image = image.resize((wide, high), Image.Resampling.BICUBIC)
        pixels = image.tobytes()
    except BadImageError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "it needs too much memory; send a smaller one"}
    finally:
        lift_limits()
    return {"width": wide, "height": high, "pixels": base64.b64encode(pixels).decode()}


def main() -> None:
    """Answer until the input ends."""
    warnings.simplefilter("ignore")  # of metadata
    Image.init()  # imports all formats, before any limit
    serve(answer)


if __name__ == "__main__":
    main()
