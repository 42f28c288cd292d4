"""Three small models under requests on two nodes, in memory for two (or, on a cluster, one).

Clients ask for one answer after the other, each time from a model drawn by chance: streamed or
whole, some leave in the middle. Others ask for a model that does not fit. What must be so is
checked: every request is answered, each model gives the same text each time, what does not fit is
refused with a sentence, and when all are idle the ranks are gone and memory is back to where it was
after the first round. The last line of stdout is JSON; exit status 1 if something is not so.

    python benchmarks/models.py --seconds 600
    python benchmarks/models.py --seconds 600 --cluster
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from cenacle import net
from cenacle.model.synth import synth

SMALL = ("mixtral", "olmoe", "qwen3_moe")
MEMORY_GB = 1.2  # two ranks of a small model plan with 0.55
IDLE_S = 10
DEADLINE_S = 300.0  # for anything to happen on a busy machine
GROWN_BYTES = 30e6


def write_models(folder: Path, *, cluster: bool) -> None:
    """Three models that fit and one, `large`, that does not."""
    for family in SMALL:
        synth(folder / family, family=family)
    if cluster:
        enlarge(folder / "qwen3_moe", folder / "large")
        return
    config = json.loads((folder / "qwen3_moe" / "config.json").read_text())
    # A long context's cache takes more than there may be.
    config |= {"num_key_value_heads": 128, "num_attention_heads": 128, "head_dim": 128}
    config |= {"max_position_embeddings": 8192}
    shape = folder / "shape.json"
    shape.write_text(json.dumps(config))
    synth(folder / "large", config=shape)


def enlarge(small: Path, large: Path) -> None:
    """A copy of a model with experts of more bytes than the machine has, which are a hole."""
    shutil.copytree(small, large)
    path, config_path = large / "model.safetensors", large / "config.json"
    data = path.read_bytes()
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:begin])
    config = json.loads(config_path.read_text())
    width, factor = config["moe_intermediate_size"], 1
    experts = [name for name in header if ".experts." in name or ".switch_mlp." in name]
    size = sum(end - first for first, end in (header[n]["data_offsets"] for n in experts))
    while size * factor < 2 * psutil.virtual_memory().total:
        factor *= 2
    config_path.write_text(json.dumps(config | {"moe_intermediate_size": width * factor}))
    (large / "model.safetensors.index.json").unlink()
    kept, at = bytearray(), 0
    for name in sorted(header.keys() - {"__metadata__"}, key=lambda n: (n in experts, n)):
        tensor = header[name]
        first, end = tensor["data_offsets"]
        size = end - first
        if name in experts:
            size *= factor
            tensor["shape"] = [n * factor if n == width else n for n in tensor["shape"]]
        else:
            kept += data[begin + first : begin + end]
        tensor["data_offsets"], at = [at, at + size], at + size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + kept)
    os.truncate(path, 8 + len(text) + at)


class Server:
    """A server of the models, and the processes that belong to it."""

    def __init__(self, folder: Path, *, cluster: bool) -> None:
        self.url = f"http://127.0.0.1:{(port := net.free_ports(1)[0])}"
        self._folder, self._processes = folder, list[subprocess.Popen[bytes]]()
        models = ("--models-dir", str(folder / "models"), "--idle-unload", f"{IDLE_S}s")
        self.log = folder / "log"
        if not cluster:
            options = ("--models-memory-gb", str(MEMORY_GB), "-n", "2", "--port", str(port))
            self._start("home", "serve", *models, *options)
            return
        listen = f"127.0.0.1:{net.free_ports(1)[0]}"
        options = ("--listen", listen, "--no-mdns", "--no-verify", "-n", "2", "--port", str(port))
        self._start("home", "up", *models, *options, "--name", "head", "--node-timeout", "10m")
        pattern = re.compile(r"cenacle join (\S+) --token (\S+)")
        found = wait_until(lambda: pattern.search(self.log.read_text()), "a token")
        self._start("other", "join", found[1], "--token", found[2], "--name", "other", "--no-mdns")

    def _start(self, home: str, *command: str) -> None:
        environment = {**os.environ, "CENACLE_HOME": str(self._folder / home)}
        with self.log.open("a") as log:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "cenacle", *command],
                    stdout=log,
                    stderr=log,
                    env=environment | {"PYTHONUNBUFFERED": "1"},
                )
            )

    def health(self) -> dict[str, Any]:
        """The body of /health."""
        body: dict[str, Any] = httpx.get(f"{self.url}/health", timeout=DEADLINE_S).json()
        return body

    def wait(self) -> None:
        """Until it answers."""

        def answers() -> bool:
            assert all(p.poll() is None for p in self._processes), self.log.read_text()
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{self.url}/health", timeout=DEADLINE_S).status_code == 200
            return False

        wait_until(answers, "an answer of the server")

    def wait_idle(self) -> None:
        """Until no model is loaded."""
        states = ("unloaded", "failed")
        wait_until(
            lambda: all(row["state"] in states for row in self.health()["models"]),
            "the end of all models",
        )

    def tree(self) -> list[psutil.Process]:
        """All of its processes."""
        roots = [psutil.Process(p.pid) for p in self._processes]
        return roots + [child for root in roots for child in root.children(recursive=True)]

    def ranks(self) -> list[int]:
        """The processes of ranks."""
        return [p.pid for p in self.tree() if "cenacle.ranks.worker" in " ".join(p.cmdline())]

    def bytes(self) -> int:
        """Memory of all its processes."""
        return sum(p.memory_info().rss for p in self.tree())

    def close(self) -> None:
        """End it."""
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of a condition."""
    ends = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < ends, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.2)
    return value


