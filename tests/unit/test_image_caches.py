"""Caches of prompts with images: no two images share one; positions behind images."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle.core.image import (
    IMAGE_TOKEN_BIT,
    PromptImage,
    cache_tokens,
    pixel_digest,
    position_shift,
    rotary_positions,
)
from cenacle.core.request import Request
from cenacle.scheduler import prefix_index
from cenacle.scheduler.prefix_index import CacheFootprint, common_prefix_length, pack_tokens
from cenacle.scheduler.scheduler import Scheduler

RED, BLUE = pixel_digest(32, 32, b"red"), pixel_digest(32, 32, b"blue")
TEXT = tuple(range(20))


def request(name: str, digest: str, rows: int = 8, columns: int = 8) -> Request:
    tokens = (*TEXT, *(99,) * rows * columns, *TEXT)
    return Request(name, tokens, 4, images=(PromptImage(len(TEXT), rows, columns, digest),))


def reused(first: Request, second: Request) -> int:
    """How many tokens of one prompt are taken from another's cache."""
    scheduler = Scheduler(prefix_cache_bytes=1 << 30, footprint=CacheFootprint(1, reusable=True))
    scheduler.submit(first)
    while (step := scheduler.next_step()) is not None and not step.final_chunks:
        pass
    scheduler.submit(second)
    step = scheduler.next_step()
    assert step is not None
    return step.reused[0].tokens if step.reused else 0


def test_the_same_image_is_reused_and_another_is_not() -> None:
    assert reused(request("a", RED), request("b", RED)) == 20 + 64 + 19
    assert reused(request("a", RED), request("b", BLUE)) == 20
    assert reused(request("a", RED, 8, 8), request("b", RED, 4, 16)) == 20


def test_an_image_of_few_tokens_is_never_reused() -> None:
    assert reused(request("a", RED, 1, 3), request("b", RED, 1, 3)) == 20
    assert reused(request("a", RED, 1, 4), request("b", RED, 1, 4)) == 43


def test_images_that_begin_alike_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tokens of two images may be equal by chance, or because somebody tried long."""
    image = [IMAGE_TOKEN_BIT | n for n in range(8)]
    other = [*image[:5], *(IMAGE_TOKEN_BIT | n for n in range(50, 53))]
    a, b = pack_tokens([1, 2, *image, 3]), pack_tokens([1, 2, *other, 3])
    assert common_prefix_length(a, b) == 2
    assert common_prefix_length(a, a) == 11
    assert common_prefix_length(a, a[: 4 * 6]) == 2  # of an entry that was cut within the image
    assert common_prefix_length(a, pack_tokens([1, 2, 3])) == 2
    # The comparison is what keeps them apart.
    monkeypatch.setattr(prefix_index, "_is_image_token", lambda *_: False)
    assert common_prefix_length(a, b) == 7


def test_no_token_is_taken_for_an_image() -> None:
    cached = request("a", RED).cache_tokens
    assert all(t >= IMAGE_TOKEN_BIT for t in cached[20:84])
    assert cached[:20] == cached[84:] == TEXT
    assert cache_tokens(TEXT, (), "a") == TEXT


def test_pages_on_disk_end_before_the_first_image() -> None:
    scheduler = Scheduler(
        prefix_cache_bytes=1 << 30,
        footprint=CacheFootprint(1, reusable=True),
        disk_bytes=1 << 30,
    )
    scheduler.register_pages([[]])
    long = request("a", RED)
    prompt = (*range(300), *long.tokens)
    scheduler.submit(
        replace(long, tokens=prompt, images=(PromptImage(320, 8, 8, RED),), max_tokens=1)
    )
    step = scheduler.next_step()
    assert step is not None
    from cenacle.core.request import TokenEvent

    while step is not None and not step.final_chunks:
        step = scheduler.next_step()
    scheduler.on_tokens([TokenEvent("a", 5, "length")])
    ends = []
    while (step := scheduler.next_step()) is not None:
        ends += [write.page.end for write in step.page_writes]
    assert ends == [128, 256]


def reference_positions(images: list[PromptImage], length: int) -> list[tuple[int, int, int]]:
    """As Qwen2-VL's paper has it, token by token."""
    positions: list[tuple[int, int, int]] = []
    start = 0
    at = 0
    while at < length:
        image = next((i for i in images if i.begin == at), None)
        if image is None:
            positions.append((start,) * 3)
            start, at = start + 1, at + 1
            continue
        for row in range(image.rows):
            for column in range(image.columns):
                positions.append((start, start + row, start + column))
        start, at = start + max(image.rows, image.columns), image.end
    return positions


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(1, 4)), max_size=3),
    st.integers(1, 6),
    st.data(),
)
def test_positions(shapes: list[tuple[int, int, int]], tail: int, data: st.DataObject) -> None:
    images, at = [], 0
    for gap, rows, columns in shapes:
        images.append(PromptImage(at + gap, rows, columns, "x"))
        at = images[-1].end
    length = at + tail
    begin = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(begin, length))
    expected = reference_positions(images, length)
    got = list(zip(*rotary_positions(images, begin, end), strict=True))
    assert got == expected[begin:end]
    assert length - 1 + position_shift(images, length - 1) == expected[-1][0]
