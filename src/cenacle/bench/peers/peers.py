"""Other programs on the same model shape, cores and threads.

Owns: running a peer's own benchmark or program, and reading its speeds or why it failed.
Does not know: our ranks. The user installs peers; nothing is downloaded or built here.
Invariant: every process has a timeout and none is left behind; all listen on the loopback only; a
peer that fails raises `PeerFailed` with the end of its output, so that no row is missing.
Next: `formats.py`, their model files; `measure.py`, which runs them in turn with ours.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from ... import net
from ...errors import InputError
from . import formats

START_TIMEOUT_S = 30.0  # a server must listen by then
REPORTED_CHARACTERS = 600  # of the output of a peer that failed


class PeerFailed(Exception):
    """A peer gave no speed: why, and the end of its output."""


@dataclass(frozen=True)
class PeerWorkload:
    """What is measured.

    Args:
        folder: our checkpoint.
        config: its config.json.
        nodes, threads: ours; a peer gets as many processes and threads.
        cores: the cores of each node.
        context: tokens before the first decoded one.
        tokens: to decode.
        prompt_tokens: length of the prompt whose processing is timed.
        cache_dir: folder for models in peers' formats, which are reused for the same shape.
        timeout_s: longest that one process of a peer may take.
        concurrency: numbers of requests at once; each decodes `tokens` after `context`.
    """

    folder: Path
    config: dict[str, Any]
    nodes: int
    threads: int
    cores: Sequence[Sequence[int]]
    context: int
    tokens: int
    prompt_tokens: int
    cache_dir: Path
    timeout_s: float
    concurrency: tuple[int, ...] = ()

    @property
    def all_cores(self) -> list[int]:
        """The cores of all nodes."""
        return sorted({c for cores in self.cores for c in cores})


@dataclass(frozen=True)
class PeerSpeed:
    """Tokens per second; `concurrency` by the number of requests, prompts included in the time."""

    decode: float
    prefill: float
    concurrency: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PeerVariant:
    """One way to run a peer, with its name for the table.

    Args:
        peer: the name under which the best of several variants is shown; None: not compared.
    """

    name: str
    run: Callable[[], PeerSpeed]
    peer: str | None = None


class Peer(ABC):
    """A program to compare with."""

    @abstractmethod
    def variants(self, workload: PeerWorkload) -> list[PeerVariant]:
        """The ways to run it on as many cores as ours.

        Raises:
            InputError: it cannot run this shape.
        """


def parse_peer(text: str) -> Peer:
    """The peer of an option: "llama.cpp=PATH", "ik_llama.cpp=PATH", "dllama=PATH" or "mlx-lm".

    Raises:
        InputError: an unknown name, or a missing program.
    """
    name, _, path = text.partition("=")
    if name == "mlx-lm" and not path:
        return MlxLm()
    if name == "llama.cpp" and path:
        return LlamaCpp(Path(path).expanduser())
    if name == "ik_llama.cpp" and path:
        return IkLlamaCpp(Path(path).expanduser())
    if name == "dllama" and path:
        return Dllama(Path(path).expanduser())
    raise InputError(
        f"--peer: expected llama.cpp=PATH, ik_llama.cpp=PATH, dllama=PATH or mlx-lm, got {text!r}",
        "peer",
    )


def _find_program(location: Path, name: str) -> Path:
    """`location` itself, or the program of that name in the folder or its usual places."""
    candidates = [location] if location.name == name else []
    candidates += [location / name, location / "bin" / name, location / "build" / "bin" / name]
    for path in (*candidates, location.parent / name):
        if path.is_file() and os.access(path, os.X_OK):
            return path.resolve()
    raise InputError(
        f"--peer: expected the program {name} at {location} or in that folder, found none", "peer"
    )


# ---- llama.cpp and ik_llama.cpp


@dataclass(frozen=True)
class LlamaMode:
    """Options of one way to run it, of llama-bench and of llama-batched-bench."""

    name: str
    bench: tuple[str, ...]
    batched: tuple[str, ...]


class LlamaCpp(Peer):
    """llama.cpp by its own llama-bench: one process, and over ggml-rpc-server for several nodes.

    One process runs in every mode; several requests are measured by llama-batched-bench, where
    that is in the same folder.

    Args:
        location: the folder of its programs, or llama-bench.
    """

    name = "llama.cpp"
    rpc_server: str | None = "ggml-rpc-server"
    modes: tuple[LlamaMode, ...] = (
        LlamaMode("flash attention", ("-fa", "1"), ("-fa", "on")),
        LlamaMode("no flash attention", ("-fa", "0"), ("-fa", "off")),
    )

    def __init__(self, location: Path) -> None:
        self._bench = _find_program(location, "llama-bench")
        self._location = location
        try:
            self._batched: Path | None = _find_program(location, "llama-batched-bench")
        except InputError:
            self._batched = None

    def variants(self, workload: PeerWorkload) -> list[PeerVariant]:
        """One process with all threads in each mode; with several nodes also a server for each."""
        threads = workload.nodes * workload.threads
        model = cached_model(workload, "gguf", formats.write_gguf)
        name = f"{self.name}, {_count(threads, 'thread')}"
        variants = [
            PeerVariant(
                f"{name}, {mode.name}",
                partial(self._run_mode, workload, model, threads, mode),
                name,
            )
            for mode in self.modes
        ]
        if workload.nodes > 1 and self.rpc_server is not None:
            server = _find_program(self._location, self.rpc_server)
            variants.append(
                PeerVariant(
                    f"{self.name}, {_count(workload.nodes, 'RPC server')}",
                    lambda: self._over_rpc(workload, model, server),
                )
            )
        return variants

    def _over_rpc(self, workload: PeerWorkload, model: Path, server: Path) -> PeerSpeed:
        ports = net.free_ports(workload.nodes)
        commands = [
            [str(server), "-H", "127.0.0.1", "-p", str(port), "-t", str(workload.threads)]
            for port in ports
        ]
        with _servers(commands, workload.cores, ports):
            hosts = ",".join(f"127.0.0.1:{p}" for p in ports)
            return self._measure(workload, model, ["--rpc", hosts, "-ngl", "99", "-t", "1"])

    def _run_mode(
        self, workload: PeerWorkload, model: Path, threads: int, mode: LlamaMode
    ) -> PeerSpeed:
        local = ["-t", str(threads), "-ngl", "0"]
        speed = self._measure(workload, model, [*local, *mode.bench])
        if self._batched is None or not workload.concurrency:
            return speed
        return replace(speed, concurrency=self._measure_requests(workload, model, local, mode))

    def _measure(self, workload: PeerWorkload, model: Path, options: list[str]) -> PeerSpeed:
        base = [str(self._bench), "-m", str(model), *options, "-r", "1", "-o", "json"]
        decode = self._run([*base, *self._decoding(workload)], workload)
        prefill = self._run([*base, "-p", str(workload.prompt_tokens), "-n", "0"], workload)
        return PeerSpeed(decode, prefill)

    def _decoding(self, workload: PeerWorkload) -> list[str]:
        return ["-p", "0", "-n", str(workload.tokens), "-d", str(workload.context)]

    def _run(self, command: list[str], workload: PeerWorkload) -> float:
        text = run_program(command, workload.all_cores, workload.timeout_s)
        match = re.search(r'"avg_ts":\s*([0-9.]+)', text)
        if match is None:
            raise PeerFailed(f"llama-bench printed no speed: {_tail(text)}")
        return float(match[1])

    def _measure_requests(
        self, workload: PeerWorkload, model: Path, local: list[str], mode: LlamaMode
    ) -> dict[int, float]:
        longest = max(workload.concurrency) * (workload.context + workload.tokens)
        options = ["-c", str(longest + 64), "-b", "512", "-ub", "512", *mode.batched]
        counts = ",".join(map(str, workload.concurrency))
        cells = ["-npp", str(workload.context), "-ntg", str(workload.tokens), "-npl", counts]
        command = [str(self._batched), "-m", str(model), *local, *options, *cells]
        text = run_program(command, workload.all_cores, workload.timeout_s)
        # | PP | TG | B | N_KV | T_PP s | S_PP t/s | T_TG s | S_TG t/s | T s | S t/s |
        rows = [line.split("|")[1:-1] for line in text.splitlines() if line.count("|") == 11]
        times_s = {int(row[2]): float(row[8]) for row in rows if row[2].strip().isdigit()}
        if missing := set(workload.concurrency) - times_s.keys():
            raise PeerFailed(
                f"llama-batched-bench printed no time for {min(missing)} requests: {_tail(text)}"
            )
        return {n: n * workload.tokens / times_s[n] for n in workload.concurrency}


class IkLlamaCpp(LlamaCpp):
    """ik_llama.cpp, with fused experts and weights repacked when it starts.

    Its llama-batched-bench gives token 0 to all requests, so that they choose the same experts.

    Args:
        location: the folder of its programs, or llama-bench.
    """

    name = "ik_llama.cpp"
    rpc_server = None
    modes = (
        LlamaMode(
            "flash attention",
            ("-rtr", "1", "-fmoe", "1", "-fa", "1"),
            ("-rtr", "-fa", "on"),
        ),
        LlamaMode(
            "flash attention, q8_0 cache",
            ("-rtr", "1", "-fmoe", "1", "-fa", "1", "-ctk", "q8_0", "-ctv", "q8_0"),
            ("-rtr", "-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"),
        ),
        LlamaMode(
            "no flash attention",
            ("-rtr", "1", "-fmoe", "1", "-fa", "0"),
            ("-rtr", "-fa", "off"),
        ),
    )

    def _decoding(self, workload: PeerWorkload) -> list[str]:
        return ["-p", "0", "-n", "0", "-gp", f"{workload.context},{workload.tokens}"]


# ---- distributed-llama


class Dllama(Peer):
    """distributed-llama: a root and its workers, each with its own cores.

    Its own times are used, which leave out sampling. The prompt that it times has `context` + 1
    tokens, processed 32 at a time as by default.

    Args:
        location: its program, or the folder of it.
    """

    def __init__(self, location: Path) -> None:
        self._program = _find_program(location, "dllama")

    def variants(self, workload: PeerWorkload) -> list[PeerVariant]:
        """As many nodes as ours."""
        model = cached_model(workload, "m", formats.write_dllama)
        vocabulary = formats.read_shape(workload.config).vocabulary
        tokenizer = model.with_suffix(".t")
        if not tokenizer.exists():
            formats.write_dllama_tokenizer(tokenizer, vocabulary)
        return [
            PeerVariant(
                f"distributed-llama, {_count(workload.nodes, 'node')}",
                lambda: self._measure(workload, model, tokenizer),
            )
        ]

    def _measure(self, workload: PeerWorkload, model: Path, tokenizer: Path) -> PeerSpeed:
        ports = net.free_ports(workload.nodes - 1)
        threads = ["--nthreads", str(workload.threads)]
        workers = [
            [str(self._program), "worker", "--host", "127.0.0.1", "--port", str(p), *threads]
            for p in ports
        ]
        # No probing: a worker takes the first connection for its root.
        with _servers(workers, workload.cores[1:], []):
            time.sleep(0.5)
            files = ["--model", str(model), "--tokenizer", str(tokenizer)]
            length = workload.context + 1  # bytes, each one token of the tokenizer written here
            root = [str(self._program), "inference", *files, "--prompt", "a" * length, *threads]
            root += [
                "--steps",
                str(workload.context + workload.tokens),
                "--buffer-float-type",
                "q80",
            ]
            root += [
                "--max-seq-len",
                str(workload.context + workload.tokens + 64),
                "--temperature",
                "0",
            ]
            if ports:
                root += ["--workers", *(f"127.0.0.1:{p}" for p in ports)]
            text = run_program(root, workload.cores[0], workload.timeout_s)
        speeds = re.findall(r"tokens/s:\s*([0-9.]+)", text)
        if len(speeds) != 2:
            raise PeerFailed(f"dllama printed no speeds: {_tail(text)}")
        return PeerSpeed(float(speeds[1]), float(speeds[0]))


# ---- mlx-lm


class MlxLm(Peer):
    """mlx-lm itself, alone or tensor-parallel over MLX's ring, in processes of their own."""

    def variants(self, workload: PeerWorkload) -> list[PeerVariant]:
        """As many ranks as ours."""
        ranks = f", {workload.nodes} ranks" if workload.nodes > 1 else ""
        return [PeerVariant(f"mlx-lm{ranks}", lambda: self._measure(workload))]

    def _measure(self, workload: PeerWorkload) -> PeerSpeed:
        order = {
            "folder": str(workload.folder),
            "nodes": workload.nodes,
            "context": workload.context,
            "tokens": workload.tokens,
            "prompt_tokens": workload.prompt_tokens,
            "budget_s": workload.timeout_s / 4,
        }
        worker = "cenacle.bench.peers.mlx_lm_worker"
        command = [sys.executable, "-m", worker, json.dumps(order)]
        with tempfile.TemporaryDirectory(prefix="cenacle-") as folder:
            hosts = Path(folder) / "hosts.json"
            hosts.write_text(
                json.dumps([[f"127.0.0.1:{p}"] for p in net.free_ports(workload.nodes)])
            )
            env = {"MLX_HOSTFILE": str(hosts)}
            others = [command] * (workload.nodes - 1)
            envs = [{**env, "MLX_RANK": str(r + 1)} for r in range(workload.nodes - 1)]
            with _servers(others, workload.cores[1:], [], envs):
                text = run_program(
                    command, workload.cores[0], workload.timeout_s, {**env, "MLX_RANK": "0"}
                )
        try:
            answer = json.loads(text.strip().splitlines()[-1])
            return PeerSpeed(answer["decode"], answer["prefill"])
        except (ValueError, LookupError, TypeError) as error:
            raise PeerFailed(f"mlx-lm printed no speed: {_tail(text)}") from error


