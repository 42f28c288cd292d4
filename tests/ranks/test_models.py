"""Three small models and two that cannot be loaded, on two nodes, in memory for two of them."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from cenacle.model.synth import synth
from support.polling import wait_until
from support.serving import RunningServer, running_server

SMALL = ("mixtral", "olmoe", "qwen3_moe")
LENGTH = 400
MEMORY_GB = 1.2  # two ranks of a small model plan with 0.55


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("models")
    for family in SMALL:
        synth(folder / family, family=family)
    config = json.loads((folder / "qwen3_moe" / "config.json").read_text())
    # A long context's cache takes more than there may be.
    config |= {"num_key_value_heads": 128, "num_attention_heads": 128, "head_dim": 128}
    config |= {"max_position_embeddings": 8192}
    shape = folder / "shape.json"
    shape.write_text(json.dumps(config))
    synth(folder / "large", config=shape)
    synth(folder / "broken", family="mixtral")
    options = ("--models-dir", str(folder), "--models-memory-gb", str(MEMORY_GB))
    # Slow links: an answer takes long enough to be disturbed, and not a processor's time.
    options += ("--latency-ms", "5", "--speculative", "off")
    with running_server(folder, *options, "--idle-unload", "8s", model=None, nodes=2) as running:
        (folder / "broken" / "model.safetensors").unlink()
        yield running


def complete(server: RunningServer, model: str, **parameters: Any) -> httpx.Response:
    body = {"model": model, "prompt": "a b c", "temperature": 0, "max_tokens": 6, **parameters}
    return server.post("/v1/completions", body)


def rows(server: RunningServer) -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in server.health()["models"]}


def test_models_take_turns_and_every_request_is_answered(server: RunningServer) -> None:
    assert {row["state"] for row in rows(server).values()} == {"unloaded"}
    names = [*SMALL, "large", *SMALL, "broken", *SMALL]
    with ThreadPoolExecutor(len(names)) as clients:
        answers = list(clients.map(lambda name: complete(server, name), names))
    texts: dict[str, set[str]] = {name: set() for name in SMALL}
    for name, answer in zip(names, answers, strict=True):
        if name in SMALL:
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == name
            texts[name].add(answer.json()["choices"][0]["text"])
        else:
            assert answer.status_code == 503
            error = answer.json()["error"]["message"]
            assert error.startswith(f"{name} is not loaded: ")
            assert ("it needs" in error) == (name == "large"), error
    assert [len(found) for found in texts.values()] == [1, 1, 1]
    assert len(set.union(*texts.values())) == 3
    after = rows(server)
    assert {after[name]["state"] for name in ("large", "broken")} == {"failed"}
    held = sum(row.get("promised_bytes", 0) for row in after.values())
    assert held <= MEMORY_GB * 1e9


def test_a_rank_of_one_model_is_lost_while_another_answers(server: RunningServer) -> None:
    loaded = [name for name in SMALL if rows(server)[name]["state"] == "loaded"]
    lost, other = sorted(SMALL, key=lambda name: name not in loaded)[:2]
    with ThreadPoolExecutor(2) as clients:
        long = clients.submit(complete, server, lost, max_tokens=LENGTH, ignore_eos=True)

        def find_rank() -> int | None:
            row = rows(server)[lost]
            return row["pids"][1] if row["running"] and "pids" in row else None

        os.kill(wait_until(find_rank), signal.SIGKILL)
        assert complete(server, other).status_code == 200
        assert long.result().json()["usage"]["completion_tokens"] == LENGTH
    log = server.log.read_text()
    assert (log.count("epoch 0 failed"), log.count("epoch 1 works")) == (1, 1)


def test_idle_models_are_unloaded_and_no_process_is_left(server: RunningServer) -> None:
    wait_until(lambda: all(row["state"] != "loaded" for row in rows(server).values()))
    wait_until(lambda: all(row["state"] in ("unloaded", "failed") for row in rows(server).values()))
    serving = psutil.Process(server.health()["pid"])
    # Those of grammars and images are started once for the server.
    left = [" ".join(child.cmdline()) for child in serving.children(recursive=True)]
    assert [line for line in left if "ranks" in line or "text" in line] == []
    assert "Traceback" not in server.log.read_text()
