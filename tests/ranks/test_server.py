"""The HTTP server as clients see it: real ranks, real sockets, OpenAI's own client."""

import contextlib
import http.client
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import numpy as np
import openai
import pytest
from mlx_lm.utils import load_model

import cenacle
from cenacle.errors import InputError
from cenacle.net import bind
from cenacle.text.tokenizer import ChatTokenizer
from support.http import HTTP
from support.polling import wait_until

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
END = json.loads((DEMO / "config.json").read_text())["eos_token_id"]
SUM: Any = [{"role": "user", "content": "What is 12 + 30?"}]
SECRET = "xyzzy-plugh"  # must not appear in any log
DEADLINE_S = 120.0  # for anything to happen on a busy machine
# An answer that continues until the context is full.
ENDLESS: dict[str, Any] = {"temperature": 0, "logit_bias": {str(END): -100}}

PROGRAM = """
import socket, sys
import cenacle
from cenacle.net import bind
from cenacle.server.http_server import ServerOptions, serve
from cenacle.server.limits import Limits

sock = bind(port=0)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # fills up when a client does not read
how = {"speculative": "always" if "always" in sys.argv else "auto"}
with cenacle.load(
    sys.argv[2], int(sys.argv[1]), recover="recover" in sys.argv, **how
) as model:
    limits = Limits(body_timeout_s=2, head_timeout_s=2, write_timeout_s=2)
    serve(model, sock, lambda url: print(url, flush=True), ServerOptions(limits))
print("ended", flush=True)
"""


@dataclass
class Server:
    url: str
    process: "subprocess.Popen[str]"
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0, timeout=300)

    def health(self) -> tuple[int, dict[str, Any]]:
        answer = HTTP.get(f"{self.url}/health", timeout=300)
        return answer.status_code, answer.json()

    def post(self, path: str = "chat/completions", **fields: Any) -> httpx.Response:
        return HTTP.post(f"{self.url}/v1/{path}", timeout=300, **fields)

    def busy(self) -> int:
        data = self.health()[1]
        return data["running"] + data["waiting"]


@contextlib.contextmanager
def server(log: Path, nodes: int, *how: str, model: Path = DEMO) -> Iterator[Server]:
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(nodes), str(model), *how],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            with selectors.DefaultSelector() as waiting:
                waiting.register(process.stdout, selectors.EVENT_READ)
                assert waiting.select(timeout=DEADLINE_S), "the server did not start"
            url = process.stdout.readline().strip()
            assert url.startswith("http://"), log.read_text()
            yield Server(url, process, log)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two ranks."""
    with server(tmp_path_factory.mktemp("pair") / "log", 2) as running:
        yield running


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with one rank: faster, for what does not depend on the group."""
    with server(tmp_path_factory.mktemp("single") / "log", 1) as running:
        yield running


@pytest.fixture(scope="module")
def client(pair: Server) -> Iterator[openai.OpenAI]:
    with pair.client() as made:
        yield made


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# Requests