# ---- processes and files


def cached_model(
    workload: PeerWorkload, suffix: str, write: Callable[[dict[str, Any], Path], None]
) -> Path:
    """The model in a peer's format, written on first use; moved into place when complete."""
    shape = formats.read_shape(workload.config)
    digest = hashlib.sha256(repr(shape).encode()).hexdigest()[:12]
    path = workload.cache_dir / f"{shape.kind}-{digest}.{suffix}"
    if not path.exists():
        workload.cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=workload.cache_dir) as folder:
            incomplete = Path(folder) / path.name
            write(workload.config, incomplete)
            incomplete.rename(path)
    return path


def run_program(
    command: Sequence[str],
    cores: Sequence[int],
    timeout_s: float,
    env: dict[str, str] | None = None,
) -> str:
    """Run a program on `cores` only.

    Returns:
        Its output.

    Raises:
        PeerFailed: it could not be started, failed, or took too long.
    """
    out: IO[str]
    with tempfile.TemporaryFile("w+") as out:
        process = _start(command, cores, out, env)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise PeerFailed(
                f"{Path(command[0]).name} was not done within {timeout_s:g} s: {_tail(_read(out))}"
            ) from None
        finally:
            _kill(process)
        text = _read(out)
    if status:
        name = Path(command[0]).name
        raise PeerFailed(f"{name} ended with status {status}: {_tail(text)}")
    return text


