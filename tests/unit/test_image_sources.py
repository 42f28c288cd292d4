"""Images in requests: their forms in each API, the marks that stand for them, where they end up."""

import base64
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cenacle.core.image import PromptImage
from cenacle.core.request import Request
from cenacle.errors import InputError
from cenacle.images import sources
from cenacle.images.decode_process import DecodedImage
from cenacle.images.placement import ImagePlaces, mark_parts
from cenacle.server.api.anthropic import MessagesAdapter
from cenacle.server.api.openai import ChatCompletionsAdapter
from cenacle.server.api.openai_responses import ResponsesAdapter
from cenacle.server.api.protocol import ServedModel
from cenacle.server.api.validation import RequestError
from cenacle.server.preparation import ImagesWantedError, RequestPreparer, _with_images

DATA = base64.b64encode(b"picture").decode()
URI = f"data:image/png;base64,{DATA}"
WITH_VISION, WITHOUT_VISION = (
    ServedModel("m", 1000, 400, image_obstacle=""),
    ServedModel("m", 1000, 400),
)
TEXT = {"type": "text", "text": "What is it?"}


def chat(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(parts)}]}


def openai_image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def claude_image(**source: str) -> dict[str, Any]:
    return {"type": "image", "source": source}


def claude(*parts: Any) -> dict[str, Any]:
    return {**chat(*parts), "model": "m", "max_tokens": 9}


FORMS = {
    "chat": (ChatCompletionsAdapter(), lambda url: chat(TEXT, openai_image(url))),
    "chat, short": (
        ChatCompletionsAdapter(),
        lambda url: chat(TEXT, {"type": "image_url", "image_url": url}),
    ),
    "tool": (
        ChatCompletionsAdapter(),
        lambda url: {
            "messages": [
                {"role": "user", "content": "look"},
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "a", "content": [TEXT, openai_image(url)]},
            ]
        },
    ),
    "responses": (
        ResponsesAdapter(),
        lambda url: {
            "input": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "What is it?"},
                        {"type": "input_image", "image_url": url, "detail": "auto"},
                    ],
                }
            ]
        },
    ),
    "messages": (MessagesAdapter(), lambda url: claude(TEXT, claude_image(type="url", url=url))),
    "tool_result": (
        MessagesAdapter(),
        lambda url: {
            **claude(TEXT),
            "messages": [
                {"role": "user", "content": "look"},
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "a",
                            "content": [TEXT, claude_image(type="url", url=url)],
                        }
                    ],
                },
            ],
        },
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("url", [URI, "https://example.com/a.png?b=c"])
def test_an_image_in_every_form(form: str, url: str) -> None:
    api, body = FORMS[form]
    request = api.parse(json.dumps(body(url)).encode(), WITH_VISION)
    assert request.image_sources == (url,)
    content = request.prompts[0][-1]["content"]  # type: ignore[index]
    assert content == "What is it?" + sources.mark("0")
    with pytest.raises(RequestError, match="remove the images") as caught:
        api.parse(json.dumps(body(url)).encode(), WITHOUT_VISION)
    assert caught.value.code == "unsupported_parameter"


def test_a_block_with_base64() -> None:
    image = claude_image(type="base64", media_type="image/webp", data=DATA)
    request = MessagesAdapter().parse(json.dumps(claude(image, TEXT, image)).encode(), WITH_VISION)
    assert request.image_sources == (f"data:image/webp;base64,{DATA}",) * 2


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "expected a data: URI"),
        ("picture.png", "expected a data: URI"),
        ("file:///etc/passwd", "expected a data: URI"),
        ("ftp://example.com/a.png", "expected a data: URI"),
        ("data:", "no comma"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,", "without data"),
        ("data:image/png;base64,$$$", "expected base64"),
        ("data:image/png;base64,AAAAA", "expected base64"),
        ("data:text/html;base64,AAAA", "got data of type text/html"),
        ("data:application/pdf;base64,AAAA", "got data of type application/pdf"),
        ("http://example.com/" + "a" * 5000, "at most 4096 characters"),
        ("http://example.com/\ue001", "private use"),
    ],
)
def test_what_is_no_image_is_refused_by_its_path(url: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        ChatCompletionsAdapter().parse(
            json.dumps(chat(TEXT, openai_image(url))).encode(), WITH_VISION
        )
    assert caught.value.field == "messages[0].content[1].image_url.url"


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ({"type": "image_url"}, "image_url"),
        ({"type": "image_url", "image_url": {}}, "image_url.url"),
        ({"type": "image_url", "image_url": 3}, "image_url"),
        ({"type": "image_url", "image_url": {"url": None}}, "image_url.url"),
    ],
)
def test_a_part_without_its_image(part: Any, field: str) -> None:
    with pytest.raises(InputError) as caught:
        ChatCompletionsAdapter().parse(json.dumps(chat(part)).encode(), WITH_VISION)
    assert caught.value.field == f"messages[0].content[0].{field}"


@pytest.mark.parametrize(
    "source",
    [
        {"type": "file", "file_id": "a"},
        {"type": "base64", "media_type": "text/plain", "data": DATA},
        {"type": "base64", "media_type": "image/png", "data": "%"},
        {"type": "base64", "media_type": "image/png", "data": ""},
        {"type": "url", "url": "file:///etc/passwd"},
    ],
)
def test_a_block_without_its_image(source: dict[str, str]) -> None:
    with pytest.raises(InputError) as caught:
        MessagesAdapter().parse(json.dumps(claude(claude_image(**source))).encode(), WITH_VISION)
    assert (caught.value.field or "").startswith("messages[0].content[0].source")


