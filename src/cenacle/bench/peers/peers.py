"""Other programs on the same shape, cores and threads.

Owns: starting a peer's own benchmark or program, reading its numbers, and what went wrong if there
are none.
Does not know: our ranks. Peers are given by the user; nothing is fetched or built here.
Invariant: every process has a deadline and none is left behind; all listen on the loopback only; a
peer that fails is a `PeerFailed` with the end of what it printed, never a missing row.
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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ... import net
from ...errors import InputError
from . import formats

NAMES = ("llama.cpp", "dllama", "mlx-lm")
START_S = 30.0  # a server must listen by then
TAIL = 600  # characters of a failed peer's output that are reported


class PeerFailed(Exception):
    """A peer gave no number: why, and the end of what it printed."""


@dataclass(frozen=True)
class PeerWorkload:
    """What is measured.

    Args:
        folder: our checkpoint.
        config: its config.json.
        nodes, threads: ours; a peer is given as many processes and threads.
        cores: the cores of each node.
        context: tokens before the first decoded one.
        tokens: to decode.
        prompt: tokens of the prompt whose processing is timed.
        cache: folder for models in peers' formats, reused when it has one of this shape.
        deadline_s: longest that one process of a peer may take.
    """

    folder: Path
    config: dict[str, Any]
    nodes: int
    threads: int
    cores: Sequence[Sequence[int]]
    context: int
    tokens: int
    prompt: int
    cache: Path
    deadline_s: float

    @property
    def all_cores(self) -> list[int]:
        """The cores of all nodes."""
        return sorted({c for cores in self.cores for c in cores})


@dataclass(frozen=True)
class PeerSpeed:
    """Tokens per second."""

    decode: float
    prefill: float


@dataclass(frozen=True)
class PeerVariant:
    """One way to run a peer: its name for the table, and how."""

    name: str
    run: Callable[[], PeerSpeed]


class Peer(ABC):
    """A program to compare with."""

    @abstractmethod
    def setups(self, job: PeerWorkload) -> list[PeerVariant]:
        """The ways to run it that use as many cores as ours.

        Raises:
            InputError: it cannot run this shape.
        """


def parse_peer(text: str) -> Peer:
    """A peer from the command line: "llama.cpp=PATH", "dllama=PATH" or "mlx-lm".

    Raises:
        InputError: an unknown name, or a program that is not there.
    """
    name, _, path = text.partition("=")
    if name == "mlx-lm" and not path:
        return MlxLm()
    if name == "llama.cpp" and path:
        return LlamaCpp(Path(path).expanduser())
    if name == "dllama" and path:
        return Dllama(Path(path).expanduser())
    raise InputError(
        f"--peer: expected llama.cpp=PATH, dllama=PATH or mlx-lm, got {text!r}", "peer"
    )


def _binary(where: Path, name: str) -> Path:
    """`where` itself, or the program of that name in the folder or its usual places."""
    tried = [where] if where.name == name else []
    tried += [where / name, where / "bin" / name, where / "build" / "bin" / name]
    tried += [where.parent / name]
    for path in tried:
        if path.is_file() and os.access(path, os.X_OK):
            return path.resolve()
    raise InputError(
        f"--peer: expected the program {name} at {where} or in that folder, found none", "peer"
    )


# ---- llama.cpp


class LlamaCpp(Peer):
    """llama.cpp by its own llama-bench: one process, and over ggml-rpc-server for several nodes.

    Args:
        where: the folder of its programs, or llama-bench.
    """

    def __init__(self, where: Path) -> None:
        self._bench = _binary(where, "llama-bench")
        self._where = where

    def setups(self, job: PeerWorkload) -> list[PeerVariant]:
        """One process with all threads; with several nodes also one server for each."""
        threads = job.nodes * job.threads
        model = cached_model(job, "gguf", formats.write_gguf)
        local = ["-t", str(threads), "-ngl", "0"]
        found = [
            PeerVariant(
                f"llama.cpp, {_count(threads, 'thread')}",
                lambda: self._measure(job, model, local),
            )
        ]
        if job.nodes > 1:
            server = _binary(self._where, "ggml-rpc-server")
            found.append(
                PeerVariant(
                    f"llama.cpp, {_count(job.nodes, 'RPC server')}",
                    lambda: self._over_rpc(job, model, server),
                )
            )
        return found

    def _over_rpc(self, job: PeerWorkload, model: Path, server: Path) -> PeerSpeed:
        ports = net.free_ports(job.nodes)
        commands = [
            [str(server), "-H", "127.0.0.1", "-p", str(port), "-t", str(job.threads)]
            for port in ports
        ]
        with _servers(commands, job.cores, ports):
            hosts = ",".join(f"127.0.0.1:{p}" for p in ports)
            return self._measure(job, model, ["--rpc", hosts, "-ngl", "99", "-t", "1"])

    def _measure(self, job: PeerWorkload, model: Path, how: list[str]) -> PeerSpeed:
        base = [str(self._bench), "-m", str(model), *how, "-r", "1", "-o", "json"]
        ask = ["-p", "0", "-n", str(job.tokens), "-d", str(job.context)]
        decode = self._one([*base, *ask], job)
        prefill = self._one([*base, "-p", str(job.prompt), "-n", "0"], job)
        return PeerSpeed(decode, prefill)

    def _one(self, command: list[str], job: PeerWorkload) -> float:
        text = run(command, job.all_cores, job.deadline_s)
        found = re.search(r'"avg_ts":\s*([0-9.]+)', text)
        if found is None:
            raise PeerFailed(f"llama-bench printed no speed: {_tail(text)}")
        return float(found[1])


# ---- distributed-llama


class Dllama(Peer):
    """distributed-llama: a root and its workers, each with its own cores.

    Its own clock is taken, which leaves out sampling. It has one number per run: the prompt's
    processing is that of `context` + 1 tokens, 32 at a time as by default.

    Args:
        where: its program, or the folder of that.
    """

    def __init__(self, where: Path) -> None:
        self._program = _binary(where, "dllama")

    def setups(self, job: PeerWorkload) -> list[PeerVariant]:
        """As many nodes as ours."""
        model = cached_model(job, "m", formats.write_dllama)
        vocabulary = formats.read_shape(job.config).vocabulary
        tokenizer = model.with_suffix(".t")
        if not tokenizer.exists():
            formats.write_dllama_tokenizer(tokenizer, vocabulary)
        return [
            PeerVariant(
                f"distributed-llama, {_count(job.nodes, 'node')}",
                lambda: self._measure(job, model, tokenizer),
            )
        ]

    def _measure(self, job: PeerWorkload, model: Path, tokenizer: Path) -> PeerSpeed:
        ports = net.free_ports(job.nodes - 1)
        threads = ["--nthreads", str(job.threads)]
        workers = [
            [str(self._program), "worker", "--host", "127.0.0.1", "--port", str(p), *threads]
            for p in ports
        ]
        # No probing: a worker takes the first connection for its root.
        with _servers(workers, job.cores[1:], []):
            time.sleep(0.5)
            files = ["--model", str(model), "--tokenizer", str(tokenizer)]
            length = job.context + 1  # of bytes: a token each in the tokenizer that we wrote
            root = [str(self._program), "inference", *files, "--prompt", "a" * length, *threads]
            root += ["--steps", str(job.context + job.tokens), "--buffer-float-type", "q80"]
            root += ["--max-seq-len", str(job.context + job.tokens + 64), "--temperature", "0"]
            if ports:
                root += ["--workers", *(f"127.0.0.1:{p}" for p in ports)]
            text = run(root, job.cores[0], job.deadline_s)
        speeds = re.findall(r"tokens/s:\s*([0-9.]+)", text)
        if len(speeds) != 2:
            raise PeerFailed(f"dllama printed no speeds: {_tail(text)}")
        return PeerSpeed(float(speeds[1]), float(speeds[0]))


# ---- mlx-lm


class MlxLm(Peer):
    """mlx-lm itself, alone or tensor-parallel over MLX's ring, in processes of their own."""

    def setups(self, job: PeerWorkload) -> list[PeerVariant]:
        """As many ranks as ours."""
        how = f", {job.nodes} ranks" if job.nodes > 1 else ""
        return [PeerVariant(f"mlx-lm{how}", lambda: self._measure(job))]

    def _measure(self, job: PeerWorkload) -> PeerSpeed:
        order = {
            "folder": str(job.folder),
            "nodes": job.nodes,
            "context": job.context,
            "tokens": job.tokens,
            "prompt": job.prompt,
            "budget_s": job.deadline_s / 4,
        }
        command = [
            sys.executable,
            "-m",
            "cenacle.bench.peers.mlx_lm_worker",
            json.dumps(order),
        ]
        with tempfile.TemporaryDirectory(prefix="cenacle-") as folder:
            hosts = Path(folder) / "hosts.json"
            hosts.write_text(json.dumps([[f"127.0.0.1:{p}"] for p in net.free_ports(job.nodes)]))
            env = {"MLX_HOSTFILE": str(hosts)}
            others = [[*command] for _ in range(job.nodes - 1)]
            envs = [{**env, "MLX_RANK": str(r + 1)} for r in range(job.nodes - 1)]
            with _servers(others, job.cores[1:], [], envs):
                text = run(command, job.cores[0], job.deadline_s, {**env, "MLX_RANK": "0"})
        try:
            answer = json.loads(text.strip().splitlines()[-1])
            return PeerSpeed(answer["decode"], answer["prefill"])
        except (ValueError, LookupError, TypeError) as error:
            raise PeerFailed(f"mlx-lm printed no speed: {_tail(text)}") from error


