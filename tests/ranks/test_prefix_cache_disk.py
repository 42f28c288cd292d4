"""Cached prefixes survive a restart: real files, real servers.

The same on one node and on two; every output equals that of a group without a cache.
"""

import hashlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

import cenacle
from cenacle.scheduler.disk_index import PAGE_TOKENS
from support.http import HTTP
from support.polling import wait_until

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
END = json.loads((DEMO / "config.json").read_text())["eos_token_id"]
LENGTH = 24
ENDLESS = 200  # tokens of an output without a stop token


def user(text):
    return {"role": "user", "content": text}


def about(name, question):
    text = f"You are {name}. " + f"{name} is patient, answers briefly and likes otters. " * 14
    return [{"role": "system", "content": text}, user(question)]


FIRST = about("Ada", "What is 12 + 30?")
SECOND = [*FIRST, {"role": "assistant", "content": "42"}, user("Who are you?")]
OTHER = about("Ada", "What is 7 + 8?")
NAMES = ("Bob", "Cleo", "Dan", "Eve", "Flo")  # whose pages the tests damage
PROMPTS = {name: about(name, "Who are you?") for name in NAMES}


def submit(model, messages, length=LENGTH):
    """Submit a request; a queue of its events."""
    events = queue.Queue()
    request = model.request(messages, length)
    if length == ENDLESS:
        request = replace(request, stop_tokens=())
    model.group.submit(request, events.put)
    return events


def collect(events):
    """The output, the number of cached prompt tokens, and how many of those came from disk."""
    tokens, cached, read = [], 0, 0
    while True:
        event = events.get(timeout=300)
        if isinstance(event, Exception):
            raise event
        tokens.append(event.token)
        cached, read = cached + event.cached_tokens, read + event.disk_tokens
        if event.finish is not None:
            return tokens, cached, read


@pytest.fixture(scope="module")
def plain():
    """Without a cache: texts by conversation, tokens by name, and those of an endless output."""
    with cenacle.load(str(DEMO), prefix_cache_gb=0) as model:
        texts = {json.dumps(c): model.generate(c, LENGTH).text for c in (FIRST, SECOND, OTHER)}
        tokens = {name: collect(submit(model, prompt))[0] for name, prompt in PROMPTS.items()}
        return texts, tokens, collect(submit(model, PROMPTS["Flo"], ENDLESS))[0]


# Over HTTP


@contextmanager
def serving(folder, nodes, *options):
    """`cenacle serve`: its address."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    log = folder / "log"
    command = [sys.executable, "-m", "cenacle", "serve", "-m", str(DEMO), "-n", str(nodes)]
    command += ["--port", str(port), "--prefix-cache-dir", str(folder / "pages"), *options]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stderr=errors)
        try:
            deadline = time.monotonic() + 90
            while "serving demo_model at" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(120)
            finally:
                process.kill()


def body(messages, **fields):
    defaults = {"model": "demo_model", "messages": messages, "temperature": 0}
    return {**defaults, "max_tokens": LENGTH, **fields}


def complete(url, messages):
    """The text, and the number of cached prompt tokens."""
    answer = HTTP.post(f"{url}/v1/chat/completions", json=body(messages)).json()
    details = answer["usage"]["prompt_tokens_details"]
    return answer["choices"][0]["message"]["content"], details["cached_tokens"]


def hits(url):
    """Cached tokens, and those that came from disk."""
    lines = [line.split() for line in HTTP.get(f"{url}/metrics").text.splitlines()]
    names = ("cenacle_prefix_cache_hits_total", "cenacle_prefix_cache_disk_hits_total")
    return tuple(float(value) for name in names for key, value, *_ in lines if key == name)


def test_a_server_reuses_prefixes_and_so_does_the_next_one(tmp_path, plain):
    """On two nodes; on one, the groups below read the pages of others, without HTTP."""
    nodes = 2
    first, second, other = plain[0].values()

    def pages(rank):
        return list((tmp_path / "pages").glob(f"*/rank-{rank}/*.safetensors"))

    with serving(tmp_path, nodes) as url:
        assert complete(url, FIRST) == (first, 0)
        text, cached = complete(url, SECOND)
        assert (text, cached > PAGE_TOKENS) == (second, True)
        text, shared = complete(url, OTHER)
        assert (text, PAGE_TOKENS < shared < cached) == (other, True), "the system prompt"
        assert hits(url) == (cached + shared, 0)
        wait_until(lambda: all(len(pages(rank)) == cached // PAGE_TOKENS for rank in range(nodes)))
    with serving(tmp_path, nodes) as url:
        text, cached = complete(url, OTHER)
        kept = shared // PAGE_TOKENS * PAGE_TOKENS
        assert (text, cached) == (other, kept)
        text, cached = complete(url, SECOND)
        assert (text, cached >= shared) == (second, True)
        assert hits(url) == (kept + cached, kept)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_full_queue_answers_429_with_retry_after(tmp_path):
    options = ("--max-batch-size", "1", "--max-queue", "1", "--speculative", "off")
    options += ("--prefix-cache-disk-gb", "0")
    with serving(tmp_path, 1, *options) as url, httpx.Client(timeout=300) as client:
        path = f"{url}/v1/chat/completions"
        endless = body(FIRST[1:], stream=True, logit_bias={str(END): -100}, max_tokens=980)
        with client.stream("POST", path, json=endless) as first:
            assert first.status_code == 200
            events = first.iter_raw()  # keep a reference: the request ends with it
            next(events)
            arguments = {"json": body(FIRST[1:])}
            waiting_client = threading.Thread(target=client.post, args=(path,), kwargs=arguments)
            waiting_client.start()
            wait_until(lambda: client.get(f"{url}/health").json()["waiting"] == 1)
            for endpoint in ("chat/completions", "completions", "responses", "messages"):
                payload = body(OTHER[1:])
                if endpoint == "completions":
                    payload = {"prompt": "What"}
                if endpoint == "responses":
                    payload = {"input": "What"}
                refused = client.post(f"{url}/v1/{endpoint}", json=payload)
                assert refused.status_code == 429, refused.text
                assert 1 <= int(refused.headers["retry-after"]) <= 60
                assert refused.json()["error"]["type"] == "rate_limit_error"
                assert "1 requests are waiting, expected at most 1" in refused.text
        waiting_client.join(120)
        assert not waiting_client.is_alive()
        assert client.post(path, json=body(FIRST[1:])).status_code == 200
    assert not (tmp_path / "pages").exists()


# Damage


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One folder for all groups: the pages of one are of no use to another."""
    return tmp_path_factory.mktemp("pages")


