"""Two models behind one address on two nodes of a cluster, of which one can be loaded at a time."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest

from cenacle import net
from cenacle.model.synth import synth
from support.http import HTTP
from support.serving import DEADLINE_S, RunningServer, wait_for_health

MODELS = ("mixtral", "olmoe")
LENGTH = 400
Agent: TypeAlias = "subprocess.Popen[bytes]"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[RunningServer, Agent, Callable[[], Agent]]]:
    """The head's server, the agent of the other node, and what starts that again."""
    for family in MODELS:
        synth(tmp_path / "models" / family, family=family)
    log, (port, listen) = tmp_path / "log", net.free_ports(2)
    with ExitStack() as stack:
        output = stack.enter_context(log.open("w"))

        def start(name: str, *command: str) -> Agent:
            environment = {"CENACLE_HOME": str(tmp_path / name), "PYTHONUNBUFFERED": "1"}
            process = subprocess.Popen(
                [sys.executable, "-m", "cenacle", *command, "--name", name, "--no-mdns"],
                stdout=output,
                stderr=output,
                env={**os.environ, **environment},
            )
            stack.callback(process.wait, DEADLINE_S)
            stack.callback(process.terminate)
            return process

        options = ("--models-dir", str(tmp_path / "models"), "-n", "2", "--no-verify")
        options += ("--node-timeout", "10m")  # the other node starts when it can
        # Slow links: an answer takes long enough to be disturbed, and not a processor's time.
        options += ("--latency-ms", "5", "--speculative", "off")
        addresses = ("--listen", f"127.0.0.1:{listen}", "--port", str(port))
        head = start("head", "up", *options, *addresses)
        token = re.compile(r"cenacle join (\S+) --token (\S+)")
        ends = time.monotonic() + DEADLINE_S
        while (line := token.search(log.read_text())) is None:
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.05)
        other = start("other", "join", line[1], "--token", line[2])
        url = f"http://127.0.0.1:{port}"
        wait_for_health(url, head, log)
        yield RunningServer(url, head, log), other, lambda: start("other", "join", line[1])


def complete(server: RunningServer, model: str, **parameters: Any) -> httpx.Response:
    body = {"model": model, "prompt": "a b c", "temperature": 0, "max_tokens": 6, **parameters}
    return server.post("/v1/completions", body)


def states(server: RunningServer) -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in server.health()["models"]}


def test_models_change_places_on_a_cluster_while_a_node_leaves_and_returns(cluster):
    server, other, restart_other = cluster
    names = [*MODELS, *MODELS]
    with ThreadPoolExecutor(len(names)) as clients:
        answers = list(clients.map(lambda name: complete(server, name), names))
    assert [answer.status_code for answer in answers] == [200] * 4, [a.text for a in answers]
    texts = [answer.json()["choices"][0]["text"] for answer in answers]
    assert texts[:2] == texts[2:]
    assert texts[0] != texts[1]
    assert sorted(row["state"] for row in states(server).values()) == ["loaded", "unloaded"]

    rows = HTTP.get(f"{server.url}/cluster", timeout=DEADLINE_S).json()["ranks"]
    for link in (row["link"] for row in rows):
        assert 0 < link["latency_s"] < 1 < link["bytes_per_s"]
        assert link["sent_bytes"] > 0

    (loaded,) = (name for name, row in states(server).items() if row["state"] == "loaded")
    with ThreadPoolExecutor(1) as clients:
        long = clients.submit(complete, server, loaded, max_tokens=LENGTH, ignore_eos=True)
        ends = time.monotonic() + DEADLINE_S
        while not states(server)[loaded]["running"]:
            assert time.monotonic() < ends, server.log.read_text()
            assert not long.done(), server.log.read_text()
            time.sleep(0.1)
        other.send_signal(signal.SIGKILL)
        assert long.result().json()["usage"]["completion_tokens"] == LENGTH
    for name in reversed(MODELS):
        answer = complete(server, name)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == texts[MODELS.index(name)]

    restart_other()
    ends = time.monotonic() + DEADLINE_S
    while "the group is formed again with other" not in server.log.read_text():
        assert time.monotonic() < ends, server.log.read_text()
        time.sleep(0.05)
    for name, text in zip(MODELS, texts, strict=False):
        answer = complete(server, name)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == text
    assert "Traceback" not in server.log.read_text()