# ---- processes and files


def cached_model(
    job: PeerWorkload, suffix: str, write: Callable[[dict[str, Any], Path], None]
) -> Path:
    """The model in a peer's format, written on first use; moved into place when it is whole."""
    shape = formats.read_shape(job.config)
    digest = hashlib.sha256(repr(shape).encode()).hexdigest()[:12]
    path = job.cache / f"{shape.kind}-{digest}.{suffix}"
    if not path.exists():
        job.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=job.cache) as folder:
            part = Path(folder) / path.name
            write(job.config, part)
            part.rename(path)
    return path


def run(
    command: Sequence[str],
    cores: Sequence[int],
    deadline_s: float,
    env: dict[str, str] | None = None,
) -> str:
    """A program's standard output; it runs on `cores` only.

    Raises:
        PeerFailed: it could not be started, failed, or was not done in time.
    """
    out: IO[str]
    with tempfile.TemporaryFile("w+") as out:
        process = _start(command, cores, out, env)
        try:
            status = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise PeerFailed(
                f"{Path(command[0]).name} was not done within {deadline_s:g} s: {_tail(_read(out))}"
            ) from None
        finally:
            _end(process)
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
    """Programs that run beside the measured one; waits until `ports` are listened on."""
    running: list[tuple[subprocess.Popen[str], IO[str]]] = []
    try:
        for i, command in enumerate(commands):
            out: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
            running.append((_start(command, cores[i], out, envs[i] if envs else None), out))
        ends = time.monotonic() + START_S
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
            said = " | ".join(_tail(_read(out)) for _, out in running)
            raise PeerFailed(f"{error}; its others said: {said or 'nothing'}") from error
    finally:
        for process, out in running:
            _end(process)
            out.close()


def _start(
    command: Sequence[str], cores: Sequence[int], out: IO[str], env: dict[str, str] | None
) -> subprocess.Popen[str]:
    pin = shutil.which("taskset")  # Linux; elsewhere the system decides
    whole = [pin, "-c", ",".join(map(str, cores)), *command] if pin and cores else list(command)
    try:
        return subprocess.Popen(
            whole,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    except OSError as error:
        raise PeerFailed(f"{command[0]} could not be started: {error}") from error


def _end(process: subprocess.Popen[str]) -> None:
    """End a program and what it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, 9)
    process.wait(10)


def _read(out: IO[str]) -> str:
    out.seek(0)
    return out.read()


def _tail(text: str) -> str:
    lines = " / ".join(line.strip() for line in text.strip().splitlines() if line.strip())
    return lines[-TAIL:] or "it printed nothing"


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex(("127.0.0.1", port)) == 0


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n != 1 else ''}"