def wait_for_pages(group, count):
    wait_until(lambda: len(list(group.glob("*/*.safetensors"))) == count)


def loaded(folder, nodes):
    return cenacle.load(str(DEMO), nodes, prefix_cache_dir=str(folder), prefix_cache_disk_gb=0.5)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def shorten(path):
    os.truncate(path, path.stat().st_size // 2)


def change_owner(path):
    """As if another group had written it, and someone had moved it here."""
    data = path.read_bytes()
    owner = re.search(rb"[0-9a-f]{32}(?=/rank-)", data)
    data = data.replace(owner[0], b"f" * 32)
    start = path.name.rpartition("-")[0] + "-"
    checksum = hashlib.sha256(start.encode() + data).hexdigest()[:32]
    path.unlink()
    path.with_name(f"{start}{checksum}.safetensors").write_bytes(data)


@pytest.mark.parametrize("nodes", [1, 2])
def test_damage_is_detected_and_every_output_is_correct(nodes, store, plain, caplog):
    _, expected, endless = plain
    before, first = set(store.iterdir()), {}
    with loaded(store, nodes) as model:
        pages = {n: (len(model.request(PROMPTS[n]).tokens) - 1) // PAGE_TOKENS for n in NAMES}
        group = store / "none yet"
        for count, name in enumerate(NAMES, 1):
            assert collect(submit(model, PROMPTS[name])) == (expected[name], 0, 0)
            wait_until(lambda: set(store.iterdir()) - before)
            (group,) = set(store.iterdir()) - before
            wait_for_pages(group, nodes * sum(list(pages.values())[:count]))
            begins = set((group / f"rank-{nodes - 1}").glob("*--0-*"))
            (first[name],) = begins - set(first.values())
    flip(first["Bob"])
    shorten(first["Cleo"])
    first["Dan"].unlink()
    change_owner(first["Eve"])
    with loaded(store, nodes) as model:
        for name in NAMES[:4]:
            assert collect(submit(model, PROMPTS[name])) == (expected[name], 0, 0), name
        read = pages["Flo"] * PAGE_TOKENS
        assert collect(submit(model, PROMPTS["Flo"])) == (expected["Flo"], read, read)
        log = caplog.text
        assert f"{first['Bob']} is damaged: it was removed" in log
        assert f"{first['Cleo']} is damaged: it was removed" in log
        assert len(re.findall("belongs to another model or group: ignored", log)) == 1
        incomplete = "prefix cache: 1 pages are not on every rank and are not used"
        assert (incomplete in log) == (nodes > 1)
        assert len(caplog.records) == 3 + (nodes > 1), "one line each"
        # All pages exist again, and so does the one of another group.
        own = nodes * sum(pages.values())
        wait_for_pages(group, own + 1)

        # When a rank dies, all caches in memory are lost, but not the files.
        events = submit(model, PROMPTS["Flo"], ENDLESS)
        token = events.get(timeout=300).token
        os.kill(model.ranks.pids[-1], signal.SIGKILL)
        assert [token, *collect(events)[0]] == endless
        read = pages["Bob"] * PAGE_TOKENS
        assert collect(submit(model, PROMPTS["Bob"])) == (expected["Bob"], read, read)
        assert model.group.state.recoveries == 1