@contextmanager
def _servers(
    commands: Sequence[Sequence[str]],
    cores: Sequence[Sequence[int]],
    ports: Sequence[int],
    envs: Sequence[dict[str, str]] | None = None,
) -> Iterator[None]:
    """Run programs beside the measured one; waits until they listen on `ports`."""
    running: list[tuple[subprocess.Popen[str], IO[str]]] = []
    try:
        for i, command in enumerate(commands):
            out: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
            running.append((_start(command, cores[i], out, envs[i] if envs else None), out))
        ends = time.monotonic() + START_TIMEOUT_S
        for i, port in enumerate(ports):
            process, out = running[i]
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > ends:
                    name = Path(commands[i][0]).name
                    raise PeerFailed(f"{name} did not listen: {_tail(_read(out))}")
                time.sleep(0.05)
        try:
            yield
        except PeerFailed as error:
            outputs = " | ".join(_tail(_read(out)) for _, out in running)
            raise PeerFailed(f"{error}; output of its others: {outputs or 'none'}") from error
    finally:
        for process, out in running:
            _kill(process)
            out.close()


def _start(
    command: Sequence[str], cores: Sequence[int], out: IO[str], env: dict[str, str] | None
) -> subprocess.Popen[str]:
    pin = shutil.which("taskset")  # Linux; elsewhere the system decides
    pinned = [pin, "-c", ",".join(map(str, cores)), *command] if pin and cores else list(command)
    try:
        return subprocess.Popen(
            pinned,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    except OSError as error:
        raise PeerFailed(f"{command[0]} could not be started: {error}") from error


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill a program and what it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, 9)
    process.wait(10)


def _read(out: IO[str]) -> str:
    out.seek(0)
    return out.read()


def _tail(text: str) -> str:
    lines = " / ".join(line.strip() for line in text.strip().splitlines() if line.strip())
    return lines[-REPORTED_CHARACTERS:] or "it printed nothing"


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex(("127.0.0.1", port)) == 0


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' if n != 1 else ''}"
