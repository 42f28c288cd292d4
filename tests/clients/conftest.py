"""Real clients, installed from npm and PyPI outside the repository, against two nodes.

A client that cannot be installed is skipped with the installer's words. What is installed stays in
`$CENACLE_CLIENTS` (`~/.cache/cenacle-clients`); delete it to get the versions of the day.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support.recording_proxy import RecordingProxy, recording_proxy
from support.scripted_checkpoint import Script, write_scripted_checkpoint
from support.serving import RunningServer, running_server

CACHE = Path(os.environ.get("CENACLE_CLIENTS") or Path.home() / ".cache" / "cenacle-clients")
PROGRAMS = Path(__file__).parent / "programs"
INSTALL_S, RUN_S = 1800, 600
# Nothing is told to or asked of anybody but the server.
QUIET = {
    "DO_NOT_TRACK": "1",
    "DISABLE_TELEMETRY": "1",
    "DISABLE_AUTOUPDATER": "1",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
    "OPENCODE_DISABLE_AUTOUPDATE": "1",
    "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
    "CONTINUE_TELEMETRY_ENABLED": "0",
    "PROMPTFOO_DISABLE_TELEMETRY": "1",
    "PROMPTFOO_DISABLE_UPDATE": "1",
    "PROMPTFOO_DISABLE_REMOTE_GENERATION": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "ANONYMIZED_TELEMETRY": "False",
    "HF_HUB_OFFLINE": "1",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
KEPT_VARIABLES = ("PATH", "LANG", "TERM", "SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS")


def _scripts(folder: Path) -> list[Script]:
    def file(name: str) -> str:
        return str(folder / name / "hello.txt")

    weather, person = {"city": "Paris"}, {"name": "Ada", "age": 36}
    command = "printf 'hello from codex\\n' > hello.txt"
    return [
        Script("play:codex", "The file is written for codex.", "exec_command", {"cmd": command}),
        *(
            Script(
                f"play:{name}",
                f"The file is written for {name}.",
                tool,
                {path: file(name), "content": f"hello from {name}\n"},
            )
            for name, tool, path in (
                ("claude", "Write", "file_path"),
                ("opencode", "write", "filePath"),
                ("qwen", "write_file", "file_path"),
                ("continue", "Write", "filepath"),
            )
        ),
        Script("play:aider", "hello.txt\n```\nhello from aider\n```"),
        Script("play:weather", "It is sunny in Paris.", "get_weather", weather),
        Script("play:person", '{"name": "Ada", "age": 36}', thinks=False),
        Script("play:Person", "Ada has been stored.", "Person", person),
        Script("play:final_result", "This was the final result.", "final_result", person),
        Script("play:code", "<code>\nfinal_answer(get_weather('Paris'))\n</code>", thinks=False),
    ]


@pytest.fixture(scope="session")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where agents work, each in a folder of its own name."""
    return tmp_path_factory.mktemp("workspaces")


@pytest.fixture(scope="session")
def model(workspaces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that plays the clients' scripts."""
    folder = tmp_path_factory.mktemp("model")
    return write_scripted_checkpoint(folder / "scripted", _scripts(workspaces))


@pytest.fixture(scope="session")
def server(
    model: Path, config_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("server")
    with running_server(folder, "--served-model-name", "*", model=model, nodes=2) as server:
        yield server


@dataclass
class Client:
    """Runs a client as its users do; `proxy` has what it sent."""

    proxy: RecordingProxy
    home: Path
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.proxy.url

    def run(self, *command: str | Path, timeout_s: float = RUN_S, **variables: str) -> str:
        """What it printed. Fails if it fails."""
        kept = {k: os.environ[k] for k in KEPT_VARIABLES if k in os.environ}
        loopback = {"NO_PROXY": "127.0.0.1,localhost", "HOME": str(self.home)}
        keys = {"OPENAI_API_KEY": "local", "ANTHROPIC_API_KEY": "local"}
        result = subprocess.run(
            [str(part) for part in command],
            cwd=self.folder,
            env=kept | QUIET | loopback | keys | self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        assert result.returncode == 0, f"{result.stdout[-6000:]}\n{self.failures()}"
        return result.stdout

    def program(self, python: Path, name: str, *arguments: str) -> str:
        """Runs one of `programs/` with the server's address."""
        return self.run(python / "bin" / "python", PROGRAMS / name, self.url, *arguments)

    def failures(self) -> list[Any]:
        return [r for r in self.proxy.requests if r.get("status", 500) >= 400]

    def check(self, path: str, *, at_least: int = 1) -> None:
        """Everything was answered, and the client used `path`."""
        posts = [r for r in self.proxy.requests if r["method"] == "POST"]
        # By this error a client learns to send the whole conversation.
        refused = [r for r in posts if r.get("status", 500) >= 400]
        assert [r for r in refused if "thread_not_found" not in r.get("answer", "")] == []
        assert sum(path in r["path"] for r in posts) >= at_least, [r["path"] for r in posts]


@pytest.fixture
def client(
    server: RunningServer, workspaces: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Client]:
    """`server` behind a proxy; the folder is named as the test, without "test_"."""
    folder = workspaces / request.node.name.removeprefix("test_")
    folder.mkdir(exist_ok=True)
    with recording_proxy(server.url) as proxy:
        client = Client(proxy, tmp_path, folder)
        yield client
        if record := os.environ.get("CENACLE_RECORD"):  # a folder for what was sent
            _write_record(Path(record), request.node.name, proxy)


def _write_record(folder: Path, name: str, proxy: RecordingProxy) -> None:
    import json

    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(proxy.requests, indent=1))


def _install(folder: Path, *commands: list[str]) -> Path:
    """Install into `folder` unless it was; skip with the installer's words."""
    done = folder / "installed"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        environment = dict(os.environ)
        if "PIP_CERT" in environment:
            environment.setdefault("SSL_CERT_FILE", environment["PIP_CERT"])
        for command in commands:
            try:
                subprocess.run(
                    command,
                    cwd=folder,
                    env=environment,
                    check=True,
                    capture_output=True,
                    text=True,
                    timeout=INSTALL_S,
                )
            except (OSError, subprocess.SubprocessError) as error:
                words = getattr(error, "stderr", None) or str(error)
                pytest.skip(f"cannot be installed: {words[-400:]}")
        done.touch()
    return folder


@pytest.fixture(scope="session")
def npm() -> Callable[..., Path]:
    """Installs npm packages; the folder of their programs."""

    def install(*packages: str) -> Path:
        if shutil.which("npm") is None:
            pytest.skip("there is no npm")
        name = packages[0].replace("/", "+")
        command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", ".", *packages]
        return _install(CACHE / "npm" / name, command) / "node_modules" / ".bin"

    return install


@pytest.fixture(scope="session")
def pypi() -> Callable[..., Path]:
    """Installs PyPI packages into a virtual environment of their own; its folder."""

    def install(*packages: str) -> Path:
        uv = CACHE / "uv"
        make = [sys.executable, "-m", "venv", str(uv)]
        _install(uv, make, [str(uv / "bin" / "pip"), "install", "--quiet", "uv"])
        folder = CACHE / "pypi" / packages[0].partition("[")[0]
        program = str(uv / "bin" / "uv")
        options = ["--quiet", "--python", str(folder / "venv")]
        _install(
            folder,
            [program, "venv", "--quiet", "--python", sys.executable, "venv"],
            [program, "pip", "install", *options, *packages],
        )
        return folder / "venv"

    return install
