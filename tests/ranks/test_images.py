"""Images over HTTP: every client is answered as mlx-vlm answers; bad ones cost a sentence."""

import base64
import io
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import anthropic
import numpy as np
import openai
import pytest

import cenacle
from cenacle.cli.chat import ChatSession, read_image
from cenacle.cli.chat_sources import ChatSettings, LocalChat, RemoteChat
from cenacle.errors import InputError
from cenacle.model.synth import synth
from support.serving import DEADLINE_S, RunningServer, running_server

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("mlx_vlm")

TOKENS = 12
FAMILY = "qwen3_vl_moe"


def picture(seed: int, width: int, height: int) -> bytes:
    colors = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colors).resize((width, height)).save(file, "PNG")
    return file.getvalue()


ONE, TWO = picture(1, 90, 50), picture(2, 40, 70)


def uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


Chat = Sequence[Sequence[str | bytes]]
# Turns of the user and the model, in turn: texts and pictures.
SHORT: Chat = [["Look ", ONE, " well?"]]
LONG: Chat = [["Look ", ONE, " well?"], ["Yes."], ["And ", TWO, ONE, "?"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "seer"
    synth(folder, family=FAMILY, images=True)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[int, list[str]]:
    """mlx-vlm's answer to each chat, by its number of turns, token by token."""
    import mlx.core as mx
    from mlx_vlm import load
    from mlx_vlm.generate import generate_step

    model, processor = load(str(folder))
    answers = {}
    for chat in (SHORT, LONG):
        messages = [
            {
                "role": ("user", "assistant")[turn % 2],
                "content": [
                    {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                    for part in parts
                ],
            }
            for turn, parts in enumerate(chat)
        ]
        text = processor.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        pictures = [p for parts in chat for p in parts if isinstance(p, bytes)]
        images = [Image.open(io.BytesIO(data)) for data in pictures]
        inputs = processor(images=images, text=[text])
        grid = mx.array(inputs["image_grid_thw"])
        ids, pixels = mx.array(inputs["input_ids"]), mx.array(inputs["pixel_values"])
        steps = generate_step(
            ids, model, pixels, None, max_tokens=TOKENS, temperature=0.0, image_grid_thw=grid
        )
        tokens = [int(token) for token, _ in steps]
        answers[len(chat)] = [processor.tokenizer.decode(tokens)]
    return answers


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    options = ("--prefix-cache-disk-gb", "0", "--image-urls", "*")
    with running_server(
        tmp_path_factory.mktemp("server"), *options, model=folder, nodes=2
    ) as running:
        yield running


def chat_messages(chat: Chat) -> list[Any]:
    def part(value: str | bytes) -> dict[str, Any]:
        if isinstance(value, str):
            return {"type": "text", "text": value}
        return {"type": "image_url", "image_url": {"url": uri(value)}}

    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": list(map(part, p))} for i, p in enumerate(chat)]


def claude_messages(chat: Chat) -> list[Any]:
    def part(value: str | bytes) -> dict[str, Any]:
        if isinstance(value, str):
            return {"type": "text", "text": value}
        data = base64.b64encode(value).decode()
        source = {"type": "base64", "media_type": "image/png", "data": data}
        return {"type": "image", "source": source}

    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": list(map(part, p))} for i, p in enumerate(chat)]


def response_input(chat: Chat) -> list[Any]:
    def part(value: str | bytes, role: str) -> dict[str, Any]:
        if isinstance(value, str):
            return {"type": "output_text" if role == "assistant" else "input_text", "text": value}
        return {"type": "input_image", "image_url": uri(value), "detail": "auto"}

    roles = ("user", "assistant")
    return [
        {"role": (role := roles[i % 2]), "content": [part(p, role) for p in parts]}
        for i, parts in enumerate(chat)
    ]


def ask_all(url: str, chat: Chat) -> dict[str, str]:
    """The answer by each API, whole or as a stream."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", timeout=DEADLINE_S)
    claude = anthropic.Anthropic(base_url=url, api_key="x", timeout=DEADLINE_S)
    answers = {}
    whole = client.chat.completions.create(
        model="seer", messages=chat_messages(chat), max_tokens=TOKENS, temperature=0
    )
    answers["chat"] = whole.choices[0].message.content or ""
    pieces = client.chat.completions.create(
        model="seer", messages=chat_messages(chat), max_tokens=TOKENS, temperature=0, stream=True
    )
    answers["chat, stream"] = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    response = client.responses.create(
        model="seer", input=response_input(chat), max_output_tokens=TOKENS, temperature=0
    )
    answers["responses"] = response.output_text
    message = claude.messages.create(
        model="seer",
        messages=claude_messages(chat),
        max_tokens=TOKENS,
        extra_body={"temperature": 0},
    )
    answers["messages"] = "".join(block.text for block in message.content)  # type: ignore
    counted = claude.messages.count_tokens(model="seer", messages=claude_messages(chat))
    assert counted.input_tokens == whole.usage.prompt_tokens  # type: ignore[union-attr]
    return answers


def test_every_client_gets_what_mlx_vlm_says(
    server: RunningServer, expected: dict[int, list[str]]
) -> None:
    for chat in (SHORT, LONG):
        answers = ask_all(server.url, chat)
        assert set(answers.values()) == set(expected[len(chat)])


def test_one_node_gives_the_same(
    folder: Path, tmp_path: Path, expected: dict[int, list[str]]
) -> None:
    options = ("--prefix-cache-disk-gb", "0", "--max-image-pixels", "8192")
    with running_server(tmp_path, *options, model=folder, nodes=1) as one:
        for chat in (SHORT, LONG):
            body = {"messages": chat_messages(chat), "max_tokens": TOKENS}
            content = one.ask(**body).json()["choices"][0]["message"]["content"]
            assert [content] == expected[len(chat)]
        large = {"messages": chat_messages([[picture(1, 640, 640)]]), "max_tokens": 1}
        expected_tokens = one.ask(**large).json()["usage"]["prompt_tokens"]
        body = {"messages": chat_messages([[picture(1, 80, 80)]]), "max_tokens": 1}
        assert (
            one.ask(**body).json()["usage"]["prompt_tokens"] == expected_tokens
        )  # 5 x 5 tokens of 16 x 16
        # Nothing is fetched unless the owner allows it.
        part = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
        refused = one.ask(messages=[{"role": "user", "content": [part]}])
        assert refused.status_code == 400
        assert "image 1 of 1: this server fetches no images" in refused.text


def test_a_response_goes_on_with_its_image(server: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", timeout=DEADLINE_S)
    first = client.responses.create(
        model="seer", input=response_input(SHORT), max_output_tokens=TOKENS, temperature=0
    )
    later = client.responses.create(
        model="seer",
        input="And now?",
        previous_response_id=first.id,
        max_output_tokens=TOKENS,
        temperature=0,
    )
    assert later.usage is not None
    assert first.usage is not None
    assert later.usage.input_tokens > first.usage.input_tokens + TOKENS
    assert later.usage.input_tokens_details.cached_tokens > first.usage.input_tokens


def test_the_chat_shows_pictures(
    folder: Path, server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`cenacle chat --image` with a server and with a model of its own; /image, /save, /load."""
    file = tmp_path / "one.png"
    file.write_bytes(ONE)

    def ask(messages: list[Any]) -> str:
        answer = server.ask(messages=messages, max_tokens=TOKENS).json()
        return answer["choices"][0]["message"]["content"]

    conversation = chat_messages([[ONE, "Look"], [""], [TWO, "well?"]])
    conversation[1]["content"] = ask(conversation[:1])
    last = ask(conversation)
    settings = ChatSettings(TOKENS, 0.0, 1.0)
    with cenacle.load(str(folder)) as model, closing(RemoteChat(server.url)) as remote:
        for source in (LocalChat(model), remote):
            session = ChatSession(source, settings, images=[read_image(file)])

            def say(line: str, session: ChatSession = session) -> None:
                assert session._handle_line(line, session._show_plain)

            say("Look")
            file.write_bytes(TWO)
            say(f"/image {file}")
            say("well?")
            file.write_bytes(ONE)
            assert [m["content"] for m in session.messages[1::2]] == [
                conversation[1]["content"],
                last,
            ]
            say(f"/save {tmp_path / 'chat.json'}")
            say(f"/save {tmp_path / 'chat.md'}")
            assert (tmp_path / "chat.md").read_text().startswith("**You**\n\n(a picture)\n\nLook")
            say("/new")
            say(f"/load {tmp_path / 'chat.json'}")
            say("/regenerate")
            assert session.messages[-1]["content"] == last
            capsys.readouterr()
            say(f"/image {tmp_path / 'none.png'}")
            assert "cannot read" in capsys.readouterr().err
            session.images = [f"data:image/png;base64,{base64.b64encode(b'x').decode()}"]
            say("and this?")
            assert "got another file" in capsys.readouterr().err
            assert session.messages[-1]["content"] == last
        elsewhere = {"type": "image_url", "image_url": "https://example.com/a"}
        with pytest.raises(InputError, match="from Python none is fetched"):
            model.prompt_of([{"role": "user", "content": [elsewhere]}])


BAD = {
    "text": b"hello " * 50,
    "zeros": bytes(500),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "truncated": ONE[:-50],
    "half": ONE[: len(ONE) // 2],
    "head": ONE[:30],
    "thin": picture(1, 3000, 3),
}


def test_bad_images_cost_a_sentence_and_nothing_is_held(
    server: RunningServer, expected: dict[int, list[str]]
) -> None:
    for name, data in BAD.items():
        chat = [["Look at ", ONE, data]]
        answers = [
            server.ask(messages=chat_messages(chat)),
            server.post("/v1/responses", {"input": response_input(chat)}),
            server.post(
                "/v1/messages",
                {"model": "seer", "max_tokens": 9, "messages": claude_messages(chat)},
            ),
        ]
        for answer in answers:
            assert answer.status_code == 400, (name, answer.text)
            message = answer.json()["error"]["message"]
            assert "image 2 of 2: " in message
            assert "\n" not in message
    health = server.health()
    assert (health["status"], health["running"], health["waiting"]) == ("ok", 0, 0)
    body = {"messages": chat_messages(SHORT), "max_tokens": TOKENS}
    assert [server.ask(**body).json()["choices"][0]["message"]["content"]] == expected[1]


def test_a_chat_may_have_many_megabytes_of_images(
    server: RunningServer, expected: dict[int, list[str]]
) -> None:
    large = ONE + os.urandom(9_000_000)  # what is behind the picture is not read
    body = {"messages": chat_messages([["Look ", large, " well?"]]), "max_tokens": TOKENS}
    assert [server.ask(**body).json()["choices"][0]["message"]["content"]] == expected[1]


def test_nothing_is_asked_behind_the_server(server: RunningServer) -> None:
    """The owner allows every public host; these are none."""
    with socket.create_server(("127.0.0.1", 0)) as private:
        private.settimeout(0)
        port = private.getsockname()[1]
        hosts = ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "2130706433", "0177.1", "[::1]")
        for url in (
            *(f"http://{host}:{port}/a.png" for host in hosts),
            *(f"http://{host}/a.png" for host in hosts),
            "http://169.254.169.254/latest/meta-data/",
        ):
            part = {"type": "image_url", "image_url": {"url": url}}
            refused = server.ask(messages=[{"role": "user", "content": [part]}])
            assert refused.status_code == 400, url
            assert "image 1 of 1: its host" in refused.text, url
        with pytest.raises(BlockingIOError):
            private.accept()


def read_stream(server: RunningServer, texts: list[str], begun: threading.Event) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", timeout=DEADLINE_S)
    stream = client.chat.completions.create(
        model="seer",
        messages=chat_messages(LONG),
        max_tokens=400,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for chunk in stream:
        texts.append(chunk.choices[0].delta.content or "")
        if len(texts) > 20:
            begun.set()


def test_an_answer_goes_on_when_a_rank_dies(server: RunningServer) -> None:
    undisturbed: list[str] = []
    read_stream(server, undisturbed, threading.Event())
    texts: list[str] = []
    begun = threading.Event()
    reader = threading.Thread(target=read_stream, args=(server, texts, begun))
    reader.start()
    assert begun.wait(DEADLINE_S)
    os.kill(server.health()["ranks"][0]["pid"], signal.SIGKILL)
    reader.join(DEADLINE_S)
    assert not reader.is_alive()
    assert "".join(texts) == "".join(undisturbed)
    assert json.loads(server.post("/v1/chat/completions", {}).text)["error"]
