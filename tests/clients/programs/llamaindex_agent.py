"""LlamaIndex: an agent with a tool, a stream, a structured answer."""

import asyncio
import sys
from typing import Literal

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, ConfigDict


class Person(BaseModel):
    """A person."""

    # In an open schema a model that cannot write its script adds fields without end.
    model_config = ConfigDict(extra="forbid")
    name: Literal["Ada"]
    age: Literal[36]


def get_weather(city: str) -> str:
    """Weather in a city."""
    return f"sunny in {city}"


llm = OpenAILike(
    model="scripted",
    api_base=f"{sys.argv[1]}/v1",
    api_key="local",
    is_chat_model=True,
    is_function_calling_model=True,
    context_window=32768,
)


async def run_agent() -> str:
    agent = FunctionAgent(tools=[get_weather], llm=llm)
    return str(await agent.run("play:weather in Paris?"))


assert asyncio.run(run_agent()) == "It is sunny in Paris."
chunks = llm.stream_chat([ChatMessage("play:weather in Paris?")])
assert "".join(chunk.delta or "" for chunk in chunks) == "It is sunny in Paris."
person = llm.as_structured_llm(Person).chat([ChatMessage("play:Person")]).raw
assert person == Person(name="Ada", age=36), person