def test_models_and_health(pair: Server, client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["demo_model"]
    assert client.models.retrieve("demo_model").owned_by == "cenacle"
    with pytest.raises(openai.NotFoundError, match="demo_model"):
        client.models.retrieve("other/model")
    status, health = pair.health()
    assert status == 200
    assert (health["status"], health["model"], health["nodes"]) == ("ok", "demo_model", 2)
    assert [r["rank"] for r in health["ranks"]] == [0, 1]
    assert all(running(r["pid"]) and r["device"] for r in health["ranks"])
    assert (health["running"], health["waiting"]) == (0, 0)


def test_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo_model", messages=SUM, temperature=0)
    choice = answer.choices[0]
    assert choice.message.content == "42"
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert abs(answer.created - time.time()) < 60
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3  # with the one that ends it
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 3


def test_a_chat_in_chunks(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="demo_model",
        messages=SUM,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    *first, last, counted = chunks
    assert first[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in first) == "42"
    assert {c.choices[0].finish_reason for c in first} == {None}
    assert last.choices[0].finish_reason == "stop"
    assert last.choices[0].delta.content is None
    assert counted.choices == []
    assert counted.usage is not None
    assert counted.usage.completion_tokens == 3
    assert len({(c.id, c.created, c.model, c.system_fingerprint) for c in chunks}) == 1


def test_the_bytes_of_a_stream(pair: Server) -> None:
    answer = pair.post(json={"messages": SUM, "temperature": 0, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(e.removeprefix("data: ")) for e in events[:-2]]
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert all("usage" not in c for c in chunks)


def test_completions(client: openai.OpenAI) -> None:
    rendered = "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    answer = client.completions.create(model="demo_model", prompt=rendered, temperature=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("42", "stop")
    assert (answer.object, answer.id[:5]) == ("text_completion", "cmpl-")
    two = client.completions.create(
        model="demo_model", prompt=[rendered, "abc"], temperature=0, max_tokens=2
    )
    assert [c.index for c in two.choices] == [0, 1]
    assert (two.choices[0].text, two.choices[0].finish_reason) == ("42", "length")
    with client.completions.create(
        model="demo_model", prompt=[5, 6, 7], stream=True, **ENDLESS
    ) as stream:
        chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert {c.object for c in chunks} == {"text_completion"}
    whole = client.completions.create(model="demo_model", prompt=[5, 6, 7], **ENDLESS)
    assert whole.choices[0].text == "".join(c.choices[0].text for c in chunks)
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 16)


def test_a_seed_gives_the_same_text_and_choices_differ(client: openai.OpenAI) -> None:
    def ask(n: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model="demo_model",
            messages=SUM,
            temperature=2,
            max_tokens=12,
            seed=5,
            n=n,
            logit_bias={str(END): -100},
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 12 * n
        return [c.message.content for c in answer.choices]

    alone, several = ask(1), ask(3)
    assert alone[0] == several[0]
    assert len(set(several)) == 3


def test_a_stop_string_ends_the_answer_before_it(pair: Server, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo_model", messages=SUM, temperature=0, stop=["2"]
    )
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("4", "stop")
    wait_until(lambda: pair.busy() == 0)


def test_min_tokens_and_an_ignored_end(pair: Server) -> None:
    for path, prompt in (("chat/completions", {"messages": SUM}), ("completions", {"prompt": "a"})):
        counts = []
        for limits in ({"ignore_eos": True}, {"min_tokens": 16}, {"min_tokens": 16, "stop": [" "]}):
            answer = pair.post(path, json={**prompt, "temperature": 0, "max_tokens": 16, **limits})
            assert answer.status_code == 200, answer.text
            counts.append(answer.json()["usage"]["completion_tokens"])
            assert answer.json()["choices"][0]["finish_reason"] == "length"
        assert counts == [16, 16, 16]
        refused = pair.post(path, json={**prompt, "max_tokens": 4, "min_tokens": 5})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "min_tokens"


def test_every_chunk_counts_tokens_if_asked(pair: Server) -> None:
    def usages(**options: bool) -> list[Any]:
        answer = pair.post(
            json={"messages": SUM, "temperature": 0, "stream": True, "stream_options": options}
        )
        events = [e.removeprefix("data: ") for e in answer.text.split("\n\n")[:-2]]
        return [json.loads(event).get("usage", "none") for event in events]

    *during, last = usages(include_usage=True, continuous_usage_stats=True)
    assert all(usage["prompt_tokens"] == last["prompt_tokens"] > 0 for usage in during)
    counts = [usage["completion_tokens"] for usage in [*during, last]]
    assert (counts[0], counts[-2:]) == (0, [3, 3])
    assert counts == sorted(counts)
    assert all(u["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"] for u in during)
    assert set(usages(include_usage=True)[:-1]) == {None}
    assert set(usages(include_usage=False, continuous_usage_stats=True)) == {"none"}


def test_concurrent_streams_give_the_same_texts_as_single_ones(client: openai.OpenAI) -> None:
    questions = ["What is 12 + 30?", "Who are you? Tell me more."]

    def ask(at: int) -> str:
        with client.chat.completions.create(
            model="demo_model",
            messages=[{"role": "user", "content": questions[at]}],
            temperature=0,
            max_tokens=24,
            logit_bias={str(END): -100},
            stream=True,
        ) as stream:
            return "".join(c.choices[0].delta.content or "" for c in stream)

    alone = [ask(0), ask(1)]
    together = ["", ""]

    def keep(at: int) -> None:
        together[at] = ask(at)

    threads = [threading.Thread(target=keep, args=(at,)) for at in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert together == alone
    assert all(len(text) >= 20 for text in alone)


# Refusals


def refused(answer: httpx.Response) -> tuple[int, str | None, str | None]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["param"], error["code"]


def test_invalid_bodies_are_refused(single: Server) -> None:
    for body in (b"{", b"[]", b"\xff", b""):
        assert refused(single.post(content=body)) == (400, None, "invalid_body")
    many = {"messages": [{"role": "user", "content": "1 + 1 " * 1000}]}
    assert refused(single.post(json=many)) == (400, "messages", "context_length_exceeded")
    crowd = single.post(json={"messages": [{"role": "user", "content": ""}] * 10_001})
    assert refused(crowd) == (400, "messages", "invalid_value")
    assert "10000 messages" in crowd.text
    ids = single.post("completions", json={"prompt": [1] * 1024})
    assert refused(ids) == (400, "prompt", "context_length_exceeded")
    ids = single.post("completions", json={"prompt": [384]})
    assert refused(ids) == (400, "prompt", "invalid_value")
    empty = single.post(json={"messages": []})
    assert refused(empty) == (400, "messages", "invalid_value")
    negative = single.post(json={"messages": SUM, "max_tokens": -2})
    assert refused(negative) == (400, "max_tokens", "invalid_value")
    surrogate = single.post(content=b'{"messages": [], "\\ud800": 1}')
    assert surrogate.status_code == 400


def test_the_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="demo_model") as caught:
        client.chat.completions.create(model="gpt-4o", messages=SUM)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="demo_model", messages=SUM, modalities=["audio"])
    assert (refusal.value.param, refusal.value.code) == ("modalities", "unsupported_parameter")


def test_unknown_paths_and_methods_are_refused(single: Server) -> None:
    wrong = HTTP.get(f"{single.url}/v1/chat/completions")
    assert refused(wrong) == (405, None, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    assert refused(single.post("models", json={})) == (405, None, "method_not_allowed")
    other = single.post("embeddings", json={})
    assert refused(other) == (404, None, "unknown_url")
    assert "generates text and has no embedding model" in other.text
    assert "has no" not in single.post("nothing", json={}).text


def test_a_body_that_is_too_large(single: Server) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(12):
            yield b" " * 1_000_000

    expected = (413, None, "body_too_large")
    assert refused(single.post(content=b" " * 11_000_000)) == expected
    assert refused(single.post(content=pieces())) == expected  # chunked: no length is declared
    with socket.create_connection(single.address, timeout=300) as sock:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n"
        )
        sock.sendall(head + b"Expect: 100-continue\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_stalled_clients_are_disconnected(single: Server) -> None:
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    body = b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"a'
    with contextlib.ExitStack() as opened:

        def connect() -> socket.socket:
            return opened.enter_context(socket.create_connection(single.address, timeout=300))

        silent, in_head, in_next_head, in_body = (connect() for _ in range(4))
        in_head.sendall(b"POST /v1/chat/comp")
        in_next_head.sendall(health)
        answer = b""
        while not answer.endswith(b"}"):  # head and body may come in two pieces
            answer += in_next_head.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 ")
        in_next_head.sendall(health[:8])
        in_body.sendall(body)
        began = time.monotonic()
        for sock in (silent, in_head, in_next_head):
            assert read_all(sock) == b""
        assert read_all(in_body).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - began < DEADLINE_S


def read_all(sock: socket.socket) -> bytes:
    """All data until the server closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            data += piece
    return data


# Disconnects


def test_disconnecting_from_a_stream_cancels_its_request(
    pair: Server, client: openai.OpenAI
) -> None:
    stream = client.chat.completions.create(
        model="demo_model", messages=SUM, stream=True, **ENDLESS
    )
    for _ in range(5):
        next(stream)
    assert pair.busy() == 1
    stream.close()
    wait_until(lambda: pair.busy() == 0)


def test_disconnecting_before_the_response_cancels_its_requests(pair: Server) -> None:
    host, port = pair.address
    connection = http.client.HTTPConnection(host, port, timeout=300)
    body = json.dumps({"messages": SUM, "n": 2, **ENDLESS})
    connection.request("POST", "/v1/chat/completions", body)
    wait_until(lambda: pair.busy() == 2)
    connection.close()
    wait_until(lambda: pair.busy() == 0)


# Log-probabilities of prompts


@pytest.fixture(scope="module")
def score() -> Callable[[list[int]], Any]:
    """Log-probabilities of what follows each token of a text, by mlx-lm's own model."""
    model, _ = load_model(DEMO)

    def score(tokens: list[int]) -> Any:
        logits = model(mx.array([tokens]))[0].astype(mx.float32)
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    return score


def lm_eval_loglikelihood(choice: dict[str, Any], context_tokens: int) -> tuple[float, bool]:
    """As lm-eval's local-completions reads it from an echo with one generated token."""
    logprobs = choice["logprobs"]
    values = logprobs["token_logprobs"][context_tokens:-1]
    best = logprobs["top_logprobs"][context_tokens:-1]
    greedy = all(value == max(top.values()) for value, top in zip(values, best, strict=True))
    return sum(values), greedy


def test_loglikelihoods_are_those_of_the_model(pair: Server, score: Any) -> None:
    tokenizer = ChatTokenizer(DEMO, {})
    question = "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    context = tokenizer.encode(question)
    endings = ["42<|im_end|>", "42", "7 and more than that, of course", "The answer is 43."]
    prompts = [[*context, *tokenizer.encode(ending)] for ending in endings]
    body = {"echo": True, "logprobs": 1, "temperature": 0, "seed": 1234, "max_tokens": 1}
    together = pair.post("completions", json={"prompt": prompts, **body}).json()
    alone = [pair.post("completions", json={"prompt": [p], **body}) for p in prompts]
    for at, prompt in enumerate(prompts):
        choice = together["choices"][at]
        assert choice["index"] == at
        ending = prompt[len(context) :]
        rows = score(prompt)[len(context) - 1 : -1]
        expected = sum(row[token] for row, token in zip(rows, ending, strict=True))
        is_greedy = all(row.argmax() == token for row, token in zip(rows, ending, strict=True))
        assert len(choice["logprobs"]["tokens"]) == len(prompt) + 1
        for one in (choice, alone[at].json()["choices"][0]):
            value, greedy = lm_eval_loglikelihood(one, len(context))
            assert (value, greedy) == (pytest.approx(expected, abs=5e-3), is_greedy)
    assert lm_eval_loglikelihood(together["choices"][0], len(context))[1], "the right answer"


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_an_echo_has_the_tokens_of_its_text(pair: Server, max_tokens: int) -> None:
    prompt = "Who are you? \N{GRINNING FACE} Tell me"
    body = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": max_tokens}
    body |= {"ignore_eos": True}
    (choice,) = pair.post("completions", json={**body, "temperature": 0}).json()["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith(prompt)
    assert choice["finish_reason"] == "length"
    assert (choice["text"] == prompt) == (not max_tokens)
    assert logprobs["token_logprobs"][0] is None is logprobs["top_logprobs"][0]
    assert all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"][1:])
    values = zip(logprobs["top_logprobs"][1:], logprobs["token_logprobs"][1:], strict=True)
    assert all(value in top.values() for top, value in values)
    offsets = logprobs["text_offset"]
    for token, begin, end in zip(
        logprobs["tokens"], offsets, [*offsets[1:], len(choice["text"])], strict=True
    ):
        assert token.startswith("bytes:") or choice["text"][begin:end] == token
    streamed = pair.post("completions", json={**body, "temperature": 0, "stream": True}).text
    chunks = [json.loads(e.removeprefix("data: ")) for e in streamed.split("\n\n")[:-2]]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(c["text"] for c in choices) == choice["text"]
    for name, values in logprobs.items():
        got = [value for c in choices if c["logprobs"] for value in c["logprobs"][name]]
        if name == "token_logprobs":
            assert got[1:] == pytest.approx(values[1:], abs=5e-3)
        elif name != "top_logprobs":
            assert got == values


def test_prompt_logprobs_and_nothing_generated(pair: Server) -> None:
    body = {"prompt": [[5, 6, 7], [8]], "max_tokens": 0, "prompt_logprobs": 2}
    answer = pair.post("completions", json=body).json()
    first, second = (choice["prompt_logprobs"] for choice in answer["choices"])
    assert first[0] is None
    assert "6" in first[1]
    assert "7" in first[2]
    assert second == [None]
    assert [choice["text"] for choice in answer["choices"]] == ["", ""]
    assert answer["usage"]["completion_tokens"] == 0
    chat = pair.post(json={"messages": SUM, "max_tokens": 1, "prompt_logprobs": 0}).json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert {len(scores) for scores in chat["prompt_logprobs"][1:]} == {1}


def half_closed(server: Server, version: str = "1.1", **body: Any) -> socket.socket:
    """A client that has sent a request and will send no more."""
    data = json.dumps({"messages": SUM, "temperature": 0, **body}).encode()
    head = f"POST /v1/chat/completions HTTP/{version}\r\nHost: localhost\r\n"
    sock = socket.create_connection(server.address, timeout=DEADLINE_S)
    sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    sock.shutdown(socket.SHUT_WR)
    return sock


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("max_tokens", [5, 200])
def test_a_half_closed_client_gets_its_answer(pair: Server, version: str, max_tokens: int) -> None:
    for stream in (False, True):
        body = {"stream": stream, "ignore_eos": True, "max_tokens": max_tokens}
        with half_closed(pair, version, **body) as sock:
            head, _, answer = read_all(sock).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        if stream:
            assert b"data: [DONE]" in answer
        else:
            assert json.loads(answer)["usage"]["completion_tokens"] == max_tokens
    with half_closed(pair, version, max_tokens=-2) as sock:
        assert read_all(sock).startswith(b"HTTP/1.1 400 Bad Request\r\n")


@pytest.mark.parametrize("stream", [False, True])
def test_a_half_closed_client_that_goes_away_is_noticed(pair: Server, stream: bool) -> None:
    def aborted() -> float:
        lines = HTTP.get(f"{pair.url}/metrics", timeout=300).text.splitlines()
        name = 'cenacle_request_outcome_total{finished_reason="abort"} '
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    before = aborted()
    sock = half_closed(pair, stream=stream, **ENDLESS)
    wait_until(lambda: pair.busy() == 1)
    sock.close()
    wait_until(lambda: pair.busy() == 0)
    assert aborted() == before + 1, "it was not answered to its end"


def test_half_a_request_is_no_request(single: Server) -> None:
    with socket.create_connection(single.address, timeout=DEADLINE_S) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
        )
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b""


def test_a_client_that_does_not_read_is_disconnected(single: Server) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(300)
        sock.connect(single.address)
        body = json.dumps({"messages": SUM, "n": 8, "stream": True, **ENDLESS}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: single.busy() == 8)
        wait_until(lambda: single.busy() == 0)
        assert not read_all(sock).endswith(b"0\r\n\r\n")  # cut, not completed


def test_no_text_is_logged(single: Server) -> None:
    single.post(json={"messages": [{"role": "user", "content": SECRET}], "max_tokens": 2})
    single.post(json={"messages": [{"role": SECRET, "content": SECRET}], SECRET: 1})
    single.post(content=f'{{"{SECRET}'.encode())
    log = single.log.read_text()
    assert SECRET not in log
    assert "Traceback" not in log
    assert "internal error" not in log


# Failures and shutdown


def test_answers_resume_after_a_rank_is_killed(tmp_path: Path) -> None:
    question: Any = {"messages": SUM, **ENDLESS, "temperature": 0.8, "seed": 3, "max_tokens": 300}
    with server(tmp_path / "log", 2, "recover") as shaken:
        undisturbed = shaken.post(json=question).json()["choices"][0]["message"]["content"]
        pids = [r["pid"] for r in shaken.health()[1]["ranks"]]
        got: list[str] = []

        def ask() -> None:
            got.append(shaken.post(json=question).json()["choices"][0]["message"]["content"])

        threads = [threading.Thread(target=ask) for _ in range(2)]
        threads[0].start()
        with shaken.client() as client:
            stream = client.chat.completions.create(model="demo_model", stream=True, **question)
            pieces = [next(stream).choices[0].delta.content for _ in range(5)]
            os.kill(pids[1], signal.SIGKILL)
            wait_until(lambda: shaken.health()[0] == 503)
            status, health = shaken.health()
            assert (status, health["status"], health["rank"]) == (503, "recovering", 1)
            assert health["reason"].startswith(f"rank 1 (process {pids[1]}) was killed by SIGKILL")
            assert 0 <= health["since_s"] < DEADLINE_S
            threads[1].start()  # waits instead of failing
            pieces += [chunk.choices[0].delta.content for chunk in stream]
        assert "".join(piece or "" for piece in pieces) == undisturbed
        for thread in threads:
            thread.join(DEADLINE_S)
        assert got == [undisturbed] * 2
        status, health = shaken.health()
        assert (status, health["status"], health["recoveries"]) == (200, "ok", 1)
        assert not any(running(pid) for pid in pids)
        shaken.process.send_signal(signal.SIGINT)
        assert shaken.process.wait(DEADLINE_S) == 0
        assert not any(running(r["pid"]) for r in health["ranks"])
        assert "epoch 1 works" in shaken.log.read_text()


def test_without_recovery_a_killed_rank_fails_all_requests(tmp_path: Path) -> None:
    with server(tmp_path / "log", 2) as doomed, doomed.client() as client:
        pids = [r["pid"] for r in doomed.health()[1]["ranks"]]
        waiting: list[httpx.Response] = []

        def post_without_stream() -> None:
            waiting.append(doomed.post(json={"messages": SUM, **ENDLESS}))

        thread = threading.Thread(target=post_without_stream)
        thread.start()
        wait_until(lambda: doomed.busy() == 1)
        with client.chat.completions.create(
            model="demo_model", messages=SUM, stream=True, **ENDLESS
        ) as stream:
            for _ in range(5):
                next(stream)
            os.kill(pids[1], signal.SIGKILL)
            with pytest.raises(openai.APIError, match="rank 1"):
                list(stream)
        thread.join(DEADLINE_S)
        assert refused(waiting[0]) == (503, None, "group_failed")
        status, health = doomed.health()
        assert (status, health["status"], health["rank"]) == (503, "failed", 1)
        assert "rank 1" in health["reason"]
        wait_until(lambda: not any(running(pid) for pid in pids))
        for _ in range(2):  # the server keeps running and refusing
            with pytest.raises(openai.InternalServerError, match="rank 1") as caught:
                client.chat.completions.create(model="demo_model", messages=SUM)
            assert caught.value.status_code == 503
        doomed.process.send_signal(signal.SIGINT)
        assert doomed.process.wait(DEADLINE_S) == 0


def test_a_signal_stops_the_server_and_its_requests(tmp_path: Path) -> None:
    with server(tmp_path / "log", 1) as ending, ending.client() as client:
        pids = [r["pid"] for r in ending.health()[1]["ranks"]]
        with client.chat.completions.create(
            model="demo_model", messages=SUM, stream=True, **ENDLESS
        ) as stream:
            for _ in range(5):
                next(stream)
            ending.process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
        assert ending.process.wait(DEADLINE_S) == 0
        assert ending.process.stdout is not None
        assert ending.process.stdout.read().strip() == "ended"
        assert not any(running(pid) for pid in pids)
        assert ending.log.read_text() == ""


# The socket


def test_a_port_in_use_is_reported_before_loading() -> None:
    with bind(port=0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is in use") as caught:
            bind(port=port)
    assert "--port" in str(caught.value)


def test_wrong_addresses_are_refused() -> None:
    with pytest.raises(InputError, match="192") as caught:
        bind("192.0.2.1", 0)
    assert caught.value.field == "host"
    with pytest.raises(InputError, match="65536"):
        bind(port=65536)
