"""Programs that ask, measure and judge."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cenacle import net
from support.recording_proxy import recording_proxy
from support.serving import DEMO, running_server

from .conftest import PROGRAMS, QUIET, Client

Install = Callable[..., Path]
START_S = 900  # Open WebUI takes four minutes on a busy machine


def test_llm(client: Client, pypi: Install) -> None:
    entry = {"model_id": "scripted", "model_name": "scripted", "api_base": f"{client.url}/v1"}
    models = client.home / "extra-openai-models.yaml"
    models.write_text(json.dumps([entry]))
    program = pypi("llm") / "bin" / "llm"
    output = client.run(program, "-m", "scripted", "play:weather", LLM_USER_PATH=str(client.home))
    assert "It is sunny in Paris." in output
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


def test_guidellm(client: Client, pypi: Install, model: Path) -> None:
    """Synthetic data: answers of a fixed length, whatever the model says."""
    client.run(
        *(pypi("guidellm") / "bin" / "guidellm", "run"),
        *("--backend", f"kind=openai_http,target={client.url},model=scripted"),
        *("--tokenizer", f"kind=huggingface_auto,model={model}"),
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"),
        *("--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=4"),
        *("--output", "kind=json,path=report.json"),
    )
    (benchmark,) = json.loads((client.folder / "report.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert [r["output_tokens"] for r in requests["successful"]] == [16] * 4
    assert requests["errored"] == requests["incomplete"] == []
    client.check("/v1/chat/completions", at_least=4)


def test_vllm_bench(client: Client, pypi: Install, model: Path) -> None:
    """Random data: answers of a fixed length, whatever the model says."""
    client.run(
        *(pypi("vllm[bench]") / "bin" / "vllm", "bench", "serve", "--base-url", client.url),
        *("--model", "scripted", "--tokenizer", model, "--dataset-name", "random"),
        *("--random-input-len", "32", "--random-output-len", "16", "--num-prompts", "4"),
        *("--save-result", "--result-dir", ".", "--result-filename", "report.json"),
    )
    report = json.loads((client.folder / "report.json").read_text())
    assert (report["completed"], report["failed"]) == (4, 0)
    assert report["total_output_tokens"] == 4 * 16
    client.check("/v1/completions", at_least=4)


def test_genai_perf(client: Client, pypi: Install, model: Path) -> None:
    """genai-perf's own bodies and its own reading of the answers; a stand-in sends them."""
    stand_in = client.home / "perf_analyzer"
    stand_in.write_text(f'#!/bin/sh\nexec {sys.executable} {PROGRAMS}/perf_analyzer.py "$@"\n')
    stand_in.chmod(0o755)
    client.run(
        *(pypi("genai-perf") / "bin" / "genai-perf", "profile", "-m", "scripted"),
        *("--endpoint-type", "chat", "--streaming", "-u", client.url, "--tokenizer", model),
        *("--synthetic-input-tokens-mean", "32", "--output-tokens-mean", "16"),
        *("--extra-inputs", "ignore_eos:true", "--concurrency", "1"),
        *("--num-dataset-entries", "4", "--request-count", "4", "--artifact-dir", "artifacts"),
        PATH=f"{client.home}:{os.environ['PATH']}",
    )
    (path,) = (client.folder / "artifacts").glob("*/profile_export_genai_perf.json")
    report = json.loads(path.read_text())
    # It counts the tokens of the whole text anew.
    assert report["output_sequence_length"]["avg"] >= 8
    assert report["time_to_first_token"]["avg"] > 0
    client.check("/v1/chat/completions", at_least=4)


def _logprob_of(model: Any, context: list[int], continuation: list[int]) -> float:
    import mlx.core as mx

    logits = model(mx.array([context + continuation]))[0].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    begin = len(context) - 1
    return sum(logprobs[begin + i, t].item() for i, t in enumerate(continuation))


def test_lm_eval(client: Client, pypi: Install, tmp_path: Path) -> None:
    """Likelihoods of endings, on the demo model; mlx-lm's logits give the same."""
    import mlx_lm

    questions = [
        {"context": "What is 12 + 30?", "endings": [" 42", " 41.", " It is 43", " no number"]},
        {"context": "2 + 2 =", "endings": [" 4", " 5", " twenty"]},
    ]
    lines = [json.dumps(question | {"gold": 0}) for question in questions]
    (client.folder / "endings.jsonl").write_text("\n".join(lines))
    task = {
        "task": "endings",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(client.folder / "endings.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_target": "gold",
        "doc_to_choice": "endings",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (client.folder / "endings.yaml").write_text(json.dumps(task))
    program = pypi("lm-eval[api]", "transformers") / "bin" / "lm-eval"
    with running_server(tmp_path, nodes=2) as demo, recording_proxy(demo.url) as proxy:
        client.proxy = proxy
        arguments = f"model={DEMO.name},base_url={proxy.url}/v1/completions,tokenizer={DEMO}"
        client.run(
            *(program, "run", "--model", "local-completions", "--tasks", "endings"),
            *("--model_args", f"{arguments},num_concurrent=2", "--include_path", "."),
            *("--output_path", "report", "--log_samples"),
        )
    client.check("/v1/completions", at_least=7)
    (path,) = (client.folder / "report").glob("*/samples_endings_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    model, tokenizer = mlx_lm.load(str(DEMO))[:2]
    for sample, question in zip(samples, questions, strict=True):
        context = tokenizer.encode(question["context"])
        for answer, ending in zip(sample["filtered_resps"], question["endings"], strict=True):
            whole = tokenizer.encode(question["context"] + ending)
            expected = _logprob_of(model, whole[: len(context)], whole[len(context) :])
            assert float(answer[0]) == pytest.approx(expected, abs=5e-3)


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
    path, key = f"{program.parent}:{os.environ['PATH']}", "sk-local"
    variables = {"PATH": path, "LITELLM_MASTER_KEY": key}  # without a key it does not start
    with (
        running(client, f"{url}/health/liveliness", program, *options, **variables),
        httpx.Client(base_url=url, timeout=120, headers={"authorization": f"Bearer {key}"}) as http,
    ):
        messages = [{"role": "user", "content": "play:weather"}]
        body = {"model": "house", "messages": messages, "max_tokens": 100}
        chat = http.post("/v1/chat/completions", json=body).json()
        assert chat["choices"][0]["message"]["content"] == "It is sunny in Paris."
        answer = http.post("/v1/messages", json=body).json()
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
