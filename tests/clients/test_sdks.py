"""Libraries: each program of `programs/` asserts what it got."""

from collections.abc import Callable
from pathlib import Path

from .conftest import Client

Install = Callable[..., Path]


def test_openai(client: Client, pypi: Install) -> None:
    client.program(pypi("openai"), "openai_sdk.py")
    client.check("/v1/responses", at_least=3)


def test_anthropic(client: Client, pypi: Install) -> None:
    client.program(pypi("anthropic"), "anthropic_sdk.py")
    client.check("/v1/messages", at_least=6)


def test_langchain(client: Client, pypi: Install) -> None:
    python = pypi("langchain", "langchain-openai", "langchain-anthropic", "langgraph")
    client.program(python, "langchain_agent.py")
    client.check("/v1/chat/completions")


def test_llamaindex(client: Client, pypi: Install) -> None:
    python = pypi("llama-index-core", "llama-index-llms-openai-like")
    client.program(python, "llamaindex_agent.py")
    client.check("/v1/chat/completions")


def test_pydantic_ai(client: Client, pypi: Install) -> None:
    client.program(pypi("pydantic-ai-slim[openai,anthropic]"), "pydantic_ai_agent.py")
    client.check("/v1/responses")


def test_instructor(client: Client, pypi: Install) -> None:
    client.program(pypi("instructor", "anthropic"), "instructor_client.py")
    client.check("/v1/chat/completions")


def test_openai_agents(client: Client, pypi: Install) -> None:
    client.program(pypi("openai-agents"), "openai_agents.py")
    client.check("/v1/responses")


def test_smolagents(client: Client, pypi: Install) -> None:
    client.program(pypi("smolagents[openai]"), "smolagents_agent.py")
    client.check("/v1/chat/completions")


def test_litellm(client: Client, pypi: Install) -> None:
    client.program(pypi("litellm[proxy]"), "litellm_sdk.py")
    client.check("/v1/chat/completions")


def test_node(client: Client, npm: Install) -> None:
    """openai, anthropic and Vercel's AI SDK."""
    packages = ("openai", "@anthropic-ai/sdk", "ai", "@ai-sdk/openai", "@ai-sdk/anthropic")
    programs = npm(*packages, "@ai-sdk/openai-compatible", "zod")
    client.run(
        "node", Path(__file__).parent / "programs" / "sdk.mjs", client.url, programs.parents[1]
    )
    client.check("/v1/responses")