class Clients:
    """What clients ask and see."""

    def __init__(self, server: Server) -> None:
        self._server, self._lock = server, threading.Lock()
        self.outcomes: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.texts: dict[str, set[str]] = {name: set() for name in SMALL}
        self.longest_s = 0.0

    def run(self, seed: int, ends_s: float) -> None:
        """One client, until the time is over."""
        rng = random.Random(seed)
        while time.monotonic() < ends_s:
            kind = rng.choices(("whole", "stream", "leave", "large"), (4, 4, 1, 1))[0]
            model = "large" if kind == "large" else rng.choice(SMALL)
            started_s = time.monotonic()
            try:
                outcome, text = self.ask(model, kind)
            except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
                outcome, text = "", None
                with self._lock:
                    self.errors[f"{kind}: {type(error).__name__}: {error}"[:200]] += 1
            with self._lock:
                self.outcomes[outcome or "error"] += 1
                self.longest_s = max(self.longest_s, time.monotonic() - started_s)
                if text is not None:
                    self.texts[model].add(text)
            time.sleep(rng.random() * 0.5)

    def ask(self, model: str, kind: str) -> tuple[str, str | None]:
        """The outcome of a request, and the text of its answer.

        Raises:
            httpx.HTTPError, ValueError: it was not answered as it must be.
        """
        url = f"{self._server.url}/v1/completions"
        body = {"model": model, "prompt": "a b c", "temperature": 0, "max_tokens": 24}
        body |= {"ignore_eos": True}
        if kind == "large":
            response = httpx.post(url, json=body, timeout=DEADLINE_S)
            if response.status_code != 503 or "large is not loaded" not in response.text:
                raise ValueError(f"expected a refusal, got {response.text[:200]}")
            return "refused", None
        if kind == "whole":
            response = httpx.post(url, json=body, timeout=DEADLINE_S)
            if response.status_code != 200:
                raise ValueError(response.text[:200])
            return "answered", response.json()["choices"][0]["text"]
        text, is_done = "", False
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=DEADLINE_S) as lines:
            for line in lines.iter_lines():
                if kind == "leave" and (text or random.random() < 0.3):
                    return "left", None
                if line == "data: [DONE]":
                    is_done = True
                elif line.startswith("data: "):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        if not is_done:
            raise ValueError("the stream broke off")
        return "answered", text


@contextlib.contextmanager
def running(folder: Path, *, cluster: bool) -> Iterator[Server]:
    """A server while it runs."""
    (folder / "models").mkdir()
    write_models(folder / "models", cluster=cluster)
    server = Server(folder, cluster=cluster)
    try:
        server.wait()
        yield server
    finally:
        server.close()


def main() -> int:
    """Run, and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--cluster", action="store_true")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="cenacle-models-") as name,
        running(Path(name), cluster=arguments.cluster) as server,
    ):
        clients = Clients(server)
        for model in SMALL:
            clients.ask(model, "whole")
        server.wait_idle()
        before = server.bytes()
        ends_s = time.monotonic() + arguments.seconds
        threads = [
            threading.Thread(target=clients.run, args=(seed, ends_s))
            for seed in range(arguments.clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        server.wait_idle()
        ranks, after = server.ranks(), server.bytes()
        rows = {row["model"]: row for row in server.health()["models"]}
        log = server.log.read_text()
    result = {
        "outcomes": clients.outcomes,
        "errors": clients.errors,
        "texts": {name: len(texts) for name, texts in clients.texts.items()},
        "longest_s": round(clients.longest_s, 1),
        "loads": {name: rows[name]["loads"] for name in SMALL},
        "unloads": {name: rows[name]["unloads"] for name in SMALL},
        "large": rows["large"]["reason"],
        "ranks_left": len(ranks),
        "grown_mb": round((after - before) / 1e6, 1),
        "tracebacks": log.count("Traceback"),
    }
    wrong = [
        name
        for name, is_wrong in {
            "a request was lost": bool(clients.errors),
            "a model gave different texts": max(result["texts"].values()) > 1,
            "nothing was answered": not clients.outcomes["answered"],
            "a rank is left": bool(ranks),
            "a model has failed": any(rows[name].get("reason") for name in SMALL),
            "a load without an end": result["loads"] != result["unloads"],
            "memory has grown": after - before > GROWN_BYTES,
            "an unexpected error": "Traceback" in log,
        }.items()
        if is_wrong
    ]
    print(json.dumps({**result, "wrong": wrong}))
    if wrong:
        print(log[-6000:], file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
