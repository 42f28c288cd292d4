"""Pictures of all kinds are decoded, and bad ones told apart in a sentence."""

import base64
import io
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from cenacle.core.image import pixel_digest
from cenacle.errors import InputError

Image = pytest.importorskip("PIL.Image")
from PIL import ImageDraw, PngImagePlugin  # noqa: E402

from cenacle.images import decode_worker  # noqa: E402
from cenacle.images.decode_process import DecodeProcess  # noqa: E402
from cenacle.images.decode_worker import BadImageError, decode  # noqa: E402

SIZE = (40, 20)


def scene(mode: str = "RGB") -> "Image.Image":
    """Red on the left, blue on the right, green below."""
    image = Image.new("RGB", SIZE, (255, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 0, 40, 20), (0, 0, 255))
    draw.rectangle((0, 14, 40, 20), (0, 255, 0))
    return image.convert(mode)


def saved(image: "Image.Image", format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def colors(data: bytes) -> list[tuple[int, ...]]:
    """Of three places, rounded: left, right, below."""
    image = decode(data)
    assert image.mode == "RGB"
    width, height = image.size
    at = ((width // 4, height // 4), (3 * width // 4, height // 4), (width // 2, height - 2))
    return [tuple(round(c / 255) for c in image.getpixel(place)) for place in at]  # type: ignore


SCENE = [(1, 0, 0), (0, 0, 1), (0, 1, 0)]
EXIF = 0x0112


def rotated() -> bytes:
    exif = Image.Exif()
    exif[EXIF] = 6  # to be turned right
    return saved(scene().rotate(90, expand=True), "JPEG", exif=exif, quality=95)


def animated(format: str, **options: object) -> bytes:
    others = [Image.new("RGB", SIZE, "black") for _ in range(2)]
    return saved(scene(), format, save_all=True, append_images=others, **options)


def transparent() -> bytes:
    image = scene("RGBA")
    image.putpixel((10, 5), (0, 0, 0, 0))
    return saved(image)


GOOD: dict[str, Callable[[], bytes]] = {
    "png": lambda: saved(scene()),
    "palette": lambda: saved(scene("P")),
    "palette, transparent": lambda: saved(scene("P"), transparency=255),
    "rgba": lambda: saved(scene("RGBA")),
    "interlaced": lambda: saved(scene(), interlace=1),
    "jpeg": lambda: saved(scene(), "JPEG", quality=95),
    "progressive": lambda: saved(scene(), "JPEG", progressive=True, quality=95),
    "cmyk": lambda: saved(scene("CMYK"), "JPEG", quality=95),
    "webp": lambda: saved(scene(), "WEBP", lossless=True),
    "gif": lambda: saved(scene(), "GIF"),
    "bmp": lambda: saved(scene(), "BMP"),
    "rotated by EXIF": rotated,
    "animated gif": lambda: animated("GIF"),
    "animated png": lambda: animated("PNG"),
    "animated webp": lambda: animated("WEBP", lossless=True),
    "damaged EXIF": lambda: saved(scene(), "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff"),
    "rubbish behind": lambda: saved(scene()) + b"rubbish" * 100,
}


@pytest.mark.parametrize("kind", GOOD)
def test_the_right_picture(kind: str) -> None:
    data = GOOD[kind]()
    assert decode(data).size == SIZE
    assert colors(data) == SCENE


def test_grey_pictures() -> None:
    levels = np.linspace(0, 65535, 800).astype(np.uint16).reshape(20, 40)
    expected = (levels >> 8).astype(np.uint8)
    for image in (Image.fromarray(levels), Image.fromarray(expected), scene("1"), scene("LA")):
        shown = np.asarray(decode(saved(image)))
        assert (shown[..., 0] == shown[..., 2]).all()
        if image.mode in ("I;16", "L"):
            assert (shown[..., 0] == expected).all()


def test_what_is_transparent_is_white() -> None:
    assert decode(transparent()).getpixel((10, 5)) == (255, 255, 255)
    assert decode(transparent()).getpixel((5, 5)) == (255, 0, 0)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes, depth: int = 8, kind: int = 2) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg_size(width: int, height: int) -> bytes:
    """A JPEG whose head has another size than its data."""
    data = bytearray(saved(scene(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "b" * 5_000_000, zip=True)
    return saved(scene(), pnginfo=info)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "expected PNG, JPEG"),
    "zeros": (lambda: bytes(1000), "nothing but zeros"),
    "noise": (lambda: bytes(range(256)) * 8, "got another file"),
    "text": (lambda: b"hello " * 100, "got another file"),
    "html": (lambda: b"<!DOCTYPE html><html>", "a page"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "a drawing"),
    "xml": (lambda: b"<?xml version='1.0'?><svg/>", "a drawing"),
    "pdf": (lambda: b"%PDF-1.7\n" + bytes(100), "a document"),
    "heic": (lambda: b"\0\0\0\x18ftypheic" + bytes(100), "a HEIC file"),
    "avif": (lambda: b"\0\0\0\x18ftypavif" + bytes(100), "an AVIF file"),
    "video": (lambda: b"\0\0\0\x18ftypisom" + bytes(100), "a video"),
    "tiff": (lambda: saved(scene(), "TIFF"), "a TIFF file"),
    "ico": (lambda: saved(scene(), "ICO"), "got another file"),
    "eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n", "got another file"),
    "head of a png": (lambda: saved(scene())[:8], "cannot be read|got another"),
    "truncated png": (lambda: saved(scene())[:-60], "damaged"),
    "truncated jpeg": (lambda: saved(scene(), "JPEG")[:-200], "damaged"),
    "truncated webp": (lambda: saved(scene(), "WEBP")[:-40], "damaged|cannot be read"),
    "truncated gif": (lambda: saved(scene(), "GIF")[:40], "damaged|cannot be read"),
    "truncated bmp": (lambda: saved(scene(), "BMP")[:100], "damaged"),
    "no known part": (lambda: saved(scene()).replace(b"IDAT", b"IDAU"), "got another file"),
    "damaged checksum": (lambda: saved(scene()).replace(b"IDAT", b"IDAT\1"), "damaged"),
    "no data": (lambda: png(40, 20, b""), "damaged"),
    "no zlib": (lambda: png(40, 20, b"not compressed"), "damaged"),
    "no width": (lambda: png(0, 20, zlib.compress(b"")), "cannot be read|damaged|sides|got"),
    "odd depth": (lambda: png(40, 20, zlib.compress(b""), depth=7), "damaged|cannot be read|got"),
    "100 megapixels": (lambda: png(10_000, 10_000, zlib.compress(bytes(9))), "64 million pixels"),
    "bomb": (lambda: png(60_000, 60_000, zlib.compress(bytes(10**6))), "64 million pixels"),
    "long bomb": (lambda: png(2**31 - 1, 1, zlib.compress(bytes(9))), "pixels"),
    "jpeg of 4 gigapixels": (lambda: jpeg_size(65_000, 65_000), "64 million pixels"),
    "thin": (lambda: saved(Image.new("RGB", (3000, 2))), "sides of at most 1 to 200"),
    "bomb of text": (text_bomb, "damaged|cannot be read|too large"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_pictures(kind: str) -> None:
    make, reason = BAD[kind]
    with pytest.raises(BadImageError, match=reason) as caught:
        decode(make())
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 300


@pytest.fixture(scope="module")
def process() -> Iterator[DecodeProcess]:
    process = DecodeProcess(16, 1024, 65536)
    yield process
    process.close()


def test_a_process_decodes(process: DecodeProcess) -> None:
    image = process.decode(saved(scene()))
    expected = scene().resize((48, 32), Image.Resampling.BICUBIC).tobytes()
    assert (image.rows, image.columns, image.pixels) == (2, 3, expected)
    assert image.digest == pixel_digest(48, 32, expected)
    with pytest.raises(InputError, match="got another file"):
        process.decode(b"hello")
    assert process.decode(saved(scene())) == image


def test_work_without_end_costs_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    from cenacle.images import decode_process

    monkeypatch.setattr(decode_process, "MEMORY_BYTES", 50 << 20)
    process = DecodeProcess(16, 1024, 65536)
    try:
        with pytest.raises(InputError, match=r"memory|needs more than"):
            process.decode(png(7000, 7000, zlib.compress(bytes(1000))))
        monkeypatch.setattr(decode_process, "MEMORY_BYTES", 1 << 30)
        assert process.decode(saved(scene())).rows == 2
    finally:
        process.close()


def test_an_answer_is_json() -> None:
    data = base64.b64encode(saved(scene())).decode()
    limits = {"cpu_s": 100, "memory_bytes": 4 << 30}
    answer = decode_worker.answer(
        {
            "image": data,
            "side": 16,
            "min_pixels": 1024,
            "max_pixels": 65536,
            **limits,
            "enlarges": False,
        }
    )
    assert (answer["width"], answer["height"]) == (48, 32)
