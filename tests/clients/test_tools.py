"""Programs that ask, measure and judge."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from cenacle import net

from .conftest import QUIET, Client

Install = Callable[..., Path]
START_S = 300


def test_llm(client: Client, pypi: Install) -> None:
    entry = {"model_id": "scripted", "model_name": "scripted", "api_base": f"{client.url}/v1"}
    models = client.home / "extra-openai-models.yaml"
    models.write_text(json.dumps([entry]))
    program = pypi("llm") / "bin" / "llm"
    said = client.run(program, "-m", "scripted", "play:weather", LLM_USER_PATH=str(client.home))
    assert "It is sunny in Paris." in said
    client.check("/v1/chat/completions")


def test_promptfoo(client: Client, npm: Install) -> None:
    config = {"apiBaseUrl": f"{client.url}/v1", "apiKey": "local"}
    assertion = {"type": "contains", "value": "It is sunny in Paris."}
    suite = {
        "prompts": ["{{question}}"],
        "providers": [{"id": "openai:chat:scripted", "config": config}],
        "tests": [{"vars": {"question": "play:weather"}, "assert": [assertion]}],
    }
    (client.folder / "promptfooconfig.json").write_text(json.dumps(suite))
    program = npm("promptfoo") / "promptfoo"
    client.run(program, "eval", "--no-cache", "-c", "promptfooconfig.json")
    client.check("/v1/chat/completions")


def test_guidellm(client: Client, pypi: Install) -> None:
    (client.folder / "prompts.jsonl").write_text('{"prompt": "play:weather"}\n' * 8)
    said = client.run(
        pypi("guidellm") / "bin" / "guidellm",
        *("benchmark", "--target", client.url, "--model", "scripted"),
        *("--data", "prompts.jsonl", "--profile", "synchronous", "--max-requests", "4"),
    )
    assert "Benchmark" in said
    client.check("/v1/")


@contextlib.contextmanager
def running(client: Client, url: str, *command: str | Path, **variables: str) -> Iterator[None]:
    """A service of the client's, until it answers."""
    environment = {**os.environ, **QUIET, "HOME": str(client.home), **variables}
    log = client.home / "service.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=client.folder,
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        ends = time.monotonic() + START_S
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url, timeout=5).is_success:
                    break
            assert time.monotonic() < ends, log.read_text()[-4000:]
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(60)


def test_litellm_proxy(client: Client, pypi: Install) -> None:
    port = net.free_ports(1)[0]
    parameters = {
        "model": "openai/scripted",
        "api_base": f"{client.url}/v1",
        "api_key": "local",
    }
    config = {"model_list": [{"model_name": "house", "litellm_params": parameters}]}
    (client.home / "config.yaml").write_text(json.dumps(config))
    program = pypi("litellm[proxy]") / "bin" / "litellm"
    url = f"http://127.0.0.1:{port}"
    options = ("--config", client.home / "config.yaml", "--host", "127.0.0.1", "--port", str(port))
    path = f"{program.parent}:{os.environ['PATH']}"
    with running(client, f"{url}/health/liveliness", program, *options, PATH=path):
        messages = [{"role": "user", "content": "play:weather"}]
        body = {"model": "house", "messages": messages, "max_tokens": 100}
        chat = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
        assert chat["choices"][0]["message"]["content"] == "It is sunny in Paris."
        answer = httpx.post(f"{url}/v1/messages", json=body, timeout=120).json()
        assert "It is sunny in Paris." in json.dumps(answer)
    client.check("/v1/")


def test_open_webui(client: Client, pypi: Install) -> None:
    port = net.free_ports(1)[0]
    url = f"http://127.0.0.1:{port}"
    program = pypi("open-webui") / "bin" / "open-webui"
    settings = {
        "OPENAI_API_BASE_URL": f"{client.url}/v1",
        "OPENAI_API_KEY": "local",
        "ENABLE_OLLAMA_API": "False",
        "WEBUI_AUTH": "False",
        "WEBUI_SECRET_KEY": "local",
        "DATA_DIR": str(client.home),
        "OFFLINE_MODE": "True",
        "BYPASS_EMBEDDING_AND_RETRIEVAL": "True",
    }
    options = ("serve", "--host", "127.0.0.1", "--port", str(port))
    with (
        running(client, f"{url}/health", program, *options, **settings),
        httpx.Client(base_url=url, timeout=120) as http,
    ):
        account = {"email": "", "password": ""}
        token = http.post("/api/v1/auths/signin", json=account).json()["token"]
        http.headers["authorization"] = f"Bearer {token}"
        (model, *_) = http.get("/api/models").json()["data"]
        messages = [{"role": "user", "content": "play:weather"}]
        body = {"model": model["id"], "messages": messages, "stream": False}
        answer = http.post("/api/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == "It is sunny in Paris."
    client.check("/v1/chat/completions")