def test_only_the_user_and_tools_show_images() -> None:
    body = chat(openai_image(URI), role="assistant")
    with pytest.raises(InputError, match="not supported"):
        ChatCompletionsAdapter().parse(json.dumps(body).encode(), WITH_VISION)


def test_other_forms_of_base64() -> None:
    data = bytes(range(250, 256)) * 3
    for text in (
        base64.b64encode(data).decode(),
        base64.urlsafe_b64encode(data).decode().rstrip("="),
        "\n".join(base64.b64encode(data).decode()),
        base64.b64encode(data).decode().replace("+", "%2B").replace("/", "%2F"),
    ):
        for head in ("data:image/png;base64", "DATA:image/png;charset=x;BASE64", "data:;base64"):
            assert sources.read_data_uri(sources.check_source(f"{head},{text}")) == data


def test_too_many_images() -> None:
    body = chat(*[openai_image(URI)] * 65)
    with pytest.raises(InputError, match="at most 64 images, got 65"):
        ChatCompletionsAdapter().parse(json.dumps(body).encode(), WITH_VISION)


def test_log_probabilities_of_prompts_with_images_are_refused() -> None:
    body = {**chat(openai_image(URI)), "prompt_logprobs": 1}
    with pytest.raises(InputError, match="not supported with images"):
        ChatCompletionsAdapter().parse(json.dumps(body).encode(), WITH_VISION)


def test_a_written_mark_is_text() -> None:
    body = chat({"type": "text", "text": "\ue0000123456789abcdef0123456789abcdef:0\ue001"})
    request = ChatCompletionsAdapter().parse(json.dumps(body).encode(), WITH_VISION)
    assert not request.image_sources


def test_images_are_wanted_before_tokens() -> None:
    body = json.dumps(chat(TEXT, openai_image(URI))).encode()
    request = ChatCompletionsAdapter().parse(body, WITH_VISION)
    with pytest.raises(ImagesWantedError) as caught:
        _with_images(request, ())
    assert (caught.value.sources, caught.value.field) == ((URI,), "messages")
    image = DecodedImage(2, 3, b"", "d")
    assert _with_images(request, [image]).images == (image,)


def image(rows: int, columns: int, digest: str = "d") -> DecodedImage:
    return DecodedImage(rows, columns, b"", digest)


def test_images_in_their_places() -> None:
    places = ImagePlaces([image(1, 2, "a"), image(2, 2, "b")], 7, ("<", "i", ">"), "messages")
    text = f"x{sources.mark('1')}y{sources.mark('0')}z"  # a template may order them
    assert places.edit_text(text) == "x<i>y<i>z"
    tokens, placed = places.expand((1, 2, 7, 3, 1, 2, 7, 3, 1))
    assert tokens == (1, 2, 7, 7, 7, 7, 3, 1, 2, 7, 7, 3, 1)
    assert placed == (PromptImage(2, 2, 2, "b"), PromptImage(9, 1, 2, "a"))
    assert Request("r", tokens, 1, images=placed).images == placed


def test_a_template_that_loses_an_image_is_told() -> None:
    places = ImagePlaces([image(1, 2)], 7, ("<", "i", ">"), "messages")
    for text in ("x", sources.mark("0") * 2, sources.mark("5")):
        with pytest.raises(InputError, match="chat template shows"):
            places.edit_text(text)


def test_a_text_with_the_models_own_placeholder_is_refused() -> None:
    places = ImagePlaces([image(1, 2)], 7, ("<", "i", ">"), "messages")
    places.edit_text(sources.mark("0"))
    with pytest.raises(InputError, match="takes for an image"):
        places.expand((1, 7, 7, 1))


def test_parts_from_python() -> None:
    chat = [
        {"role": "system", "content": "See."},
        {
            "role": "user",
            "content": [TEXT, openai_image(URI), {"type": "image_url", "image_url": URI}],
        },
    ]
    system, user = mark_parts(chat)
    assert system == chat[0]
    assert user["content"] == "What is it?" + 2 * sources.mark(URI)
    for part, reason in (
        ({"type": "image_url", "image_url": "a.png"}, "expected a data: URI"),
        ({"type": "image_url"}, "expected a text or an image"),
        ({"type": "video"}, "expected a text or an image"),
        ("text", "expected a text or an image"),
    ):
        with pytest.raises(InputError, match=reason) as caught:
            mark_parts([{"role": "user", "content": [TEXT, part]}])
        assert caught.value.field == "messages[0].content[1]"


@pytest.mark.parametrize("begin", [-1, 0, 3])
def test_images_of_a_request_are_within_it(begin: int) -> None:
    images = (PromptImage(begin, 1, 2, "a"), PromptImage(1, 1, 2, "b"))
    with pytest.raises(InputError, match="expected them in order"):
        Request("r", (1, 2, 3, 4, 5), 1, images=images)
    with pytest.raises(InputError, match="text behind the last"):
        Request("r", (1, 2, 3), 1, images=(PromptImage(1, 1, 2, "a"),))


def test_pixels_do_not_go_with_the_request() -> None:
    request = Request("r", (1, 2, 2, 3), 2, images=(PromptImage(1, 1, 2, "a", b"pixels"),))
    sent = json.loads(json.dumps(request.to_json()))
    without = replace(request.images[0], pixels=b"")
    assert Request.from_json(sent) == replace(request, images=(without,))
    assert request.resumed_with([9]).images == request.images


def test_a_preparer_needs_nothing_of_images_for_texts() -> None:
    model: Any = SimpleNamespace(text=None)
    assert (
        RequestPreparer(model, WITH_VISION, 10)._image_places(
            ChatCompletionsAdapter().parse(json.dumps(chat(TEXT)).encode(), WITH_VISION)
        )
        is None
    )
