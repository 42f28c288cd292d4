"""Coding agents: each edits a file in a folder."""

import json
from collections.abc import Callable
from pathlib import Path

from .conftest import Client

Install = Callable[..., Path]


def check_file(client: Client, name: str) -> None:
    assert (client.folder / "hello.txt").read_text() == f"hello from {name}\n"


def test_codex(client: Client, npm: Install) -> None:
    (client.home / "config.toml").write_text(f"""\
model = "scripted"
model_provider = "cenacle"
[model_providers.cenacle]
name = "Cenacle"
base_url = "{client.url}/v1"
wire_api = "responses"
""")
    program = npm("@openai/codex") / "codex"
    options = ("--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox")
    output = client.run(
        program, "exec", *options, "play:codex: write hello.txt", CODEX_HOME=str(client.home)
    )
    check_file(client, "codex")
    assert "The file is written for codex." in output
    assert "tool_call" not in output
    client.check("/v1/responses", at_least=2)


def test_claude(client: Client, npm: Install) -> None:
    output = client.run(
        npm("@anthropic-ai/claude-code") / "claude",
        *("-p", "play:claude: write hello.txt", "--permission-mode", "acceptEdits"),
        ANTHROPIC_BASE_URL=client.url,
        ANTHROPIC_MODEL="scripted",
    )
    check_file(client, "claude")
    assert output.strip() == "The file is written for claude."
    client.check("/v1/messages", at_least=2)


def test_opencode(client: Client, npm: Install) -> None:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "Cenacle",
        "options": {"baseURL": f"{client.url}/v1", "apiKey": "local"},
        "models": {"scripted": {"name": "scripted"}},
    }
    config = {"provider": {"cenacle": provider}, "share": "disabled", "autoupdate": False}
    (client.folder / "opencode.json").write_text(json.dumps(config))
    program = npm("opencode-ai") / "opencode"
    output = client.run(program, "run", "-m", "cenacle/scripted", "play:opencode: write hello.txt")
    check_file(client, "opencode")
    assert "The file is written for opencode." in output
    client.check("/v1/chat/completions", at_least=2)


def test_qwen(client: Client, npm: Install) -> None:
    options = ("--auth-type", "openai", "--approval-mode", "yolo")
    output = client.run(
        npm("@qwen-code/qwen-code") / "qwen",
        *("-p", "play:qwen: write hello.txt", *options),
        OPENAI_BASE_URL=f"{client.url}/v1",
        OPENAI_MODEL="scripted",
    )
    check_file(client, "qwen")
    assert "The file is written for qwen." in output
    client.check("/v1/chat/completions", at_least=2)


def test_continue(client: Client, npm: Install) -> None:
    config = client.home / "config.yaml"
    config.write_text(f"""\
name: Cenacle
version: 1.0.0
schema: v1
models:
  - name: scripted
    provider: openai
    model: scripted
    apiBase: {client.url}/v1
    apiKey: local
    capabilities: [tool_use]
""")
    program = npm("@continuedev/cli") / "cn"
    output = client.run(
        program, "-p", "--auto", "--config", config, "play:continue: write hello.txt"
    )
    check_file(client, "continue")
    assert "The file is written for continue." in output
    client.check("/v1/chat/completions", at_least=2)


def test_aider(client: Client, pypi: Install) -> None:
    (client.folder / "hello.txt").write_text("nothing\n")
    options = ("--no-git", "--yes-always", "--no-check-update", "--no-analytics", "--no-stream")
    output = client.run(
        pypi("aider-chat") / "bin" / "aider",
        *(*options, "--no-show-model-warnings", "--edit-format", "whole"),
        *("--model", "openai/scripted", "--message", "play:aider: write hello.txt", "hello.txt"),
        OPENAI_API_BASE=f"{client.url}/v1",
    )
    check_file(client, "aider")
    assert "Applied edit" in output
    client.check("/v1/chat/completions")
