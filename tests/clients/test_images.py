"""LangChain's pictures get the answer of a plain request, which `ranks/test_images.py` compares
with mlx-vlm's."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cenacle.model.synth import synth
from support.recording_proxy import recording_proxy
from support.serving import RunningServer, running_server

from .conftest import Client
from .test_sdks import Install

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("mlx_vlm")
TOKENS = 12


@pytest.fixture
def seer(tmp_path: Path) -> Iterator[RunningServer]:
    synth(tmp_path / "seer", family="qwen3_vl_moe", images=True)
    with running_server(tmp_path, model=tmp_path / "seer", nodes=2) as server:
        yield server


def test_langchain(seer: RunningServer, pypi: Install, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.linear_gradient("L").resize((90, 50)).convert("RGB").save(picture)
    uri = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    parts = [
        {"type": "text", "text": "Look "},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "text", "text": " well?"},
    ]
    plain = seer.ask(messages=[{"role": "user", "content": parts}], max_tokens=TOKENS)
    assert plain.status_code == 200, plain.text
    expected = plain.json()["choices"][0]["message"]["content"]
    without = seer.ask(messages=[{"role": "user", "content": "Look  well?"}], max_tokens=TOKENS)
    assert without.json()["choices"][0]["message"]["content"] != expected

    python = pypi("langchain", "langchain-openai", "langchain-anthropic", "langgraph")
    with recording_proxy(seer.url) as proxy:
        client = Client(proxy, tmp_path, tmp_path)
        output = client.program(python, "langchain_image.py", str(picture), str(TOKENS))
        for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages"):
            client.check(path, at_least=2)
    assert json.loads(output.splitlines()[-1]) == [expected] * 6
